"""Every collective of a step, counted: the table of the paper, in number and in bytes."""

import pytest
import torch
import torch.distributed as dist
from gpt2_cases import batch, config, groups, pair
from torch.utils.checkpoint import set_checkpoint_early_stop

from megatron_edu import comm
from megatron_edu.comm import Ledger
from megatron_edu.models.block import Block
from megatron_edu.models.gpt2 import GPT2
from megatron_edu.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_edu.tensor_parallel.norm import clip_grad_norm, grad_norm
from megatron_edu.training.data_parallel import DataParallel
from megatron_edu.training.optimizer import OptimizerConfig, make_optimizer

LAYERS, ROWS, LENGTH, WIDTH = 3, 4, 13, 36
ACTIVATION = ROWS * LENGTH * WIDTH      # b s h
TOKENS = ROWS * LENGTH                  # b s


def model_loss(model, ids, labels, mask):
    "The fused output layer and loss."
    return model.loss(ids, labels, mask)


def separate_loss(model, ids, labels, mask):
    "Local logits, then their loss."
    local, vocabulary = model(ids), model.config.vocab_size
    losses = vocab_parallel_cross_entropy(local, labels, group=model.group, vocab_size=vocabulary)
    return (losses * mask).sum() / mask.sum()


LOSSES = {"model.loss": model_loss, "logits, then loss": separate_loss}


def one_step(tp, dp, loss_of, recompute, device, dtype=torch.float64, autocast=None):
    "How often each collective of a step came: {(phase, op, axis, dtype, elements): times}."
    mine = groups(tp, dp, device)
    changed = config(num_layers=LAYERS)
    model, _ = pair(changed, mine.tp_group, dtype, device, recompute)
    wrapped = DataParallel(model, mine.dp_group) if dp > 1 else model
    data = batch(changed, ROWS, LENGTH, device=device)
    with Ledger() as step, set_checkpoint_early_stop(False):
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = LOSSES[loss_of](wrapped, *data)
        loss.backward()
    with Ledger() as norm:
        clip_grad_norm(model, 1.0)
    with Ledger() as update:
        make_optimizer(model, OptimizerConfig()).step()
    return [counted(step), counted(norm), counted(update)], step.bytes()


def counted(ledger):
    "The records, with how often each came."
    found = {}
    for r in ledger.records:
        key = r.phase, r.op, r.axis, r.dtype, r.elements
        found[key] = found.get(key, 0) + 1
    return found


def loss_records(loss_of, tp, dtype="float64"):
    "A few numbers a token: two from each rank for the fused loss, three in sums for the other."
    if loss_of == "model.loss":
        return {("forward", "all_gather", "tp", dtype, tp * 2 * TOKENS): 1}
    return {("forward", "all_reduce", "tp", dtype, TOKENS): 3}


def paper_table(recompute, loss_of, tp):
    "Section 3 of the paper: what the tensor-parallel group exchanges in one step."
    per_layer = 4 if recompute else 2
    return loss_records(loss_of, tp) | {
        ("forward", "all_reduce", "tp", "float64", ACTIVATION): 2 * LAYERS + 1,
        ("backward", "all_reduce", "tp", "float64", ACTIVATION): per_layer * LAYERS + 1,
    }


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "tp, dp, loss_of",
    [
        (2, 1, "model.loss"),
        (4, 1, "model.loss"),
        (2, 2, "model.loss"),
        (2, 1, "logits, then loss"),
        (4, 1, "logits, then loss"),
    ],
)
def test_a_step_is_the_papers_table(ranks, device, tp, dp, loss_of, recompute):
    for (step, norm, update), moved in ranks(tp * dp)(
        one_step, tp, dp, loss_of, recompute, device
    ):
        assert step == paper_table(recompute, loss_of, tp)
        activations = (6 if recompute else 4) * LAYERS + 2
        a_token = 2 * tp if loss_of == "model.loss" else 3
        assert moved == 8 * (activations * ACTIVATION + a_token * TOKENS)
        assert norm == {("forward", "all_reduce", "tp", "float64", 1): 1}
        assert update == {}


@pytest.mark.parametrize("tp", [2])
def test_bytes_under_bf16_autocast(ranks, device, tp):
    "Layers speak bf16; the embedding, whose table is fp32, and the loss speak fp32."
    for (step, norm, _), _ in ranks(tp)(
        one_step, tp, 1, "model.loss", False, device, torch.float32, torch.bfloat16
    ):
        assert step == loss_records("model.loss", tp, "float32") | {
            ("forward", "all_reduce", "tp", "float32", ACTIVATION): 1,
            ("forward", "all_reduce", "tp", "bfloat16", ACTIVATION): 2 * LAYERS,
            ("backward", "all_reduce", "tp", "bfloat16", ACTIVATION): 2 * LAYERS + 1,
        }
        assert norm == {("forward", "all_reduce", "tp", "float32", 1): 1}


