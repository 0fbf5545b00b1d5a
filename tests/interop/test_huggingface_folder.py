"Written folders: transformers opens them; compared before they are named; all ranks refuse alike."

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from bert_cases import config as bert_config
from gpt2_cases import config, shake

import megatron_edu.interop.compare
import megatron_edu.interop.folder
from megatron_edu.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_edu.data.wordpiece import load_wordpiece, train_wordpiece
from megatron_edu.generate import fill_mask
from megatron_edu.first_rank import on_first_rank
from megatron_edu.generate import SamplingConfig, generate, ids_without_token
from megatron_edu.interop import load_huggingface, save_huggingface
from megatron_edu.interop.compare import (
    bert_batch,
    check_conversion,
    compare_with_transformers,
    gpt2_batch,
)
from megatron_edu.mesh import ParallelDims
from megatron_edu.models import build_model

TEXT = ["the cat sat on the mat", "the dog sat on the log"] * 20
TOKENIZER = train_tokenizer(TEXT, 290)
PIECES = train_wordpiece(TEXT, 60)
SIZES = {
    "gpt2": config(vocab_size=TOKENIZER.vocab_size + 3),
    "post": bert_config(vocab_size=PIECES.vocab_size + 2, layer_norm="post"),
    "pre": bert_config(vocab_size=PIECES.vocab_size + 2, layer_norm="pre"),
}
kinds = pytest.mark.parametrize("kind", SIZES)


def built(kind):
    model = build_model(SIZES[kind])
    shake(model)
    return model


def tokenizer_of(kind):
    return TOKENIZER if kind == "gpt2" else PIECES


@pytest.fixture(scope="module", autouse=True)
def offline():
    "Nothing is fetched, and nothing tries to be."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory, offline):
    path = tmp_path_factory.mktemp("written")
    for kind in SIZES:
        save_huggingface(built(kind), path / kind, tokenizer_of(kind))
    return path


# --------------------------------------------------------------------------------- as they open it


def test_the_pipeline_ends_at_the_last_position(folders):
    "Nothing is said of a length, as a user would call it; so 256 new tokens would be usual."
    write = transformers.pipeline("text-generation", model=str(folders / "gpt2"))
    for prompt in ("the cat", "the dog sat on the"):
        ids = write(prompt, return_tensors=True)[0]["generated_token_ids"]
        assert len(ids) <= 17 and ids[: len(TOKENIZER.encode(prompt))] == TOKENIZER.encode(prompt)
        assert len(ids) == 17 or ids[-1] == TOKENIZER.eod_id
        assert max(ids) < TOKENIZER.vocab_size


def test_the_pipeline_stops_at_the_end_of_a_document(tmp_path):
    "In a model that has nothing else to say."
    model = built("gpt2")
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(10 * model.wte.weight[TOKENIZER.eod_id])
    save_huggingface(model, tmp_path / "new", TOKENIZER)
    write = transformers.pipeline("text-generation", model=str(tmp_path / "new"))
    ids = write("the cat", return_tensors=True)[0]["generated_token_ids"]
    assert ids == [*TOKENIZER.encode("the cat"), TOKENIZER.eod_id]


def test_a_row_without_a_token_is_not_drawn_there_either(tmp_path):
    model = built("gpt2")
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(10 * model.wte.weight[TOKENIZER.vocab_size + 1])
    save_huggingface(model, tmp_path / "new", TOKENIZER)
    write = transformers.pipeline("text-generation", model=str(tmp_path / "new"))
    ids = write("the cat", return_tensors=True)[0]["generated_token_ids"]
    assert max(ids) < TOKENIZER.vocab_size


