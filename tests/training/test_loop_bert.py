"What a BERT's run does with a batch: losses, gradients and validation are the reference's."

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bert_cases import KINDS, config
from bert_data_cases import numbered_wordpiece, random_file
from gpt2_cases import shake

from megatron_edu import reference
from megatron_edu.config import PRESETS
from megatron_edu.data.bert import BertSamples
from megatron_edu.data.gpt2 import split_documents
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.tokenizer import train_tokenizer
from megatron_edu.mesh import ParallelDims, ParallelGroups
from megatron_edu.reference.gpt2 import answer
from megatron_edu.tensor_parallel.shard import shard_state_dict
from megatron_edu.training.journal import Journal
from megatron_edu.training.loop import begin_run
from megatron_edu.training.optimizer import OptimizerConfig
from megatron_edu.training.run import Data, RunConfig, TrainConfig, recipe
from megatron_edu.training.validation import validate

SIZE, SEED = 700, 5
FREQUENT = 568      # a token that is to be predicted more than once in what is held out
WORDS = numbered_wordpiece(SIZE, every=4)
MODEL = config(vocab_size=SIZE, max_seq_len=24, num_token_types=2)
PAPERS = [name for name in PRESETS if not name.endswith(("tiny", "laptop"))]
GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2)]
on_grids = pytest.mark.parametrize(("tp", "dp"), GRIDS)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    "A sentence file of 25 documents, five of them held out."
    file = random_file(tmp_path_factory.mktemp("data") / "sentences", 0, longest=8)
    assert file.num_tokens < SIZE - 5
    return file.prefix


def plan(model=MODEL, tp=1, dp=1, **settings) -> TrainConfig:
    given = {"steps": 3, "batch_size": 8, "eval_batches": 2, "validation": 0.2, "seed": SEED}
    run = RunConfig(**{"out": Path("run"), **given, **settings})
    return TrainConfig(model, run, OptimizerConfig(), ParallelDims(tp=tp, dp=dp))


def samples_of(prefix, part: int, count: int) -> BertSamples:
    "The samples of the trained (0) or the held-out part (1)."
    documents = split_documents(25, (0.8, 0.2))[part]
    return BertSamples(TokenFile(prefix), WORDS, 24, count, SEED, documents)


def shaken(layer_norm: str) -> reference.Bert:
    "A model that is right now and then: for one word its bias is large."
    full = reference.Bert(replace(MODEL, layer_norm=layer_norm))
    shake(full, seed=SEED)
    full.mlm.bias.data[FREQUENT] += 9
    return full


def begin(plan, prefix, device):
    "A run whose weights are the shaken ones."
    groups = plan.parallel.build(device)
    run = begin_run(plan, TokenFile(prefix), groups, torch.device(device), None, WORDS)
    full = shaken(plan.model.layer_norm)
    run.model.load_state_dict(shard_state_dict(full.state_dict(), run.model))
    return run


def first_step(plan, prefix, device):
    return begin(plan, prefix, device).advance()


@on_grids
@pytest.mark.parametrize("micro_batch", [None, 1, 2])
@pytest.mark.parametrize("layer_norm", KINDS)
def test_a_step_is_the_references(ranks, device, sentences, tp, dp, micro_batch, layer_norm):
    full = shaken(layer_norm)
    batch = samples_of(sentences, 0, 24).batch(range(8))
    counted = (batch["labels"] != -100).sum(-1)
    assert len(counted.unique()) > 1 and counted[:4].sum() != counted[4:].sum()
    assert batch["sentence_order"].unique().tolist() == [0, 1]
    want, losses = answer(full, **batch), full.losses(**batch)
    settings = plan(full.config, tp, dp, micro_batch=micro_batch)
    for found in ranks(tp * dp)(first_step, settings, sentences, device):
        assert found["mlm_loss"] == pytest.approx(losses["mlm"].item(), rel=1e-5)
        assert found["sop_loss"] == pytest.approx(losses["sop"].item(), rel=1e-5)
        assert found["loss"] == pytest.approx(want.loss.item(), rel=1e-5)
        assert found["grad_norm"] == pytest.approx(want.norm.item(), rel=1e-4)


def held_out(plan, prefix, device):
    "What validation finds, twice."
    run = begin(plan, prefix, device)
    return validate(run.model, run.data), validate(run.model, run.data), run.model.training


