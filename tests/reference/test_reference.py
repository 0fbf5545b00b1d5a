"""The reference against transformers, against the definition of its loss, and alone."""

import ast
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from megatron_edu import models
from megatron_edu.config import GPT2Config
from megatron_edu.reference import gpt2
from megatron_edu.definitions import token_weights
from megatron_edu.reference.gpt2 import GPT2, answer, summed_loss

ATOL = 1e-10    # float64; what is right errs by about 1e-15
SMALL = GPT2Config(2, 24, 3, vocab_size=41, max_seq_len=11, dropout=0.0, vocab_multiple=16)


def shaken(config: GPT2Config, seed: int = 0) -> GPT2:
    "A float64 model in which no bias is 0, no LayerNorm weight 1 and no padding row empty."
    model = GPT2(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).double()
    return model


def batch(config: GPT2Config, rows: int = 3, length: int | None = None, seed: int = 0):
    "Ids, labels of which some do not count, and a mask of fractions and zeros."
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, length or config.max_seq_len)
    ids, labels = torch.randint(config.vocab_size, (2, *shape), generator=generator)
    labels[0, 0] = -100
    mask = torch.rand(shape, generator=generator, dtype=torch.float64)
    mask[mask < 0.2] = 0
    mask[-1, -1] = 1
    return ids, labels, mask


def loss_by_definition(logits, labels, mask, vocab_size):
    "One term after the other: -log of the softmax at the label."
    total = count = 0.0
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1]):
            label = labels[row, place].item()
            if label != -100:
                real = logits[row, place, :vocab_size]
                weight = mask[row, place].item()
                total = total + weight * (real.exp().sum().log() - real[label])
                count += weight
    return total / count


# ------------------------------------------------------------------------ transformers agrees

SHAPES = {
    # config, rows, length
    "powers of two": (GPT2Config(2, 32, 4, 64, 16, dropout=0.0, vocab_multiple=64), 2, 16),
    "odd, short, padded": (GPT2Config(3, 21, 3, 37, 19, dropout=0.0, vocab_multiple=16), 3, 7),
    "f is not 4h": (GPT2Config(2, 10, 5, 13, 6, 0.0, ffn_hidden_size=23, vocab_multiple=8), 2, 5),
    "one layer, one head": (GPT2Config(1, 7, 1, 11, 9, dropout=0.0, vocab_multiple=1), 1, 9),
    "one token": (GPT2Config(2, 12, 2, 30, 5, dropout=0.0, vocab_multiple=32), 4, 1),
    "other epsilon": (replace(SMALL, layer_norm_eps=1e-2), 2, 6),
}
NAMES = {
    "wte.": "transformer.wte.",
    "wpe.": "transformer.wpe.",
    "ln_f.": "transformer.ln_f.",
    "blocks.": "transformer.h.",
    ".attn.qkv.": ".attn.c_attn.",
    ".attn.proj.": ".attn.c_proj.",
    ".mlp.up.": ".mlp.c_fc.",
    ".mlp.down.": ".mlp.c_proj.",
}


def their_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def turned(name: str, full: torch.Tensor) -> torch.Tensor:
    "transformers keeps the weights of a block's linear layers as (inputs, outputs)."
    return full.T if name.startswith("blocks.") and full.dim() == 2 else full


