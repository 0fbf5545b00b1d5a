"""The gradient norm of a split model, and clipping by it."""

import math

import pytest
import torch
from gpt2_cases import batch, config, groups, pair

from megatron_edu.comm import Ledger, group_rank
from megatron_edu.tensor_parallel.norm import clip_grad_norm, grad_norm
from megatron_edu.tensor_parallel.shard import placements
from megatron_edu.training.data_parallel import DataParallel

widths = pytest.mark.parametrize("tp", [1, 2, 4])


def with_gradients(tp, device, dtype=torch.float64, scale=1.0):
    """A sharded model and a reference with the same random gradients, of the given type.

    Random, so that the norm is tested and not the backward pass; of very different sizes.
    """
    model, full = pair(config(), groups(tp, 1, device).tp_group, dtype, device)
    generator = torch.Generator().manual_seed(0)
    sharded = dict(model.named_parameters())
    for name, place in placements(model).items():
        parameter = full.get_parameter(name)
        size = scale * 10 ** (3 * torch.rand((), generator=generator) - 1)
        whole = size * torch.randn(parameter.shape, generator=generator)
        parameter.grad = whole.to(parameter)
        piece = parameter.grad
        if place.rule is not None:
            rank = group_rank(place.group)
            piece = place.rule.split(parameter.grad, rank, tp)
        sharded[name].grad = piece.clone()
    return model, full


def exact_norm(full):
    "In float64, from the gradients as they are."
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in full.parameters()))


def norms(tp, device, dtype, scale=1.0):
    model, full = with_gradients(tp, device, dtype, scale)
    norm = grad_norm(model)
    return norm.item(), exact_norm(full), norm.dtype


@widths
@pytest.mark.parametrize(
    "dtype, rtol",
    [
        (torch.float64, 1e-14),
        (torch.float32, 1e-6),
        (torch.bfloat16, 1e-6),  # the gradients are coarse, the sum of their squares is not
        (torch.float16, 1e-6),
    ],
)
def test_norm_is_the_references(ranks, device, tp, dtype, rtol):
    results = ranks(tp)(norms, tp, device, dtype)
    assert len({norm for norm, _, _ in results}) == 1, "the ranks disagree"
    for norm, want, kind in results:
        assert norm == pytest.approx(want, rel=rtol, abs=0)
        assert kind == torch.promote_types(dtype, torch.float32)


@widths
def test_float16_gradients_do_not_overflow(ranks, device, tp):
    for norm, want, _ in ranks(tp)(norms, tp, device, torch.float16, 100.0):
        assert torch.finfo(torch.float16).max < want < math.inf
        assert norm == pytest.approx(want, rel=1e-6)


# ---------------------------------------------------------------------------- clipping


def clip(tp, device, limit):
    "Norm returned, reference's norm, largest relative error of a clipped gradient."
    model, full = with_gradients(tp, device)
    limit = limit * exact_norm(full)
    norm = clip_grad_norm(model, limit)
    want = torch.nn.utils.clip_grad_norm_(full.parameters(), limit)
    errors = []
    for (name, place), parameter in zip(placements(model).items(), model.parameters()):
        expected = full.get_parameter(name).grad
        if place.rule is not None:
            rank = group_rank(place.group)
            expected = place.rule.split(expected, rank, tp)
        errors.append(((parameter.grad - expected).abs().max() / expected.abs().max()).item())
    return norm.item(), want.item(), max(errors), grad_norm(model).item() / limit


@widths
@pytest.mark.parametrize("limit", [0.01, 0.5, 0.999, 1.001, 100.0])
def test_clipping_is_pytorchs_on_one_device(ranks, device, tp, limit):
    for norm, want, error, length in ranks(tp)(clip, tp, device, limit):
        assert norm == pytest.approx(want, rel=1e-14)
        assert error < 1e-14
        assert length == pytest.approx(min(1.0, 1 / limit), rel=1e-6)


def unclipped(tp, device, limit):
    model, _ = with_gradients(tp, device)
    before = [p.grad.clone() for p in model.parameters()]
    clip_grad_norm(model, limit)
    return all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before))


@widths
@pytest.mark.parametrize("limit", [1e9, math.inf])
def test_short_gradients_are_left_alone(ranks, device, tp, limit):
    assert all(ranks(tp)(unclipped, tp, device, limit))


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_that_is_not_above_zero_is_refused(limit):
    model, _ = pair(config())
    with pytest.raises(ValueError, match=f"max_norm={limit}: must be above 0"):
        clip_grad_norm(model, limit)


# --------------------------------------------------------------------------- at the edge