@pytest.mark.parametrize("kind", ["post", "pre"])
def test_the_pipeline_fills_a_mask(folders, kind):
    fill = transformers.pipeline("fill-mask", model=str(folders / kind))
    found = fill("the [MASK] sat on the mat", top_k=3)
    ids = [PIECES.cls_id, *PIECES.encode("the [MASK] sat on the mat"), PIECES.sep_id]
    model = built(kind).double().eval()
    with torch.no_grad():
        x = model.hidden_states(torch.tensor([ids]))[0, ids.index(PIECES.mask_id)]
        p = model.logits(model.mlm(x), model.mlm.bias)[: PIECES.vocab_size + 2].softmax(-1)
    for each in found:
        assert each["score"] == pytest.approx(p[each["token"]].item(), abs=1e-5)


@kinds
def test_their_tokenizer_gives_our_ids_and_knows_the_length(folders, kind):
    fast, ours = transformers.AutoTokenizer.from_pretrained(folders / kind), tokenizer_of(kind)
    for text in ("the cat sat on the log", "The  MAT, on\nthe dog!"):
        assert fast.encode(text, add_special_tokens=False) == ours.encode(text)
    assert fast.model_max_length == 17
    if kind == "gpt2":
        assert fast.eos_token_id == fast.bos_token_id == fast.pad_token_id == ours.eod_id
        assert transformers.AutoConfig.from_pretrained(folders / kind).eos_token_id == ours.eod_id
    else:
        names = ("pad", "unk", "cls", "sep", "mask")
        assert [getattr(fast, f"{name}_token_id") for name in names] == list(ours.special_ids)
        pair = fast("the cat", "the dog")
        assert pair["token_type_ids"] == [0] * (pair["input_ids"].index(ours.sep_id) + 1) + [1] * 3


@kinds
def test_our_own_loaders_read_it_too(folders, kind):
    load = load_tokenizer if kind == "gpt2" else load_wordpiece
    assert load(folders / kind).encode("the cat") == tokenizer_of(kind).encode("the cat")
    model = load_huggingface(folders / kind)
    assert torch.equal(model.wpe.weight, built(kind).wpe.weight)


def test_without_a_tokenizer_the_length_alone_is_said(tmp_path):
    save_huggingface(built("gpt2"), tmp_path / "new")
    said = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert said == {"max_length": 17}


@kinds
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, kind):
    other = PIECES if kind == "gpt2" else TOKENIZER
    for wrong in (other, "tokenizer.json", TOKENIZER.core):
        with pytest.raises(TypeError, match="^tokenizer=.*: must be a (Tokenizer|WordPiece) or"):
            save_huggingface(built(kind), tmp_path / "new", wrong)
    small = {"gpt2": config(), "post": bert_config(vocab_size=9), "pre": bert_config(vocab_size=9)}
    model = build_model(small[kind])
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ ids, the model (101|9);"):
        save_huggingface(model, tmp_path / "new", tokenizer_of(kind))
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------- compared before


@kinds
def test_a_right_folder_is_compared_and_named(tmp_path, kind):
    model, lines = built(kind), []
    save_huggingface(
        model,
        tmp_path / "new",
        check=lambda partial: lines.append((partial, check_conversion(model, partial))),
    )
    ((partial, line),) = lines
    assert partial != tmp_path / "new" and not partial.exists() and (tmp_path / "new").is_dir()
    assert line.startswith("compared with transformers: largest difference")
    assert float(line.split()[-3]) < 1e-11
    assert compare_with_transformers(load_huggingface(tmp_path / "new"), tmp_path / "new") < 1e-11


WRONG = {  # what is changed a little, in a parameter of the trunk, of the table or of a head
    "gpt2": ["blocks.1.attn.proj.weight", "ln_f.bias", "wte.weight", "wpe.weight"],
    "post": ["ln_emb.bias", "mlm.bias", "sop.weight", "pooler.bias", "token_types.weight"],
    "pre": ["ln_f.weight", "mlm.ln.bias", "sop.bias", "blocks.0.mlp.up.bias"],
}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in WRONG for name in WRONG[kind]])
def test_another_model_is_refused_and_nothing_is_left(tmp_path, kind, name):
    model, other = built(kind), built(kind)
    with torch.no_grad():
        other.get_parameter(name).view(-1)[5 if "sop" not in name else 1] += 1e-4
    with pytest.raises(
        ValueError, match="gives other answers .* by up to .*; nothing was converted"
    ):
        save_huggingface(
            other, tmp_path / "new", check=lambda folder: check_conversion(model, folder)
        )
    assert not list(tmp_path.iterdir())


