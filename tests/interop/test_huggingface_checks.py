"Folders of weights that are wrong: each kind of fault is refused in one line, or warned of."

import json
import os
import re
import shutil
import struct
import warnings
from importlib import import_module

import pytest
import torch
import transformers
from bert_cases import config as bert_config
from gpt2_cases import config, shake
from safetensors.torch import load_file, save_file

import megatron_edu.interop.checks
from megatron_edu.interop import load_huggingface, save_huggingface
from megatron_edu.interop.checks import weight_shape
from megatron_edu.mesh import ParallelDims
from megatron_edu.models import Bert, build_model

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SIZES = {
    "gpt2": dict(n_layer=2, n_embd=36, n_head=4, vocab_size=101, n_positions=17),
    "bert": dict(
        num_hidden_layers=2,
        hidden_size=36,
        num_attention_heads=4,
        intermediate_size=52,
        vocab_size=101,
        max_position_embeddings=17,
    ),
}
THEIRS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES["gpt2"])),
    "bert": lambda: transformers.BertForPreTraining(transformers.BertConfig(**SIZES["bert"])),
}
both = pytest.mark.parametrize("kind", THEIRS)
LAYER = {"gpt2": "transformer.h.0.", "bert": "bert.encoder.layer.0."}
TABLE = {"gpt2": "transformer.wte.weight", "bert": "bert.embeddings.word_embeddings.weight"}
FIELD = {"gpt2": "n_layer", "bert": "num_hidden_layers"}
MATRIX = {"gpt2": "mlp.c_fc.weight", "bert": "intermediate.dense.weight"}
HEADS = {"gpt2": "lm_head.weight", "bert": "cls.predictions.decoder.weight"}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "A folder of each kind that is right."
    path = tmp_path_factory.mktemp("good")
    for kind, build in THEIRS.items():
        torch.manual_seed(0)
        built = build()
        shake(built)
        built.save_pretrained(path / kind)
    return path


@pytest.fixture
def spoil(good, tmp_path):
    "A function that copies a folder and changes what is in it."

    def make(kind, tensors=None, fields=None, name="spoiled"):
        there = shutil.copytree(good / kind, tmp_path / name)
        if tensors is not None:
            content = load_file(there / FILE)
            save_file(tensors(content), there / FILE, metadata={"format": "pt"})
        if fields is not None:
            content = json.loads((there / "config.json").read_text()) | fields
            (there / "config.json").write_text(json.dumps(content))
        return there

    return make


