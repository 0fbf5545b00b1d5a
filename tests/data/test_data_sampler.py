"Who reads which batch: the same samples for every grid of ranks, and one reader in each tp group."

import re

import numpy as np
import pytest
import torch

from megatron_edu.comm import Ledger
from megatron_edu.config import BertConfig, GPT2Config
from megatron_edu.data.gpt2 import GPT2Samples
from megatron_edu.data.sampler import (
    BatchSampler,
    Field,
    batch_fields,
    bert_fields,
    broadcast_batch,
)
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.token_writer import TokenFileWriter
from megatron_edu.mesh import ParallelDims
from megatron_edu.models import GPT2
from megatron_edu.ranks import RankError
from megatron_edu.settings import RunConfig, TrainConfig
from megatron_edu.training.run import Data

VOCAB = 997


def token_fields(shape=(2, 4), vocab_size=10) -> dict[str, Field]:
    "What a GPT-2 of this vocabulary reads."
    return {"input_ids": Field(shape, vocab_size), "labels": Field(shape, vocab_size, True)}


def steps_of(num_samples, global_batch, micro_batch, dp, consumed=0) -> list[list[int]]:
    "Samples of each step, put together from all data-parallel ranks."
    sizes = num_samples, global_batch, micro_batch
    samplers = [BatchSampler(*sizes, rank, dp, consumed) for rank in range(dp)]
    lists = [list(sampler) for sampler in samplers]
    per_step = samplers[0].micro_batches
    steps = []
    for k in range(0, len(lists[0]), per_step):
        steps.append([i for batches in lists for batch in batches[k : k + per_step] for i in batch])
    return steps


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("dp", [1, 2, 3, 4])
def test_a_step_uses_the_same_samples_for_every_grid(dp, micro_batch):
    steps = steps_of(150, 72, micro_batch, dp)
    assert steps == [list(range(72)), list(range(72, 144))]


def test_sizes_of_what_is_handed_out():
    sampler = BatchSampler(100, 24, 3, dp_rank=1, dp_size=4)
    assert sampler.micro_batches == 2 and len(sampler) == 4 * 2
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [3] * 8
    assert batches[:2] == [[6, 7, 8], [9, 10, 11]]
    assert len(sampler) == 0 and list(sampler) == []


@pytest.mark.parametrize("stop", range(6))
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 2)])
def test_a_run_goes_on_on_any_grid(stop, before, after):
    first = BatchSampler(50, 8, 2, 0, before)
    stream = iter(first)
    for _ in range(stop * first.micro_batches):
        next(stream)
    state = first.state_dict()
    assert state == {"consumed": 8 * stop}
    for rank in range(after):
        sampler = BatchSampler(50, 8, 2, rank, after)
        sampler.load_state_dict(state)
        assert list(sampler) == list(BatchSampler(50, 8, 2, rank, after, consumed=8 * stop))
    rest = steps_of(50, 8, 2, after, consumed=8 * stop)
    assert rest == steps_of(50, 8, 2, 1)[stop:]


@pytest.mark.parametrize(
    ("num_samples", "consumed", "left"), [(8, 0, 4), (8, 8, 0), (15, 0, 4), (15, 8, 0), (55, 8, 20)]
)
def test_what_is_left_are_the_micro_batches_of_whole_steps(num_samples, consumed, left):
    sampler = BatchSampler(num_samples, 8, 2, consumed=consumed)
    assert len(sampler) == left == len(list(sampler))