def test_query_and_key_exchanged_show(folders):
    model = load_huggingface(folders / "pre")
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.attn.qkv.parameters():
                parameter.copy_(parameter.unflatten(0, (3, 36))[[1, 0, 2]].flatten(0, 1))
    assert compare_with_transformers(model, folders / "pre") > 1e-3


def test_an_encoder_alone_is_compared_without_its_heads(folders, tmp_path):
    transformers.BertModel.from_pretrained(folders / "post").save_pretrained(tmp_path / "trunk")
    with pytest.warns(UserWarning, match="no masked-token head"):
        model = load_huggingface(tmp_path / "trunk")
    assert compare_with_transformers(model, tmp_path / "trunk") < 1e-11


@kinds
def test_the_batch_says_something(kind):
    batch = (gpt2_batch if kind == "gpt2" else bert_batch)(SIZES[kind])
    assert batch["input_ids"].shape == (2, 17) and len(batch["input_ids"].unique()) > 20
    if kind != "gpt2":
        assert batch["token_types"].unique().tolist() == [0, 1, 2]
        assert batch["attention_mask"].sum(-1).tolist() == [17, 9]


@kinds
def test_the_model_is_left_as_it_was(folders, kind):
    model = load_huggingface(folders / kind).train()
    check_conversion(model, folders / kind)
    assert model.training and model.wte.weight.dtype == torch.float32


def test_without_memory_for_both_it_is_said_and_skipped(folders, monkeypatch):
    monkeypatch.setattr(megatron_edu.interop.compare, "available_memory", lambda: 1000)
    said = check_conversion(built("gpt2"), folders / "gpt2")
    assert said.startswith("not compared with transformers: it would take")


def test_without_transformers_it_is_said_and_skipped(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = check_conversion(built("gpt2"), folders / "gpt2")
    assert said == "not compared with transformers: transformers is not installed"


def test_a_folder_that_they_cannot_open_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="transformers cannot run this model .*; nothing was conv"):
        check_conversion(built("gpt2"), tmp_path)


# ---------------------------------------------------------------------------------- on every rank


def fail(tp, device, folder, how):
    group = ParallelDims(tp=tp).build(device).tp_group
    model = build_model(config(), group).to(device)
    if how == "nan":
        with torch.no_grad():
            model.ln_f.bias[3] = torch.nan

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def other(partial):
        raise ValueError("other answers")

    kept = megatron_edu.interop.folder.save_file
    if how == "disk":
        megatron_edu.interop.folder.save_file = full
    try:
        save_huggingface(model, folder, check=other if how == "check" else None)
    except (OSError, ValueError) as error:
        return type(error), str(error)
    finally:
        megatron_edu.interop.folder.save_file = kept


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    "how, kind, words",
    [
        ("disk", OSError, "No space left"),
        ("check", ValueError, "other answers"),
        ("nan", ValueError, "ln_f.bias holds 1 of 36 numbers"),
        ("taken", ValueError, "not ours"),
    ],
)
def test_what_fails_on_the_first_rank_is_raised_on_all(
    ranks, device, tmp_path, tp, how, kind, words
):
    folder = tmp_path / "new"
    if how == "taken":
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    found = ranks(tp)(fail, tp, device, folder, how)
    assert len(set(found)) == 1
    assert found[0][0] is kind and words in found[0][1]
    left = ["new/mine.txt"] if how == "taken" else []
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == left