def twin(model: GPT2) -> transformers.GPT2LMHeadModel:
    "The same weights in transformers' GPT-2."
    config = model.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.padded_vocab_size,
            n_positions=config.max_seq_len,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_inner=config.ffn_hidden_size,
            activation_function={"tanh": "gelu_new", "exact": "gelu"}[config.gelu],
            layer_norm_epsilon=config.layer_norm_eps,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).double()
    state = {their_name(name): turned(name, full) for name, full in model.state_dict().items()}
    loaded = theirs.load_state_dict(state, strict=False)
    assert loaded.missing_keys == ["lm_head.weight"] and not loaded.unexpected_keys
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    return theirs


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_has_the_same_logits_loss_and_gradients(shape, gelu):
    config, rows, length = SHAPES[shape]
    model = shaken(replace(config, gelu=gelu))
    theirs = twin(model)
    ids, labels, mask = batch(config, rows, length)

    logits = theirs(ids).logits
    torch.testing.assert_close(model(ids), logits, rtol=0, atol=ATOL)

    loss = loss_by_definition(logits, labels, mask, config.vocab_size)
    loss.backward()
    found = {name: p.grad for name, p in theirs.named_parameters()}
    want = answer(model, ids, labels, mask)
    torch.testing.assert_close(want.loss, loss.detach(), rtol=0, atol=ATOL)
    assert {their_name(name) for name in want.gradients} == set(found)
    for name, gradient in want.gradients.items():
        theirs_turned = turned(name, found[their_name(name)])
        torch.testing.assert_close(gradient, theirs_turned, rtol=0, atol=ATOL)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in found.values()))
    assert abs(want.norm.item() - norm) < ATOL


def test_the_two_gelus_are_not_the_same():
    "Else the parameter of the test above would say nothing."
    ids, _, _ = batch(SMALL)
    tanh, exact = (shaken(replace(SMALL, gelu=gelu))(ids) for gelu in ("tanh", "exact"))
    assert (tanh - exact).abs().max() > 1e-5


def test_transformers_own_loss_shifts_the_labels():
    "It takes the ids as labels, and computes in float32."
    config = replace(SMALL, vocab_multiple=1)
    model = shaken(config)
    ids, _, _ = batch(config)
    labels = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], dim=1)
    theirs = twin(model)(ids, labels=ids).loss
    torch.testing.assert_close(model.loss(ids, labels), theirs.double(), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------ the loss


def test_loss_at_the_start_is_the_logarithm_of_the_real_vocabulary():
    config = GPT2Config(2, 64, 4, vocab_size=300, max_seq_len=32, dropout=0.0, vocab_multiple=512)
    ids, labels, _ = batch(config, rows=8)
    assert abs(GPT2(config).loss(ids, labels).item() - math.log(300)) < 0.05


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int8, torch.float16])
def test_masks_of_zeros_and_ones_may_have_any_type(dtype):
    model = shaken(SMALL)
    ids, labels, mask = batch(SMALL)
    ones = (mask > 0.5).double()
    found = model.loss(ids, labels, ones.to(dtype))
    torch.testing.assert_close(found, model.loss(ids, labels, ones), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_is_exact_for_masks_of_fractions(dtype):
    model = shaken(SMALL)
    ids, labels, mask = batch(SMALL)
    mask = mask.to(dtype)
    want = loss_by_definition(model(ids), labels, mask, SMALL.vocab_size)
    found = model.loss(ids, labels, mask)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, want, rtol=1e-15, atol=1e-15)


