"""The vocabulary-parallel embedding against `F.embedding`, on up to eight ranks."""

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
from megatron_edu.tensor_parallel.embedding import VocabParallelEmbedding
from megatron_edu.tensor_parallel.shard import Shard

widths = pytest.mark.parametrize("tp", SIZES)
HIDDEN = 7


def layer_of(tp, device, table, vocab_size=VOCAB):
    "The layer with this rank's rows of `table`."
    layer = VocabParallelEmbedding(*table.shape, group=group_of(tp), vocab_size=vocab_size)
    layer.to(device=device, dtype=table.dtype)
    state = {"weight": Shard(0).split(table, rank_of(tp), tp)}
    layer.load_state_dict(state)
    return layer


def step(tp, device, table, ids, upstream, steps=1, autocast=False):
    "Rows, gradient of this rank's rows, and what was communicated."
    layer = layer_of(tp, device, table)
    with Ledger() as ledger, torch.autocast(device, torch.bfloat16, enabled=autocast):
        rows = layer(ids.to(device))
        for _ in range(steps):
            rows.backward(upstream.to(device), retain_graph=True)
    return rows.detach().cpu(), layer.weight.grad.cpu(), ledger.records


def reference(table, ids, upstream):
    table = table.clone().requires_grad_()
    rows = F.embedding(ids, table)
    rows.backward(upstream)
    return rows.detach(), table.grad


def edges(tp):
    "First and last id of every rank that are words."
    width = PADDED // tp
    ends = torch.tensor([[first, first + width - 1] for first in range(0, PADDED, width)])
    return ends[(ends < VOCAB).all(1)]