def without(tp, device, missing):
    "The norm when gradients are missing: of all parameters, of the sharded, of the replicated."
    model, _ = with_gradients(tp, device)
    left = 0.0
    for place, parameter in zip(placements(model).values(), model.parameters()):
        kind = "replicated" if place.rule is None else "sharded"
        if missing in ("all", kind):
            parameter.grad = None
        elif kind == "replicated":
            left += parameter.grad.square().sum().item()
        else:
            rank = group_rank(place.group)
            left += 0.0 if rank else (parameter.grad.square().sum().item())
    norm = clip_grad_norm(model, 1.0).item()
    return norm, left, all(p.grad is None for p in model.parameters())


@widths
def test_no_gradients_have_norm_zero(ranks, device, tp):
    assert ranks(tp)(without, tp, device, "all") == [(0.0, 0.0, True)] * tp


@widths
def test_only_replicated_gradients(ranks, device, tp):
    for norm, left, _ in ranks(tp)(without, tp, device, "sharded"):
        assert norm == pytest.approx(math.sqrt(left), rel=1e-14)


@widths
def test_only_sharded_gradients(ranks, device, tp):
    results = ranks(tp)(without, tp, device, "replicated")
    assert len({norm for norm, _, _ in results}) == 1
    if tp == 1:
        assert results[0][0] == pytest.approx(math.sqrt(results[0][1]), rel=1e-14)


def one_rank_without(tp, device):
    "One rank has no gradient of any sharded parameter, the others have all."
    model, full = with_gradients(tp, device)
    mine = [
        parameter
        for place, parameter in zip(placements(model).values(), model.parameters())
        if place.rule is not None
    ]
    if torch.distributed.get_rank() == tp - 1:
        for parameter in mine:
            parameter.grad = None
    return grad_norm(model).item(), exact_norm(full)


@pytest.mark.parametrize("tp", [2, 4])
def test_a_rank_without_sharded_gradients_does_not_hang_the_others(ranks, device, tp):
    results = ranks(tp)(one_rank_without, tp, device)
    assert len({norm for norm, _ in results}) == 1
    assert 0 < results[0][0] < results[0][1]


def with_bad_number(tp, device, bad, name):
    model, _ = with_gradients(tp, device)
    if torch.distributed.get_rank() == tp - 1:
        model.get_parameter(name).grad.view(-1)[0] = bad
    norm = grad_norm(model).item()
    clip_grad_norm(model, 1.0)
    gradients = [p.grad for p in model.parameters()]
    return norm, all(g.isnan().all().item() for g in gradients)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_nan_on_one_rank_is_seen_by_all(ranks, device, tp):
    for norm, all_nan in ranks(tp)(with_bad_number, tp, device, math.nan, "wte.weight"):
        assert math.isnan(norm) and all_nan


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_infinity_on_one_rank_is_seen_by_all(ranks, device, tp):
    for norm, _ in ranks(tp)(with_bad_number, tp, device, math.inf, "wte.weight"):
        assert norm == math.inf


# ------------------------------------------------------------------------ communication


def collectives(tp, dp, device, dtype):
    mine = groups(tp, dp, device)
    model, _ = pair(config(), mine.tp_group, dtype, device)
    wrapped = DataParallel(model, mine.dp_group)
    wrapped.loss(*batch(model.config, device=device)).backward()
    with Ledger() as ledger:
        clip_grad_norm(model, 1.0)
    return [(r.op, r.axis, r.elements, r.bytes) for r in ledger.records]


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    "dtype, size", [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 4)]
)
def test_one_all_reduce_of_one_element(ranks, device, tp, dp, dtype, size):
    for made in ranks(tp * dp)(collectives, tp, dp, device, dtype):
        assert made == [("all_reduce", "tp", 1, size)]


def test_no_collective_on_one_device():
    assert collectives(1, 1, "cpu", torch.float64) == []


def norms_of_replicas(tp, dp, device):
    "Norms on a grid and of the reference, from the same global batch."
    mine = groups(tp, dp, device)
    model, full = pair(config(), mine.tp_group, device=device)
    data = batch(config(), device=device)
    counted = ((data[1] != -100) * data[2]).sum()
    rows = [t.chunk(dp)[mine.dp_rank] for t in data]
    wrapped = DataParallel(model, mine.dp_group)
    wrapped.loss(*rows, num_tokens=counted / dp).backward()
    full.loss(*data).backward()
    return grad_norm(model).item(), exact_norm(full)


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_norm_on_a_grid(ranks, device, tp, dp):
    results = ranks(tp * dp)(norms_of_replicas, tp, dp, device)
    for norm, want in results:
        assert norm == pytest.approx(want, abs=1e-12)
