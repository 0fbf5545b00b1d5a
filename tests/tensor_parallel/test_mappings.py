"""f, g, scatter and gather: values, gradients, what goes over the wire, and joint differences."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_edu.comm import Ledger
from megatron_edu.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron_edu.tensor_parallel.mappings import (
    Region,
    copy_to_tp,
    gather_from_tp,
    reduce_from_tp,
    scatter_to_tp,
)
from megatron_edu.tensor_parallel.shard import Shard

ATOL = 1e-10
SIZES = [1, 2, 3, 4, 8]
MAPPINGS = [copy_to_tp, reduce_from_tp, scatter_to_tp, gather_from_tp]


def group():
    return dist.group.WORLD


def draw(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    "The same numbers on every rank that asks with the same seed."
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    "The same numbers in memory that is not contiguous."
    return x.mT.contiguous().mT


def one_pass(mapping, x, grad):
    "Value and gradient of a mapping, and its ledger; x and grad are left as they were."
    x = x.requires_grad_()
    before, incoming = x.detach().clone(), grad.clone()
    with Ledger() as ledger:
        y = mapping(x)
        y.backward(grad)
    assert torch.equal(x, before) and torch.equal(grad, incoming)
    return y.detach().cpu(), x.grad.cpu(), ledger


def shared_to_shared(device, op, contiguous):
    "f and g: every rank has its own x and its own incoming gradient."
    x, grad = (draw(seed + 10 * dist.get_rank(), 5, 7).to(device) for seed in (0, 1))
    if not contiguous:
        x, grad = strided(x), strided(grad)
    mapping = {"f": copy_to_tp, "g": reduce_from_tp}[op]
    return one_pass(lambda x: mapping(x, group()), x, grad)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("op", ["f", "g"])
@pytest.mark.parametrize("tp", SIZES)
def test_f_and_g_sum_in_one_pass_and_do_nothing_in_the_other(ranks, device, tp, op, contiguous):
    answers = ranks(tp)(shared_to_shared, device, op, contiguous)
    xs, grads = ([draw(seed + 10 * rank, 5, 7) for rank in range(tp)] for seed in (0, 1))
    for rank, (y, gradient, ledger) in enumerate(answers):
        value, slope = (xs[rank], sum(grads)) if op == "f" else (sum(xs), grads[rank])
        torch.testing.assert_close(y, value, rtol=0, atol=ATOL)
        torch.testing.assert_close(gradient, slope, rtol=0, atol=ATOL)
        phase = "backward" if op == "f" else "forward"
        assert ledger.count() == ledger.count("all_reduce", phase) == (tp > 1)
        assert ledger.elements() == (35 if tp > 1 else 0)


def pieces(device, op, dim, contiguous):
    "scatter: a shared x. gather: a shared incoming gradient. The other of the two differs."
    size = dist.get_world_size()
    shape = [3, 5, 2]
    shape[dim] = 3 * size
    whole, piece = draw(0, *shape), draw(1 + dist.get_rank(), *shape).chunk(size, dim)[0]
    x, grad = (whole, piece) if op == "scatter" else (piece, whole)
    x, grad = x.clone().to(device), grad.clone().to(device)
    if not contiguous:
        x, grad = strided(x), strided(grad)
    mapping = {"scatter": scatter_to_tp, "gather": gather_from_tp}[op]
    return one_pass(lambda x: mapping(x, group(), dim), x, grad)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("op", ["scatter", "gather"])
@pytest.mark.parametrize("tp", SIZES)
def test_scatter_and_gather_undo_each_other(ranks, device, tp, op, dim, contiguous):
    answers = ranks(tp)(pieces, device, op, dim, contiguous)
    shape = [3, 5, 2]
    shape[dim] = 3 * tp
    whole = draw(0, *shape)
    joined = torch.cat([draw(1 + rank, *shape).chunk(tp, dim)[0] for rank in range(tp)], dim)
    for rank, (y, gradient, ledger) in enumerate(answers):
        own = whole.chunk(tp, dim)[rank]
        value, slope = (own, joined) if op == "scatter" else (joined, own)
        assert torch.equal(y, value) and torch.equal(gradient, slope)
        phase = "backward" if op == "scatter" else "forward"
        assert ledger.count() == ledger.count("all_gather", phase) == (tp > 1)
        assert ledger.elements() == (whole.numel() if tp > 1 else 0)


def joint_difference(loss, x, shared, step=1e-6):
    "Central differences of a loss that all ranks compute; one rank moves, or all if x is shared."
    slope = torch.zeros_like(x)
    for mover in range(1 if shared else dist.get_world_size()):
        moves = shared or mover == dist.get_rank()
        for i in range(x.numel()):
            move = torch.zeros_like(x)
            move[i] = step * moves
            slope[i] += moves * (loss(x + move) - loss(x - move)) / (2 * step)
    return slope


def replicated_loss(op, x):
    "A number that is the same on all ranks, through one of the four mappings."
    factor = 1.0 + dist.get_rank()
    if op == "f":
        return reduce_from_tp((copy_to_tp(x, group()) * factor).sin().sum(), group())
    if op == "g":
        return reduce_from_tp((x * factor).sin(), group()).square().sum()
    if op == "scatter":
        return reduce_from_tp((scatter_to_tp(x, group()) * factor).sin().sum(), group())
    return gather_from_tp((x * factor).sin(), group()).square().sum()


def difference(op, device):
    shared = op in ("f", "scatter")
    x = draw(0 if shared else dist.get_rank(), dist.get_world_size()).to(device).requires_grad_()
    loss = replicated_loss(op, x)
    loss.backward()
    with torch.no_grad():
        slope = joint_difference(lambda x: replicated_loss(op, x), x, shared)
    return loss.item(), (x.grad - slope).abs().max().item(), slope.abs().max().item()


@pytest.mark.parametrize("op", ["f", "g", "scatter", "gather"])
@pytest.mark.parametrize("tp", SIZES)
def test_gradients_are_those_of_joint_finite_differences(ranks, device, tp, op):
    answers = ranks(tp)(difference, op, device)
    assert len({loss for loss, *_ in answers}) == 1
    for _, error, largest in answers:
        assert error < 1e-7 * max(1.0, largest)
        assert largest > 1e-3


WEIGHTS = {         # two MLPs above a replicated scale; stored as (in, out)
    "scale": ((5,), None),
    "A1": ((5, 24), Shard(1)),
    "B1": ((24, 5), Shard(0)),
    "A2": ((5, 24), Shard(1)),
    "B2": ((24, 5), Shard(0)),
}


def stack(group, rank, size, device):
    "Loss and gradients of two MLPs in a row, split over `group`."
    w = {}
    for seed, (name, (shape, rule)) in enumerate(WEIGHTS.items()):
        full = draw(seed, *shape) / 2
        w[name] = full if rule is None else rule.split(full, rank, size).clone()
        w[name] = w[name].to(device).requires_grad_()
    x = draw(100, 2, 3, 5).to(device) * w["scale"]
    for A, B in (("A1", "B1"), ("A2", "B2")):
        x = reduce_from_tp(F.gelu(copy_to_tp(x, group) @ w[A]) @ w[B], group)
    loss = x.square().mean()
    loss.backward()
    return loss.item(), {name: weight.grad.cpu() for name, weight in w.items()}


def sharded_stack(device):
    return stack(group(), dist.get_rank(), dist.get_world_size(), device)


@pytest.mark.parametrize("tp", SIZES)
def test_a_stack_of_blocks_has_the_gradients_of_one_device(ranks, device, tp):
    answers = ranks(tp)(sharded_stack, device)
    want_loss, want = stack(None, 0, 1, "cpu")
    for rank, (loss, gradients) in enumerate(answers):
        assert abs(loss - want_loss) <= ATOL
        for name, (_, rule) in WEIGHTS.items():
            wanted = want[name] if rule is None else rule.split(want[name], rank, tp)
            torch.testing.assert_close(gradients[name], wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_without_a_group_nothing_happens(mapping):
    x = draw(0, 3, 3).requires_grad_()
    with Ledger() as ledger:
        assert mapping(x, None) is x
    assert ledger.records == []


def half(mapping, device):
    x = torch.ones(4, dtype=torch.bfloat16, device=device, requires_grad=True)
    y = mapping(x, group())
    y.sum().backward()
    return y.dtype, x.grad.dtype


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.world(2)
def test_types_stay(ranks, device, mapping):
    for answer in ranks(2)(half, mapping, device):
        assert answer == (torch.bfloat16, torch.bfloat16)


def refused(dim):
    with Ledger() as ledger:
        try:
            scatter_to_tp(torch.ones(4, 7, 10), group(), dim)
        except ValueError as error:
            return str(error), ledger.count()


@pytest.mark.parametrize("tp, dim, size, nearest", [(3, 0, 4, 3), (2, 1, 7, 8), (4, -1, 10, 8)])
def test_a_dim_that_does_not_divide_is_refused_before_any_collective(ranks, tp, dim, size, nearest):
    for message, count in ranks(tp)(refused, dim):
        assert message == (
            f"shape (4, 7, 10), dim {dim}: size={size} does not divide among {tp} "
            f"tensor-parallel ranks; the nearest that does is {nearest}"
        )
        assert count == 0


def both_ways(device):
    "A region's two operators and the halves for functions that are more, on the same numbers."
    region, (x, grad) = Region(group()), (draw(seed + dist.get_rank(), 5, 7) for seed in (0, 10))
    x, grad = x.to(device).requires_grad_(), grad.to(device)
    entered, left = region.enter(x), region.leave(x)
    (slope,) = torch.autograd.grad(entered, x, grad)
    same = torch.equal(slope, region.enter_backward(grad.clone()).wait())
    same &= torch.equal(left, region.leave_forward(x.detach().clone()))
    return same, region.size, left.detach().cpu()


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_a_region_enters_by_f_and_leaves_by_g(ranks, device, tp):
    want = sum(draw(rank, 5, 7) for rank in range(tp))
    for same, size, left in ranks(tp)(both_ways, device):
        assert same and size == tp
        torch.testing.assert_close(left, want, rtol=0, atol=ATOL)


LAYERS = [
    (ColumnParallelLinear, (4, 4)),
    (RowParallelLinear, (4, 4)),
    (VocabParallelEmbedding, (4, 4)),
    (Region, (None,)),
]


@pytest.mark.parametrize("kind, sizes", LAYERS)
def test_a_split_along_the_sequence_is_refused_until_it_does_something(kind, sizes):
    kind(*sizes, sequence_split=False)
    with pytest.raises(ValueError, match="^sequence_split=True: .* whole sequence.* pass False$"):
        kind(*sizes, sequence_split=True)
