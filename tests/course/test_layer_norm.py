"""Where the LayerNorm stands: masks, the two orders and their gradients."""

import math

import pytest
import torch

from megatron_edu.reference.gpt2 import Block
from megatron_edu.course import layer_norm
from megatron_edu.course.layer_norm import (
    MASK,
    PEAK,
    block_norms,
    byte_ids,
    make_bert,
    masked_batch,
    training,
)

ORDERS = ("post", "pre")
TEXT = byte_ids(["The quick brown fox jumps over the lazy dog, and the dog sleeps on. "] * 40)


def test_bytes_are_the_documents():
    ids = byte_ids(["añ", "b"])
    assert ids.dtype == torch.int64
    assert bytes(ids.tolist()).decode() == "añ\n\nb"


def test_masks_are_berts():
    random = torch.randint(MASK, (20_000,), generator=torch.Generator().manual_seed(0))
    batch = masked_batch(random, 5, rows=2000)
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == labels.shape == (2000, 32)
    asked = labels != -100
    masked, kept = ids[asked] == MASK, ids[asked] == labels[asked]

    def error(p, count):
        return 5 * math.sqrt(p * (1 - p) / count)   # 5 standard errors

    count = asked.sum().item()
    assert abs(asked.float().mean() - 0.15) < error(0.15, ids.numel())
    assert abs(masked.float().mean() - 0.8) < error(0.8, count)
    assert abs(kept.float().mean() - 0.1 * (1 + 1 / MASK)) < error(0.1, count)
    assert not (ids[~asked] == MASK).any()


def test_what_is_drawn_in_place_of_a_token_is_no_mask(monkeypatch):
    "Of two tokens, where one draw in three would be the mask."
    monkeypatch.setattr(layer_norm, "MASK", 2)
    text = torch.randint(2, (20_000,), generator=torch.Generator().manual_seed(0))
    batch = masked_batch(text, 5, rows=2000)
    masked = (batch["input_ids"] == 2)[batch["labels"] != -100].double()
    assert abs(masked.mean() - 0.8) < 5 * math.sqrt(0.8 * 0.2 / len(masked)) < 0.1 / 3


def test_batches_are_windows_of_the_text():
    batch = masked_batch(torch.arange(200), 1, rows=50)
    asked = batch["labels"] != -100
    whole = torch.where(asked, batch["labels"], batch["input_ids"])
    assert torch.equal(whole, whole[:, :1] + torch.arange(32))
    labels = masked_batch(torch.arange(33), 1, rows=200)["labels"]
    assert labels.max() == 32 and labels[labels >= 0].min() == 0    # both ends are reached


def test_a_batch_depends_on_its_number_alone():
    one, again, other = (masked_batch(TEXT, number) for number in (7, 7, 8))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["labels"], other["labels"])


@pytest.mark.parametrize("order", ORDERS)
def test_initial_weights(order):
    depth = 8
    scaled, plain = make_bert(order, depth), make_bert(order, depth, scaled=False)
    assert scaled.config.layer_norm == order and len(scaled.blocks) == depth
    std = scaled.blocks[0].mlp.up.weight.std().item()
    assert abs(std - 0.08) < 0.002                      # gain 0.64, as 0.02 at a width of 1024
    for a, b in zip(scaled.blocks, plain.blocks):
        for name in ("attn.proj.weight", "mlp.down.weight"):
            torch.testing.assert_close(a.get_parameter(name) * 4, b.get_parameter(name))
        assert torch.equal(a.mlp.up.weight, b.mlp.up.weight)


@pytest.mark.parametrize("order", ORDERS)
def test_norms_by_layer(order):
    model = make_bert(order, 3)
    model.loss(**masked_batch(TEXT, 0)).backward()
    for block, norm in zip(model.blocks, block_norms(model), strict=True):
        squares = sum(p.grad.double().square().sum() for p in block.parameters())
        assert math.isclose(norm, squares.sqrt(), rel_tol=1e-5)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("depth", [4, 16, 48])
def test_before_training_the_gradient_arrives_at_any_depth(depth, scaled):
    ratios = {}
    for order in ORDERS:
        model = make_bert(order, depth, scaled=scaled)
        model.loss(**masked_batch(TEXT, 0)).backward()
        norms = block_norms(model)
        ratios[order] = norms[0] / norms[-1]
    assert 0.3 < ratios["post"] < 2.5
    assert ratios["pre"] > 1.2


def first_over_last(order, depth, steps=20):
    model = make_bert(order, depth)
    for _ in training(model, TEXT, 1, steps + 1):
        norms = block_norms(model)
    return norms[0] / norms[-1]


def test_after_the_warm_up_it_fades_with_depth_in_post_ln_alone():
    assert first_over_last("post", 4) > 3 * first_over_last("post", 12)
    assert first_over_last("pre", 12) > 0.5


class FromTheNorm(Block):
    "Pre-LN with the residual taken after the LayerNorm."

    def forward(self, x, mask=None):
        x = self.ln_1(x)
        x = self.ln_2(x + self.attn(x, mask))
        return x + self.mlp(x)


def test_a_residual_taken_after_the_norm_is_post_ln():
    post, pre = make_bert("post", 4).double(), make_bert("pre", 4).double()
    ids = masked_batch(TEXT, 0)["input_ids"]
    assert (post.hidden_states(ids) - pre.hidden_states(ids)).abs().max() > 0.1
    for block in pre.blocks:
        block.__class__ = FromTheNorm
    torch.testing.assert_close(pre.hidden_states(ids), post.hidden_states(ids), rtol=0, atol=1e-9)


def test_each_gradient_is_clipped_after_the_pause(monkeypatch):
    clipped = []
    monkeypatch.setattr(layer_norm, "clip_grad_norm", lambda model, clip: clipped.append(clip))
    for k, _ in enumerate(training(make_bert("pre", 1), TEXT, 1, 3)):
        assert len(clipped) == k
    assert clipped == [1.0] * 3


def test_training_pauses_before_the_update():
    model, twin = make_bert("post", 2), make_bert("post", 2)
    before = [p.clone() for p in model.parameters()]
    steps = training(model, TEXT, 3, 2)
    loss, norm = next(steps)
    want = twin.loss(**masked_batch(TEXT, 300_001))
    want.backward()
    assert loss == want.item() and norm > 1
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    for p, q in zip(model.parameters(), twin.parameters()):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or p.grad.equal(q.grad))
    next(steps)
    moved = (model.wte.weight - before[0]).abs().max().item()
    assert math.isclose(moved, PEAK / 20, rel_tol=0.01)     # first of 20 steps of warm-up
    twin.zero_grad()
    twin.load_state_dict(model.state_dict())
    twin.loss(**masked_batch(TEXT, 300_002)).backward()
    assert model.wte.weight.grad.equal(twin.wte.weight.grad)    # of the second step alone
    assert len(list(steps)) == 0