WEIGHT_TYPES = {
    None: torch.float32,
    torch.bool: torch.float32,
    torch.int64: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


@pytest.mark.parametrize("dtype", WEIGHT_TYPES)
def test_token_weights(dtype):
    labels = torch.tensor([[3, -100, 0, 7]])
    mask = None if dtype is None else torch.tensor([[1, 1, 0, 1]]).to(dtype)
    weights = token_weights(labels, mask)
    assert weights.tolist() == [[1, 0, 1 if mask is None else 0, 1]]
    assert weights.dtype == WEIGHT_TYPES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_has_the_type_of_the_logits_not_of_the_mask(dtype):
    ids, labels, mask = batch(SMALL)
    loss = shaken(SMALL).to(dtype).loss(ids, labels, mask.double())
    assert loss.dtype == dtype


def test_the_count_of_tokens_is_not_rounded():
    "bfloat16 has no 1023: a sum in the mask's own type would be 1024."
    config = replace(SMALL, max_seq_len=1023)
    model = shaken(config)
    ids, labels = torch.randint(config.vocab_size, (2, 1, 1023))
    found = model.loss(ids, labels, torch.ones(1, 1023, dtype=torch.bfloat16))
    torch.testing.assert_close(found, model.loss(ids, labels), rtol=0, atol=1e-15)


def test_a_label_of_minus_100_is_a_mask_of_zero():
    model = shaken(SMALL)
    ids, labels, mask = batch(SMALL)
    labels[0, 0] = 5
    mask[:2, 3:] = 0
    want = model.loss(ids, labels, (mask > 0).double())
    torch.testing.assert_close(
        model.loss(ids, labels.masked_fill(mask == 0, -100)), want, rtol=0, atol=1e-15
    )


def test_what_is_not_counted_may_have_any_label():
    model = shaken(SMALL)
    ids, labels, mask = batch(SMALL)
    want = model.loss(ids, labels, mask)
    for label in (-1, SMALL.vocab_size, 10**6):
        wild = labels.masked_fill(mask == 0, label)
        torch.testing.assert_close(model.loss(ids, wild, mask), want, rtol=0, atol=0)


def test_parts_add_up_when_they_know_the_whole_count():
    "And the mean of their means is something else."
    model = shaken(SMALL)
    ids, labels, mask = batch(SMALL, rows=2)
    mask = (mask > 0).double()
    mask[1, 2:] = 0
    count = token_weights(labels, mask).sum()
    whole = model.loss(ids, labels, mask)
    parts = [[t[i : i + 1] for t in (ids, labels, mask)] for i in (0, 1)]
    total = sum(model.loss(*part, num_tokens=count) for part in parts)
    torch.testing.assert_close(total, whole, rtol=0, atol=1e-14)
    mean = sum(model.loss(*part) for part in parts) / 2
    assert (mean - whole).abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_give_a_float32_loss(dtype):
    logits = 3 * torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    logits = logits.to(dtype)
    labels = torch.arange(10).view(2, 5)
    found = summed_loss(logits, labels, torch.ones(2, 5), 41)
    real = logits.double()[..., :41].flatten(0, 1)
    want = F.cross_entropy(real, labels.flatten(), reduction="sum")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------ the padding


def test_padding_rows_have_no_gradient_and_no_say():
    model = shaken(SMALL)
    data = batch(SMALL)
    assert SMALL.padded_vocab_size == 48
    before = answer(model, *data)
    assert before.gradients["wte.weight"][41:].abs().max() == 0
    assert before.gradients["wte.weight"][:41].abs().amax(-1).min() > 0
    with torch.no_grad():
        model.wte.weight[41:] += 100
    after = answer(model, *data)
    assert torch.equal(before.loss, after.loss)
    for name, gradient in before.gradients.items():
        assert torch.equal(gradient, after.gradients[name]), name


def test_padding_leaves_the_loss_as_it_is_without_any():
    "The same weights in a table with and without padding rows."
    bare = replace(SMALL, vocab_multiple=1)
    model, unpadded = shaken(SMALL), GPT2(bare).double()
    state = model.state_dict()
    state["wte.weight"] = state["wte.weight"][:41]
    unpadded.load_state_dict(state)
    data = batch(SMALL)
    want, found = answer(unpadded, *data), answer(model, *data)
    torch.testing.assert_close(found.loss, want.loss, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.norm, want.norm, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------ the initial weights


def test_weights_depend_on_config_and_seed_alone():
    want = GPT2(SMALL, seed=3).state_dict()
    torch.manual_seed(12345)
    torch.rand(7)
    for config in (SMALL, replace(SMALL, dropout=0.5, gelu="exact", num_heads=4)):
        found = GPT2(config, seed=3).state_dict()
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)
    other = GPT2(SMALL, seed=4).state_dict()
    drawn = [name for name in want if want[name].dim() == 2]
    assert not any(torch.equal(other[name], want[name]) for name in drawn)
    assert len(drawn) == 2 + 4 * SMALL.num_layers


def test_weights_are_drawn_in_float32_whatever_the_default():
    want = GPT2(SMALL).state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        found = GPT2(SMALL).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(found[name].dtype == torch.float64 for name in found)
    assert all(torch.equal(found[name].float(), want[name]) for name in want)


def test_every_parameter_gets_its_weight_from_the_rule():
    "The names are those the sharded model uses, too."
    block = ("ln_1", "attn.qkv", "attn.proj", "ln_2", "mlp.up", "mlp.down")
    layers = [f"blocks.{i}.{part}" for i in range(2) for part in block] + ["ln_f"]
    names = ["wte.weight", "wpe.weight"]
    names += [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    weights = GPT2(SMALL).state_dict()
    assert list(weights) == names == [*GPT2(SMALL).state_dict()]
    shapes = {name: p.shape for name, p in GPT2(SMALL).named_parameters()}
    assert {name: weight.shape for name, weight in weights.items()} == shapes


def test_initial_distribution():
    "The paper, 4.2: 0.02, and 0.02/sqrt(2N) before an addition."
    config = GPT2Config(8, 128, 4, vocab_size=1000, max_seq_len=128, vocab_multiple=256)
    for name, weight in GPT2(config).state_dict().items():
        if name.endswith("bias"):
            assert weight.abs().max() == 0
        elif "ln" in name:
            assert torch.equal(weight, torch.ones(128))
        else:
            real = weight[:1000]
            std = 0.02 / 4 if name.endswith(("proj.weight", "down.weight")) else 0.02
            assert abs(real.std() / std - 1) < 0.02, name
            assert abs(real.mean()) < 4 * std / math.sqrt(real.numel()), name
            assert weight[1000:].abs().sum() == 0
    assert weight.dtype == torch.float32


def test_init_std_scales_the_weights():
    one, ten = (GPT2(replace(SMALL, init_std=std)).state_dict() for std in (0.02, 0.2))
    for name, weight in one.items():
        if weight.dim() == 2:
            torch.testing.assert_close(10 * weight, ten[name], rtol=1e-5, atol=0)


def test_no_two_weights_share_numbers():
    "One stream for all: a generator made anew for each tensor would repeat it."
    first = [w.flatten()[:5] for name, w in GPT2(SMALL).state_dict().items() if w.dim() == 2]
    ratios = {tuple((f / f[0]).tolist()) for f in first}
    assert len(ratios) == len(first)


# ------------------------------------------------------------------------ the model


def test_a_later_token_moves_no_earlier_logit():
    model = shaken(SMALL)
    ids, _, _ = batch(SMALL)
    for place in range(SMALL.max_seq_len):
        changed = ids.clone()
        changed[:, place] = (ids[:, place] + 1) % SMALL.vocab_size
        moved = (model(changed) - model(ids)).abs().amax(-1)
        assert moved[:, :place].sum() == 0
        assert moved[:, place:].min() > 0


def test_a_prefix_has_the_logits_of_the_whole():
    "Positions count from 0 for every length."
    model = shaken(SMALL)
    ids, _, _ = batch(SMALL)
    torch.testing.assert_close(model(ids[:, :4]), model(ids)[:, :4], rtol=0, atol=1e-13)


def test_logits_have_all_rows_of_the_table():
    assert shaken(SMALL)(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 48)


def test_dropout_acts_in_training_only():
    config = replace(SMALL, dropout=0.5)
    ids, _, _ = batch(config)
    model, plain = shaken(config), shaken(SMALL)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), plain(ids))