def test_a_step_that_was_broken_off_is_repeated():
    sampler = BatchSampler(40, 8, 2)
    stream = iter(sampler)
    for _ in range(4 + 3):
        next(stream)
    assert sampler.state_dict() == {"consumed": 8}
    next(stream)
    assert sampler.state_dict() == {"consumed": 16}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1000, 50, 4, 0, 4), "global_batch 50 .* of 4 on 4 .* multiple of 16; use 48 or 64"),
        ((1000, 3, 4, 0, 1), "multiple of 4; use 4$"),
        ((10, 32, 4, 0, 1), "10 samples do not fill one global batch of 32"),
        ((100, 8, 0, 0, 1), "micro_batch 0"),
        ((100, 0, 1, 0, 1), "global_batch 0"),
        ((100, 8, 2, 2, 2), "rank 2 of 2"),
        ((100, 8, 2, -1, 2), "rank -1 of 2"),
        ((100, 8, 2, 0, 1, -8), "-8 samples are consumed, of 100"),
        ((100, 8, 2, 0, 1, 101), "101 samples are consumed, of 100"),
    ],
)
def test_sizes_that_cannot_work_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        BatchSampler(*sizes)


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> GPT2Samples:
    prefix = tmp_path_factory.mktemp("tokens") / "x"
    chance = np.random.default_rng(0)
    with TokenFileWriter(prefix, VOCAB) as writer:
        for size in chance.integers(1, 50, size=60):
            writer.append(chance.integers(0, VOCAB, size=size))
            writer.end_document()
    return GPT2Samples(TokenFile(prefix), seq_len=12, num_samples=200, seed=3)


def two_steps(samples, dims, device):
    "Batches of this rank over two steps, the samples it read itself, and its ledger."
    groups = dims.build(device)
    sampler = BatchSampler(len(samples), 8, 2, groups.dp_rank, dims.dp)
    batches, read = [], 0
    with Ledger() as ledger:
        for _, indices in zip(range(2 * sampler.micro_batches), sampler):
            batch = samples.batch(indices) if groups.tp_rank == 0 else None
            read += len(indices) * (batch is not None)
            batches.append(
                broadcast_batch(batch, groups.tp_group, token_fields((2, 12), VOCAB), device)
            )
    both = {k: torch.cat([batch[k] for batch in batches]).cpu() for k in ("input_ids", "labels")}
    counts = ledger.count("broadcast", axis="tp"), ledger.elements("broadcast"), ledger.count()
    return groups.tp_rank, groups.dp_rank, read, both, counts


@pytest.mark.parametrize(("tp", "dp"), [(1, 2), (2, 1), (1, 4), (4, 1), (2, 2)])
def test_every_grid_trains_on_the_same_samples(ranks, device, samples, tp, dp):
    results = ranks(tp * dp)(two_steps, samples, ParallelDims(tp=tp, dp=dp), device)
    micro_batches = 2 * 8 // (2 * dp)
    for tp_rank, dp_rank, read, both, counts in results:
        first, size = dp_rank * 8 // dp, 8 // dp
        share = [*range(first, first + size), *range(8 + first, 8 + first + size)]
        expected = samples.batch(share)
        assert torch.equal(both["input_ids"], expected["input_ids"])
        assert torch.equal(both["labels"], expected["labels"])
        assert read == (len(share) if tp_rank == 0 else 0)
        messages = 0 if tp == 1 else micro_batches
        assert counts == (messages, messages * 2 * 2 * 12, messages)


def good_batch(dtype=torch.int64) -> dict[str, torch.Tensor]:
    rows = torch.arange(10, dtype=dtype).view(2, 5)
    return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}


def spoiled(name: str, token: int) -> dict[str, torch.Tensor]:
    batch = {key: ids.clone() for key, ids in good_batch().items()}
    batch[name][1, 2] = token
    return batch


@pytest.mark.parametrize("name", ["input_ids", "labels"])
@pytest.mark.parametrize("token", [-1, 10, -100])
def test_ids_outside_the_vocabulary_are_refused(name, token):
    batch = spoiled(name, token)
    if (name, token) == ("labels", -100):
        kept = broadcast_batch(batch, None, token_fields())
        assert torch.equal(kept["labels"], batch["labels"])
        return
    message = f"{name} holds {token}; this model knows 0 to 9; use the tokenizer"
    with pytest.raises(ValueError, match=message):
        broadcast_batch(batch, None, token_fields())


