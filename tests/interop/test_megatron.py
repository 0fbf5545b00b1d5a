"Classic checkpoints of Megatron-LM: every version and split gives one model; others are refused."

import argparse
import os
import pickle
import re
import shutil
import sys
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from bert_cases import config as bert_config
from gpt2_cases import config as gpt2_config
from gpt2_cases import shake

import megatron_edu.memory
from megatron_edu import cli
from megatron_edu.config import BertConfig
from megatron_edu.interop import save_huggingface
from megatron_edu.interop.compare import compare_with_transformers
from megatron_edu.interop.megatron import ALLOWED, FILE, Unused, load_megatron, unpickle
from megatron_edu.models import build_model
from megatron_edu.training.checkpoint import latest_checkpoint, load_model

SMALL = {
    "gpt2": gpt2_config(ffn_hidden_size=52),
    "bert": bert_config(ffn_hidden_size=52, gelu="tanh", layer_norm_eps=1e-5),
}
SPELLINGS = {  # the present name of a part -> what versions have called it
    "first": {},
    "later": {".transformer.": ".encoder.", ".attention.": ".self_attention."},
    "last": {
        ".transformer.": ".encoder.",
        ".attention.": ".self_attention.",
        "_layernorm.": "_norm.",
        "lm_head.layernorm.": "lm_head.norm.",
    },
}
kinds = pytest.mark.parametrize("kind", SMALL)


# ---------------------------------------------------------------- files as Megatron-LM writes them


def their_rows(config, tp, rank, version):
    "The rows of our fused Q, K, V that one rank of theirs has, in its order."
    heads, d = config.num_heads // tp, config.hidden_size // config.num_heads
    mine, parts, numbers = range(rank * heads, (rank + 1) * heads), range(3), range(d)
    order = {
        0: [(part, head, j) for part in parts for head in mine for j in numbers],
        1: [(part, head, j) for head in mine for j in numbers for part in parts],
        2: [(part, head, j) for head in mine for part in parts for j in numbers],
    }[min(int(version or 0), 2)]
    return [part * config.hidden_size + head * d + j for part, head, j in order]


def their_names(own, tp, rank, config, version):
    "One parameter of ours in one rank's file: its name, and how to cut it."
    layer, _, kind = own.rpartition(".")
    whole = lambda w: w  # noqa: E731
    rows = lambda w: w.chunk(tp)[rank]  # noqa: E731
    columns = lambda w: w.chunk(tp, 1)[rank]  # noqa: E731
    outer = {
        "wte": ("language_model.embedding.word_embeddings", rows),
        "wpe": ("language_model.embedding.position_embeddings", whole),
        "token_types": ("language_model.embedding.tokentype_embeddings", whole),
        "output": ("language_model.output_layer", rows),
        "ln_f": ("language_model.transformer.final_layernorm", whole),
        "pooler": ("language_model.pooler.dense", whole),
        "sop": ("binary_head", whole),
        "mlm": ("lm_head", rows),
        "mlm.dense": ("lm_head.dense", whole),
        "mlm.ln": ("lm_head.layernorm", whole),
    }
    inner = {
        "ln_1": ("input_layernorm", whole),
        "attn.qkv": (
            "attention.query_key_value",
            lambda w: w[their_rows(config, tp, rank, version)],
        ),
        "attn.proj": ("attention.dense", columns if kind == "weight" else whole),
        "ln_2": ("post_attention_layernorm", whole),
        "mlp.up": ("mlp.dense_h_to_4h", rows),
        "mlp.down": ("mlp.dense_4h_to_h", columns if kind == "weight" else whole),
    }
    if layer in outer:
        name, cut = outer[layer]
    else:
        _, number, part = layer.split(".", 2)
        name, cut = inner[part]
        name = f"language_model.transformer.layers.{number}.{name}"
    return f"{name}.{kind}", cut


def nest(flat, levels=("language_model", "embedding", "transformer", "encoder", "pooler")):
    "Dotted names as nested dictionaries down to the layers, as most versions have them."
    found = {}
    for name, value in flat.items():
        place, rest = found, name
        while rest.partition(".")[0] in levels or place is found and "." in rest:
            head, _, rest = rest.partition(".")
            place = place.setdefault(head, {})
        place[rest] = value
    return found