@pytest.mark.parametrize("part", ["embedding", "attention weights", "attention", "mlp"])
def test_dropout_in_each_of_its_places(part, monkeypatch):
    "All other places are switched off."
    calls = []
    dropout, attend = F.dropout, F.scaled_dot_product_attention
    wanted = {"embedding": 0, "attention": 1, "mlp": 2}.get(part)

    def one_dropout(x, p, training):
        calls.append(p)
        return dropout(x, p if len(calls) - 1 == wanted else 0.0, training)

    def one_attention(q, k, v, attn_mask, dropout_p, is_causal):
        p = dropout_p if part == "attention weights" else 0.0
        return attend(q, k, v, attn_mask, dropout_p=p, is_causal=is_causal)

    monkeypatch.setattr(gpt2.F, "dropout", one_dropout)
    monkeypatch.setattr(gpt2.F, "scaled_dot_product_attention", one_attention)
    config = replace(SMALL, num_layers=1, dropout=0.5)
    model = shaken(config)
    ids, _, _ = batch(config)
    first = model(ids)
    assert calls == [0.5] * 3
    calls.clear()
    assert not torch.equal(first, model(ids))


def test_answer_leaves_no_gradients_behind():
    "And does not add to those that were there."
    model = shaken(SMALL)
    data = batch(SMALL)
    want = answer(model, *data)
    model.loss(*data).backward()
    again = answer(model, *data)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(want.gradients[name], again.gradients[name]) for name in want.gradients)
    assert not want.loss.requires_grad