IDS = {
    "random": lambda tp: integers(VOCAB, 3, 11),
    "first and last of each rank": edges,
    "all on the first rank": lambda tp: integers(PADDED // 8, 3, 11),
    "all on the last with words": lambda tp: VOCAB - 1 - integers(5, 3, 11),
    "one word again and again": lambda tp: torch.full((2, 9), 37),
    "one token": lambda tp: torch.tensor(50),
    "one dim": lambda tp: integers(VOCAB, 5),
    "three dims": lambda tp: integers(VOCAB, 2, 3, 5),
    "none": lambda tp: torch.empty(2, 0, dtype=torch.int64),
    "int32": lambda tp: integers(VOCAB, 3, 11).int(),
    "not contiguous": lambda tp: integers(VOCAB, 11, 3).t(),
}


@widths
@pytest.mark.parametrize("case", IDS)
def test_equals_embedding(ranks, device, tp, case):
    ids = IDS[case](tp)
    table, upstream = normal(PADDED, HIDDEN, seed=1), normal(*ids.shape, HIDDEN, seed=2)
    rows, gradients, _ = zip(*ranks(tp)(step, tp, device, table, ids, upstream), strict=True)
    want_rows, want_gradient = reference(table, ids, upstream)
    assert_equal_everywhere(rows)
    close(rows[0], want_rows)
    close(Shard(0).merge(list(gradients)), want_gradient)


@widths
def test_foreign_ids_read_nothing(ranks, device, tp):
    "A row that no id asks for may hold anything, the row that foreign ids are sent to as well."
    ids = integers(VOCAB, 3, 11)
    table, upstream = normal(PADDED, HIDDEN, seed=1), normal(3, 11, HIDDEN, seed=2)
    asked = torch.zeros(PADDED, dtype=torch.bool)
    asked[ids] = True
    asked[:: PADDED // tp] = False
    ids = ids.masked_fill(~asked[ids], int(asked.nonzero()[0]))
    poisoned = table.masked_fill(~asked[:, None], torch.nan)
    rows, gradients, _ = zip(*ranks(tp)(step, tp, device, poisoned, ids, upstream), strict=True)
    want_rows, want_gradient = reference(table, ids, upstream)
    close(rows[0], want_rows)
    close(Shard(0).merge(list(gradients)), want_gradient)


@widths
def test_padding_rows_have_no_gradient(ranks, device, tp):
    ids, upstream = torch.arange(VOCAB), normal(VOCAB, HIDDEN, seed=2)
    table = normal(PADDED, HIDDEN, seed=1)
    gradients = [g for _, g, _ in ranks(tp)(step, tp, device, table, ids, upstream)]
    gradient = Shard(0).merge(gradients)
    assert (gradient[:VOCAB] != 0).any(dim=1).all()
    assert not gradient[VOCAB:].any()


@widths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_exact(ranks, device, tp, dtype):
    "One rank adds a row, the others zeros: nothing is rounded."
    ids = integers(VOCAB, 3, 11)
    table, upstream = normal(PADDED, HIDDEN, dtype=dtype), normal(3, 11, HIDDEN, dtype=dtype)
    for rows, _, _ in ranks(tp)(step, tp, device, table, ids, upstream):
        assert rows.dtype == dtype
        assert torch.equal(rows, F.embedding(ids, table))


@widths
def test_autocast_leaves_the_rows_alone(ranks, device, tp):
    ids = integers(VOCAB, 3, 11)
    table = normal(PADDED, HIDDEN, dtype=torch.float32)
    upstream = normal(3, 11, HIDDEN, dtype=torch.float32)
    for rows, gradient, _ in ranks(tp)(step, tp, device, table, ids, upstream, autocast=True):
        assert rows.dtype == gradient.dtype == torch.float32
        assert torch.equal(rows, F.embedding(ids, table))


@widths
def test_one_all_reduce_forward_none_backward(ranks, device, tp):
    ids, upstream = integers(VOCAB, 3, 11), normal(3, 11, HIDDEN)
    for _, _, records in ranks(tp)(step, tp, device, normal(PADDED, HIDDEN), ids, upstream):
        made = [(r.op, r.phase, r.elements, r.bytes) for r in records]
        elements = 3 * 11 * HIDDEN
        assert made == [("all_reduce", "forward", elements, 8 * elements)] * (tp > 1)


@widths
def test_backward_twice(ranks, device, tp):
    ids, upstream = integers(VOCAB, 3, 11), normal(3, 11, HIDDEN)
    table = normal(PADDED, HIDDEN)
    gradients = [g for _, g, _ in ranks(tp)(step, tp, device, table, ids, upstream, steps=2)]
    close(Shard(0).merge(gradients), 2 * reference(table, ids, upstream)[1])


def without_gradient(tp, device, table, ids):
    layer = layer_of(tp, device, table)
    with torch.no_grad():
        rows = layer(ids.to(device))
    return rows.requires_grad, torch.equal(rows, layer(ids.to(device)))


@widths
def test_without_gradient(ranks, device, tp):
    said = ranks(tp)(without_gradient, tp, device, normal(PADDED, HIDDEN), integers(VOCAB, 3, 11))
    assert said == [(False, True)] * tp


def one_wrong_id(tp, wrong, vocab_size):
    layer = layer_of(tp, "cpu", normal(PADDED, HIDDEN), vocab_size)
    return message(layer, torch.tensor([[1, 2], [wrong, 3]]))


@widths
@pytest.mark.parametrize(
    "wrong, vocab_size",
    [
        (-1, VOCAB), (-100, VOCAB), (VOCAB, VOCAB),
        (PADDED - 1, VOCAB), (PADDED, None), (2**40, None),
    ],
)
def test_ids_out_of_range(ranks, tp, wrong, vocab_size):
    last = (vocab_size or PADDED) - 1
    for said in ranks(tp)(one_wrong_id, tp, wrong, vocab_size):
        assert f"token id {wrong} is out of range" in said
        assert f"from 0 to {last}" in said and "vocab_size" in said


def after_an_error(tp, device, table, ids):
    "A refused batch leaves the ranks in step."
    layer = layer_of(tp, device, table)
    refused = message(layer_of(tp, "cpu", table), ids + VOCAB)
    return refused != "no error", layer(ids.to(device)).detach().cpu()


@widths
def test_next_batch_after_an_error(ranks, device, tp):
    table, ids = normal(PADDED, HIDDEN), integers(VOCAB, 3, 11)
    for refused, rows in ranks(tp)(after_an_error, tp, device, table, ids):
        assert refused
        close(rows, F.embedding(ids, table))


def build(tp, rows, vocab_size=None):
    return message(VocabParallelEmbedding, rows, 4, group=group_of(tp), vocab_size=vocab_size)


@pytest.mark.parametrize("tp", [2, 3, 4, 8])
def test_rows_that_do_not_divide(ranks, tp):
    for said in ranks(tp)(build, tp, 12 * tp + 1):
        assert f"num_embeddings={12 * tp + 1} does not divide among {tp}" in said
        assert f"the next that does is {13 * tp}" in said


@widths
@pytest.mark.parametrize("vocab_size", [PADDED + 1, 0, -3])
def test_vocabulary_that_does_not_fit(ranks, tp, vocab_size):
    "Ids without a row would be silent zero rows on several ranks."
    for said in ranks(tp)(build, tp, PADDED, vocab_size):
        assert f"vocab_size={vocab_size} is not from 1 to {PADDED}" in said


def test_one_device_makes_no_collective():
    assert not dist.is_initialized()
    table, upstream = normal(PADDED, HIDDEN), normal(1, HIDDEN)
    rows, gradient, records = step(1, "cpu", table, torch.tensor([3]), upstream)
    assert records == [] and rows.shape == (1, HIDDEN) and gradient.shape == (PADDED, HIDDEN)


def group_of_one(device):
    layer = VocabParallelEmbedding(10, 4, group=dist.group.WORLD).to(device)
    with Ledger() as ledger:
        layer(torch.arange(10, device=device)).sum().backward()
    return ledger.count()


def test_a_group_of_one_makes_no_collective(ranks, device):
    assert ranks(1)(group_of_one, device) == [0]