def args_of(config, tp, **changes):
    said = dict(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        ffn_hidden_size=config.ffn_size,
        max_position_embeddings=config.max_seq_len,
        layernorm_epsilon=config.layer_norm_eps,
        hidden_dropout=config.dropout,
        attention_dropout=config.dropout,
        padded_vocab_size=-(-config.vocab_size // (128 * tp)) * 128 * tp,
        vocab_size=config.vocab_size,
        bias_gelu_fusion=config.gelu == "tanh",
        openai_gelu=False,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=1,
        params_dtype=torch.float16,
        init_method_std=config.init_std,
        lr=1e-4,
        save="/somewhere",
    )
    return argparse.Namespace(**(said | changes))


def write(
    folder,
    model,
    tp=1,
    version=3.0,
    *,
    args=True,
    spelling="first",
    nested=True,
    old=False,
    stage="",
    dtype=torch.float32,
    unit=128,
    **more,
):
    "A folder of Megatron-LM that holds a model of ours, with states that are not the model's."
    config = model.config
    rows = -(-config.vocab_size // (unit * tp)) * unit * tp
    for rank in range(tp):
        flat = {}
        for own, values in model.state_dict().items():
            if values.shape[0] == config.padded_vocab_size:  # their padding is no zeros
                padding = torch.full((rows - config.vocab_size, *values.shape[1:]), 0.5)
                values = torch.cat([values[: config.vocab_size], padding])
            name, cut = their_names(own, tp, rank, config, version)
            for before, after in SPELLINGS[spelling].items():
                name = name.replace(before, after)
            flat[name] = cut(values).clone().to(dtype)
        content = {"iteration": 500, "model": nest(flat) if nested else flat} | more
        if version is not None:
            content["checkpoint_version"] = version
        if args is not None:
            content["args"] = args_of(config, tp, rank=rank) if args is True else args
        content["optimizer"] = {"exp_avg": torch.ones(3), "scale": torch.tensor(2.0)}
        content["lr_scheduler"] = {"num_iters": 500}
        content["random_rng_state"] = (3, (1, 2), None)
        content["np_rng_state"] = np.random.RandomState(0).get_state()
        content["np_number"] = np.float64(2.5)
        path = folder / f"mp_rank_{rank:02d}{stage}" / FILE
        path.parent.mkdir(parents=True)
        torch.save(content, path, _use_new_zipfile_serialization=not old)
    return folder


def edit(folder, change, rank=0):
    "Save one rank's file with a change."
    path = folder / f"mp_rank_{rank:02d}" / FILE
    content = torch.load(path, weights_only=False)
    content = change(content) or content
    torch.save(content, path)


def edit_model(name, change):
    "What `edit` takes: one tensor changed, taken out (None) or put in, by its dotted name."

    def apply(content):
        *levels, rest = name.split("/")
        place = content["model"]
        for level in levels:
            place = place[level]
        value = change(place.get(rest))
        if value is None:
            del place[rest]
        else:
            place[rest] = value

    return apply


def edit_args(**changes):
    return lambda content: vars(content["args"]).update(changes)


def built(kind, **changes):
    base = SMALL[kind]
    model = build_model(type(base)(**(vars(base) | changes)))
    shake(model)
    with torch.no_grad():  # a state of ours has zeros for padding
        for name in ("wte.weight", "output.weight", "mlm.bias"):
            if name in dict(model.named_parameters()):
                model.get_parameter(name)[model.config.vocab_size :] = 0
    return model


def read(folder, **more):
    "The model, the line, and what was warned of."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, line = load_megatron(folder, **({"vocab_multiple": 64} | more))
    return model, line, [str(each.message) for each in said]


def assert_same(model, other):
    assert model.config == other.config
    a, b = model.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ------------------------------------------------------------------------------ every way to write


@kinds
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("version", "spelling", "nested", "old"),
    [
        (None, "first", True, True),
        (0, "first", False, False),
        (1.0, "later", True, False),
        (2.0, "later", False, True),
        (3.0, "last", True, False),
        (3, "later", True, False),
    ],
)
def test_every_version_gives_the_same_bits(tmp_path, kind, tp, version, spelling, nested, old):
    model = built(kind)
    write(tmp_path, model, tp, version, spelling=spelling, nested=nested, old=old)
    again, line, said = read(tmp_path)
    assert_same(again, model)
    files = "1 file" if tp == 1 else f"{tp} files"
    assert line == (
        f"read from {files} of Megatron-LM, version {int(version or 0)}, iteration 500; dropped: "
        "optimizer, lr_scheduler, random_rng_state, np_rng_state, np_number"
    )
    assert not any("assumed" in each for each in said)


@kinds
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_without_args_the_public_models_are_assumed(tmp_path, kind, tp):
    gelu = {"gpt2": "tanh", "bert": "exact"}[kind]
    model = built(kind, hidden_size=256, num_layers=1, gelu=gelu, dropout=0.1)
    write(tmp_path, model, tp, None, args=None)
    again, _, said = read(tmp_path)
    rows = -(-101 // (128 * tp)) * 128 * tp
    assert again.config == type(model.config)(**(vars(model.config) | {"vocab_size": rows}))
    for name, values in model.state_dict().items():
        there = again.state_dict()[name]
        tokens = 101 if name in ("wte.weight", "mlm.bias") else None
        assert torch.equal(there[:tokens], values[:tokens]), name
    (assumed, words) = said
    assert f"assumed are 64 numbers a head, the {gelu} GELU, layernorm_epsilon 1e-05" in assumed
    assert f"which of the {rows} rows of the word table are padding is not known" in words


@kinds
def test_transformers_gives_the_same_answers(tmp_path, kind):
    model = built(kind)
    save_huggingface(model, tmp_path / "theirs")
    write(tmp_path / "megatrons", model, 2, 2.0)
    again, _, _ = read(tmp_path / "megatrons")
    assert compare_with_transformers(again, tmp_path / "theirs") < 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(tmp_path, dtype):
    model = built("gpt2")
    model.load_state_dict({name: w.to(dtype).float() for name, w in model.state_dict().items()})
    again, _, _ = read(write(tmp_path, model, 2, dtype=dtype))
    assert_same(again, model)
    assert all(p.dtype == torch.float32 for p in again.parameters())


def test_a_table_of_its_own_for_the_output(tmp_path):
    model = built("gpt2", tie_embeddings=False)
    again, _, _ = read(write(tmp_path, model, 2))
    assert_same(again, model)


@pytest.mark.parametrize("latest", ["500\n", "release", None])
def test_a_run_and_a_save_and_one_stage(tmp_path, latest):
    model, run = built("gpt2"), tmp_path / "run"
    folder = {"500\n": run / "iter_0000500", "release": run / "release", None: run}[latest]
    write(folder, model, 2, stage="_000" if latest is None else "")
    if latest is not None:
        (run / "latest_checkpointed_iteration.txt").write_text(latest)
    for named in (run, str(folder)):
        assert_same(read(named)[0], model)


@pytest.mark.parametrize("absent", ["order", "tokens"])
def test_heads_that_are_missing_begin_anew(tmp_path, absent):
    model = built("bert")
    write(tmp_path, model, 2)
    for rank in range(2):
        for name in {"order": ("binary_head", "language_model/pooler"), "tokens": ("lm_head",)}[
            absent
        ]:
            edit(tmp_path, edit_model(name, lambda _: None), rank)
    again, _, said = read(tmp_path)
    words = {"order": "no pooler, no sentence-order head", "tokens": "no masked-token head"}[absent]
    assert any(words in each and "train them before use" in each for each in said)
    fresh = build_model(again.config).state_dict()
    gone = {"order": ("pooler", "sop"), "tokens": ("mlm",)}[absent]
    for name, values in again.state_dict().items():
        source = fresh if name.startswith(gone) else model.state_dict()
        assert torch.equal(values, source[name]), name


def test_a_copy_of_the_word_table_must_be_one(tmp_path):
    model, there = built("gpt2"), "word_embeddings_for_head"
    write(tmp_path, model)

    def copy(content):
        table = content["model"]["language_model"]["embedding"]["word_embeddings.weight"]
        content["model"][there] = {"weight": table.clone()}

    edit(tmp_path, copy)
    assert_same(read(tmp_path)[0], model)
    edit(tmp_path, edit_model(f"{there}/weight", lambda w: w + 1))
    with pytest.raises(ValueError, match=f"{there}.weight differs from language_model.embedding"):
        read(tmp_path)


# ---------------------------------------------------------------------------- what is read of it


@pytest.mark.parametrize(
    ("kind", "said", "gelu", "words"),
    [
        ("gpt2", {"bias_gelu_fusion": True, "openai_gelu": False}, "tanh", None),
        ("gpt2", {"bias_gelu_fusion": False, "openai_gelu": True}, "tanh", None),
        ("gpt2", {"bias_gelu_fusion": False, "openai_gelu": False}, "exact", None),
        ("gpt2", {"openai_gelu": False}, "exact", None),
        ("gpt2", {}, "tanh", "assumed are the tanh GELU$"),
        ("bert", {"bias_gelu_fusion": True, "openai_gelu": True}, "tanh", None),
        ("bert", {"bias_gelu_fusion": False, "openai_gelu": False}, "exact", None),
        ("bert", {"bias_gelu_fusion": True, "openai_gelu": False}, "tanh", "masked-token head the"),
        ("bert", {}, "exact", "assumed are the exact GELU$"),
    ],
)
def test_which_gelu(tmp_path, kind, said, gelu, words):
    write(tmp_path, built(kind))

    def change(content):
        del content["args"].bias_gelu_fusion, content["args"].openai_gelu
        vars(content["args"]).update(said)

    edit(tmp_path, change)
    model, _, warned = read(tmp_path)
    found = [each for each in warned if "GELU" in each]
    assert model.config.gelu == gelu and len(found) == (words is not None)
    assert words is None or re.search(words, found[0])


@pytest.mark.parametrize(
    ("kind", "tp", "given", "rows", "vocabulary"),
    [
        ("gpt2", 1, {}, 50304, 50257),
        ("gpt2", 2, {}, 50432, 50257),
        ("gpt2", 1, {}, 50432, 50432),
        ("gpt2", 1, {"make_vocab_size_divisible_by": 1}, 50257, 50257),
        ("bert", 1, {}, 30592, 30522),
        ("bert", 1, {}, 29056, 28996),
        ("bert", 4, {}, 30720, 30522),
        ("bert", 1, {}, 50304, 50304),
        ("gpt2", 1, {"vocab_size": 50300}, 50304, 50300),
        ("gpt2", 1, {"vocab_size": 50300, "tokenizer_type": "NullTokenizer"}, 50304, 50301),
        ("gpt2", 1, {"vocab_size": 300}, 50304, 50257),
    ],
)
def test_the_vocabulary(tmp_path, kind, tp, given, rows, vocabulary):
    model = built(
        kind, hidden_size=8, num_heads=4, num_layers=1, ffn_hidden_size=8, vocab_size=rows
    )
    args = args_of(model.config, tp, padded_vocab_size=rows)
    del args.vocab_size
    vars(args).update(given)
    write(tmp_path, model, tp, args=args, unit=given.get("make_vocab_size_divisible_by", 128))
    again, _, said = read(tmp_path)
    assert again.config.vocab_size == vocabulary
    assert torch.equal(again.wte.weight[:vocabulary], model.wte.weight[:vocabulary])
    assert not again.wte.weight[vocabulary:].any()
    (line,) = [each for each in said if "rows of the word table" in each]
    known = f"{vocabulary} of the {rows} rows" in line
    assert known or vocabulary == rows and "all are taken as tokens" in line


def test_options_that_change_no_answer(tmp_path):
    write(tmp_path, built("gpt2"))
    edit(tmp_path, edit_args(hidden_dropout=0.2, init_method_std=0.01, layernorm_epsilon=1e-6))
    model, _, said = read(tmp_path)
    config = model.config
    assert (config.dropout, config.init_std, config.layer_norm_eps) == (0.2, 0.01, 1e-6)
    assert any("attention_dropout 0.0; a model here has one dropout" in each for each in said)


def test_without_padding_asked_for_it_is_that_of_a_new_model(tmp_path):
    write(tmp_path, built("gpt2"))
    assert read(tmp_path, vocab_multiple=None)[0].wte.weight.shape == (1024, 36)


# ----------------------------------------------------------------------------------------- refused

ATTENTION = "language_model/transformer/layers.1.attention.query_key_value.weight"
NORM = "language_model/transformer/final_layernorm.bias"


def changed(value, place):
    def apply(w):
        w = w.clone()
        w.view(-1)[place] = value
        return w

    return apply


REFUSED = {  # change of rank 1 of 2 -> words
    "other version": (
        lambda c: c.update(checkpoint_version=2.0),
        "checkpoint_version is 2, and 3 in mp",
    ),
    "other iteration": (
        lambda c: c.update(iteration=400),
        "iteration is 400, and 500 in mp_rank_00",
    ),
    "other args": (
        edit_args(num_attention_heads=2),
        "num_attention_heads is 2, and 4 in mp_rank_00",
    ),
    "no args": (lambda c: c.pop("args") and None, "args is False, and True in mp_rank_00"),
    "other shape": (
        edit_model(ATTENTION, lambda w: w[:-1]),
        r"weight is \(53, 36\), and \(54, 36\)",
    ),
    "one tensor less": (
        edit_model(NORM, lambda w: None),
        r"final_layernorm.bias is None, and \(36,",
    ),
    "one more": (
        edit_model("extra", lambda w: torch.ones(3)),
        r"extra is \(3,\), and None in mp_r",
    ),
    "whole ones differ": (
        edit_model(NORM, lambda w: w + 0.25),
        r"transformer.final_layernorm.bias differs from that of rank 0 by up to 0.25, and all",
    ),
    "nan": (
        edit_model(ATTENTION, changed(torch.nan, 5)),
        "query_key_value.weight holds 1 of 1,944",
    ),
    "infinite": (
        edit_model(ATTENTION, changed(-torch.inf, 0)),
        "holds 1 of 1,944 numbers that are",
    ),
}
FIRST = {  # change of the only rank -> words
    "version 4": (
        lambda c: c.update(checkpoint_version=4),
        "checkpoint_version is 4; only 0, 1, 2, 3",
    ),
    "version text": (
        lambda c: c.update(checkpoint_version="3"),
        "checkpoint_version is '3'; only 0",
    ),
    "version half": (lambda c: c.update(checkpoint_version=1.5), "checkpoint_version is 1.5; only"),
    "list": (lambda c: c.update(model=[c["model"]]), r"one stage \(its model is of type list\)"),
    "chunks": (
        lambda c: {"model0": c["model"], "model1": c["model"]},
        "model0 is a part of a pipeline",
    ),
    "no model": (lambda c: c.pop("model") and None, r"\(its model is of type NoneType\)"),
    "a list alone": (lambda c: [c], r"\(it is no dictionary\)"),
    "args dict": (
        lambda c: c.update(args=vars(c["args"])),
        "args is of type dict; it must be a Name",
    ),
    "args list": (edit_args(num_layers=[2]), r"args say num_layers \[2\]; it must be a number or"),
    "pipeline": (
        edit_args(pipeline_model_parallel_size=2),
        "pipeline_model_parallel_size 2, and the",
    ),
    "more ranks": (
        edit_args(tensor_model_parallel_size=2),
        "tensor_model_parallel_size 2, and the w",
    ),
    "older ranks": (
        edit_args(model_parallel_size=2),
        "args say model_parallel_size 2, and the weights 1",
    ),
    "layers": (edit_args(num_layers=3), "args say num_layers 3, and the weights 2; use"),
    "positions": (
        edit_args(max_position_embeddings=18),
        "max_position_embeddings 18, and the weig",
    ),
    "width": (edit_args(ffn_hidden_size=144), "ffn_hidden_size 144, and the weights 52"),
    "rows": (edit_args(padded_vocab_size=256), "padded_vocab_size 256, and the weights 128"),
    "heads": (
        edit_args(num_attention_heads=5),
        "describe no model: hidden_size=36 does not divide",
    ),
    "heads text": (edit_args(num_attention_heads="4"), "describe no model: num_heads='4'"),
    "eps": (edit_args(layernorm_epsilon=-1.0), "describe no model: layer_norm_eps=-1.0"),
    "dropout": (
        edit_args(hidden_dropout="much", attention_dropout="much"),
        "no model: dropout='much'",
    ),
    "multiple": (
        edit_args(make_vocab_size_divisible_by=0),
        "model: make_vocab_size_divisible_by=0",
    ),
    "post": (
        edit_args(apply_residual_connection_post_layernorm=True),
        "post_layernorm is True, which",
    ),
    "rope": (edit_args(position_embedding_type="rope"), "position_embedding_type is 'rope', which"),
    "rotary": (
        edit_args(use_rotary_position_embeddings=True),
        "rotary_position_embeddings is True",
    ),
    "rms": (edit_args(normalization="RMSNorm"), "normalization is 'RMSNorm', which a model here"),
    "experts": (
        edit_args(num_experts=8),
        "num_experts is 8, which a model here cannot have; use one",
    ),
    "swiglu": (edit_args(swiglu=True), "swiglu is True, which a model here cannot have"),
    "relu": (edit_args(squared_relu=True), "squared_relu is True, which a model here cannot have"),
    "1p": (edit_args(apply_layernorm_1p=True), "apply_layernorm_1p is True, which"),
    "groups": (edit_args(group_query_attention=True), "group_query_attention is True, which"),
    "surplus": (
        edit_model("language_model/transformer/layers.0.moe.weight", lambda w: torch.ones(3)),
        r"a model here has no 'language_model.transformer.layers.0.moe.weight', and would",
    ),
    "decoder": (
        edit_model("language_model/decoder", lambda w: {"a": torch.ones(2)}),
        "has no 'langu.*a'",
    ),
    "missing": (
        edit_model(NORM, lambda w: None),
        r"final_layernorm.bias is missing, and must have \(36,",
    ),
    "no table": (
        edit_model("language_model/embedding", lambda w: None),
        "word_embeddings.weight is missing; only",
    ),
    "no attention": (
        edit_model(ATTENTION, lambda w: None),
        "layers.1.attention.* is missing, and must",
    ),
    "flat table": (
        edit_model("language_model/embedding/position_embeddings.weight", lambda w: w.view(-1)),
        r"position_embeddings.weight has shape \(612,\); only a GPT-2 or a BERT",
    ),
    "wrong shape": (
        edit_model(NORM, lambda w: w[:-1]),
        r"bias has shape \(35,\), and must have \(36,\)",
    ),
    "whole numbers": (
        edit_model(NORM, lambda w: w.long()),
        "is of type torch.int64, and weights must",
    ),
    "a number": (
        edit_model(NORM, lambda w: 3),
        "final_layernorm.bias' is of type int, and weights",
    ),
    "no storage": (
        edit_model(NORM, lambda w: w.to("meta")),
        "is of type torch.float32, and|cannot be re",
    ),
    "sparse": (
        edit_model(NORM, lambda w: w.to_sparse()),
        "is of type torch.float32, and|cannot be read",
    ),
    "two names": (
        lambda c: c["model"]["language_model"].update(
            encoder=dict(c["model"]["language_model"]["transformer"])
        ),
        "holds language_model.transformer.*twice",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_of_several_saves_are_refused(tmp_path, name):
    change, words = REFUSED[name]
    write(tmp_path, built("gpt2"), 2)
    edit(tmp_path, change, rank=1)
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "mp_rank_01" / FILE))


@pytest.mark.parametrize("name", FIRST)
def test_what_a_model_here_cannot_be_is_refused(tmp_path, name):
    change, words = FIRST[name]
    write(tmp_path, built("gpt2"))
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "mp_rank_00" / FILE))