def block_alone(tp, device):
    group = groups(tp, 1, device).tp_group
    block = Block(config(), group).to(device)
    x = torch.randn(ROWS, LENGTH, WIDTH, device=device, requires_grad=True)
    with Ledger() as ledger:
        block(x).sum().backward()
    return counted(ledger), ledger.wire() / x.element_size()


@pytest.mark.parametrize("tp", [2, 4])
def test_a_block_is_two_and_two_all_reduces(ranks, device, tp):
    for found, sent in ranks(tp)(block_alone, tp, device):
        assert found == {
            (phase, "all_reduce", "tp", "float32", ACTIVATION): 2
            for phase in ("forward", "backward")
        }
        assert sent == 8 * ACTIVATION * (tp - 1) / tp


def inference(tp, device):
    "Collectives of building the model, and of its logits without gradients."
    group = groups(tp, 1, device).tp_group
    changed = config(num_layers=LAYERS)
    with Ledger() as building:
        model = GPT2(changed, group).to(device)
    model.recompute = True
    ids = batch(changed, ROWS, LENGTH, device=device)[0]
    with Ledger() as ledger, torch.no_grad():
        model(ids)
    return counted(building), counted(ledger)


@pytest.mark.parametrize("tp", [2, 4])
def test_logits_without_gradients(ranks, device, tp):
    for building, found in ranks(tp)(inference, tp, device):
        assert building == {}
        assert found == {("forward", "all_reduce", "tp", "float32", ACTIVATION): 2 * LAYERS + 1}


def long_batch_loss(tp, device):
    "More tokens than the fused loss takes at a time: the elements stay the same."
    changed = config(num_layers=1, max_seq_len=200)
    model = GPT2(changed, groups(tp, 1, device).tp_group).to(device)
    ids, labels, _ = batch(changed, rows=4, length=200, device=device)
    with Ledger() as ledger:
        model.loss(ids, labels).backward()
    return ledger.elements("all_gather"), ledger.count("all_gather"), ledger.count("all_reduce")


@pytest.mark.parametrize("tp", [2])
def test_the_loss_of_a_long_batch_moves_two_numbers_a_token(ranks, device, tp):
    for elements, times, others in ranks(tp)(long_batch_loss, tp, device):
        assert elements == tp * 2 * 800
        assert times == 2
        assert others == 2 * 2 + 2


# ----------------------------------------------------------------------- one device


COLLECTIVES = [
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter",
    "reduce_scatter_tensor", "broadcast", "barrier", "all_to_all", "all_to_all_single",
    "init_process_group", "new_group", "broadcast_object_list", "all_gather_object",
]   # fmt: skip


def forbid_collectives(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("one device made a collective call or a process group")

    for name in COLLECTIVES:
        monkeypatch.setattr(dist, name, forbidden)
    for name in ("_all_gather", "_reduce_scatter", "_write"):
        assert hasattr(comm, name)
        monkeypatch.setattr(comm, name, forbidden)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("loss_of", LOSSES)
def test_one_device_says_nothing(monkeypatch, loss_of, recompute):
    "No process group, no collective call, in building, a step, clipping and an update."
    forbid_collectives(monkeypatch)
    assert not dist.is_initialized()
    mine = groups(1)
    assert mine.tp_group is None and mine.dp_group is None
    model, full = pair(config(dropout=0.1), mine.tp_group, recompute=recompute)
    wrapped = DataParallel(model, mine.dp_group)
    data = batch(config())
    with Ledger() as ledger:
        loss = LOSSES[loss_of](model, *data)
        loss.backward()
        wrapped.loss(*data).backward()
        clip_grad_norm(model, 1e-3)
        make_optimizer(model, OptimizerConfig()).step()
    assert ledger.records == []
    assert not dist.is_initialized()
    assert grad_norm(model) == pytest.approx(1e-3, rel=1e-3)
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in full.named_parameters()
    }


def world_of_one(device):
    "A process group of one rank, as `torchrun` with one process makes it."
    model, _ = pair(config(), dist.group.WORLD, device=device)
    with Ledger() as ledger:
        model.loss(*batch(config(), device=device)).backward()
        grad_norm(model)
    return ledger.records


def test_a_group_of_one_rank_says_nothing(ranks, device):
    assert ranks(1)(world_of_one, device) == [[]]


def test_the_ledger_would_have_seen_it(monkeypatch):
    "The patches of the test above do bite."
    forbid_collectives(monkeypatch)
    with pytest.raises(AssertionError, match="one device made"):
        dist.init_process_group("gloo", init_method="tcp://127.0.0.1:1", rank=0, world_size=1)
    with pytest.raises(AssertionError, match="one device made"):
        comm.dist.all_reduce(torch.ones(1))
