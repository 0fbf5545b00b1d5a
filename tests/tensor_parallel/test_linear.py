"""Column and row linears against `nn.Linear`: values, gradients, types, and what is sent."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron_edu.comm import Ledger, group_rank, group_size
from megatron_edu.mesh import ParallelDims
from megatron_edu.tensor_parallel import mappings
from megatron_edu.tensor_parallel.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_linear,
)
from megatron_edu.tensor_parallel.mappings import Region, copy_to_tp, reduce_from_tp
from megatron_edu.tensor_parallel.shard import Shard, gather_tensors, shard_state_dict

ATOL = 1e-10
SIZES = [1, 2, 3, 4, 8]
WIDTH = 72                      # the cut size: divides by 1, 2, 3, 4 and 8, also in 3 blocks
INPUTS = {                      # leading dims of the input, and whether its memory is contiguous
    "1d": ((), True),
    "2d": ((5,), True),
    "3d": ((2, 5), True),
    "2d strided": ((5,), False),
    "3d strided": ((2, 5), False),
    "no rows": ((0,), True),
}


def draw(seed: int, *shape: int) -> torch.Tensor:
    "The same numbers on every rank that asks with the same seed."
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def strided(x: torch.Tensor) -> torch.Tensor:
    "The same numbers in memory that is not contiguous."
    return torch.stack([x, x], dim=-1)[..., 0]


def build(kind: str, bias: bool, group, **options) -> nn.Module:
    "A layer that cuts WIDTH; the other size is 7."
    sizes = (7, WIDTH) if kind == "column" else (WIDTH, 7)
    layer = ColumnParallelLinear if kind == "column" else RowParallelLinear
    return layer(*sizes, bias, group=group, **options).double()


def full_state(kind: str, bias: bool) -> dict[str, torch.Tensor]:
    out, inn = (WIDTH, 7) if kind == "column" else (7, WIDTH)
    return {"weight": draw(1, out, inn)} | ({"bias": draw(2, out)} if bias else {})


@cache
def tp_group(device):
    "The tensor-parallel group of the whole world; None for one rank."
    return ParallelDims(tp=dist.get_world_size()).build(device).tp_group


def local(x: torch.Tensor, whole: bool, group, blocks: int = 1) -> torch.Tensor:
    "This rank's columns, unless the layer takes or gives whole ones."
    if whole:
        return x.clone()
    return Shard(x.dim() - 1, blocks).split(x, group_rank(group), group_size(group)).clone()


def run(kind, bias, lead, contiguous, whole, blocks, device):
    """One step of a layer on this rank; the loss is a fixed weighting of its output.

    `whole`: with gather_output (column), or without input_is_parallel (row).
    """
    group = tp_group(device)
    switch = {"gather_output": whole, "blocks": blocks}
    options = switch if kind == "column" else {"input_is_parallel": not whole}
    layer = build(kind, bias, group, **options).to(device)
    layer.load_state_dict(shard_state_dict(full_state(kind, bias), layer))
    full_x = draw(3, *lead, 7 if kind == "column" else WIDTH)
    x = local(full_x, kind == "column" or whole, group)
    weights = draw(4, *lead, WIDTH if kind == "column" else 7)
    weights = local(weights, kind == "row" or whole, group, blocks)
    if not contiguous:
        x, weights = strided(x), strided(weights)
    x, weights = x.to(device).requires_grad_(), weights.to(device)
    with Ledger() as ledger:
        y = layer(x)
        y.backward(weights)
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    gradients = gather_tensors(gradients, layer)
    answer = {"output": y.detach(), "input": x.grad, **gradients}
    return {name: tensor.cpu() for name, tensor in answer.items()}, ledger


def on_one_device(kind, bias, lead):
    layer = nn.Linear(*((7, WIDTH) if kind == "column" else (WIDTH, 7)), bias).double()
    layer.load_state_dict(full_state(kind, bias))
    x = draw(3, *lead, layer.in_features).requires_grad_()
    y = layer(x)
    y.backward(draw(4, *lead, layer.out_features))
    return {"output": y.detach(), "input": x.grad} | {
        name: p.grad for name, p in layer.named_parameters()
    }


def assert_equals_one_device(answers, kind, bias, lead, whole, blocks, tp):
    want = on_one_device(kind, bias, lead)
    for rank, (got, _) in enumerate(answers):
        own = Shard(len(lead), blocks)
        expected = dict(want)
        if kind == "column" and not whole:
            expected["output"] = own.split(want["output"], rank, tp)
        if kind == "row" and not whole:
            expected["input"] = own.split(want["input"], rank, tp)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=ATOL)


@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("tp", SIZES)
def test_layer_is_nn_linear(ranks, device, tp, kind, form):
    lead, contiguous = INPUTS[form]
    answers = ranks(tp)(run, kind, True, lead, contiguous, False, 1, device)
    assert_equals_one_device(answers, kind, True, lead, False, 1, tp)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("tp", [1, 2, 3, 8])
def test_bias_and_switches(ranks, device, tp, kind, whole, bias):
    answers = ranks(tp)(run, kind, bias, (2, 5), True, whole, 1, device)
    assert_equals_one_device(answers, kind, bias, (2, 5), whole, 1, tp)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("tp", SIZES)
def test_three_fused_blocks(ranks, device, tp, whole):
    answers = ranks(tp)(run, "column", True, (2, 5), True, whole, 3, device)
    assert_equals_one_device(answers, "column", True, (2, 5), whole, 3, tp)


ROWS = 10       # b x s of every counted step
COUNTS = {      # (kind, whole): (op, phase) and elements of each collective, in order
    ("column", False): [("all_reduce", "backward", ROWS * 7)],
    ("column", True): [
        ("all_gather", "forward", ROWS * WIDTH),
        ("all_reduce", "backward", ROWS * 7),
    ],
    ("row", False): [("all_reduce", "forward", ROWS * 7)],
    ("row", True): [
        ("all_reduce", "forward", ROWS * 7),
        ("all_gather", "backward", ROWS * WIDTH),
    ],
}


@pytest.mark.parametrize("kind, whole", COUNTS)
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_collectives_are_counted(ranks, device, tp, kind, whole):
    for _, ledger in ranks(tp)(run, kind, True, (2, 5), True, whole, 1, device):
        records = [(r.op, r.phase, r.elements) for r in ledger.records]
        assert records == (COUNTS[kind, whole] if tp > 1 else [])
        assert {(r.axis, r.dtype) for r in ledger.records} <= {("tp", "float64")}
        assert ledger.bytes() == 8 * ledger.elements()


class MLP(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class ColumnV1(ColumnParallelLinear):
    "f, then a linear layer: the definition."

    def forward(self, x):
        return F.linear(copy_to_tp(x, self.group), self.weight, self.bias)


class RowV1(RowParallelLinear):
    "A linear layer, then g, then the bias: the definition."

    def forward(self, x):
        return reduce_from_tp(F.linear(x, self.weight), self.group) + self.bias


def mlp_state() -> dict[str, torch.Tensor]:
    shapes = {"up.weight": (WIDTH, 7), "up.bias": (WIDTH,), "down.weight": (7, WIDTH)}
    shapes["down.bias"] = (7,)
    return {name: draw(seed, *shape) / 4 for seed, (name, shape) in enumerate(shapes.items())}


def mlp_step(column, row, times, device):
    "`times` passes through one MLP: the same layers, used again on their own output."
    group = tp_group(device)
    model = MLP(column(7, WIDTH, group=group), row(WIDTH, 7, group=group)).double().to(device)
    model.load_state_dict(shard_state_dict(mlp_state(), model))
    x = draw(9, 2, 5, 7).to(device).requires_grad_()
    y = x
    with Ledger() as ledger:
        for _ in range(times):
            y = model(y)
        y.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    answer = {"output": y.detach(), "input": x.grad, **gather_tensors(gradients, model)}
    return {name: tensor.cpu() for name, tensor in answer.items()}, ledger


def mlp_on_one_device(times):
    model = MLP(nn.Linear(7, WIDTH), nn.Linear(WIDTH, 7)).double()
    model.load_state_dict(mlp_state())
    x = draw(9, 2, 5, 7).requires_grad_()
    y = x
    for _ in range(times):
        y = model(y)
    y.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"output": y.detach(), "input": x.grad, **gradients}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("tp", SIZES)
def test_the_pair_needs_one_f_and_one_g_for_each_use(ranks, device, tp, times):
    want = mlp_on_one_device(times)
    for got, ledger in ranks(tp)(mlp_step, ColumnParallelLinear, RowParallelLinear, times, device):
        for name, wanted in want.items():
            torch.testing.assert_close(got[name], wanted, rtol=0, atol=ATOL)
        for phase in ("forward", "backward"):
            assert ledger.count(phase=phase) == (times if tp > 1 else 0)
            assert ledger.elements(phase=phase) == (times * ROWS * 7 if tp > 1 else 0)


@pytest.mark.parametrize("tp", [2, 3])
def test_fused_layers_are_their_definition(ranks, device, tp):
    fused = ranks(tp)(mlp_step, ColumnParallelLinear, RowParallelLinear, 1, device)
    plain = ranks(tp)(mlp_step, ColumnV1, RowV1, 1, device)
    for (got, ledger), (want, recorded) in zip(fused, plain):
        assert ledger.records == recorded.records
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=ATOL)


class Noted(torch.utils._python_dispatch.TorchDispatchMode):
    "Takes notes of matrix products and copies."

    NAMES = {torch.ops.aten.mm: "product", torch.ops.aten.bmm: "product"}
    NAMES |= {torch.ops.aten.addmm: "product", torch.ops.aten.clone: "copy"}

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in self.NAMES:
            self.events.append(self.NAMES[function.overloadpacket])
        return function(*args, **(kwargs or {}))


def order_of_the_backward_pass(device):
    "Which comes first, with `all_reduce_start` and its `wait` replaced by ones that take notes."
    events = []
    start = mappings.all_reduce_start

    class Waiting:
        def __init__(self, pending):
            self.pending = pending

        def wait(self):
            events.append("wait")
            return self.pending.wait()

    def noted_start(x, group):
        events.append("start")
        return Waiting(start(x, group))

    group = dist.group.WORLD
    x = draw(0, 5, 7).to(device).requires_grad_()
    weight = draw(1, WIDTH // group.size(), 7).to(device).requires_grad_()
    y = column_linear(x, weight, None, Region(group))
    mappings.all_reduce_start = noted_start
    try:
        with Noted(events):
            y.backward(torch.ones_like(y))
    finally:
        mappings.all_reduce_start = start
    return events


@pytest.mark.world(2)
def test_the_sum_travels_while_the_weights_gradient_is_computed(ranks, device):
    for events in ranks(2)(order_of_the_backward_pass, device):
        assert events == ["product", "start", "product", "wait"]


def without_gradients(kind, needs_x, needs_weight, device):
    group = tp_group(device)
    layer = build(kind, True, group).to(device)
    layer.weight.requires_grad_(needs_weight)
    x = draw(3, 5, layer.weight.shape[1]).to(device).requires_grad_(needs_x)
    products = []
    with Ledger() as ledger:
        y = layer(x).sum()
        with Noted(products):
            y.backward()
    given = (x.grad is not None, layer.weight.grad is not None, layer.bias.grad is not None)
    return given, products.count("product"), ledger.count(phase="backward")


@pytest.mark.parametrize("needs_weight", [True, False])
@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.world(2)
def test_gradients_nobody_wants_are_neither_computed_nor_sent(
    ranks, device, kind, needs_x, needs_weight
):
    answers = ranks(2)(without_gradients, kind, needs_x, needs_weight, device)
    for given, products, count in answers:
        assert given == (needs_x, needs_weight, True)
        assert products == needs_x + needs_weight
        assert count == (kind == "column" and needs_x)


def copies_of_the_forward_pass(device):
    "Notes of a row layer without bias: what it does to its partial sums."
    events, group = [], tp_group(device)
    layer = build("row", False, group).to(device)
    x = draw(3, 5, layer.weight.shape[1]).to(device)
    with Noted(events):
        layer(x)
    return events


@pytest.mark.world(2)
def test_partial_sums_are_added_up_in_place(ranks, device):
    assert ranks(2)(copies_of_the_forward_pass, device) == [["product"]] * 2


def steps_of_one_rank(kind, device):
    "How the result came about: the layer with a group of one, and PyTorch's function."
    layer = build(kind, True, dist.group.WORLD).to(device)
    x = draw(3, 5, layer.weight.shape[1]).to(device)
    return layer(x).grad_fn.name(), F.linear(x, layer.weight, layer.bias).grad_fn.name()


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.world(1)
def test_a_group_of_one_rank_takes_the_short_way(ranks, device, kind):
    for mine, its in ranks(1)(steps_of_one_rank, kind, device):
        assert mine == its


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_without_a_group_it_is_nn_linear_bit_for_bit(kind, bias):
    layer = build(kind, bias, None)
    twin = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias).double()
    twin.load_state_dict(layer.state_dict())
    xs = [draw(3, 2, 5, twin.in_features).requires_grad_() for _ in range(2)]
    with Ledger() as ledger:
        for each, x in zip((layer, twin), xs):
            each(x).square().sum().backward()
    assert ledger.records == [] and layer.state_dict().keys() == twin.state_dict().keys()
    assert torch.equal(layer(xs[0]), twin(xs[0])) and torch.equal(xs[0].grad, xs[1].grad)
    for mine, its in zip(layer.parameters(), twin.parameters()):
        assert torch.equal(mine.grad, its.grad)


def precision(dtype, autocast, device):
    "Relative errors against float64, and the types, of an MLP in half or single precision."
    group = tp_group(device)
    up, down = ColumnParallelLinear(7, WIDTH, group=group), RowParallelLinear(WIDTH, 7, group=group)
    model = MLP(up, down).to(device)
    model.load_state_dict(shard_state_dict(mlp_state(), model))
    model.to(torch.float32 if autocast else dtype)
    x = draw(9, 2, 5, 7).to(device, torch.float32 if autocast else dtype).requires_grad_()
    with Ledger() as ledger, torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        middle = model.up(x)
        y = model(x)
    y.double().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    answer = {"output": y.detach(), "input": x.grad, **gather_tensors(gradients, model)}
    wire = {r.dtype for r in ledger.records}
    slopes = {tensor.dtype for name, tensor in answer.items() if name != "output"}
    types = (middle.dtype, y.dtype, slopes, wire)
    return {name: tensor.double().cpu() for name, tensor in answer.items()}, types


BOUNDS = {      # largest error of any tensor, over its own largest element
    ("float32", False): 2e-6,
    ("bfloat16", False): 3e-2,
    ("bfloat16", True): 3e-2,
}


@pytest.mark.parametrize("name, autocast", BOUNDS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_single_and_half_precision(ranks, device, tp, name, autocast):
    dtype = getattr(torch, name)
    want = mlp_on_one_device(1)
    for got, types in ranks(tp)(precision, dtype, autocast, device):
        gradient_type = torch.float32 if autocast else dtype
        assert types == (dtype, dtype, {gradient_type}, {name} if tp > 1 else set())
        for key, wanted in want.items():
            error = (got[key] - wanted).abs().max() / wanted.abs().max()
            assert error <= BOUNDS[name, autocast], key


def doubles_under_autocast(device):
    x, weight, bias = draw(0, 2, 7).to(device), draw(1, 3, 7).to(device), draw(2, 3).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = column_linear(x, weight, bias, Region(dist.group.WORLD))
        return y.dtype, F.linear(x, weight, bias).dtype


@pytest.mark.world(2)
def test_autocast_leaves_float64_alone_as_it_does_in_pytorch(ranks, device):
    assert ranks(2)(doubles_under_autocast, device) == [(torch.float64, torch.float64)] * 2


def refused(layer, *sizes, **options):
    try:
        layer(*sizes, group=dist.group.WORLD, **options)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "layer, sizes, blocks, what, nearest",
    [
        (ColumnParallelLinear, (6, 25), 1, "out_features=25", 24),
        (ColumnParallelLinear, (6, 23), 1, "out_features=23", 24),
        (ColumnParallelLinear, (6, 20), 3, "out_features=20", 24),
        (ColumnParallelLinear, (6, 16), 3, "out_features=16", 12),
        (RowParallelLinear, (25, 6), 1, "in_features=25", 24),
    ],
)
@pytest.mark.world(4)
def test_sizes_that_do_not_divide(ranks, layer, sizes, blocks, what, nearest):
    options = {"blocks": blocks} if blocks > 1 else {}
    for message in ranks(4)(refused, layer, *sizes, **options):
        assert message.startswith(f"{what} does not divide ")
        assert "among 4 tensor-parallel ranks" in message
        assert message.endswith(f"the nearest that does is {nearest}")


def test_blocks_must_divide_without_a_group_too():
    with pytest.raises(ValueError, match="out_features=7 does not divide in 3 equal blocks"):
        ColumnParallelLinear(4, 7, blocks=3)


@pytest.mark.parametrize("kind", ["column", "row"])
def test_initial_weights_have_the_range_of_the_whole_layer(kind):
    torch.manual_seed(0)
    layer = ColumnParallelLinear(400, 50) if kind == "column" else RowParallelLinear(400, 50)
    assert 0.045 < layer.weight.abs().max() <= 0.05         # 1 / sqrt(400)
    assert not layer.bias.any()


def largest_initial_weight(kind):
    torch.manual_seed(0)
    return build(kind, True, dist.group.WORLD).weight.abs().max().item()


@pytest.mark.parametrize("kind, inputs", [("column", 7), ("row", WIDTH)])
@pytest.mark.world(4)
def test_a_slice_too_has_the_range_of_the_whole_layer(ranks, kind, inputs):
    for largest in ranks(4)(largest_initial_weight, kind):
        assert 0.9 * inputs**-0.5 < largest <= inputs**-0.5
