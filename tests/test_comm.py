"""Collectives against plain torch, and the ledger against arithmetic."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from megatron_edu.comm import (
    Ledger,
    Record,
    all_gather,
    all_reduce,
    all_reduce_start,
    broadcast,
    group_rank,
    group_size,
    reduce_scatter,
    ring_bytes,
)

SIZES = [2, 3, 5]  # the parameter is called tp, so that nccl leaves out what has too few GPUs

LAYOUTS = {
    "vector": lambda x: x.flatten(),
    "matrix": lambda x: x.view(30, 4),
    "cube": lambda x: x.view(2, 30, 2),
    "transposed": lambda x: x.view(4, 30).t(),
    "every other column": lambda x: x.view(30, 4)[:, ::2],
    "permuted": lambda x: x.view(2, 2, 30).permute(1, 2, 0),
    "one row many times": lambda x: x[:4].expand(30, 4),
}


def tensor_of(rank: int, layout: str, device: str) -> torch.Tensor:
    "What a rank puts in: 120 numbers of its own, laid out in memory as asked."
    numbers = torch.randn(120, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    return LAYOUTS[layout](numbers.to(device))


def tensors_of(size: int, layout: str) -> torch.Tensor:
    return torch.stack([tensor_of(rank, layout, "cpu") for rank in range(size)])


def dim_of_30(x: torch.Tensor) -> int:
    "The dim that 2, 3 and 5 ranks divide."
    return [dim for dim, length in enumerate(x.shape) if length % 30 == 0][0]


def check(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(results) == len(expected)
    for result, want in zip(results, expected):
        torch.testing.assert_close(result, want, rtol=0, atol=1e-10)


def collective(call, layout: str, device: str) -> torch.Tensor:
    "Run one collective on this rank's tensor. The tensor must be what it was."
    x = tensor_of(dist.get_rank(), layout, device)
    before, strides = x.clone(), x.stride()
    result = call(x, dist.group.WORLD)
    assert torch.equal(x, before) and x.stride() == strides
    assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    return result.cpu()


# Results


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["sum", "max"])
def test_all_reduce(ranks, device, tp, layout, op):
    results = ranks(tp)(collective, lambda x, group: all_reduce(x, group, op), layout, device)
    everything = tensors_of(tp, layout)
    total = everything.sum(0) if op == "sum" else everything.amax(0)
    check(results, [total] * tp)


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_reduce_in_place_gives_the_sum_for_any_layout(ranks, device, tp, layout):
    def in_place():
        x = tensor_of(dist.get_rank(), layout, device)
        return all_reduce(x, dist.group.WORLD, inplace=True).cpu()

    check(ranks(tp)(in_place), [tensors_of(tp, layout).sum(0)] * tp)


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_reduce_start_gives_the_sum_at_wait(ranks, device, tp, layout):
    def started():
        first = all_reduce_start(tensor_of(dist.get_rank(), layout, device), dist.group.WORLD)
        second = all_reduce_start(torch.ones(3, device=device), dist.group.WORLD, "max")
        torch.ones(50, 50, device=device) @ torch.ones(50, 50, device=device)
        return first.wait().cpu(), second.wait().cpu()

    sums, ones = zip(*ranks(tp)(started))
    check(sums, [tensors_of(tp, layout).sum(0)] * tp)
    check(ones, [torch.ones(3)] * tp)


@pytest.mark.parametrize("tp", SIZES)
def test_all_reduce_of_a_scalar(ranks, device, tp):
    def scalar():
        return all_reduce(torch.tensor(2.0, device=device), dist.group.WORLD).cpu()

    check(ranks(tp)(scalar), [torch.tensor(2.0 * tp)] * tp)


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, -1])
def test_all_gather(ranks, device, tp, layout, dim):
    results = ranks(tp)(collective, lambda x, group: all_gather(x, group, dim), layout, device)
    pieces = [tensor_of(rank, layout, "cpu") for rank in range(tp)]
    check(results, [torch.cat(pieces, dim)] * tp)


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reduce_scatter(ranks, device, tp, layout):
    everything = tensors_of(tp, layout)
    dim = dim_of_30(everything[0])
    call = lambda x, group: reduce_scatter(x, group, dim)  # noqa: E731
    results = ranks(tp)(collective, call, layout, device)
    check(results, list(everything.sum(0).chunk(tp, dim)))


@pytest.mark.parametrize("tp", SIZES)
def test_all_reduce_is_reduce_scatter_and_all_gather(ranks, device, tp):
    def halves(x, group):
        return all_gather(reduce_scatter(x, group, dim=0), group, dim=0)

    results = ranks(tp)(collective, halves, "matrix", device)
    check(results, ranks(tp)(collective, all_reduce, "matrix", device))


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one row many times"])
def test_broadcast_overwrites_all_but_the_source(ranks, device, tp, layout):
    def from_src(src):
        x = tensor_of(dist.get_rank(), layout, device)
        assert broadcast(x, dist.group.WORLD, src) is x
        return x.cpu()

    for src in range(tp):
        check(ranks(tp)(from_src, src), [tensor_of(src, layout, "cpu")] * tp)


@pytest.mark.world(4)
def test_the_source_of_a_broadcast_is_a_place_in_the_group(ranks, device):
    def from_second_of_pair():
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        mine = pairs[dist.get_rank() // 2]
        x = torch.tensor([dist.get_rank()], device=device)
        return broadcast(x, mine, src=1).item(), group_rank(mine), group_size(mine)

    assert ranks(4)(from_second_of_pair) == [(1, 0, 2), (1, 1, 2), (3, 0, 2), (3, 1, 2)]


@pytest.mark.parametrize("tp", [2])
def test_no_gradient_passes_and_none_is_promised(ranks, device, tp):
    def requires_grad():
        world = dist.group.WORLD
        x = torch.ones(4, device=device, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results = [call(2 * x, world) for call in (all_reduce, all_gather, reduce_scatter)]
        return [result.requires_grad for result in results]

    assert ranks(tp)(requires_grad) == [[False] * 3] * tp


@pytest.mark.world(4)
def test_pieces_that_are_not_equal_are_refused(ranks, device):
    def uneven():
        with pytest.raises(ValueError) as caught:
            reduce_scatter(torch.ones(2, 6, device=device), dist.group.WORLD, dim=1)
        return str(caught.value)

    for message in ranks(4)(uneven):
        for words in ("dim 1 has 6 elements", "4 ranks", "pad it to 8"):
            assert words in message


# One rank


def calls_of_one(group) -> tuple[list[bool], int]:
    "Which functions hand back the very same tensor, and how many collectives they made."
    x = torch.ones(5)
    with Ledger() as ledger:
        results = [call(x, group) for call in (all_reduce, all_gather, reduce_scatter, broadcast)]
        results.append(all_reduce_start(x, group).wait())
        results.append(all_reduce(x, group, "max", inplace=True))
    return [result is x for result in results], ledger.count()


def test_without_a_group_nothing_is_called():
    assert calls_of_one(None) == ([True] * 6, 0)
    assert (group_size(None), group_rank(None)) == (1, 0)
    assert not dist.is_initialized()


@pytest.mark.parametrize("tp", [2])
def test_a_group_of_one_calls_nothing(ranks, tp):
    def own_group():
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        return calls_of_one(alone[dist.get_rank()])

    assert ranks(tp)(own_group) == [([True] * 6, 0)] * tp


# The ledger


def one_of_each(device: str) -> Ledger:
    world = dist.group.WORLD
    with Ledger() as ledger:
        all_reduce(torch.ones(3, 5, device=device, dtype=torch.float64), world)
        all_reduce_start(torch.ones(7, device=device, dtype=torch.bfloat16), world).wait()
        all_gather(torch.ones(4, 2, device=device), world, dim=0)
        reduce_scatter(torch.ones(12, device=device), world)
        broadcast(torch.ones(6, device=device, dtype=torch.int64), world)
    all_reduce(torch.ones(1, device=device), world)
    return ledger


@pytest.mark.parametrize("tp", [2, 3])
def test_the_ledger_records_the_whole_tensor(ranks, device, tp):
    for ledger in ranks(tp)(one_of_each, device):
        assert ledger.records == [
            Record("all_reduce", "world", "float64", 15, 120, "forward", tp),
            Record("all_reduce", "world", "bfloat16", 7, 14, "forward", tp),
            Record("all_gather", "world", "float32", 8 * tp, 32 * tp, "forward", tp),
            Record("reduce_scatter", "world", "float32", 12, 48, "forward", tp),
            Record("broadcast", "world", "int64", 6, 48, "forward", tp),
        ]


@pytest.mark.parametrize("tp", [2])
def test_the_ledger_counts_what_is_asked_for(ranks, device, tp):
    ledger = ranks(tp)(one_of_each, device)[0]
    assert ledger.count() == 5 and ledger.count("all_reduce") == 2
    assert ledger.count(axis="tp") == 0 and ledger.count(axis="world", phase="forward") == 5
    assert ledger.elements() == 15 + 7 + 16 + 12 + 6 and ledger.elements("broadcast") == 6
    assert ledger.bytes("all_reduce", phase="forward") == 134
    assert ledger.bytes(phase="backward") == 0
    assert [r.op for r in ledger.select(op="all_gather")] == ["all_gather"]


@pytest.mark.parametrize("tp", [2, 4])
def test_the_ledger_knows_what_went_over_the_wire(ranks, device, tp):
    part = (tp - 1) / tp        # of a tensor in each walk around the ring
    for ledger in ranks(tp)(one_of_each, device):
        assert ledger.wire("all_reduce") == 2 * part * 134
        assert ledger.wire("all_gather") == part * 32 * tp
        assert ledger.wire() == part * (2 * 134 + 32 * tp + 48 + 48)
        assert ledger.wire(phase="backward") == ledger.wire(axis="tp") == 0


def test_the_table_joins_equal_records():
    small = Record("all_reduce", "tp", "float32", 1000, 4000, "forward", 4)
    large = Record("all_reduce", "tp", "float32", 2_000_000, 8_000_000, "backward", 4)
    heads, first, second = Ledger([small, large, small]).table().splitlines()
    assert heads.split() == ["phase", "op", "axis", "dtype", "elements", "bytes", "wire", "times"]
    assert first.split()[3:] == ["float32", "1,000", "4,000", "6,000", "2"]
    assert second.split()[-4:] == ["2,000,000", "8,000,000", "12,000,000", "1"]
    assert len(heads) == len(first) == len(second)


@pytest.mark.parametrize("tp", [2])
def test_nested_ledgers_each_keep_their_own(ranks, device, tp):
    def nested():
        x, world = torch.ones(2, device=device), dist.group.WORLD
        with Ledger() as outer:
            with Ledger() as inner:
                all_reduce(x, world)
            all_reduce(x, world)
        all_reduce(x, world)
        return outer.count(), inner.count()

    assert ranks(tp)(nested) == [(2, 1)] * tp


@pytest.mark.parametrize("tp", [2])
def test_a_ledger_is_closed_by_an_error(ranks, device, tp):
    def failing():
        ledger = Ledger()
        with pytest.raises(KeyError), ledger:
            raise KeyError
        all_reduce(torch.ones(2, device=device), dist.group.WORLD)
        return ledger.count()

    assert ranks(tp)(failing) == [0] * tp


class Both(torch.autograd.Function):
    "An all-reduce of 3 elements forward and one of 3 elements backward."

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x, dist.group.WORLD)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, dist.group.WORLD)


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_ledger_tells_forward_from_backward(ranks, device, tp, recompute):
    def passes():
        def square(x):
            return Both.apply(x) ** 2

        x = torch.ones(3, device=device, requires_grad=True)
        with Ledger() as ledger:
            y = checkpoint(square, x, use_reentrant=False) if recompute else square(x)
            y.sum().backward()
        return ledger, x.grad.cpu()

    for ledger, grad in ranks(tp)(passes):
        assert ledger.count(phase="forward") == 1
        assert ledger.elements(phase="backward") == (6 if recompute else 3)
        torch.testing.assert_close(grad, torch.full((3,), 2.0 * tp * tp))


# Cost on a ring


def sent_on_a_ring(size: int, steps: int, elements: int) -> list[int]:
    "Elements that each rank sends when it passes on one chunk a step."
    chunks = [len(chunk) for chunk in torch.arange(elements).tensor_split(size)]
    return [sum(chunks[(rank - step) % size] for step in range(steps)) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 512])
def test_ring_bytes_are_those_of_a_ring(size):
    elements = 4 * size
    for op, steps in {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}.items():
        sent = sent_on_a_ring(size, steps * (size - 1), elements)
        assert sent == [ring_bytes(op, elements, size)] * size
    assert ring_bytes("broadcast", elements, size) * size == elements * (size - 1)


def test_a_collective_with_a_wrong_name_has_no_cost():
    with pytest.raises(KeyError, match="all-reduce"):
        ring_bytes("all-reduce", 1, 2)
