"""The vocabulary-parallel cross-entropy against `F.cross_entropy`, on up to eight ranks."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
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
from megatron_edu.tensor_parallel.cross_entropy import (
    vocab_parallel_argmax,
    vocab_parallel_cross_entropy,
)

widths = pytest.mark.parametrize("tp", SIZES)


def step(tp, device, logits, targets, upstream, steps=1, layout=None, **options):
    "Losses, gradient of this rank's columns, whether its logits are intact, what was communicated."
    local = logits.chunk(tp, -1)[rank_of(tp)].to(device)
    local = (layout or torch.clone)(local).detach().requires_grad_()
    before = local.detach().clone()
    options = {"group": group_of(tp), "vocab_size": VOCAB} | options
    with Ledger() as ledger:
        losses = vocab_parallel_cross_entropy(local, targets.to(device), **options)
        for _ in range(steps):
            losses.backward(upstream.to(device), retain_graph=True)
    intact = torch.allclose(local.detach(), before, rtol=0, atol=0, equal_nan=True)
    return losses.detach().cpu(), local.grad.cpu(), intact, ledger.records


def reference(logits, targets, upstream, vocab_size=VOCAB, ignore_index=-100):
    "On one device, with the padding columns cut off."
    logits = logits.double().clone().requires_grad_()
    rows = logits[..., :vocab_size].reshape(-1, vocab_size)
    losses = F.cross_entropy(rows, targets.flatten(), reduction="none", ignore_index=ignore_index)
    losses = losses.view(targets.shape)
    losses.backward(upstream.double())
    return losses.detach(), logits.grad


def joined(gradients):
    return torch.cat(gradients, dim=-1)


def batch(*shape, scale=1.0):
    "Logits with all columns in use, targets, and a gradient that comes in."
    logits = scale * normal(*shape, PADDED, seed=1)
    return logits, integers(VOCAB, *shape, seed=2), normal(*shape, seed=3)


def minus_infinity():
    "Most columns are minus infinity, the target's never."
    logits, targets, upstream = batch(3, 11)
    hidden = integers(4, 3, 11, PADDED) > 0
    hidden = hidden.scatter(-1, targets[..., None], False)
    return logits.masked_fill(hidden, -torch.inf), targets, upstream


def only_one_column():
    "One column a row is not minus infinity: loss 0, gradient 0."
    logits, targets, upstream = batch(3, 11)
    keep = F.one_hot(targets, PADDED).bool()
    return logits.masked_fill(~keep, -torch.inf), targets, upstream


def impossible_target():
    "The target's own logit is minus infinity: its loss is infinite, its gradient is finite."
    logits, targets, upstream = batch(3, 11)
    return logits.scatter(-1, targets[..., None], -torch.inf), targets, upstream


def padding_of(value):
    logits, targets, upstream = batch(3, 11)
    return logits.index_fill(-1, torch.arange(VOCAB, PADDED), value), targets, upstream


def some_ignored(ignore_index=-100):
    logits, targets, upstream = batch(3, 11)
    return logits, targets.masked_fill(integers(3, 3, 11) == 0, ignore_index), upstream


def targets_from(low, high):
    logits, _, upstream = batch(3, 11)
    return logits, low + integers(high - low, 3, 11), upstream


CASES = {
    "random": lambda: batch(3, 11),
    "logits x 1000": lambda: batch(3, 11, scale=1000.0),
    "logits x 1e-8": lambda: batch(3, 11, scale=1e-8),
    "logits + 1e6": lambda: (batch(3, 11)[0] + 1e6, *batch(3, 11)[1:]),
    "huge padding": lambda: padding_of(1e30),
    "NaN padding": lambda: padding_of(torch.nan),
    "minus infinity": minus_infinity,
    "one column left": only_one_column,
    "minus infinity at the target": impossible_target,
    "all targets on the first rank": lambda: targets_from(0, 15),
    "all targets on the last rank with words": lambda: targets_from(90, VOCAB),
    "some ignored": some_ignored,
    "all ignored": lambda: (batch(3, 11)[0], torch.full((3, 11), -100), batch(3, 11)[2]),
    "one row": lambda: batch(1),
    "no row": lambda: batch(2, 0),
    "a single token": lambda: batch(),
    "three dims": lambda: batch(2, 3, 5),
}


@widths
@pytest.mark.parametrize("case", CASES)
def test_equals_cross_entropy(ranks, device, tp, case):
    logits, targets, upstream = CASES[case]()
    results = ranks(tp)(step, tp, device, logits, targets, upstream)
    losses, gradients, intact, _ = zip(*results, strict=True)
    want_losses, want_gradient = reference(logits.nan_to_num(neginf=-torch.inf), targets, upstream)
    assert_equal_everywhere(losses)
    atol = 1e-10 if case != "logits + 1e6" else 1e-9    # float64 near 1e6 has steps of 1e-10
    close(losses[0], want_losses, atol)
    close(joined(gradients), want_gradient, atol)
    assert all(intact)


@widths
def test_all_ignored_is_zero(ranks, device, tp):
    logits, targets, upstream = CASES["all ignored"]()
    for losses, gradient, _, _ in ranks(tp)(step, tp, device, 1000 * logits, targets, upstream):
        assert not losses.any() and not gradient.any()


@widths
@pytest.mark.parametrize("ignore_index", [-1, 0, 77])
def test_another_ignore_index(ranks, device, tp, ignore_index):
    "Also one that is a word."
    data = some_ignored(ignore_index)
    results = ranks(tp)(step, tp, device, *data, ignore_index=ignore_index)
    losses, gradients, _, _ = zip(*results, strict=True)
    want_losses, want_gradient = reference(*data, ignore_index=ignore_index)
    close(losses[0], want_losses)
    close(joined(gradients), want_gradient)


@widths
@pytest.mark.parametrize("padded", [120, 168, 240])
def test_loss_does_not_depend_on_padding(ranks, device, tp, padded):
    "With 240 columns on 8 ranks the last four ranks hold nothing but padding."
    logits, targets, upstream = batch(3, 11)
    want_losses, want_gradient = reference(logits, targets, upstream)
    more = torch.full((3, 11, padded), 5.0, dtype=torch.float64)
    more[..., :VOCAB] = logits[..., :VOCAB]
    results = ranks(tp)(step, tp, device, more, targets, upstream)
    losses, gradients, _, _ = zip(*results, strict=True)
    close(losses[0], want_losses)
    gradient = joined(gradients)
    close(gradient[..., :VOCAB], want_gradient[..., :VOCAB])
    assert not gradient[..., VOCAB:].any()


@widths
def test_without_vocab_size_all_columns_count(ranks, device, tp):
    data = batch(3, 11)
    results = ranks(tp)(step, tp, device, *data, vocab_size=None)
    losses, gradients, _, _ = zip(*results, strict=True)
    want_losses, want_gradient = reference(*data, vocab_size=PADDED)
    close(losses[0], want_losses)
    close(joined(gradients), want_gradient)


def on_gathered_logits(tp, device, logits, targets):
    losses = vocab_parallel_cross_entropy(logits.to(device), targets.to(device), group=group_of(tp))
    return losses.cpu()


@widths
def test_gathered_logits_add_log_tp(ranks, device, tp):
    "Every column is counted tp times: the sign by which the mistake is known."
    logits, targets, upstream = batch(3, 11)
    want, _ = reference(logits, targets, upstream, PADDED)
    for losses in ranks(tp)(on_gathered_logits, tp, device, logits, targets):
        close(losses, want + math.log(tp))


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "columns last": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "a slice of more": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every other row": lambda t: t.repeat_interleave(2, dim=0)[::2],
}


@widths
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_in_any_layout(ranks, device, tp, layout):
    data = batch(3, 11)
    results = ranks(tp)(step, tp, device, *data, layout=LAYOUTS[layout])
    losses, gradients, intact, _ = zip(*results, strict=True)
    want_losses, want_gradient = reference(*data)
    close(losses[0], want_losses)
    close(joined(gradients), want_gradient)
    assert all(intact)


@widths
@pytest.mark.parametrize("dtype, unit", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_inputs_are_computed_in_fp32(ranks, device, tp, dtype, unit):
    "The losses are as good as fp32; the gradient is rounded once, to the type of the logits."
    logits, targets, upstream = batch(3, 11, scale=10.0)
    logits, upstream = logits.to(dtype), upstream.float()
    results = ranks(tp)(step, tp, device, logits, targets, upstream)
    losses, gradients, intact, records = zip(*results, strict=True)
    want_losses, want_gradient = reference(logits, targets, upstream)
    assert losses[0].dtype == torch.float32 and gradients[0].dtype == dtype
    assert {r.dtype for made in records for r in made} <= {"float32"}
    torch.testing.assert_close(losses[0].double(), want_losses, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(joined(gradients).double(), want_gradient, rtol=unit, atol=1e-7)
    assert all(intact)


@widths
def test_fp32(ranks, device, tp):
    logits, targets, upstream = batch(3, 11, scale=10.0)
    logits, upstream = logits.float(), upstream.float()
    results = ranks(tp)(step, tp, device, logits, targets, upstream)
    losses, gradients, _, _ = zip(*results, strict=True)
    want_losses, want_gradient = reference(logits, targets, upstream)
    assert losses[0].dtype == gradients[0].dtype == torch.float32
    torch.testing.assert_close(losses[0].double(), want_losses, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(joined(gradients).double(), want_gradient, rtol=1e-5, atol=1e-6)


@widths
def test_three_all_reduces_of_one_number_a_token(ranks, device, tp):
    for _, _, _, records in ranks(tp)(step, tp, device, *batch(3, 11)):
        made = [(r.op, r.phase, r.elements, r.bytes) for r in records]
        assert made == [("all_reduce", "forward", 33, 8 * 33)] * (3 if tp > 1 else 0)


@widths
def test_backward_twice(ranks, device, tp):
    data = batch(3, 11)
    gradients = [gradient for _, gradient, _, _ in ranks(tp)(step, tp, device, *data, steps=2)]
    close(joined(gradients), 2 * reference(*data)[1])


def without_gradient(tp, device, logits, targets):
    local = logits.chunk(tp, -1)[rank_of(tp)].to(device).requires_grad_()
    targets = targets.to(device)
    options = {"group": group_of(tp), "vocab_size": VOCAB}
    losses = [vocab_parallel_cross_entropy(local, targets, **options)]
    with torch.no_grad():
        losses.append(vocab_parallel_cross_entropy(local, targets, **options))
    with torch.inference_mode():
        losses.append(vocab_parallel_cross_entropy(local, targets, **options))
    return [t.requires_grad for t in losses], all(torch.equal(t, losses[0]) for t in losses)


@widths
def test_without_gradient(ranks, device, tp):
    said = ranks(tp)(without_gradient, tp, device, *batch(3, 11)[:2])
    assert said == [([True, False, False], True)] * tp


def under_autocast(tp, device, x, weight, targets):
    "A layer that autocast runs in bf16, its loss, and the same loss of the same logits outside."
    weight = weight.chunk(tp)[rank_of(tp)].to(device)
    targets = targets.to(device)
    with torch.autocast(device, torch.bfloat16):
        logits = F.linear(x.to(device), weight)
        inside = vocab_parallel_cross_entropy(logits, targets, group=group_of(tp), vocab_size=VOCAB)
    outside = vocab_parallel_cross_entropy(logits, targets, group=group_of(tp), vocab_size=VOCAB)
    return logits.dtype, inside.dtype, torch.equal(inside, outside)


@widths
def test_autocast(ranks, device, tp):
    x, weight = normal(33, 7, dtype=torch.float32), normal(PADDED, 7, dtype=torch.float32)
    said = ranks(tp)(under_autocast, tp, device, x, weight, integers(VOCAB, 33))
    assert said == [(torch.bfloat16, torch.float32, True)] * tp


def refused(tp, logits, targets, vocab_size):
    local = logits.chunk(tp, -1)[rank_of(tp)]
    options = {"group": group_of(tp), "vocab_size": vocab_size}
    return message(vocab_parallel_cross_entropy, local, targets, **options)


@widths
@pytest.mark.parametrize(
    "wrong, vocab_size",
    [(-1, VOCAB), (-99, VOCAB), (VOCAB, VOCAB), (PADDED - 1, VOCAB), (PADDED, None), (2**40, None)],
)
def test_targets_out_of_range(ranks, tp, wrong, vocab_size):
    targets = torch.tensor([3, wrong, 5])
    for said in ranks(tp)(refused, tp, normal(3, PADDED), targets, vocab_size):
        assert f"target id {wrong} is out of range" in said
        assert f"from 0 to {(vocab_size or PADDED) - 1}" in said and "with -100" in said


@widths
@pytest.mark.parametrize("vocab_size", [0, -1, PADDED + 1])
def test_vocabulary_that_does_not_fit(ranks, tp, vocab_size):
    for said in ranks(tp)(refused, tp, normal(3, PADDED), torch.tensor([0, 0, 0]), vocab_size):
        assert f"vocab_size={vocab_size} is not from 1 to {PADDED}" in said


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("shape", [(3, 11), (33,), (11, 3, 1), (10, 3), (1,)])
def test_targets_of_another_shape(ranks, tp, shape):
    "The transposed one has the right number of targets, and would give a wrong loss."
    targets = torch.zeros(shape, dtype=torch.int64)
    for said in ranks(tp)(refused, tp, normal(11, 3, PADDED), targets, VOCAB):
        assert f"targets have shape {shape}" in said and "(11, 3)" in said


def test_one_device_makes_no_collective():
    assert not dist.is_initialized()
    assert step(1, "cpu", *batch(3))[-1] == []


def group_of_one(device, logits, targets):
    with Ledger() as ledger:
        losses = vocab_parallel_cross_entropy(
            logits.to(device), targets.to(device), group=dist.group.WORLD, vocab_size=VOCAB
        )
    return losses.cpu(), ledger.count()


def test_a_group_of_one_makes_no_collective(ranks, device):
    logits, targets, upstream = batch(3)
    ((losses, count),) = ranks(1)(group_of_one, device, logits, targets)
    close(losses, reference(logits, targets, upstream)[0])
    assert count == 0


# --------------------------------------------------------------------------- the likeliest word


def likeliest(tp, device, logits, vocab_size=VOCAB):
    "The ids, whether this rank's logits are intact, and what was communicated."
    local = logits.chunk(tp, -1)[rank_of(tp)].to(device)
    before = local.clone()
    with Ledger() as ledger:
        ids = vocab_parallel_argmax(local, group=group_of(tp), vocab_size=vocab_size)
    return ids.cpu(), torch.allclose(local, before, rtol=0, atol=0, equal_nan=True), ledger.records


def tied():
    "Whole numbers from 0 to 2: on every rank many columns share the largest."
    return integers(3, 40, PADDED, seed=4).double()


ROWS = {
    "random": lambda: normal(3, 11, PADDED, seed=1),
    "ties": tied,
    "ties in bf16": lambda: normal(200, PADDED, seed=1).bfloat16(),
    "huge padding": lambda: padding_of(1e30)[0],
    "NaN padding": lambda: padding_of(torch.nan)[0],
    "all equal": lambda: torch.full((2, PADDED), -3.0),
    "all minus infinity": lambda: torch.full((2, PADDED), -torch.inf),
    "largest is the last word": lambda: normal(5, PADDED).index_fill(-1, torch.tensor([100]), 9.0),
    "no row": lambda: normal(2, 0, PADDED),
    "a single row": lambda: normal(PADDED),
    "a slice of more": lambda: normal(6, 2 * PADDED)[::2, :PADDED],
}


@widths
@pytest.mark.parametrize("case", ROWS)
def test_the_likeliest_word_is_that_of_one_device(ranks, device, tp, case):
    logits = ROWS[case]()
    ids, intact, _ = zip(*ranks(tp)(likeliest, tp, device, logits), strict=True)
    assert_equal_everywhere(ids)
    assert ids[0].dtype == torch.int64 and torch.equal(ids[0], logits[..., :VOCAB].argmax(-1))
    assert all(intact)


@widths
def test_the_likeliest_of_equals_is_the_lowest(ranks, device, tp):
    logits = tied()
    lowest = [min(j for j in range(VOCAB) if row[j] == row[:VOCAB].max()) for row in logits]
    for ids, _, _ in ranks(tp)(likeliest, tp, device, logits):
        assert ids.tolist() == lowest


@widths
def test_without_vocab_size_padding_may_be_likeliest(ranks, device, tp):
    logits = padding_of(1e30)[0]
    for ids, _, _ in ranks(tp)(likeliest, tp, device, logits, None):
        assert torch.equal(ids, torch.full_like(ids, VOCAB))


@widths
def test_the_likeliest_word_takes_two_numbers_a_row_and_rank(ranks, device, tp):
    for _, _, records in ranks(tp)(likeliest, tp, device, normal(3, 11, PADDED)):
        sent = [(record.op, record.elements) for record in records]
        assert sent == ([] if tp == 1 else [("all_gather", tp * 2 * 3 * 11)])


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("vocab_size", [0, PADDED + 1])
def test_the_likeliest_word_of_no_vocabulary(ranks, device, tp, vocab_size):
    def said():
        local = normal(3, PADDED).chunk(tp, -1)[rank_of(tp)]
        options = {"group": group_of(tp), "vocab_size": vocab_size}
        return message(vocab_parallel_argmax, local, **options)

    for each in ranks(tp)(said):
        assert f"vocab_size={vocab_size} is not from 1 to {PADDED}" in each
