"""Replicas: their averaged gradients are those of one device on the whole batch."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from gpt2_cases import batch, config, groups, pair
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from megatron_edu.comm import all_gather
from megatron_edu.models.gpt2 import GPT2
from megatron_edu.reference.gpt2 import answer
from megatron_edu.tensor_parallel.norm import clip_grad_norm
from megatron_edu.tensor_parallel.shard import gather_tensors, shard_state_dict
from megatron_edu.training.data_parallel import DataParallel
from megatron_edu.training.optimizer import OptimizerConfig, make_optimizer

GRIDS = [(1, 1), (1, 2), (2, 1), (2, 2)]
grids = pytest.mark.parametrize("tp, dp", GRIDS)
replicated = pytest.mark.parametrize("tp, dp", [(1, 2), (2, 2)])

ROWS = 8


def counted(data):
    "Weight of all counted tokens, written out."
    ids, labels, mask = data
    weights = (labels != -100).double()
    return (weights if mask is None else weights * mask).sum().item()


def rows_of(data, dp, dp_rank):
    "A replica's rows of the global batch."
    return [None if t is None else t.chunk(dp)[dp_rank] for t in data]


def gradient_errors(model, full, data):
    "Largest error of the full gradients, and of the replicas among each other."
    want = answer(full, *data).gradients
    got = gather_tensors({name: p.grad for name, p in model.named_parameters()}, model)
    assert got.keys() == want.keys()
    return max((got[name] - want[name]).abs().max().item() for name in want)


def spread(model, dp_group, of):
    "Largest difference among the replicas."
    flat = torch.cat([of(p).detach().flatten() for p in model.parameters()])
    copies = all_gather(flat[None], dp_group, dim=0)
    return (copies.amax(0) - copies.amin(0)).max().item()


def unequal_masks(empty_replica=False):
    "Masks in which each replica counts fewer tokens than the one before, the last perhaps none."
    length = torch.linspace(13, 1, ROWS).round()
    if empty_replica:
        length[ROWS // 2 :] = 0
    return (torch.arange(13) < length[:, None]).double()


MASKS = {
    "none": None,
    "equal": torch.ones(ROWS, 13, dtype=torch.float64),
    "unequal": unequal_masks(),
    "one replica counts nothing": unequal_masks(empty_replica=True),
}


def one_batch(tp, dp, mask, device, local_counts=False):
    "One backward pass. Losses of the replicas, their mean's error, error of gradients, spread."
    mine = groups(tp, dp, device)
    model, full = pair(config(), mine.tp_group, device=device)
    ids, labels, _ = batch(config(), ROWS, device=device)
    data = ids, labels, None if mask is None else mask.to(device)
    replica = DataParallel(model, mine.dp_group)
    share = None if local_counts else counted(data) / dp
    loss = replica.loss(*rows_of(data, dp, mine.dp_rank), num_tokens=share)
    loss.backward()
    mean = all_gather(loss.detach()[None], mine.dp_group, dim=0).mean()
    loss_error = (mean - answer(full, *data).loss).abs().item()
    return loss_error, gradient_errors(model, full, data), spread(model, mine.dp_group, grad_of)


def grad_of(p):
    return p.grad


def value_of(p):
    return p


@grids
@pytest.mark.parametrize("mask", MASKS)
def test_averaged_gradients_are_those_of_the_whole_batch(ranks, device, tp, dp, mask):
    for loss, gradients, apart in ranks(tp * dp)(one_batch, tp, dp, MASKS[mask], device):
        assert loss < 1e-10 and gradients < 1e-10 and apart == 0


def loss_of_a_temporary(tp, dp, device):
    "One backward pass of a loss whose `DataParallel` nobody has kept. Error of gradients, spread."
    mine = groups(tp, dp, device)
    model, full = pair(config(), mine.tp_group, device=device)
    data = batch(config(), ROWS, device=device)
    rows = rows_of(data, dp, mine.dp_rank)
    loss = DataParallel(model, mine.dp_group).loss(*rows, num_tokens=counted(data) / dp)
    loss.backward()
    return gradient_errors(model, full, data), spread(model, mine.dp_group, grad_of)


@replicated
def test_a_loss_is_averaged_though_nobody_keeps_its_object(ranks, device, tp, dp):
    for gradients, apart in ranks(tp * dp)(loss_of_a_temporary, tp, dp, device):
        assert gradients < 1e-10 and apart == 0


@pytest.mark.parametrize("tp, dp", [(1, 3)])
def test_rows_need_not_be_shared_out_equally(ranks, device, tp, dp):
    for loss, gradients, apart in ranks(dp)(one_batch, tp, dp, MASKS["unequal"], device):
        assert loss < 1e-10 and gradients < 1e-10 and apart == 0


@replicated
def test_these_masks_tell_a_mean_of_means(ranks, device, tp, dp):
    world = ranks(tp * dp)
    for loss, gradients, _ in world(one_batch, tp, dp, MASKS["unequal"], device, True):
        assert loss > 1e-3 and gradients > 1e-3


# --------------------------------------------------------------------------- micro-batches


def take_notes(replica, group):
    "Bytes of every bucket that DDP averages from now on."
    sizes = []

    def hook(state, bucket):
        sizes.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)

    replica._ddp.register_comm_hook(None, hook)
    return sizes


def micro_batches(tp, dp, micro, quiet, recompute, device, steps=2):
    "Errors of the last of several steps, each in micro-batches; and what DDP sent in it."
    mine = groups(tp, dp, device)
    model, full = pair(config(), mine.tp_group, device=device, recompute=recompute)
    replica = DataParallel(model, mine.dp_group)
    sizes = take_notes(replica, mine.dp_group) if dp > 1 else []
    for step in range(steps):
        ids, labels, _ = batch(config(), ROWS, seed=step, device=device)
        data = ids, labels, MASKS["unequal"].to(device)
        sizes.clear()
        model.zero_grad(set_to_none=True)
        parts = list(zip(*(t.split(micro) for t in rows_of(data, dp, mine.dp_rank))))
        for i, part in enumerate(parts):
            silent = quiet and i < len(parts) - 1
            with replica.no_sync() if silent else contextlib.nullcontext():
                replica.loss(*part, num_tokens=counted(data) / dp).backward()
            if silent and dp > 1:
                assert sizes == [] and spread(model, mine.dp_group, grad_of) > 1e-4
    errors = gradient_errors(model, full, data), spread(model, mine.dp_group, grad_of)
    return *errors, sum(sizes), sum(p.numel() for p in model.parameters())


@grids
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_add_up_to_the_batch(ranks, device, tp, dp, micro, recompute):
    for error, apart, sent, numbers in ranks(tp * dp)(
        micro_batches, tp, dp, micro, True, recompute, device
    ):
        assert error < 1e-10 and apart == 0
        assert sent == (8 * numbers if dp > 1 else 0)


@replicated
def test_without_no_sync_every_micro_batch_is_sent(ranks, device, tp, dp):
    for error, apart, sent, numbers in ranks(tp * dp)(
        micro_batches, tp, dp, 1, False, False, device
    ):
        assert error < 1e-10 and apart == 0
        assert sent == ROWS // dp * 8 * numbers


# -------------------------------------------------------------------------------- training


def train(tp, dp, device, steps=5):
    "How far apart the replicas' weights are after some steps, and how far they went."
    mine = groups(tp, dp, device)
    model, _ = pair(config(), mine.tp_group, device=device)
    before = [p.detach().clone() for p in model.parameters()]
    replica = DataParallel(model, mine.dp_group)
    settings = OptimizerConfig(lr=1e-2, clip=0.3)
    optimizer = make_optimizer(model, settings)
    for step in range(steps):
        data = batch(config(), ROWS, seed=step, device=device)
        optimizer.zero_grad()
        rows = rows_of(data, dp, mine.dp_rank)
        replica.loss(*rows, num_tokens=counted(data) / dp).backward()
        clip_grad_norm(model, settings.clip)
        optimizer.step()
    moved = [(p - old).abs().max().item() for p, old in zip(model.parameters(), before)]
    return spread(model, mine.dp_group, value_of), min(moved)


@replicated
def test_replicas_stay_equal_to_the_bit(ranks, device, tp, dp):
    for apart, moved in ranks(tp * dp)(train, tp, dp, device):
        assert apart == 0 and moved > 1e-3


def start(tp, dp, device):
    "Each replica is built from another seed. Are its slices those of the first replica's seed?"
    mine = groups(tp, dp, device)
    model = GPT2(config(), mine.tp_group, seed=10 + mine.dp_rank).to(device)
    first = GPT2(config(), seed=10).state_dict()
    want = {name: t.to(device) for name, t in shard_state_dict(first, model).items()}
    equal = [all(torch.equal(p, want[n]) for n, p in model.named_parameters())]
    DataParallel(model, mine.dp_group)
    return equal + [all(torch.equal(p, want[n]) for n, p in model.named_parameters())]


@replicated
def test_replicas_start_with_the_weights_of_the_first(ranks, device, tp, dp):
    found = ranks(tp * dp)(start, tp, dp, device)
    assert found == [[True, True]] * tp + [[False, True]] * tp


# -------------------------------------------------------------------------- without replicas


def is_the_model_alone(group):
    model, _ = pair(config(), None)
    replica = DataParallel(model, group)
    data = batch(config())
    want = model.loss(*data)
    with replica.no_sync():
        loss = replica.loss(*data, num_tokens=None)
    return replica._ddp is None, replica.module is model, torch.equal(loss, want)


def test_without_a_group_it_is_the_model_alone():
    assert all(is_the_model_alone(None))


def test_with_one_replica_it_is_the_model_alone(ranks):
    assert ranks(1)(lambda: is_the_model_alone(dist.group.WORLD)) == [(True, True, True)]


def test_its_gradients_are_the_models():
    model, full = pair(config(), None)
    data = batch(config())
    DataParallel(model, None).loss(*data).backward()
    assert gradient_errors(model, full, data) < 1e-10