def test_a_bad_id_is_found_before_it_goes_to_another_device():
    "On a GPU it would end in an assertion of the device. A meta tensor has no numbers to look at."
    with pytest.raises(ValueError, match="input_ids holds 10; this model knows 0 to 9"):
        broadcast_batch(spoiled("input_ids", 10), None, token_fields(), "meta")
    assert broadcast_batch(good_batch(), None, token_fields(), "meta")["labels"].is_meta


@pytest.mark.parametrize("tp", [2, 4])
def test_a_bad_id_stops_every_rank_of_the_group(ranks, tp, device):
    def feed(dims, batch):
        groups = dims.build(device)
        mine = batch if groups.tp_rank == 0 else None
        return broadcast_batch(mine, groups.tp_group, token_fields(), device)

    world, dims = ranks(tp), ParallelDims(tp=tp)
    with pytest.raises(RankError, match="input_ids holds 10; this model knows 0 to 9"):
        world(feed, dims, spoiled("input_ids", 10))
    after = world(feed, dims, good_batch())
    assert all(torch.equal(batch["labels"].cpu(), good_batch()["labels"]) for batch in after)


@pytest.mark.parametrize("tp", [2])
def test_a_batch_of_small_integers_arrives_as_it_was(ranks, tp, device):
    def feed(dims, batch):
        groups = dims.build(device)
        mine = batch if groups.tp_rank == 0 else None
        return broadcast_batch(mine, groups.tp_group, token_fields(), device)

    for batch in ranks(tp)(feed, ParallelDims(tp=tp), good_batch(torch.int32)):
        assert batch["input_ids"].dtype == torch.int64
        assert torch.equal(batch["input_ids"].cpu(), good_batch()["input_ids"])


def test_a_batch_of_another_shape_is_refused():
    message = re.escape("input_ids of shape (2, 4); a batch of this step has (2, 5)")
    with pytest.raises(ValueError, match=message):
        broadcast_batch(good_batch(), None, token_fields((2, 5)))


def test_one_rank_makes_no_message():
    with Ledger() as ledger:
        batch = broadcast_batch(good_batch(), None, token_fields())
    assert ledger.count() == 0
    assert torch.equal(batch["input_ids"], good_batch()["input_ids"])


BERT = BertConfig(1, 8, 2, vocab_size=10, max_seq_len=4, num_token_types=3)


