"""The configuration: exact counts, padding that knows no ranks, and sizes that are refused."""

from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest
import torch
import transformers
from torch import nn

from megatron_edu import reference
from megatron_edu.config import PRESETS, BertConfig, GPT2Config, round_up
from megatron_edu.models.architecture import build_model

TINY = PRESETS["tiny"]

# The paper's table 1 and the models around it, to the last parameter.
EXACT = {
    "gpt2-124m": 125_164_032,
    "gpt2-355m": 355_788_800,
    "gpt2-1.2b": 1_213_479_936,
    "gpt2-2.5b": 2_490_408_960,
    "gpt2-4.2b": 4_199_109_120,
    "gpt2-8.3b": 8_317_040_640,
    "gpt2-8.3b-24-heads": 8_317_040_640,
}

# The paper's three BERTs: hidden, heads, layers, parameters, and what the paper calls them.
BERTS = {
    "bert-336m": (1024, 16, 24, 336_429_058, "336M"),
    "bert-1.3b": (2048, 32, 24, 1_281_001_474, "1.3B"),
    "bert-3.9b": (2560, 40, 48, 3_869_588_482, "3.9B"),
}

# hidden, heads, layers, parameters in the paper's rounding
SCALING_STUDY = {
    "gpt2-1.2b": (1536, 16, 40, "1.2135"),
    "gpt2-2.5b": (1920, 20, 54, "2.4904"),
    "gpt2-4.2b": (2304, 24, 64, "4.1991"),
    "gpt2-8.3b": (3072, 32, 72, "8.3170"),
}


ODD = {
    "odd sizes": GPT2Config(3, 15, 5, vocab_size=23, max_seq_len=7, vocab_multiple=8),
    "f is not 4h": GPT2Config(2, 12, 3, 23, 7, ffn_hidden_size=17, vocab_multiple=8),
    "no padding": GPT2Config(1, 12, 3, 23, 7, vocab_multiple=1),
    "untied": GPT2Config(1, 12, 3, 23, 7, vocab_multiple=8, tie_embeddings=False),
    "BERT, untied": BertConfig(1, 12, 3, 23, 7, vocab_multiple=8, tie_embeddings=False),
    "BERT, odd sizes": BertConfig(3, 15, 5, 23, 7, vocab_multiple=8, num_token_types=3),
    "BERT, f is not 4h": BertConfig(2, 12, 3, 23, 7, ffn_hidden_size=17, vocab_multiple=8),
    "BERT, post-LN": BertConfig(1, 12, 3, 23, 7, vocab_multiple=1, layer_norm="post"),
}
KINDS = {GPT2Config: reference.GPT2, BertConfig: reference.Bert}


@pytest.mark.parametrize("name", EXACT)
def test_presets_have_exactly_these_parameters(name):
    assert PRESETS[name].num_parameters() == EXACT[name]


@pytest.mark.parametrize("name", SCALING_STUDY)
def test_presets_of_the_scaling_study(name):
    config = PRESETS[name]
    hidden, heads, layers, billions = SCALING_STUDY[name]
    assert (config.hidden_size, config.num_heads, config.num_layers) == (hidden, heads, layers)
    assert f"{config.num_parameters() / 1e9:.4f}" == billions
    assert (config.head_size, config.padded_vocab_size, config.max_seq_len) == (96, 51_200, 1024)


@pytest.mark.parametrize("name", BERTS)
def test_presets_of_the_berts(name):
    "The paper's vocabulary, padded by the same rule as GPT-2's, and its order of layers."
    config = PRESETS[name]
    hidden, heads, layers, exact, short = BERTS[name]
    assert (config.hidden_size, config.num_heads, config.num_layers) == (hidden, heads, layers)
    assert config.num_parameters() == exact
    millions, billions = f"{exact / 1e6:.0f}M", f"{exact / 1e9:.1f}B"
    assert short in (millions, billions) and name == f"bert-{short.lower()}"
    assert (config.head_size, config.max_seq_len, config.num_token_types) == (64, 512, 2)
    assert (config.vocab_size, config.padded_vocab_size) == (30_522, 30_720)
    assert (config.layer_norm, config.gelu, config.layer_norm_eps) == ("pre", "exact", 1e-12)


def test_the_first_bert_without_padding():
    "BERT-base with both heads, as transformers counts it."
    base = replace(PRESETS["bert-336m"], num_layers=12, hidden_size=768, num_heads=12)
    for layer_norm in ("pre", "post"):
        config = replace(base, vocab_multiple=1, layer_norm=layer_norm)
        assert config.num_parameters() == 110_106_428
    with torch.device("meta"):
        theirs = transformers.BertForPreTraining(transformers.BertConfig())
    assert sum(p.numel() for p in theirs.parameters()) == 110_106_428