def test_names_within_names_without_end_are_refused(tmp_path):
    write(tmp_path, built("gpt2"))
    edit(tmp_path, lambda c: c["model"].update(again=c["model"]))
    with pytest.raises(ValueError, match="is of type dict, and weights must be"):
        read(tmp_path)


def test_half_a_head_is_refused(tmp_path):
    write(tmp_path, built("bert"))
    edit(tmp_path, edit_model("binary_head/bias", lambda w: None))
    with pytest.raises(ValueError, match="binary_head.bias is missing, and must have"):
        read(tmp_path)


def test_heads_that_no_rank_has_whole_are_refused(tmp_path):
    write(tmp_path, built("gpt2"), 4)
    for rank in range(4):
        edit(tmp_path, edit_args(num_attention_heads=2), rank)
    with pytest.raises(ValueError, match="num_attention_heads=2 does not divide among 4"):
        read(tmp_path)


def lose(folder, name):
    shutil.rmtree(folder / name)


FOLDERS = {
    "last gone": (
        lambda f: lose(f, "mp_rank_01"),
        "is one of 2 ranks, and there are files of 1; put",
    ),
    "first gone": (lambda f: lose(f, "mp_rank_00"), "of rank 0 is missing"),
    "file gone": (
        lambda f: (f / "mp_rank_01" / FILE).unlink(),
        "of rank 1 is missing, and a model",
    ),
    "stages": (
        lambda f: (
            (f / "mp_rank_00").rename(f / "mp_rank_00_000"),
            (f / "mp_rank_01").rename(f / "mp_rank_00_001"),
        ),
        r"cut for a pipeline or for experts, too \(_000, _001 after the ranks' numbers\)",
    ),
    "odd name": (
        lambda f: (f / "mp_rank_01").rename(f / "mp_rank_1"),
        "mp_rank_1: no name of a rank's",
    ),
    "no number": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("-5"),
        "says '-5'; it must be a number of steps or release",
    ),
    "no save": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("7"),
        "names iter_0000007, which is not there",
    ),
    "nothing": (lambda f: [lose(f, "mp_rank_00"), lose(f, "mp_rank_01")], "holds no mp_rank_00"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_not_whole_is_refused(tmp_path, name):
    change, words = FOLDERS[name]
    change(write(tmp_path, built("gpt2"), 2))
    with pytest.raises(ValueError, match=words):
        read(tmp_path)


# ------------------------------------------------------------------------ strange and broken files


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


class Code:
    def __reduce__(self):
        return eval, ("1/0",)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("where", ["args", "optimizer", "model"])
def test_a_bomb_is_named_and_not_run(tmp_path, monkeypatch, where, old, forced):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target, bomb = tmp_path / "harm", Bomb(tmp_path / "harm")
    content = {"model": {}, where: bomb if where != "args" else argparse.Namespace(x=bomb)}
    path = tmp_path / "mp_rank_00" / FILE
    path.parent.mkdir()
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=rf"asks for '{os.mkdir.__module__}.mkdir', and to unpick"):
        read(tmp_path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # it is one
    assert target.is_dir()


@pytest.mark.parametrize("what", [Code(), print, Unused, pickle.loads, type(np.dtype("u4"))])
def test_any_other_global_is_named(tmp_path, what):
    path = tmp_path / FILE
    torch.save({"model": {}, "optimizer": what}, path)
    name = "eval" if isinstance(what, Code) else what.__name__
    with pytest.raises(ValueError, match=rf"asks for '(\w+\.)*{name}', .*; save the model again"):
        unpickle(path)


def test_what_was_allowed_is_so_no_longer(tmp_path):
    path = write(tmp_path, built("gpt2")) / "mp_rank_00" / FILE
    read(tmp_path)
    assert not set(ALLOWED) & set(torch.serialization.get_safe_globals())
    with pytest.raises(pickle.UnpicklingError, match="GLOBAL argparse.Namespace"):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("core", [b"core", b"_core"])
@pytest.mark.parametrize("old", [False, True])
def test_arrays_of_both_numpys_are_passed_over(tmp_path, core, old):
    "And NumPy never sees the bytes that are to become one."
    model = built("gpt2")
    path = write(tmp_path, model, old=old) / "mp_rank_00" / FILE
    other = {b"core": b"_core", b"_core": b"core"}[core]

    def rename(raw):
        return re.sub(rb"numpy\._?core\.multiarray\n", b"numpy.%s.multiarray\n" % core, raw)

    if old:
        path.write_bytes(rename(path.read_bytes()))
        raw = path.read_bytes()
    else:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, rename(content) if name.endswith(".pkl") else content)
        raw = rename(next(content for name, content in files.items() if name.endswith(".pkl")))
    for name in (b"_reconstruct", b"scalar"):
        assert b"numpy.%s.multiarray\n%s" % (core, name) in raw
        assert b"numpy.%s.multiarray\n%s" % (other, name) not in raw
    assert_same(read(tmp_path)[0], model)
    content = unpickle(path)
    assert isinstance(content["np_rng_state"][1], Unused)
    assert isinstance(content["np_number"], Unused)


