"""Output layer and loss in one, against `F.linear` and `F.cross_entropy`, on up to eight ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from vocab_cases import (
    PADDED,
    SIZES,
    VOCAB,
    assert_equal_everywhere,
    close,
    group_of,
    integers,
    message,
    normal,
    rank_of,
)

from megatron_edu.comm import Ledger
from megatron_edu.tensor_parallel import fused_loss
from megatron_edu.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_edu.tensor_parallel.fused_loss import linear_cross_entropy
from megatron_edu.tensor_parallel.mappings import copy_to_tp

widths = pytest.mark.parametrize("tp", SIZES)
HIDDEN = 7


class Chunks:
    "Another number of rows a chunk, for as long as the block lasts."

    def __init__(self, rows):
        self.rows = rows

    def __enter__(self):
        self.before, fused_loss.CHUNK = fused_loss.CHUNK, self.rows

    def __exit__(self, *exception):
        fused_loss.CHUNK = self.before


def step(tp, device, x, weight, targets, weights, *, scale=0.3, chunk=4, steps=1, layout=None,
         autocast=False, frozen=(), vocab_size=VOCAB):
    "Loss, both gradients of scale x loss, and what was communicated."
    layout = layout or torch.clone
    x = layout(x.to(device)).detach().requires_grad_("x" not in frozen)
    weight = layout(weight.chunk(tp)[rank_of(tp)].to(device)).detach()
    weight.requires_grad_("weight" not in frozen)
    targets, weights = targets.to(device), weights.to(device)
    options = {"group": group_of(tp), "vocab_size": vocab_size}
    with Chunks(chunk), Ledger() as ledger:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(x, weight, targets, weights, **options)
        for _ in range(steps):
            (scale * loss).backward(retain_graph=True)
    gradients = [None if t.grad is None else t.grad.cpu() for t in (x, weight)]
    return loss.detach().cpu(), *gradients, ledger.records


def reference(x, weight, targets, weights, scale=0.3):
    "On one device, with the padding rows cut off."
    x, weight = (t.double().clone().requires_grad_() for t in (x, weight))
    logits = F.linear(x, weight[:VOCAB]).reshape(-1, VOCAB)
    counted = targets.where(weights != 0, -100).flatten()
    losses = F.cross_entropy(logits, counted, reduction="none")
    loss = (losses * weights.flatten()).sum()
    (scale * loss).backward()
    return loss.detach(), x.grad, weight.grad


def batch(*shape, scale=1.0):
    "Input and rows of the output layer, padding in use; targets; weights of which some are 0."
    x, weight = scale * normal(*shape, HIDDEN, seed=1), normal(PADDED, HIDDEN, seed=2)
    weights = normal(*shape, seed=4).abs() * (integers(4, *shape, seed=5) > 0)
    return x, weight, integers(VOCAB, *shape), weights


def changed(data, **changes):
    names = ("x", "weight", "targets", "weights")
    return tuple(changes.get(name, t) for name, t in zip(names, data, strict=True))


def agrees(results, data, scale=0.3, atol=1e-10):
    losses, grad_x, grad_weight, _ = zip(*results, strict=True)
    want_loss, want_x, want_weight = reference(*data, scale=scale)
    assert_equal_everywhere(losses)
    assert_equal_everywhere(grad_x)
    close(losses[0], want_loss, atol)
    close(grad_x[0], want_x, atol)
    close(torch.cat(grad_weight), want_weight, atol)


ONES = torch.ones(3, 11, dtype=torch.float64)
CASES = {
    "random": lambda: batch(3, 11),
    "logits x 1000": lambda: batch(3, 11, scale=1000.0),
    "all count 1": lambda: changed(batch(3, 11), weights=ONES),
    "counted or not, as integers": lambda: changed(batch(3, 11), weights=integers(2, 3, 11)),
    "negative weights": lambda: changed(batch(3, 11), weights=normal(3, 11)),
    "targets outside at weight 0": lambda: changed(
        batch(3, 11), targets=batch(3, 11)[2].where(batch(3, 11)[3] != 0, -100)
    ),
    "nothing counts": lambda: changed(batch(3, 11), weights=0 * ONES),
    "all targets on the first rank": lambda: changed(batch(3, 11), targets=integers(15, 3, 11)),
    "all targets on the last rank with words": lambda: changed(
        batch(3, 11), targets=90 + integers(11, 3, 11)
    ),
    "no row": lambda: batch(2, 0),
    "a single token": lambda: changed(batch(), weights=torch.tensor(2.0, dtype=torch.float64)),
    "three dims": lambda: batch(2, 3, 5),
}


@widths
@pytest.mark.parametrize("case", CASES)
def test_equals_linear_and_cross_entropy(ranks, device, tp, case):
    data = CASES[case]()
    agrees(ranks(tp)(step, tp, device, *data), data)


@widths
def test_nothing_counts_is_zero(ranks, device, tp):
    data = changed(batch(3, 11, scale=1000.0), weights=0 * ONES, targets=torch.full((3, 11), -100))
    for loss, grad_x, grad_weight, _ in ranks(tp)(step, tp, device, *data):
        assert loss == 0 and not grad_x.any() and not grad_weight.any()


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 511, 512, 513, 1025])
def test_rows_around_the_chunk(ranks, device, tp, rows):
    "At the real size of a chunk. The bound grows with the number of terms in a sum."
    data = batch(rows)
    agrees(ranks(tp)(step, tp, device, *data, chunk=512), data)


@widths
@pytest.mark.parametrize("chunk", [1, 10, 11, 12, 33, 34, 1000])
def test_any_chunk(ranks, device, tp, chunk):
    data = batch(3, 11)
    agrees(ranks(tp)(step, tp, device, *data, chunk=chunk), data)


def test_the_chunk_is_as_documented():
    assert fused_loss.CHUNK == 512 and "512" in linear_cross_entropy.__doc__


def both_ways(tp, device, x, weight, targets, weights):
    "Differences to the loss that holds all logits: loss, gradient of x, gradient of the weight."
    found = []
    targets, weights = targets.to(device), weights.to(device)
    for fused in (True, False):
        ours = x.to(device).requires_grad_()
        rows = weight.chunk(tp)[rank_of(tp)].to(device).requires_grad_()
        options = {"group": group_of(tp), "vocab_size": VOCAB}
        if fused:
            with Chunks(4):
                loss = linear_cross_entropy(ours, rows, targets, weights, **options)
        else:
            logits = F.linear(copy_to_tp(ours, group_of(tp)), rows)
            loss = (vocab_parallel_cross_entropy(logits, targets, **options) * weights).sum()
        (loss / 3).backward()
        found.append((loss.detach(), ours.grad, rows.grad))
        ours.grad = None
    return [float((a - b).abs().max()) for a, b in zip(*found, strict=True)]


@widths
def test_equals_the_unfused_loss(ranks, device, tp):
    for differences in ranks(tp)(both_ways, tp, device, *batch(3, 11)):
        assert max(differences) < 1e-12


@widths
def test_loss_does_not_depend_on_padding(ranks, device, tp):
    "With 240 rows on 8 ranks the last four ranks hold nothing but padding."
    x, weight, targets, weights = batch(3, 11)
    more = torch.full((240, HIDDEN), 3.0, dtype=torch.float64)
    more[:VOCAB] = weight[:VOCAB]
    results = ranks(tp)(step, tp, device, x, more, targets, weights)
    agrees(results, (x, more, targets, weights))
    assert not torch.cat([grad for _, _, grad, _ in results])[VOCAB:].any()


@widths
@pytest.mark.parametrize("scale", [1.0, 0.0, -2.5, 1e6])
def test_incoming_gradient(ranks, device, tp, scale):
    data = batch(3, 11)
    results = ranks(tp)(step, tp, device, *data, scale=scale)
    agrees(results, data, scale, atol=1e-10 * max(1, abs(scale)))


@widths
def test_backward_twice(ranks, device, tp):
    data = batch(3, 11)
    results = ranks(tp)(step, tp, device, *data, steps=2)
    want = reference(*data)
    close(results[0][1], 2 * want[1])
    close(torch.cat([grad for _, _, grad, _ in results]), 2 * want[2])


@widths
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_of_the_inputs_is_frozen(ranks, device, tp, frozen):
    data = batch(3, 11)
    results = ranks(tp)(step, tp, device, *data, frozen=[frozen])
    _, grad_x, grad_weight, _ = zip(*results, strict=True)
    _, want_x, want_weight = reference(*data)
    if frozen == "x":
        assert set(grad_x) == {None}
        close(torch.cat(grad_weight), want_weight)
    else:
        assert set(grad_weight) == {None}
        close(grad_x[0], want_x)


def step_with_bias(tp, device, data, bias, *, autocast=False, trained=True):
    "Loss and the gradients of input, weight and bias, and what was communicated."
    x, weight, targets, weights = (t.to(device) for t in data)
    x = x.clone().requires_grad_()
    rows, own = (t.to(device).chunk(tp)[rank_of(tp)].clone() for t in (weight, bias))
    rows.requires_grad_()
    own.requires_grad_(trained)
    options = {"group": group_of(tp), "vocab_size": VOCAB, "bias": own}
    with Chunks(4), Ledger() as ledger, torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(x, rows, targets, weights, **options)
    (0.3 * loss).backward()
    gradients = [None if t.grad is None else t.grad.cpu() for t in (x, rows, own)]
    return loss.detach().cpu(), *gradients, len(ledger.records)


def reference_with_bias(data, bias):
    "On one device: `F.linear` with a bias."
    x, weight, bias = (t.double().clone().requires_grad_() for t in (*data[:2], bias))
    logits = F.linear(x, weight, bias)[..., :VOCAB].reshape(-1, VOCAB)
    losses = F.cross_entropy(logits, data[2].flatten(), reduction="none")
    loss = (losses * data[3].flatten()).sum()
    (0.3 * loss).backward()
    return loss.detach(), x.grad, weight.grad, bias.grad


@widths
def test_bias(ranks, device, tp):
    data, bias = batch(3, 11), normal(PADDED, seed=6)
    results = ranks(tp)(step_with_bias, tp, device, data, bias)
    want = reference_with_bias(data, bias)
    for loss, grad_x, _, _, messages in results:
        close(loss, want[0])
        close(grad_x, want[1])
        assert messages == (9 if tp > 1 else 0), "a bias has no message of its own"
    close(torch.cat([rows for _, _, rows, _, _ in results]), want[2])
    close(torch.cat([own for _, _, _, own, _ in results]), want[3])
    assert want[3][:VOCAB].abs().min() > 1e-4 and not want[3][VOCAB:].any()


@widths
def test_bias_under_autocast(ranks, device, tp):
    data = tuple(t.float() if t.is_floating_point() else t for t in batch(3, 11))
    bias = normal(PADDED, seed=6).float()
    results = ranks(tp)(step_with_bias, tp, device, data, bias, autocast=True)
    want = reference_with_bias(data, bias)
    own = torch.cat([result[3] for result in results])
    assert own.dtype == torch.float32
    assert (own - want[3]).norm() <= 1e-2 * want[3].norm()
    assert abs(results[0][0] - want[0]) <= 1e-2 * want[0]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_frozen_bias_counts_and_has_no_gradient(ranks, device, tp):
    data, bias = batch(3, 11), normal(PADDED, seed=6)
    want = reference_with_bias(data, bias)
    for loss, _, _, own, _ in ranks(tp)(step_with_bias, tp, device, data, bias, trained=False):
        close(loss, want[0])
        assert own is None


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "last dim first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "a slice of more": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@widths
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_in_any_layout(ranks, device, tp, layout):
    data = batch(3, 11)
    agrees(ranks(tp)(step, tp, device, *data, layout=LAYOUTS[layout]), data)


@widths
@pytest.mark.parametrize("chunk", [4, 33, 512])
def test_what_is_communicated(ranks, device, tp, chunk):
    "A chunk gathers two numbers a row from each rank; backward, x's gradient is summed."
    starts = range(0, 33, chunk) if tp > 1 else []
    for *_, records in ranks(tp)(step, tp, device, *batch(3, 11), chunk=chunk):
        forward = [(r.op, r.elements) for r in records if r.phase == "forward"]
        backward = [(r.op, r.elements) for r in records if r.phase == "backward"]
        assert forward == [("all_gather", tp * 2 * min(chunk, 33 - start)) for start in starts]
        assert backward == [("all_reduce", 33 * HIDDEN)] * (tp > 1)


@widths
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_inputs(ranks, device, tp, dtype, bound):
    "The loss is fp32. Errors against the same numbers in float64, as a share of the result's norm."
    x, weight, targets, weights = batch(3, 11)
    data = x.to(dtype), weight.to(dtype), targets, weights.float()
    losses, grad_x, grad_weight, records = zip(*ranks(tp)(step, tp, device, *data), strict=True)
    assert losses[0].dtype == torch.float32
    assert grad_x[0].dtype == grad_weight[0].dtype == dtype
    assert {r.dtype for made in records for r in made if r.phase == "forward"} <= {"float32"}
    results = losses[0], grad_x[0], torch.cat(grad_weight)
    for got, want in zip(results, reference(*data), strict=True):
        assert (got.double() - want).norm() <= bound * want.norm()


@widths
def test_fp32(ranks, device, tp):
    data = tuple(t.float() if t.is_floating_point() else t for t in batch(3, 11))
    losses, grad_x, grad_weight, _ = zip(*ranks(tp)(step, tp, device, *data), strict=True)
    results = losses[0], grad_x[0], torch.cat(grad_weight)
    for got, want in zip(results, reference(*data), strict=True):
        assert got.dtype == torch.float32
        assert (got.double() - want).norm() <= 1e-6 * want.norm()


@widths
def test_a_loss_scale_above_the_range_of_fp16(ranks, device, tp):
    "The scale is 2^17, the scaled gradients fit: they must be finite and right."
    x, weight, targets, weights = batch(3, 11)
    data = x.half(), (weight / 100).half(), targets, (weights / 100).half()
    results = ranks(tp)(step, tp, device, *data, scale=2.0**17)
    want = reference(*data, scale=2.0**17)
    for got, true in ((results[0][1], want[1]), (torch.cat([r[2] for r in results]), want[2])):
        assert got.isfinite().all()
        assert (got.double() - true).norm() <= 1e-2 * true.norm()


@widths
def test_autocast(ranks, device, tp):
    "What bf16 inputs give, bit for bit, but the weight's gradient is not rounded to bf16."
    data = tuple(t.float() if t.is_floating_point() else t for t in batch(3, 11))
    rounded = changed(data, x=data[0].bfloat16(), weight=data[1].bfloat16())
    found = ranks(tp)(step, tp, device, *data, autocast=True)
    wanted = ranks(tp)(step, tp, device, *rounded)
    for (*got, _), (loss, grad_x, grad_weight, _) in zip(found, wanted, strict=True):
        assert {t.dtype for t in got} == {torch.float32}
        assert torch.equal(got[0], loss) and torch.equal(got[1], grad_x.float())
        assert torch.equal(got[2].bfloat16(), grad_weight)
    assert not torch.equal(found[0][2], wanted[0][2].float())


def products(tp, device, x, weight, targets, weights):
    "Losses and operations in matrix products: training, no_grad, inference, nothing to train."
    x = x.to(device).requires_grad_()
    weight = weight.chunk(tp)[rank_of(tp)].to(device).requires_grad_()
    rest = targets.to(device), weights.to(device)
    options = {"group": group_of(tp), "vocab_size": VOCAB}
    losses, counts = [], []
    for guard, inputs in (
        (torch.enable_grad, (x, weight)),
        (torch.no_grad, (x, weight)),
        (torch.inference_mode, (x, weight)),
        (torch.enable_grad, (x.detach(), weight.detach())),
    ):
        with Chunks(4), FlopCounterMode(display=False) as counter, guard():
            losses.append(linear_cross_entropy(*inputs, *rest, **options))
        counts.append(counter.get_total_flops())
    same = all(torch.equal(loss, losses[0]) for loss in losses)
    return same, [loss.requires_grad for loss in losses], counts


@widths
def test_without_gradient_nothing_is_computed_for_it(ranks, device, tp):
    one = 2 * 33 * HIDDEN * PADDED // tp
    for same, needs, (training, *others) in ranks(tp)(products, tp, device, *batch(3, 11)):
        assert same
        assert needs == [True, False, False, False]
        assert training >= 2 * one      # the counter does not see every product that has an `out`
        assert others == [one] * 3


def peak(fn):
    "Most bytes that tensors made by `fn` hold at one time, from the CPU allocator's own log."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        fn()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(sizes.cumsum(0).max())


def test_memory_is_one_chunk_of_logits():
    n, v, h = 2048, 2000, 8
    x, weight = torch.randn(n, h), torch.randn(v, h, requires_grad=True)
    data = x, weight, torch.zeros(n, dtype=torch.int64), torch.ones(n)

    def fused():
        linear_cross_entropy(*data, vocab_size=v).backward()

    def unfused():
        losses = vocab_parallel_cross_entropy(F.linear(data[0], data[1]), data[2])
        (losses * data[3]).sum().backward()

    assert peak(unfused) > 1.9 * n * v * 4
    assert 512 * v * 4 < peak(fused) < 1.2 * 512 * v * 4


def test_the_weights_gradient_is_made_once():
    "The backward pass scales what the forward pass made: no second array of v x h at any time."
    n, v, h = 8, 4000, 100
    x, weight = torch.randn(n, h), torch.randn(v, h, requires_grad=True)
    data = x, weight, torch.zeros(n, dtype=torch.int64), torch.ones(n)
    assert peak(lambda: linear_cross_entropy(*data, vocab_size=v).backward()) < 1.2 * v * h * 4
    assert weight.grad.shape == (v, h)


def refused(tp, x, weight, targets, weights, vocab_size=VOCAB):
    rows = weight.chunk(tp)[rank_of(tp)]
    return message(
        linear_cross_entropy, x, rows, targets, weights, group=group_of(tp), vocab_size=vocab_size
    )


@widths
@pytest.mark.parametrize("wrong", [-1, -100, VOCAB, PADDED - 1, PADDED, 2**40])
def test_targets_out_of_range(ranks, tp, wrong):
    targets, weights = torch.tensor([3, wrong, 5]), torch.tensor([1.0, 0.5, 0.0])
    data = changed(batch(3), targets=targets, weights=weights)
    for said in ranks(tp)(refused, tp, *data):
        assert f"target id {wrong} is out of range" in said
        assert f"from 0 to {VOCAB - 1}" in said and "weight 0" in said


@widths
@pytest.mark.parametrize("vocab_size", [0, -1, PADDED + 1])
def test_vocabulary_that_does_not_fit(ranks, tp, vocab_size):
    for said in ranks(tp)(refused, tp, *batch(3), vocab_size):
        assert f"vocab_size={vocab_size} is not from 1 to {PADDED}" in said


@pytest.mark.parametrize("tp", [1, 2])
def test_shapes_that_do_not_fit(ranks, tp):
    x, weight, targets, weights = batch(11, 3)
    for said in ranks(tp)(refused, tp, x, weight, targets.t(), weights.t()):
        assert "targets have shape (3, 11)" in said and "(11, 3)" in said
    for said in ranks(tp)(refused, tp, x, weight, targets, weights.t()):
        assert "weights have shape (3, 11), targets (11, 3)" in said


def test_one_device_makes_no_collective():
    assert not dist.is_initialized()
    assert step(1, "cpu", *batch(3))[-1] == []


def group_of_one(device, *data):
    x, weight, targets, weights = (t.to(device) for t in data)
    options = {"group": dist.group.WORLD, "vocab_size": VOCAB}
    with Ledger() as ledger:
        loss = linear_cross_entropy(x.requires_grad_(), weight, targets, weights, **options)
        loss.backward()
    return loss.detach().cpu(), ledger.count()


def test_a_group_of_one_makes_no_collective(ranks, device):
    data = batch(3)
    ((loss, count),) = ranks(1)(group_of_one, device, *data)
    close(loss, reference(*data)[0])
    assert count == 0
