"""The reference BERT against transformers, against the definition of its losses, and alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers

from megatron_edu.config import BertConfig
from megatron_edu.reference.bert import Bert

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


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize("layer_norm", ["pre", "post"])
def test_transformers_has_the_same_logits_losses_and_gradients(layer_norm, gelu, padding):
    config = replace(SMALL, layer_norm=layer_norm, gelu=gelu)
    model = shaken(config)
    theirs = twin(model)
    data = batch(config)
    if not padding:
        del data["attention_mask"]
    inputs = {name: data.get(name) for name in ("input_ids", "token_types", "attention_mask")}
    ids, types, mask = inputs.values()
    found = theirs(ids, token_type_ids=types, attention_mask=mask)
    token_logits, order_logits = model(**inputs)
    torch.testing.assert_close(token_logits, found.prediction_logits, rtol=0, atol=ATOL)
    torch.testing.assert_close(order_logits, found.seq_relationship_logits, rtol=0, atol=ATOL)
    hidden = theirs.bert(ids, token_type_ids=types, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(model.hidden_states(**inputs), hidden, rtol=0, atol=ATOL)

    real = found.prediction_logits[..., : config.vocab_size].flatten(0, 1)
    mlm = F.cross_entropy(real, data["labels"].flatten())
    sop = F.cross_entropy(found.seq_relationship_logits, data["sentence_order"])
    losses = model.losses(**data)
    torch.testing.assert_close(losses, {"mlm": mlm, "sop": sop}, rtol=0, atol=ATOL)
    (mlm + sop).backward()
    model.loss(**data).backward()
    ours = in_their_words({n: p.grad for n, p in model.named_parameters()}, layer_norm)
    want = {name: p.grad for name, p in theirs.named_parameters()}
    assert ours.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=ATOL)