def refusal(folder) -> str:
    "The one line in which a folder is refused."
    with pytest.raises(ValueError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        load_huggingface(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def silently(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_huggingface(folder)


# ------------------------------------------------------------------------------------- tensors


@both
@pytest.mark.parametrize("number", [2, 7, 41])
def test_a_surplus_layer_is_refused_by_name(spoil, kind, number):
    name = LAYER[kind].replace("0", str(number)) + MATRIX[kind]
    there = spoil(kind, lambda tensors: tensors | {name: torch.zeros(2, 2)})
    words = f"layer {LAYER[kind].partition('.')[2].replace('0.', str(number))}"
    said = refusal(there)
    assert words in said and f"{FIELD[kind]} 2" in said


@both
@pytest.mark.parametrize("more", ["crossattention.q_attn.weight", "attn.lora_A", "scale"])
def test_a_tensor_within_a_layer_that_ours_lack_is_refused_by_name(spoil, kind, more):
    name = LAYER[kind] + more
    there = spoil(kind, lambda tensors: tensors | {name: torch.zeros(2)})
    assert f"a model here has no {name}, and would compute something else" in refusal(there)


def test_a_bias_of_the_output_layer_is_refused(spoil):
    there = spoil("gpt2", lambda tensors: tensors | {"lm_head.bias": torch.zeros(101)})
    assert "no lm_head.bias" in refusal(there)


@both
@pytest.mark.parametrize("small", [False, True])
def test_an_output_layer_of_its_own_is_refused_by_name(spoil, kind, small):
    "However little it differs."

    def change(tensors):
        other = tensors[TABLE[kind]].clone()
        other[100, 35] += 1e-6 if small else 1.0
        return tensors | {HEADS[kind]: other}

    said = refusal(spoil(kind, change))
    assert (
        HEADS[kind] in said and TABLE[kind] in said and "use a model in which they are tied" in said
    )


@both
def test_a_tied_output_layer_may_be_there_twice(spoil, kind):
    there = spoil(kind, lambda tensors: tensors | {HEADS[kind]: tensors[TABLE[kind]].clone()})
    assert torch.equal(silently(there).wte.weight[:101], load_file(there / FILE)[TABLE[kind]])


@both
def test_one_tensor_under_two_names_must_be_equal(spoil, kind):
    "With and without the prefix of the trunk."
    name = TABLE[kind].partition(".")[2]
    again = spoil(
        kind, lambda tensors: tensors | {name: tensors[TABLE[kind]].clone()}, name="again"
    )
    silently(again)
    there = spoil(kind, lambda tensors: tensors | {name: tensors[TABLE[kind]] + 1})
    assert f"{name} differs from" in refusal(there) or f"differs from {name}" in refusal(there)


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_refused_by_name(spoil, kind, value, dtype):
    name = LAYER[kind] + MATRIX[kind]

    def change(tensors):
        tensors[name][3, 5] = value
        return tensors | {name: tensors[name].to(dtype)}

    assert f"{name} holds 1 of {36 * (144 if kind == 'gpt2' else 52):,} numbers" in refusal(
        spoil(kind, change)
    )


@both
def test_a_weight_too_large_for_float32_is_refused(spoil, kind):
    name = LAYER[kind] + MATRIX[kind]
    there = spoil(kind, lambda tensors: tensors | {name: tensors[name].double() * 1e60})
    assert f"{name} holds" in refusal(there)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read(spoil, kind, dtype):
    there = spoil(kind, lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})
    if dtype is torch.float64:
        with pytest.warns(UserWarning, match="float64 weights are rounded"):
            model = load_huggingface(there)
    else:
        model = silently(there)
    assert model.wte.weight.dtype == torch.float32
    wanted = load_file(there / FILE)[TABLE[kind]].float()
    assert torch.equal(model.wte.weight[:101], wanted)


@both
@pytest.mark.parametrize(
    "dtype, name",
    [
        (torch.int8, "I8"),
        (torch.int64, "I64"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
    ],
)
def test_what_are_no_floats_is_refused_by_name(spoil, kind, dtype, name):
    matrix = LAYER[kind] + MATRIX[kind]
    there = spoil(kind, lambda tensors: tensors | {matrix: tensors[matrix].to(dtype)})
    assert f"{matrix} is of type {name}, and weights must be floating-point" in refusal(there)


@both
def test_every_tensor_with_another_shape_is_refused_by_name(good, tmp_path, kind):
    content = load_file(good / kind / FILE)
    for number, name in enumerate(content):
        there = shutil.copytree(good / kind, tmp_path / str(number))
        longer = torch.cat([content[name], content[name][:1]])
        save_file(content | {name: longer}, there / FILE)
        shapes = f"{tuple(longer.shape)} in the weights, but config.json makes it"
        plain = name.partition(".")[2] if "cls" not in name else name
        said = refusal(there)
        assert f"{plain} has shape {shapes} {tuple(content[name].shape)}" in said


@both
def test_a_transposed_matrix_is_refused(spoil, kind):
    name = LAYER[kind] + MATRIX[kind]
    there = spoil(kind, lambda tensors: tensors | {name: tensors[name].t().contiguous()})
    assert f"{name} has shape" in refusal(there)


@both
def test_a_tensor_that_is_missing_is_named(spoil, kind):
    name = LAYER[kind] + MATRIX[kind]
    there = spoil(kind, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    assert re.search(rf"lacks 1 of \d+ tensors, {name.partition('.')[2]} first", refusal(there))


@both
@pytest.mark.parametrize(
    "head",
    [
        "score.weight",
        "classifier.bias",
        "qa_outputs.weight",
        "v_head.summary.weight",
        "multiple_choice_head.summary.bias",
    ],
)
def test_another_head_is_left_out_with_a_warning(spoil, kind, head):
    there = spoil(kind, lambda tensors: tensors | {head: torch.zeros(3, 36)})
    with pytest.warns(UserWarning, match=f"left out, {head} first") as caught:
        load_huggingface(there)
    assert len(caught) == 1


def test_the_triangles_of_old_folders_are_no_weights(spoil):
    old = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 17, 17, dtype=torch.uint8).tril(),
        "h.1.attn.masked_bias": torch.tensor(-1e4),
    }
    silently(spoil("gpt2", lambda tensors: tensors | old))


@pytest.mark.parametrize("name", ["post", "pre", "gpt2"])
def test_shapes_are_those_of_the_models(name):
    sizes = config(ffn_hidden_size=52) if name == "gpt2" else bert_config(layer_norm=name)
    model = build_model(sizes)
    for own, parameter in model.state_dict().items():
        rows = 101 if own in ("wte.weight", "mlm.bias") else len(parameter)
        assert weight_shape(own, sizes) == (rows, *parameter.shape[1:]), own


# -------------------------------------------------------------------------------- configuration

WRONG = ["2", 2.0, True, None, [2], {"is": 2}, -2, 0, 2**31, 10**30, float("nan")]


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize(
    "kind, field",
    [
        ("gpt2", "n_layer"),
        ("gpt2", "n_embd"),
        ("gpt2", "vocab_size"),
        ("gpt2", "n_head"),
        ("gpt2", "n_positions"),
        ("bert", "num_hidden_layers"),
        ("bert", "intermediate_size"),
        ("bert", "type_vocab_size"),
    ],
)
def test_a_size_that_is_none_is_refused_by_name(spoil, kind, field, value):
    said = refusal(spoil(kind, fields={field: value}))
    assert f"config.json: {field} is " in said and "must be a whole number from 1" in said


@pytest.mark.parametrize("value", ["52", 52.0, False, -52, 0])
def test_a_width_that_is_none_is_refused_by_name(spoil, value):
    assert "n_inner is " in refusal(spoil("gpt2", fields={"n_inner": value}))


@pytest.mark.parametrize("value", ["0.1", None, True, -0.1, 1.0, 7, float("nan"), float("inf"), []])
@pytest.mark.parametrize(
    "kind, field",
    [
        ("gpt2", "attn_pdrop"),
        ("gpt2", "layer_norm_epsilon"),
        ("bert", "hidden_dropout_prob"),
        ("bert", "layer_norm_eps"),
        ("bert", "initializer_range"),
    ],
)
def test_a_number_that_is_none_is_refused_by_name(spoil, kind, field, value):
    if "drop" not in field and value in (1.0, 7):
        return
    said = refusal(spoil(kind, fields={field: value}))
    assert f"{field} is " in said and "must be a number from 0" in said


@pytest.mark.parametrize(
    "kind, field",
    [("gpt2", "n_layer"), ("gpt2", "activation_function"), ("bert", "hidden_dropout_prob")],
)
def test_a_long_value_is_shortened_in_the_message(spoil, kind, field):
    assert len(refusal(spoil(kind, fields={field: "9" * 10**5}))) < 600


HUGE = [
    ("gpt2", "n_embd", 10**9),
    ("gpt2", "n_layer", 10**9),
    ("gpt2", "vocab_size", 10**9),
    ("gpt2", "n_positions", 2**31 - 1),
    ("gpt2", "n_inner", 10**9),
    ("bert", "num_hidden_layers", 2**31 - 1),
    ("bert", "type_vocab_size", 10**9),
]


@pytest.mark.parametrize("kind, field, value", HUGE)
def test_a_model_that_memory_cannot_hold_is_refused_with_the_estimate(spoil, kind, field, value):
    heads = {"n_head": 1} if field == "n_embd" else {}
    said = refusal(spoil(kind, fields={field: value} | heads))
    assert re.search(r"a model of [\d,]+ parameters; to read it takes [\d,.]+ .iB", said)


@both
def test_more_layers_than_tensors_are_refused_before_they_are_counted(spoil, kind, monkeypatch):
    "Where memory is not known."
    monkeypatch.setattr(megatron_edu.interop.checks, "available_memory", lambda: None)
    module = import_module(f"megatron_edu.interop.huggingface_{kind}")
    monkeypatch.setattr(module, "names", lambda config: pytest.fail("the layers are counted"))
    said = refusal(spoil(kind, fields={FIELD[kind]: 2**31 - 1}))
    assert "the weights have 2 layers, but" in said


@both
@pytest.mark.parametrize(
    "text, words",
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[1]", "holds \\[1\\], and no object"),
        (b'"text"', "no object"),
        (b"[" + b'"word", ' * 10**4 + b"1]", "no object"),
        (b'"' + b"x" * 10**5 + b'"', "no object"),
        (b"12", "no object"),
        (b"null", "no object"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[" * 200_000, "cannot be read"),
        (b'{"a":' * 100_000, "cannot be read"),
        (b"1" * 5000, "cannot be read"),
        (b'{"model_type": ["gpt2"]}', "model_type \\['gpt2'\\]"),
        (b"{}", "model_type None"),
        (b'{"model_type": "' + b"x" * 10**6 + b'"}', "model_type 'xxxxxxx"),
    ],
)
def test_a_configuration_that_is_none_is_refused(spoil, kind, text, words):
    there = spoil(kind)
    (there / "config.json").write_bytes(text)
    said = refusal(there)
    assert re.search(words, said) and len(said) < 600


@both
@pytest.mark.parametrize("fields", [{"bits": 4}, {"quant_method": "gptq"}])
def test_quantised_weights_are_refused(spoil, kind, fields):
    assert "quantization_config" in refusal(spoil(kind, fields={"quantization_config": fields}))


# ----------------------------------------------------------------------------------------- files


def with_index(there, weight_map):
    (there / FILE).rename(there / "part-1.safetensors")
    (there / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return there


@both
@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/hostname",
        "sub/part.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "x" * 5000,
        "part-2.safetensors",
        "nul\0l",
        7,
        None,
        ["part-1.safetensors"],
    ],
    ids=lambda f: repr(f)[:20],
)
def test_an_index_that_leads_elsewhere_is_refused(spoil, kind, file):
    there = spoil(kind)
    shutil.copy(there / FILE, there.parent / "outside.safetensors")
    said = refusal(with_index(there, {TABLE[kind]: file}))
    assert "no readable model.safetensors" in said and INDEX in said and len(said) < 600


@both
@pytest.mark.parametrize("weight_map", [[], {}, None, "part-1.safetensors", 3])
def test_an_index_without_a_map_is_refused(spoil, kind, weight_map):
    assert "no weight_map" in refusal(with_index(spoil(kind), weight_map))


@both
def test_an_index_that_names_what_a_file_lacks_is_refused(spoil, kind):
    there = with_index(spoil(kind), {"of another model": "part-1.safetensors"})
    assert "part-1.safetensors lacks of another model, which" in refusal(there)


@both
def test_an_index_decides_between_two_files(spoil, kind):
    "A stale copy of one tensor in the other file does not count."
    there = spoil(kind)
    content = load_file(there / FILE)
    save_file(
        {TABLE[kind]: content[TABLE[kind]] + 1, "more": torch.zeros(1)},
        there / "part-2.safetensors",
    )
    names = dict.fromkeys(content, "part-1.safetensors") | {"more": "part-2.safetensors"}
    with pytest.warns(UserWarning, match="more first"):
        model = load_huggingface(with_index(there, names))
    assert torch.equal(model.wte.weight[:101], content[TABLE[kind]])


def damaged(path, how):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    names = sorted(name for name in header if name != "__metadata__")
    if how == "overlap":
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    if how == "shape":
        header[names[0]]["shape"] = [1, 1]
    if how == "type":
        header[names[0]]["dtype"] = "F33"
    new = json.dumps(header).encode()
    return {
        "cut": data[:-100],
        "header cut": data[: 8 + size // 2],
        "empty": b"",
        "text": b"hello" * 99,
        "header too large": struct.pack("<Q", 2**62) + data[8:],
        "longer": data + b"1234",
        "no header": struct.pack("<Q", 0),
    }.get(how, struct.pack("<Q", len(new)) + new + data[8 + size :])


@both
@pytest.mark.parametrize(
    "how",
    [
        "cut",
        "header cut",
        "empty",
        "text",
        "header too large",
        "longer",
        "no header",
        "overlap",
        "shape",
        "type",
    ],
)
def test_a_damaged_file_is_refused(spoil, kind, how):
    there = spoil(kind)
    (there / FILE).write_bytes(damaged(there / FILE, how))
    assert "no readable model.safetensors" in refusal(there)


@both
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"]
)
def test_pickled_weights_are_named_and_not_opened(spoil, kind, name):
    there = spoil(kind)
    (there / FILE).unlink()
    (there / name).write_bytes(b"cos\nsystem\n(S'touch pickled'\ntR.")
    said = refusal(there)
    assert f"only {name} is there" in said and "pickled weights are not read" in said
    assert not os.path.exists("pickled")


@both
@pytest.mark.parametrize("name", [FILE, "config.json"])
def test_what_is_no_file_is_refused_without_waiting(spoil, kind, name):
    there = spoil(kind)
    (there / name).unlink()
    os.mkfifo(there / name)
    refusal(there)
    (there / name).unlink()
    (there / name).mkdir()
    refusal(there)


def test_a_file_in_place_of_the_folder_is_refused(good):
    assert "is a file; name the folder that holds it" in refusal(good / "gpt2" / FILE)
    assert "cannot be read" in refusal(good / "nowhere")


def test_of_two_formats_the_single_file_counts(spoil):
    "As transformers has it."
    there = spoil("gpt2")
    (there / INDEX).write_text("{")
    silently(there)


# --------------------------------------------------------------------------------- other multiples


def split_in_three(folder):
    group = ParallelDims(tp=3).build().tp_group
    with pytest.raises(ValueError) as caught:
        load_huggingface(folder, group)
    model = load_huggingface(folder, group, vocab_multiple=3).double().eval()
    with torch.no_grad():
        x = model.hidden_states(torch.arange(12)[None])
        found = (
            model.logits(x)
            if not isinstance(model, Bert)
            else model.logits(model.mlm(x), model.mlm.bias)
        )
    return str(caught.value), model.config.padded_vocab_size, found


@both
def test_three_ranks_share_rows_rounded_up_to_another_multiple(ranks, tmp_path, kind):
    sizes = dict(num_layers=1, hidden_size=36, num_heads=6)
    model = build_model(config(**sizes) if kind == "gpt2" else bert_config(**sizes))
    shake(model)
    save_huggingface(model, tmp_path / "folder")
    model = model.double().eval()
    with torch.no_grad():
        x = model.hidden_states(torch.arange(12)[None])
        wanted = model.logits(x) if kind == "gpt2" else model.logits(model.mlm(x), model.mlm.bias)
    answers = ranks(3)(split_in_three, tmp_path / "folder")
    for said, rows, _ in answers:
        assert "padded_vocab_size=1024" in said and "set vocab_multiple to a multiple of 3" in said
        assert rows == 102
    whole = torch.cat([found for *_, found in answers], -1)
    torch.testing.assert_close(whole[..., :101], wanted[..., :101], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "value, error",
    [("3", TypeError), (3.0, TypeError), (True, TypeError), (0, ValueError), (-3, ValueError)],
)
def test_a_multiple_that_is_none(good, value, error):
    with pytest.raises(error, match="vocab_multiple="):
        load_huggingface(good / "gpt2", vocab_multiple=value)


@both
def test_an_adapter_beside_a_model_is_refused(spoil, kind):
    there = spoil(kind)
    (there / "adapter_config.json").write_text("{}")
    assert "an adapter beside a model; merge the two first" in refusal(there)