def bert_batch() -> dict[str, torch.Tensor]:
    "Two rows, each tensor with the largest number that it may hold."
    ids = torch.tensor([[2, 9, 0, 3], [2, 4, 3, 1]])
    return {
        "input_ids": ids,
        "labels": torch.tensor([[-100, 9, -100, -100], [-100, -100, 0, -100]]),
        "token_types": torch.tensor([[0, 0, 1, 2], [0, 1, 1, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "sentence_order": torch.tensor([1, 0]),
    }


def feed_bert(dims, device):
    "The batch on this rank, and what was sent for it."
    groups = dims.build(device)
    given = dict(reversed(bert_batch().items()))        # their order says nothing
    mine = given if groups.tp_rank == 0 else None
    with Ledger() as ledger:
        batch = broadcast_batch(mine, groups.tp_group, bert_fields(BERT, 2), device)
    sent = [(record.op, record.axis, record.elements) for record in ledger.records]
    return {name: tensor.cpu() for name, tensor in batch.items()}, sent


@pytest.mark.parametrize(("tp", "dp"), [(1, 2), (2, 1), (4, 1), (2, 2)])
def test_the_five_tensors_of_a_bert_arrive_in_one_broadcast(ranks, device, tp, dp):
    for batch, sent in ranks(tp * dp)(feed_bert, ParallelDims(tp=tp, dp=dp), device):
        assert list(batch) == list(bert_batch())
        assert all(torch.equal(batch[name], want) for name, want in bert_batch().items())
        assert sent == ([] if tp == 1 else [("broadcast", "tp", 4 * 2 * 4 + 2)])


@pytest.mark.parametrize(
    ("name", "value", "largest"),
    [
        ("input_ids", 10, 9),
        ("input_ids", -100, 9),
        ("labels", 10, 9),
        ("labels", -1, 9),
        ("token_types", 3, 2),
        ("token_types", -100, 2),
        ("attention_mask", 2, 1),
        ("sentence_order", 2, 1),
        ("sentence_order", -100, 1),
    ],
)
def test_numbers_that_a_bert_does_not_know_are_refused(name, value, largest):
    batch = bert_batch()
    batch[name].view(-1)[-1] = value
    message = f"{name} holds {value}; this model knows 0 to {largest}; use the tokenizer"
    with pytest.raises(ValueError, match=message):
        broadcast_batch(batch, None, bert_fields(BERT, 2))


@pytest.mark.parametrize("name", list(bert_batch()))
def test_each_tensor_has_its_shape(name):
    batch = bert_batch()
    batch[name] = batch[name][:1]
    with pytest.raises(ValueError, match=f"{name} of shape .1,.*; a batch of this step has .2,"):
        broadcast_batch(batch, None, bert_fields(BERT, 2))


def test_the_samples_of_another_kind_are_refused():
    gpt2 = GPT2Config(1, 8, 2, vocab_size=10, max_seq_len=4)
    with pytest.raises(ValueError, match="a batch of input_ids, labels; .* takes .*sentence_order"):
        broadcast_batch(good_batch(), None, bert_fields(BERT, 2))
    with pytest.raises(ValueError, match="takes input_ids, labels; use the samples of its kind"):
        broadcast_batch(bert_batch(), None, batch_fields(gpt2, 2))
    assert batch_fields(gpt2, 2) == token_fields()


# The road of ids in a run


def opened(tmp_path, known: int | None) -> tuple:
    "A model, and a function that reads its first batch of a file with an id that it does not know."
    config = GPT2Config(1, 16, 2, vocab_size=90, max_seq_len=8, vocab_multiple=4)
    plan = TrainConfig(config, RunConfig(tmp_path / "run", batch_size=4, steps=1, eval_batches=1))
    with TokenFileWriter(tmp_path / "x", 100) as writer:
        for _ in range(4):
            writer.append([99] * 30)
            writer.end_document()
    file = TokenFile(tmp_path / "x", known)
    data = Data.open(file, plan, plan.parallel.build(), torch.device("cpu"))
    return GPT2(config), lambda: next(data.batches(data.train, data.sampler(data.train)))


@pytest.mark.parametrize("known", [None, 91])
def test_the_reader_looks_at_ids_of_a_file_that_nobody_looked_at(tmp_path, known):
    _, first = opened(tmp_path, known)
    with pytest.raises(ValueError, match="input_ids holds 99; this model knows 0 to 89"):
        first()


def test_ids_of_a_file_that_was_looked_at_meet_the_models_own_check_alone(tmp_path):
    "One that says so and is not: the reader lets it pass, and the model refuses it as from anyone."
    model, first = opened(tmp_path, 90)
    batch = first()
    assert set(batch["input_ids"].flatten().tolist()) == {99}
    with pytest.raises(ValueError, match="token id 99 is out of range"):
        model.losses(**batch)


def test_a_batch_that_is_known_still_has_its_names_and_shapes():
    with pytest.raises(ValueError, match=r"input_ids of shape \(2, 4\); .* has \(2, 5\)"):
        broadcast_batch(good_batch(), None, token_fields((2, 5)), checked=True)
    with pytest.raises(ValueError, match="a batch of input_ids; this model takes"):
        half = {"input_ids": good_batch()["input_ids"]}
        broadcast_batch(half, None, token_fields(), checked=True)
