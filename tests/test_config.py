"""The configuration: exact counts, padding that knows no ranks, and sizes that are refused."""

from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest
import torch
from torch import nn

from megatron_edu import reference
from megatron_edu.config import PRESETS, BertConfig, GPT2Config, parameter_counts, round_up

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

# hidden, heads, layers, parameters in the paper's rounding
SCALING_STUDY = {
    "gpt2-1.2b": (1536, 16, 40, "1.2135"),
    "gpt2-2.5b": (1920, 20, 54, "2.4904"),
    "gpt2-4.2b": (2304, 24, 64, "4.1991"),
    "gpt2-8.3b": (3072, 32, 72, "8.3170"),
}


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


@pytest.mark.parametrize("name", PRESETS)
def test_count_is_that_of_the_model(name):
    "On the meta device: shapes without content."
    kind = {GPT2Config: reference.GPT2, BertConfig: reference.Bert}[type(PRESETS[name])]
    with torch.device("meta"):
        model = kind(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].num_parameters()


ODD = {
    "odd sizes": GPT2Config(3, 15, 5, vocab_size=23, max_seq_len=7, vocab_multiple=8),
    "f is not 4h": GPT2Config(2, 12, 3, 23, 7, ffn_hidden_size=17, vocab_multiple=8),
    "no padding": GPT2Config(1, 12, 3, 23, 7, vocab_multiple=1),
}


@pytest.mark.parametrize("name", ODD)
def test_count_is_that_of_a_small_model(name):
    "By purpose, too."
    config = ODD[name]
    model = reference.GPT2(config)
    found = dict.fromkeys(parameter_counts(config), 0)
    for parameter, value in model.named_parameters():
        purposes = {"wte": "tokens", "wpe": "positions", ".attn.": "attention", ".mlp.": "mlp"}
        purpose = [p for part, p in purposes.items() if part in parameter] or ["norms"]
        found[purpose[0]] += value.numel()
    assert found == parameter_counts(config)
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
    (dict(num_heads=2.0), "num_heads=2.0: must be a whole number, at least 1"),
    (dict(vocab_size="512"), "vocab_size='512': must be a whole number, at least 1"),
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
    (dict(gelu="relu"), "gelu='relu': 'tanh' (GPT-2's approximation) or 'exact'"),
]


@pytest.mark.parametrize("change, message", WRONG, ids=lambda value: str(value)[:30])
def test_impossible_numbers_are_refused(change, message):
    with pytest.raises(ValueError) as caught:
        replace(TINY, **change)
    assert str(caught.value) == message


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


def test_frozen_comparable_and_saved_as_plain_values():
    with pytest.raises(FrozenInstanceError):
        TINY.num_layers = 3
    assert GPT2Config(**asdict(TINY)) == TINY
    assert hash(replace(TINY)) == hash(TINY)
    assert replace(TINY, num_layers=3) != TINY


def test_feed_forward_size():
    assert TINY.ffn_size == 4 * 64
    assert replace(TINY, ffn_hidden_size=100).ffn_size == 100