@pytest.mark.parametrize("name", PRESETS)
def test_count_is_that_of_the_model(name):
    "On the meta device, where nothing is drawn: shapes without content."
    model = build_model(PRESETS[name], seed=None)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].num_parameters()


@pytest.mark.parametrize("name", ODD)
def test_count_is_that_of_a_small_model(name):
    "By purpose, too."
    config = ODD[name]
    purposes = {"wte": "tokens", "wpe": "positions", ".attn.": "attention", ".mlp.": "mlp"}
    purposes |= {"types": "token_types", "pooler": "order_head", "sop": "order_head"}
    purposes |= {"mlm.": "token_head", "output": "output"}
    found = dict.fromkeys(config.parameter_counts(), 0)
    for parameter, value in KINDS[type(config)](config).named_parameters():
        purpose = [p for part, p in purposes.items() if part in parameter] or ["norms"]
        found[purpose[0]] += value.numel()
    assert found == config.parameter_counts()
    assert sum(found.values()) == config.num_parameters()


@pytest.mark.parametrize("h", [1, 7, 64])
def test_a_layer_has_12hh_and_13h(h):
    parts = [nn.Linear(h, 3 * h), nn.Linear(h, h), nn.Linear(h, 4 * h), nn.Linear(4 * h, h)]
    parts += [nn.LayerNorm(h), nn.LayerNorm(h)]
    layer = sum(p.numel() for part in parts for p in part.parameters())
    one, two = (replace(TINY, num_layers=n, hidden_size=h, num_heads=1) for n in (1, 2))
    assert two.num_parameters() - one.num_parameters() == layer == 12 * h**2 + 13 * h


def test_heads_change_no_count():
    counts = {replace(TINY, num_heads=n).num_parameters() for n in (1, 2, 4, 8, 64)}
    assert len(counts) == 1


def test_the_trained_8_billion_model_has_other_heads():
    "As in the paper's table of results: 24 heads of size 128."
    config = PRESETS["gpt2-8.3b-24-heads"]
    assert (config.num_heads, config.head_size) == (24, 128)
    assert replace(config, num_heads=32) == PRESETS["gpt2-8.3b"]


def test_the_first_gpt2_without_padding():
    assert replace(PRESETS["gpt2-124m"], vocab_multiple=1).num_parameters() == 124_439_808


@pytest.mark.parametrize(
    "value, multiple, rounded",
    [(1, 1024, 1024), (1024, 1024, 1024), (1025, 1024, 2048), (50_257, 1024, 51_200), (7, 1, 7)],
)
def test_round_up(value, multiple, rounded):
    assert round_up(value, multiple) == rounded


def test_the_padded_vocabulary_knows_no_ranks():
    "Padding to 128 x tp would make every split another model."
    config = PRESETS["gpt2-124m"]
    assert config.padded_vocab_size == 51_200
    assert {config.padded_vocab_size % (128 * tp) for tp in (1, 2, 4, 8)} == {0}
    names = {field.name for field in fields(config)}
    assert not names & {"tp", "tp_size", "world_size", "ranks", "group", "dims"}
    assert all(type(getattr(config, name)) in (int, float, str, bool, type(None)) for name in names)


UNEVEN = "does not divide by num_heads=4; the nearest that does is"
WRONG = [
    (dict(num_layers=0), "num_layers=0: must be a whole number, at least 1"),
    (dict(hidden_size=-4), "hidden_size=-4: must be a whole number, at least 1"),
    (dict(num_heads=0), "num_heads=0: must be a whole number, at least 1"),
    (dict(max_seq_len=0), "max_seq_len=0: must be a whole number, at least 1"),
    (dict(vocab_multiple=0), "vocab_multiple=0: must be a whole number, at least 1"),
    (dict(ffn_hidden_size=0), "ffn_hidden_size=0: must be a whole number, at least 1"),
    (dict(hidden_size=65), f"hidden_size=65 {UNEVEN} 64"),
    (dict(hidden_size=67), f"hidden_size=67 {UNEVEN} 68"),
    (dict(hidden_size=1), f"hidden_size=1 {UNEVEN} 4"),
    (dict(dropout=1.0), "dropout=1.0: a probability, 0 <= dropout < 1"),
    (dict(dropout=-0.1), "dropout=-0.1: a probability, 0 <= dropout < 1"),
    (dict(dropout=float("nan")), "dropout=nan: a probability, 0 <= dropout < 1"),
    (dict(layer_norm_eps=0.0), "layer_norm_eps=0.0: must be above 0"),
    (dict(init_std=-0.02), "init_std=-0.02: must be above 0"),
    (dict(layer_norm_eps=float("inf")), "layer_norm_eps=inf: must be finite"),
    (dict(init_std=float("nan")), "init_std=nan: must be above 0"),
    (dict(gelu="relu"), "gelu='relu': must be 'tanh' or 'exact'"),
]