# ------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("bad", [-1, -100, 41, 47, 48, 10**9])
def test_ids_out_of_range(bad):
    "47 is a padding row, which exists: a silent zero vector would be worse than an error."
    ids, labels, _ = batch(SMALL)
    ids[1, 2] = bad
    with pytest.raises(ValueError, match=f"token id {bad} is out of range: ids go from 0 to 40"):
        GPT2(SMALL)(ids)
    with pytest.raises(ValueError, match=f"token id {bad} "):
        GPT2(SMALL).loss(ids, labels)


@pytest.mark.parametrize("bad", [-1, 41, 47, 48, 10**9])
def test_labels_out_of_range(bad):
    ids, labels, mask = batch(SMALL)
    labels[-1, -1] = bad
    with pytest.raises(ValueError, match=f"target id {bad} is out of range: ids go from 0 to 40"):
        GPT2(SMALL).loss(ids, labels, mask)


def test_a_sequence_that_is_too_long():
    with pytest.raises(ValueError, match="12 tokens is longer than max_seq_len=11; cut it, or"):
        GPT2(SMALL)(torch.zeros(1, 12, dtype=torch.long))


@pytest.mark.parametrize("wrong", [1, 2], ids=["labels", "weights"])
@pytest.mark.parametrize("kind", [GPT2, models.GPT2], ids=["reference", "sharded"])
def test_labels_and_weights_of_other_shapes(kind, wrong):
    "Turned around there are as many of them, and each would stand for another token."
    data = list(batch(SMALL))
    data[wrong] = data[wrong].T
    rule = r"shapes \[.*\(11, 3\).*\]; give one label and one weight for each token"
    with pytest.raises(ValueError, match=rule):
        kind(SMALL).loss(*data)


# ------------------------------------------------------------------------ independence


def test_the_reference_loads_no_parallel_code():
    "In a fresh interpreter: the reference, and of this library what it means, nothing else."
    program = """
import sys, megatron_edu.reference
print(*sorted(name for name in sys.modules if name.startswith("megatron_edu")))
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = ["", ".checks", ".compiler", ".config", ".definitions", ".reference"]
    modules += [".reference.bert", ".reference.gpt2", ".weights"]
    assert run.stdout.split() == ["megatron_edu" + module for module in modules]


def test_the_reference_imports_no_collective():
    "Not within a function either."
    tree = ast.parse(Path(gpt2.__file__).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    known = {"typing", "torch", "torch.nn.functional"}
    known |= {"..checks", "..config", "..definitions", "..weights"}
    assert found == known
    assert "distributed" not in Path(gpt2.__file__).read_text(encoding="utf-8")