@pytest.mark.parametrize(
    "name",
    [
        "megatron.model.enums.ModelType",
        "megatron.core.enums.ModelType",
        "megatron.fp16.loss_scaler.DynamicLossScaler",
        "megatron.fp16.loss_scaler.LossScaler",
        "fp16.loss_scaler.DynamicLossScaler",
        "fp16.loss_scaler.LossScaler",
    ],
)
def test_objects_of_megatrons_own_classes_are_passed_over(tmp_path, monkeypatch, name):
    module, _, kind = name.rpartition(".")
    theirs = type(kind, (), {"__module__": module, "__qualname__": kind})
    parts = module.split(".")
    for i in range(len(parts)):
        made = types.ModuleType(".".join(parts[: i + 1]))
        monkeypatch.setitem(sys.modules, made.__name__, made)
    setattr(sys.modules[module], kind, theirs)
    each = theirs()
    each.cur_scale = 2.0
    model = built("gpt2")
    args = args_of(model.config, 1, model_type=each)
    write(tmp_path, model, args=args, loss_scaler=each)
    with monkeypatch.context() as gone:
        for i in range(len(parts)):
            gone.delitem(sys.modules, ".".join(parts[: i + 1]))
        assert_same(read(tmp_path)[0], model)


def halve(raw):
    return raw[: len(raw) // 2]


def flip(raw):
    "One bit of the largest tensor."
    place = len(raw) // 2
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


@pytest.mark.parametrize(
    ("old", "change"),
    [
        (False, halve),
        (True, halve),
        (False, flip),
        (False, lambda raw: b""),
        (True, lambda raw: b"a text\n" * 40),
        (True, lambda raw: raw[:1000]),
        (False, lambda raw: b"PK\x03\x04" + bytes(200)),
        (False, lambda raw: raw[:-1]),
    ],
)
def test_a_damaged_file_is_one_message(tmp_path, old, change):
    path = write(tmp_path, built("gpt2"), 2, old=old) / "mp_rank_01" / FILE
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(
        ValueError, match="cannot be read .*; take a whole copy of the file"
    ) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_what_is_no_folder_is_refused():
    with pytest.raises(TypeError, match="folder=5"):
        load_megatron(5)


# ------------------------------------------------------------------------------- the command line


def refusal(capsys, *words):
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    assert end.value.code == 2
    return capsys.readouterr().err


@kinds
def test_the_command_converts_a_run(tmp_path, capsys, kind):
    model, source, out = built(kind), tmp_path / "theirs", tmp_path / "ours"
    write(source / "iter_0000500", model, 2)
    (source / "latest_checkpointed_iteration.txt").write_text("500")
    cli.main(f"convert --from {source} --to {out} --format megatron_edu".split())
    said = capsys.readouterr()
    again = load_model(latest_checkpoint(out))
    assert said.out == (
        f"{again.config.num_parameters():,} parameters in {out}; read from 2 files of "
        "Megatron-LM, version 3, iteration 500; dropped: optimizer, lr_scheduler, "
        "random_rng_state, np_rng_state, np_number\n"
    )
    assert f"{source} holds no tokenizer, and none is written" in said.err
    assert "101 of the 256 rows of the word table are taken as tokens" in said.err
    own = model.state_dict()
    for name, values in again.state_dict().items():
        assert torch.equal(values[: len(own[name])][:101], own[name][:101]), name
    assert isinstance(again.config, BertConfig) == (kind == "bert")


def test_the_command_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    source, out = tmp_path / "theirs", tmp_path / "ours"
    write(source, built("gpt2"), 2)
    words = "convert", "--from", source, "--to", out
    said = refusal(capsys, *words, "--format", "huggingface")
    assert "a checkpoint of Megatron-LM; --format huggingface is made from a run" in said
    assert said.rstrip().endswith("read it with --format megatron_edu first")
    with monkeypatch.context() as small:
        small.setattr(megatron_edu.memory, "available_memory", lambda: 1000)
        said = refusal(capsys, *words, "--format", "megatron_edu")
        assert "conversion of this model: at least" in said and "--force" in said
        assert not out.exists()
        cli.main([*map(str, words), "--format", "megatron_edu", "--force", "--quiet"])
        assert capsys.readouterr().out == "" and latest_checkpoint(out)
    shutil.rmtree(source / "mp_rank_00")
    said = refusal(capsys, *words, "--format", "megatron_edu", "--overwrite")
    assert "of rank 0 is missing" in said and "Traceback" not in said


def test_a_file_that_is_read_whole_needs_its_memory_first(tmp_path, monkeypatch):
    write(tmp_path, built("gpt2"), old=True)
    size = (tmp_path / "mp_rank_00" / FILE).stat().st_size
    monkeypatch.setattr(megatron_edu.memory, "available_memory", lambda: size - 1)
    monkeypatch.setattr("megatron_edu.interop.megatron.read_part", lambda path: 1 / 0)
    with pytest.raises(ValueError, match="conversion of this model: at least"):
        read(tmp_path)