@pytest.mark.parametrize("change, message", WRONG, ids=lambda value: str(value)[:30])
def test_impossible_numbers_are_refused(change, message):
    "By both kinds."
    for config in (TINY, PRESETS["bert-tiny"]):
        with pytest.raises(ValueError) as caught:
            replace(config, **change)
        assert str(caught.value) == message


WRONG_BERT = [
    (dict(num_token_types=0), "num_token_types=0: must be a whole number, at least 1"),
    (dict(layer_norm="Pre"), "layer_norm='Pre': must be 'pre' or 'post'"),
]


@pytest.mark.parametrize("change, message", WRONG_BERT, ids=lambda value: str(value)[:30])
def test_impossible_berts_are_refused(change, message):
    with pytest.raises(ValueError) as caught:
        replace(PRESETS["bert-tiny"], **change)
    assert str(caught.value) == message


KINDS_OF = {    # of both models; of BERT alone
    "num_layers": "a whole number", "hidden_size": "a whole number", "vocab_size": "a whole number",
    "ffn_hidden_size": "a whole number or None", "dropout": "a number", "init_std": "a number",
    "num_token_types": "a whole number", "tie_embeddings": "True or False",
}


@pytest.mark.parametrize("value", ["2", 2.5, True, [2], None, 1j], ids=str)
@pytest.mark.parametrize("name", KINDS_OF)
def test_a_value_of_another_kind_is_a_type_error(name, value):
    fits = {"dropout": (2.5,), "init_std": (2.5,), "ffn_hidden_size": (None,)}
    fits["tie_embeddings"] = (True,)
    if value in fits.get(name, ()):
        return
    for config in (TINY, PRESETS["bert-tiny"]):
        if hasattr(config, name):
            with pytest.raises(TypeError) as caught:
                replace(config, **{name: value})
            assert str(caught.value) == f"{name}={value!r}: must be {KINDS_OF[name]}"


def test_the_nearest_that_divides_does_divide():
    for hidden in range(1, 60):
        for heads in (1, 3, 4, 7):
            try:
                config = replace(TINY, hidden_size=hidden, num_heads=heads)
            except ValueError as error:
                nearest = int(str(error).rsplit(" ", 1)[1])
                assert nearest % heads == 0 and 0 < abs(nearest - hidden) < heads
            else:
                assert config.head_size * heads == hidden


@pytest.mark.parametrize("name", ["tiny", "bert-tiny"])
def test_frozen_comparable_and_saved_as_plain_values(name):
    config = PRESETS[name]
    with pytest.raises(FrozenInstanceError):
        config.num_layers = 3
    assert type(config)(**asdict(config)) == config
    assert hash(replace(config)) == hash(config)
    assert replace(config, num_layers=3) != config


def test_what_a_kind_is_cannot_be_chosen():
    "GPT-2 is causal and BERT is not: no field, so no file and no option can say otherwise."
    assert TINY.causal and not PRESETS["bert-tiny"].causal
    assert not any(field.name == "causal" for field in fields(BertConfig))
    assert TINY != BertConfig(**asdict(TINY))
    with pytest.raises(TypeError, match="causal"):
        GPT2Config(**asdict(TINY), causal=False)


def test_bert_has_other_defaults():
    config = BertConfig(2, 64, 4, vocab_size=512, max_seq_len=64)
    assert (config.gelu, config.layer_norm_eps) == ("exact", 1e-12)
    assert (config.num_token_types, config.layer_norm) == (2, "pre")
    same = GPT2Config(2, 64, 4, vocab_size=512, max_seq_len=64)
    for field in ("dropout", "ffn_hidden_size", "init_std", "vocab_multiple"):
        assert getattr(config, field) == getattr(same, field)


def test_feed_forward_size():
    assert TINY.ffn_size == 4 * 64
    assert replace(TINY, ffn_hidden_size=100).ffn_size == 100