def long_text(tp, device):
    group = ParallelDims(tp=tp).build(device).tp_group

    def work():
        raise OSError("é" * 3000)

    with pytest.raises(OSError) as caught:
        on_first_rank(work, group, device)
    return str(caught.value)


@pytest.mark.parametrize("tp", [2])
def test_a_long_text_is_cut_alike(ranks, device, tp):
    first, second = ranks(tp)(long_text, tp, device)
    assert first == second and set(first) == {"é"} and len(first) > 400


# ----------------------------------------------------------------------- more rows than tokens


def test_a_model_with_more_rows_than_tokens_writes_tokens_alone(folders):
    model = load_huggingface(folders / "gpt2")
    banned = ids_without_token(TOKENIZER, model.config.vocab_size)
    assert banned.tolist() == [TOKENIZER.vocab_size + k for k in range(3)]
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(10 * model.wte.weight[banned[1]])
    prompt = torch.tensor([TOKENIZER.encode("the cat")])
    for sampling in (
        SamplingConfig(temperature=0),
        SamplingConfig(top_k=4),
        SamplingConfig(top_p=0.9),
    ):
        free = generate(model, prompt, 12, sampling)
        assert (free[0] == banned[1]).any()
        kept = generate(model, prompt, 12, sampling, banned=banned)
        assert kept.max() < TOKENIZER.vocab_size
        TOKENIZER.decode(kept[0].tolist())


def fill(tp, device):
    model = build_model(SIZES["pre"], ParallelDims(tp=tp).build(device).tp_group).to(device)
    silent = ids_without_token(PIECES, SIZES["pre"].vocab_size)
    rows = model.mlm.bias.shape[0]
    first = 0 if model.group is None else model.group.rank() * rows
    with torch.no_grad():
        for i in silent.tolist():
            if first <= i < first + rows:
                model.mlm.bias[i - first] = 1e3  # these rows would win
    return fill_mask(model, PIECES, "the [MASK] sat", PIECES.vocab_size)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_hole_is_filled_with_tokens_alone(ranks, device, tp):
    for (found,) in ranks(tp)(fill, tp, device):
        assert {token for token, _ in found} == set(PIECES.core.get_vocab())
        assert sum(p for _, p in found) == pytest.approx(1)


def test_a_hole_in_a_damaged_model_is_refused_and_modes_come_back():
    model = built("pre").train()
    model.blocks[0].eval()
    before = {name: part.training for name, part in model.named_modules()}
    with pytest.raises(ValueError, match=r"count=\d+: from 1 to the \d+ tokens of"):
        fill_mask(model, PIECES, "the [MASK] sat", PIECES.vocab_size + 2)
    with torch.no_grad():
        model.mlm.ln.bias[2] = torch.nan
    with pytest.raises(FloatingPointError, match="the holes in 'the .MASK. sat' are not finite"):
        fill_mask(model, PIECES, "the [MASK] sat")
    assert {name: part.training for name, part in model.named_modules()} == before
    for wrong in ({"model": built("gpt2")}, {"tokenizer": TOKENIZER}, {"text": 5}, {"count": 2.0}):
        with pytest.raises(TypeError, match="must be a "):
            fill_mask(**({"model": model, "tokenizer": PIECES, "text": "the [MASK]"} | wrong))


def test_a_folder_is_written_and_read_without_transformers(tmp_path):
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from megatron_edu.interop import load_huggingface, save_huggingface\n"
        "from megatron_edu.interop.compare import check_conversion\n"
        "from megatron_edu.config import PRESETS\n"
        "from megatron_edu.models import build_model\n"
        "model = build_model(PRESETS['tiny'])\n"
        f"save_huggingface(model, {str(tmp_path / 'new')!r}, "
        "check=lambda f: print(check_conversion(model, f)))\n"
        f"load_huggingface({str(tmp_path / 'new')!r})\n"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "not compared with transformers: transformers is not installed\n"
    assert os.listdir(tmp_path) == ["new"]
