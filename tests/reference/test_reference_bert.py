"""The reference BERT against transformers, against the definition of its losses, and alone."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from megatron_edu.config import BertConfig
from megatron_edu.reference import bert, gpt2
from megatron_edu.definitions import order_loss, visible
from megatron_edu.reference.bert import Bert
from megatron_edu.reference.gpt2 import answer

ATOL = 1e-10    # float64; what is right errs by about 1e-15
SMALL = BertConfig(2, 24, 3, vocab_size=41, max_seq_len=11, dropout=0.0, vocab_multiple=16)


def shaken(config: BertConfig, seed: int = 0) -> Bert:
    "A float64 model in which no bias is 0, no LayerNorm weight 1 and no padding row empty."
    model = Bert(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).double()
    return model


def batch(config: BertConfig, rows: int = 3, length: int | None = None, seed: int = 0) -> dict:
    "What `losses` takes: about a third of the tokens counted, row i ends in i padding tokens."
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, length or config.max_seq_len)
    ids, labels = torch.randint(config.vocab_size, (2, *shape), generator=generator)
    places = torch.arange(shape[1])
    real = places < shape[1] - torch.arange(rows)[:, None] % shape[1]
    labels[(torch.rand(shape, generator=generator) > 0.3) | ~real] = -100
    labels[0, 0] = 3
    split = torch.randint(shape[1] + 1, (rows, 1), generator=generator)
    return {
        "input_ids": ids,
        "labels": labels,
        "token_types": (places >= split).long() % config.num_token_types,
        "attention_mask": real.long(),
        "sentence_order": torch.randint(2, (rows,), generator=generator),
    }


# ------------------------------------------------------------------------ transformers agrees

HEADS = {
    "wte.": "bert.embeddings.word_embeddings.",
    "wpe.": "bert.embeddings.position_embeddings.",
    "token_types.": "bert.embeddings.token_type_embeddings.",
    "ln_emb.": "bert.embeddings.LayerNorm.",
    "ln_f.": "bert.encoder.ln.",
    "blocks.": "bert.encoder.layer.",
    "pooler.": "bert.pooler.dense.",
    "sop.": "cls.seq_relationship.",
    "mlm.bias": "cls.predictions.bias",
    "mlm.dense.": "cls.predictions.transform.dense.",
    "mlm.ln.": "cls.predictions.transform.LayerNorm.",
    ".attn.proj.": ".attention.output.dense.",
    ".mlp.up.": ".intermediate.dense.",
    ".mlp.down.": ".output.dense.",
}
NORMS = {
    "pre": {".ln_1.": ".attention.ln.", ".ln_2.": ".ln."},
    "post": {".ln_1.": ".attention.output.LayerNorm.", ".ln_2.": ".output.LayerNorm."},
}


def in_their_words(tensors: dict[str, torch.Tensor], layer_norm: str) -> dict[str, torch.Tensor]:
    "Under transformers' names, which keep query, key and value apart."
    theirs = {}
    for name, full in tensors.items():
        for ours, their in (HEADS | NORMS[layer_norm]).items():
            name = their + name.removeprefix(ours) if name.startswith(ours) else name
            name = name.replace(ours, their) if ours.startswith(".") else name
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), full.chunk(3)):
                theirs[name.replace(".attn.qkv.", f".attention.self.{part}.")] = piece
        else:
            theirs[name] = full
    return theirs


def twin(model: Bert):
    "The same weights in transformers' BERT, of either kind."
    config = model.config
    kinds = {
        "pre": (transformers.MegatronBertConfig, transformers.MegatronBertForPreTraining),
        "post": (transformers.BertConfig, transformers.BertForPreTraining),
    }
    their_config, their_model = kinds[config.layer_norm]
    theirs = their_model(
        their_config(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.ffn_size,
            hidden_act={"tanh": "gelu_new", "exact": "gelu"}[config.gelu],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=config.max_seq_len,
            type_vocab_size=config.num_token_types,
            layer_norm_eps=config.layer_norm_eps,
            pad_token_id=None,      # a number would take that row's gradient away
            attn_implementation="eager",
        )
    ).double()
    state = in_their_words(model.state_dict(), config.layer_norm)
    loaded = theirs.load_state_dict(state, strict=False)
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert set(loaded.missing_keys) == tied and not loaded.unexpected_keys
    predictions = theirs.cls.predictions
    assert predictions.decoder.weight is theirs.bert.embeddings.word_embeddings.weight
    assert predictions.decoder.bias is predictions.bias
    return theirs


SHAPES = {
    # config, rows, length
    "powers of two": (BertConfig(2, 32, 4, 64, 16, dropout=0.0, vocab_multiple=64), 2, 16),
    "odd, short, padded": (BertConfig(3, 21, 3, 37, 19, dropout=0.0, vocab_multiple=16), 3, 7),
    "f is not 4h": (BertConfig(2, 10, 5, 13, 6, 0.0, ffn_hidden_size=23, vocab_multiple=8), 2, 5),
    "one layer, one head": (BertConfig(1, 7, 1, 11, 9, dropout=0.0, vocab_multiple=1), 1, 9),
    "one token": (BertConfig(2, 12, 2, 30, 5, dropout=0.0, vocab_multiple=32), 4, 1),
    "three types": (replace(SMALL, num_token_types=3, layer_norm_eps=1e-2), 2, 6),
}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize("layer_norm", ["pre", "post"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_has_the_same_outputs_losses_and_gradients(shape, layer_norm, gelu, padding):
    config, rows, length = SHAPES[shape]
    config = replace(config, layer_norm=layer_norm, gelu=gelu)
    model = shaken(config)
    theirs = twin(model)
    data = batch(config, rows, length)
    if not padding:
        del data["attention_mask"]
    ids, types, mask = (data.get(n) for n in ("input_ids", "token_types", "attention_mask"))

    found = theirs(ids, token_type_ids=types, attention_mask=mask)
    hidden = theirs.bert(ids, token_type_ids=types, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(model.hidden_states(ids, types, mask), hidden, rtol=0, atol=ATOL)
    token_logits, order_logits = model(ids, types, mask)
    torch.testing.assert_close(token_logits, found.prediction_logits, rtol=0, atol=ATOL)
    torch.testing.assert_close(order_logits, found.seq_relationship_logits, rtol=0, atol=ATOL)

    real = found.prediction_logits[..., : config.vocab_size].flatten(0, 1)
    mlm = F.cross_entropy(real, data["labels"].flatten())
    sop = F.cross_entropy(found.seq_relationship_logits, data["sentence_order"])
    losses = model.losses(**data)
    torch.testing.assert_close(losses, {"mlm": mlm, "sop": sop}, rtol=0, atol=ATOL)

    (mlm + sop).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    want = answer(model, **data)
    torch.testing.assert_close(want.loss, (mlm + sop).detach(), rtol=0, atol=ATOL)
    ours = in_their_words(want.gradients, layer_norm)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=ATOL)


def test_what_the_loss_does_not_use_has_a_gradient_of_0():
    "Without an order of sentences that is all its head has."
    model = shaken(SMALL)
    data = batch(SMALL)
    del data["sentence_order"]
    found = answer(model, **data)
    model.loss(**data).backward()
    head = {name for name in found.gradients if name.startswith(("pooler.", "sop."))}
    assert {name for name, p in model.named_parameters() if p.grad is None} == head != set()
    for name, parameter in model.named_parameters():
        want = torch.zeros_like(parameter) if name in head else parameter.grad
        assert torch.equal(found.gradients[name], want)
    squares = sum(gradient.square().sum() for gradient in found.gradients.values())
    torch.testing.assert_close(found.norm, squares.sqrt(), rtol=0, atol=ATOL)


@pytest.mark.parametrize("layer_norm", ["pre", "post"])
def test_transformers_own_loss(layer_norm):
    "It computes in the type of its logits, over all columns: without padding of the vocabulary."
    config = replace(SMALL, layer_norm=layer_norm, vocab_multiple=1)
    model = shaken(config)
    data = batch(config)
    theirs = twin(model)(
        data["input_ids"],
        token_type_ids=data["token_types"],
        attention_mask=data["attention_mask"],
        labels=data["labels"],
        next_sentence_label=data["sentence_order"],
    )
    torch.testing.assert_close(model.loss(**data), theirs.loss, rtol=0, atol=ATOL)


def test_the_two_orders_and_the_two_gelus_are_not_the_same():
    "Else the parameters of the test above would say nothing."
    ids = batch(SMALL)["input_ids"]
    (pre, pre_order), (post, post_order) = (
        shaken(replace(SMALL, layer_norm=kind))(ids) for kind in ("pre", "post")
    )
    assert (pre - post).abs().max() > 0.1 and (pre_order - post_order).abs().max() > 0.01
    tanh, _ = shaken(replace(SMALL, gelu="tanh"))(ids)
    assert (tanh - pre).abs().max() > 1e-5


# ------------------------------------------------------------------------ what the mask hides


@pytest.mark.parametrize("layer_norm", ["pre", "post"])
def test_every_token_moves_every_output(layer_norm):
    "Both directions, unlike GPT-2."
    model = shaken(replace(SMALL, layer_norm=layer_norm))
    ids = batch(SMALL)["input_ids"]
    before = model(ids)
    for place in range(SMALL.max_seq_len):
        changed = ids.clone()
        changed[:, place] = (ids[:, place] + 1) % SMALL.vocab_size
        for now, then in zip(model(changed), before):
            assert (now - then).abs().amax(-1).min() > 0


@pytest.mark.parametrize("layer_norm", ["pre", "post"])
def test_padding_says_nothing(layer_norm):
    "A row with its padding is the row without it, whatever stands in the padding."
    model = shaken(replace(SMALL, layer_norm=layer_norm))
    ids, types = (batch(SMALL)[name][:1] for name in ("input_ids", "token_types"))
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    tokens, order = model(ids[:, :7], types[:, :7])
    for change in (0, 1, 5):
        wild = torch.where(mask == 0, (ids + change) % SMALL.vocab_size, ids)
        found = model(wild, types, mask)
        torch.testing.assert_close(found[0][:, :7], tokens, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1], order, rtol=0, atol=1e-12)
    assert (model(ids, types)[0][:, :7] - tokens).abs().max() > 1e-3


def test_padding_may_stand_anywhere():
    "In the middle of a row, too: no output there moves when it does."
    model = shaken(SMALL)
    data = batch(SMALL)
    mask = torch.ones_like(data["input_ids"])
    mask[:, 4] = 0
    before, order = model(data["input_ids"], attention_mask=mask)
    data["input_ids"][:, 4] = (data["input_ids"][:, 4] + 1) % SMALL.vocab_size
    after, order_after = model(data["input_ids"], attention_mask=mask)
    moved = (after - before).abs().amax(-1) > 0
    assert moved[:, 4].all() and moved.sum() == len(moved)
    assert torch.equal(order, order_after)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_visible(dtype):
    rows = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0]]).to(dtype)
    found = visible(rows)
    assert found.dtype == torch.bool and found.shape == (3, 1, 1, 3)
    assert found.flatten(1).int().tolist() == [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    assert visible(None) is None


@pytest.mark.parametrize("layer_norm", ["pre", "post"])
def test_a_row_of_padding_alone(layer_norm):
    "It gives numbers, is attended as if all of it were real, and leaves the other rows alone."
    config = replace(SMALL, layer_norm=layer_norm)
    model = shaken(config)
    data = batch(config)
    data["attention_mask"][1] = 0
    data["labels"][1] = -100
    tokens, order = model(*(data[n] for n in ("input_ids", "token_types", "attention_mask")))
    assert tokens.isfinite().all() and order.isfinite().all()
    full = model(data["input_ids"][1:2], data["token_types"][1:2])
    torch.testing.assert_close(tokens[1:2], full[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(order[1:2], full[1], rtol=0, atol=1e-12)

    others = {name: torch.cat([each[:1], each[2:]]) for name, each in data.items()}
    encoder = [p for name, p in model.named_parameters() if not name.startswith(("pooler", "sop"))]
    found, want = (model.losses(**each)["mlm"] for each in (data, others))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    for now, then in zip(*(torch.autograd.grad(loss, encoder) for loss in (found, want))):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-12)


def test_attention_without_a_softmax_that_forgives(monkeypatch):
    "PyTorch's attention answers a row without keys with zeros. Others do not, and need not."

    def by_hand(q, k, v, attn_mask, dropout_p, is_causal):
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        return scores.masked_fill(~attn_mask, -torch.inf).softmax(-1) @ v

    model = shaken(SMALL)
    data = batch(SMALL)
    data["attention_mask"][1] = 0
    want = answer(model, **data)
    monkeypatch.setattr(gpt2.F, "scaled_dot_product_attention", by_hand)
    found = answer(model, **data)
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())
    torch.testing.assert_close(found.loss, want.loss, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------ the losses


def test_losses_by_definition():
    "One term after the other, with a mask of fractions."
    model = shaken(SMALL)
    data = batch(SMALL)
    mask = torch.rand(data["labels"].shape, generator=torch.Generator().manual_seed(1))
    tokens, order = model(*(data[n] for n in ("input_ids", "token_types", "attention_mask")))
    total = count = 0.0
    for row, place in (data["labels"] != -100).nonzero().tolist():
        real = tokens[row, place, : SMALL.vocab_size]
        weight = mask[row, place].item()
        total = total + weight * (real.logsumexp(0) - real[data["labels"][row, place]])
        count += weight
    swapped = [real.logsumexp(0) - real[i] for real, i in zip(order, data["sentence_order"])]
    losses = model.losses(**data, loss_mask=mask)
    torch.testing.assert_close(losses["mlm"], total / count, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses["sop"], sum(swapped) / len(swapped), rtol=1e-12, atol=0)
    torch.testing.assert_close(model.loss(**data, loss_mask=mask), sum(losses.values()))


def test_parts_add_up_when_they_know_the_whole_counts():
    "Rows with unlike numbers of counted tokens, and unlike numbers of rows. Gradients, too."
    model = shaken(SMALL)
    data = batch(SMALL, rows=5)
    data["labels"][0] = data["input_ids"][0]
    count = (data["labels"] != -100).sum()
    parts = [{n: each[rows] for n, each in data.items()} for rows in (slice(2), slice(2, 5))]
    whole = answer(model, **data)
    found = [answer(model, **part, num_tokens=count, num_samples=5) for part in parts]
    torch.testing.assert_close(sum(each.loss for each in found), whole.loss, rtol=0, atol=1e-12)
    for name, gradient in whole.gradients.items():
        total = sum(each.gradients[name] for each in found)
        torch.testing.assert_close(total, gradient, rtol=0, atol=1e-12)
    for name, loss in model.losses(**data).items():
        means = [model.losses(**part)[name] for part in parts]
        assert (sum(means) / 2 - loss).abs() > 1e-3


@pytest.mark.parametrize("num_tokens", [None, 0, 0.0, torch.tensor(0), 7])
def test_no_counted_token(num_tokens):
    "The loss is 0, and so is its gradient; the order is learnt all the same."
    model = shaken(SMALL)
    data = batch(SMALL)
    data["labels"][:] = -100
    losses = model.losses(**data, num_tokens=num_tokens)
    assert losses["mlm"] == 0 and losses["sop"] > 0
    losses["mlm"].backward(retain_graph=True)
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())
    losses["sop"].backward()
    assert model.pooler.weight.grad.abs().max() > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("divisor", [0.5, 0.1, 7, torch.tensor(3), torch.tensor(0.25)])
def test_sums_are_divided_by_any_number(divisor):
    "Fractions, too: one counted token is half a token for each of two replicas."
    model, data = shaken(SMALL), batch(SMALL)
    sums = model.losses(**data, num_tokens=1, num_samples=1)
    means = model.losses(**data, num_tokens=divisor, num_samples=divisor)
    for name, mean in means.items():
        torch.testing.assert_close(mean * divisor, sums[name], rtol=1e-14, atol=0)


def test_weights_are_summed_in_the_type_of_the_loss():
    model, data = shaken(SMALL), batch(SMALL, rows=9)
    weights = torch.rand(data["labels"].shape, generator=torch.Generator().manual_seed(1))
    found, want = (model.losses(**data, loss_mask=each) for each in (weights, weights.double()))
    torch.testing.assert_close(found["mlm"], want["mlm"], rtol=1e-12, atol=0)


def test_without_an_order_there_is_one_loss():
    model = shaken(SMALL)
    data = batch(SMALL)
    both = model.losses(**data)
    del data["sentence_order"]
    assert model.losses(**data).keys() == {"mlm"}
    assert torch.equal(model.loss(**data), both["mlm"])


def test_without_types_all_are_of_the_first():
    model = shaken(SMALL)
    data = batch(SMALL)
    zeros = model(data["input_ids"], torch.zeros_like(data["input_ids"]))
    assert all(map(torch.equal, model(data["input_ids"]), zeros))
    types = model(data["input_ids"], data["token_types"])
    assert (types[0] - zeros[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_give_a_float32_loss(dtype):
    logits = 3 * torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([0, 1, 1, 0])
    found = order_loss(logits.to(dtype), order, None)
    assert found.dtype == torch.float32
    want = F.cross_entropy(logits.to(dtype).double(), order)
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=0)


def test_padding_rows_of_the_table_have_no_gradient_and_no_say():
    "Nor have their biases."
    model = shaken(SMALL)
    data = batch(SMALL)
    before = answer(model, **data)
    for name in ("wte.weight", "mlm.bias"):
        gradient = before.gradients[name]
        assert len(gradient) == 48 and gradient[41:].abs().max() == 0
        assert gradient[:41].abs().min() > 0
    with torch.no_grad():
        model.wte.weight[41:] += 100
        model.mlm.bias[41:] += 100
    after = answer(model, **data)
    assert torch.equal(before.loss, after.loss)
    assert all(torch.equal(before.gradients[n], after.gradients[n]) for n in before.gradients)


# ------------------------------------------------------------------------ the initial weights

WEIGHT_BIAS = ("weight", "bias")
KINDS = {kind: replace(SMALL, layer_norm=kind) for kind in ("pre", "post")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_its_weight_from_the_rule(kind):
    "The names are those the sharded model uses, too."
    parts = ("ln_1", "attn.qkv", "attn.proj", "ln_2", "mlp.up", "mlp.down")
    layers = [f"blocks.{i}.{part}" for i in range(2) for part in parts]
    layers = ["ln_emb", *layers] if kind == "post" else [*layers, "ln_f"]
    names = ["wte.weight", "wpe.weight", "token_types.weight"]
    names += [f"{layer}.{each}" for layer in [*layers, "pooler", "sop"] for each in WEIGHT_BIAS]
    names += ["mlm.bias"]
    names += [f"mlm.{part}.{each}" for part in ("dense", "ln") for each in WEIGHT_BIAS]
    weights = Bert(KINDS[kind]).state_dict()
    assert list(weights) == names == [*Bert(KINDS[kind]).state_dict()]
    shapes = {name: p.shape for name, p in Bert(KINDS[kind]).named_parameters()}
    assert {name: weight.shape for name, weight in weights.items()} == shapes


@pytest.mark.parametrize("kind", KINDS)
def test_weights_depend_on_config_and_seed_alone(kind):
    want = Bert(KINDS[kind], seed=3).state_dict()
    torch.manual_seed(12345)
    torch.rand(7)
    for change in ({}, dict(dropout=0.5, gelu="tanh", num_heads=4)):
        found = Bert(replace(KINDS[kind], **change), seed=3).state_dict()
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)
    other = Bert(KINDS[kind], seed=4).state_dict()
    drawn = [name for name in want if want[name].dim() == 2]
    assert not any(torch.equal(other[name], want[name]) for name in drawn)
    assert len(drawn) == 3 + 4 * SMALL.num_layers + 3


def test_the_two_orders_start_from_the_same_weights():
    pre, post = (Bert(KINDS[kind]).state_dict() for kind in ("pre", "post"))
    ends = {f"{name}.{each}" for name in ("ln_emb", "ln_f") for each in WEIGHT_BIAS}
    assert pre.keys() ^ post.keys() == ends
    assert all(torch.equal(pre[name], post[name]) for name in pre.keys() & post.keys())


@pytest.mark.parametrize("layer_norm", ["pre", "post"])
def test_initial_distribution(layer_norm):
    "The paper, 4.2: 0.02, and 0.02/sqrt(2N) before an addition."
    sizes = dict(vocab_size=1000, max_seq_len=128, vocab_multiple=256, num_token_types=90)
    config = BertConfig(8, 128, 4, layer_norm=layer_norm, **sizes)
    for name, weight in Bert(config).state_dict().items():
        assert weight.dtype == torch.float32
        if name.endswith("bias"):
            assert weight.abs().max() == 0
        elif "ln" in name:
            assert torch.equal(weight, torch.ones(128))
        else:
            real = weight[:1000]
            std = 0.02 / 4 if name.endswith(("proj.weight", "down.weight")) else 0.02
            spread = 4 / math.sqrt(2 * real.numel())        # four standard errors of the width
            assert abs(real.std() / std - 1) < spread, name
            assert abs(real.mean()) < 4 * std / math.sqrt(real.numel()), name
            assert weight[1000:].abs().sum() == 0


def test_no_two_weights_share_numbers():
    "One stream for all: a generator made anew for each tensor would repeat it."
    first = [w.flatten()[:5] for name, w in Bert(SMALL).state_dict().items() if w.dim() == 2]
    ratios = {tuple((f / f[0]).tolist()) for f in first}
    assert len(ratios) == len(first)


def test_losses_at_the_start_are_those_of_ignorance():
    config = replace(SMALL, vocab_size=300, vocab_multiple=512, hidden_size=64, num_heads=4)
    losses = Bert(config).losses(**batch(config, rows=64))
    assert abs(losses["mlm"].item() - math.log(300)) < 0.05
    assert abs(losses["sop"].item() - math.log(2)) < 0.01


# ------------------------------------------------------------------------ dropout


@pytest.mark.parametrize("layer_norm", ["pre", "post"])
def test_dropout_acts_in_training_only(layer_norm):
    config = replace(SMALL, layer_norm=layer_norm, dropout=0.5)
    ids = batch(config)["input_ids"]
    model, plain = shaken(config), shaken(replace(config, dropout=0.0))
    assert not torch.equal(model(ids)[0], model(ids)[0])
    model.eval()
    assert all(map(torch.equal, model(ids), plain(ids)))


@pytest.mark.parametrize("layer_norm, normalised", [("pre", False), ("post", True)])
def test_embeddings_are_dropped_after_their_layer_norm(layer_norm, normalised, monkeypatch):
    "In post-LN, as in the original; pre-LN has none there."
    seen = []
    monkeypatch.setattr(bert.F, "dropout", lambda x, p, training: seen.append(x) or x)
    Bert(replace(SMALL, layer_norm=layer_norm)).double()(batch(SMALL)["input_ids"])
    assert len(seen) == 1 + 2 * SMALL.num_layers
    width = seen[0].var(-1, unbiased=False)
    assert torch.allclose(width, torch.ones_like(width), atol=1e-6) == normalised


# ------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("bad", [-1, 41, 47, 48])
def test_ids_out_of_range(bad):
    data = batch(SMALL)
    data["input_ids"][1, 2] = bad
    with pytest.raises(ValueError, match=f"token id {bad} is out of range: ids go from 0 to 40"):
        Bert(SMALL).loss(**data)


@pytest.mark.parametrize("bad", [-1, 41, 47, 48])
def test_labels_out_of_range(bad):
    data = batch(SMALL)
    data["labels"][0, 0] = bad
    with pytest.raises(ValueError, match=f"target id {bad} is out of range: ids go from 0 to 40"):
        Bert(SMALL).loss(**data)


@pytest.mark.parametrize("bad", [-1, 2])
def test_types_out_of_range(bad):
    data = batch(SMALL)
    data["token_types"][1, 2] = bad
    rule = f"token type {bad} is out of range: ids go from 0 to 1; build the model with a larger"
    with pytest.raises(ValueError, match=rule + " num_token_types"):
        Bert(SMALL).loss(**data)


@pytest.mark.parametrize("bad", [-100, -1, 2])
def test_orders_out_of_range(bad):
    "-100 too: PyTorch's loss would leave that row out of the sum in silence."
    data = batch(SMALL)
    data["sentence_order"][1] = bad
    rule = f"sentence order {bad} is out of range: ids go from 0 to 1; 0 is in order, 1 is swapped"
    with pytest.raises(ValueError, match=rule):
        Bert(SMALL).loss(**data)


@pytest.mark.parametrize("name", ["token_types", "attention_mask"])
def test_other_shapes(name):
    "One row would broadcast, and mean something else."
    data = batch(SMALL)
    data[name] = data[name][:1]
    rule = rf"{name} has shape \(1, 11\), input_ids \(3, 11\); give one number for each token"
    with pytest.raises(ValueError, match=rule):
        Bert(SMALL).loss(**data)
    data[name] = batch(SMALL)[name].T       # as many numbers
    with pytest.raises(ValueError, match=rf"{name} has shape \(11, 3\), input_ids \(3, 11\)"):
        Bert(SMALL).loss(**data)


@pytest.mark.parametrize("name", ["labels", "loss_mask"])
def test_labels_and_weights_of_other_shapes(name):
    "Turned around there are as many of them, and each would stand for another token."
    data = batch(SMALL)
    data["loss_mask"] = torch.ones_like(data["labels"])
    data[name] = data[name].T
    rule = r"shapes \[.*\(11, 3\).*\]; give one label and one weight for each token"
    with pytest.raises(ValueError, match=rule):
        Bert(SMALL).loss(**data)


def test_an_order_for_other_rows():
    data = batch(SMALL)
    order = data["sentence_order"]
    for other, shape in ((order[:2], "2,"), (order[:, None], "3, 1")):
        rule = rf"sentence_order has shape \({shape}\), the batch 3 rows; give one number a row"
        with pytest.raises(ValueError, match=rule):
            Bert(SMALL).loss(**(data | {"sentence_order": other}))


def test_a_sequence_that_is_too_long():
    with pytest.raises(ValueError, match="12 tokens is longer than max_seq_len=11; cut it, or"):
        Bert(SMALL)(torch.zeros(1, 12, dtype=torch.long))


# ------------------------------------------------------------------------ independence


def test_the_reference_imports_no_collective():
    "Not within a function either."
    text = Path(bert.__file__).read_text(encoding="utf-8")
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    known = {"torch", "torch.nn.functional", ".gpt2"}
    known |= {"..checks", "..config", "megatron_edu.definitions", "..weights"}
    assert found == known
    assert "distributed" not in text