@on_grids
@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("layer_norm", KINDS)
def test_validation_is_the_references(ranks, device, sentences, tp, dp, micro_batch, layer_norm):
    full = shaken(layer_norm).eval()
    batch = samples_of(sentences, 1, 16).batch(range(16))
    inputs = (batch[name] for name in ("input_ids", "token_types", "attention_mask"))
    with torch.no_grad():
        logits, order = full(*inputs)
    masked = batch["labels"] != -100
    words, logits = batch["labels"][masked], logits[masked][:, :SIZE]
    want = {
        "val_mlm_loss": F.cross_entropy(logits, words).item(),
        "val_sop_loss": F.cross_entropy(order, batch["sentence_order"]).item(),
        "val_mlm_accuracy": (logits.argmax(-1) == words).float().mean().item(),
        "val_sop_accuracy": (order.argmax(-1) == batch["sentence_order"]).float().mean().item(),
    }
    want["val_loss"] = want["val_mlm_loss"] + want["val_sop_loss"]
    assert 0 < want["val_mlm_accuracy"] < 1 and want["val_sop_accuracy"] not in (0, 0.5, 1)
    dropout = replace(full.config, dropout=0.3)
    settings = plan(dropout, tp, dp, micro_batch=micro_batch)
    for found, again, training in ranks(tp * dp)(held_out, settings, sentences, device):
        assert found == pytest.approx(want, rel=1e-5) and again == found and training


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_both_losses_are_shown(sentences, tmp_path, monkeypatch, capsys, terminal):
    "On a terminal and elsewhere, with the very numbers of a step."
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    settings = plan(out=tmp_path)
    numbers = begin(settings, sentences, "cpu").advance()
    assert numbers["loss"] == pytest.approx(numbers["mlm_loss"] + numbers["sop_loss"])
    journal = Journal(settings, 0, active=True)
    journal.write(1, 0.1, **numbers)
    journal.close()
    wanted = "loss {loss:.3f} (mlm {mlm_loss:.3f}, sop {sop_loss:.3f}) lr "
    if not terminal:
        wanted = "  loss {loss:.4f} (mlm {mlm_loss:.4f}, sop {sop_loss:.4f})  lr "
    shown = screen.getvalue() if terminal else capsys.readouterr().out
    assert wanted.format(**numbers) in shown


def test_samples_follow_the_configuration(sentences):
    "Seed, length, number and documents of both parts."
    data = Data.open(TokenFile(sentences), plan(), ParallelGroups(ParallelDims()), "cpu", WORDS)
    for part, (found, count) in enumerate([(data.train, 24), (data.validation, 16)]):
        assert len(found) == count
        wanted = samples_of(sentences, part, count).batch(range(count))
        for name, rows in found.batch(range(count)).items():
            assert torch.equal(rows, wanted[name])


def test_a_tokenizer_that_does_not_fit_is_refused(sentences):
    groups = ParallelGroups(ParallelDims())
    other = train_tokenizer(["of another kind"], 257)
    for tokenizer, words in {
        None: "tokenizer None: the samples of a BERT need the special tokens",
        other: "the samples of a BERT need the special tokens",
        numbered_wordpiece(SIZE + 1): f"{SIZE + 1} tokens, the model vocab_size={SIZE}",
    }.items():
        with pytest.raises(ValueError, match=words):
            Data.open(TokenFile(sentences), plan(), groups, "cpu", tokenizer)
    smaller = numbered_wordpiece(SIZE - 1)
    Data.open(TokenFile(sentences), plan(), groups, "cpu", smaller)


def test_the_papers_recipe():
    "Section 4.2: 2 M steps of 1,024 samples, 1e-4 after 10,000 steps, falling in a line to 0."
    found = recipe(MODEL, Path("run"))
    assert (found.run.steps, found.run.batch_size) == (2_000_000, 1024)
    assert found.optimizer == OptimizerConfig(
        lr=1e-4, min_lr=0.0, warmup_steps=10_000, decay="linear"
    )


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_recipe_for_both_models(name):
    "Section 4.2: clipping, weight decay, dropout, activations recomputed after every layer."
    found = recipe(PRESETS[name], Path("run"))
    assert (found.optimizer.clip, found.optimizer.weight_decay) == (1.0, 0.01)
    assert (found.model.dropout, found.run.recompute) == (0.1, True)
    assert found.run.precision == "fp32"        # runs on every device; see `recipe`
