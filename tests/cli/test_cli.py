"The command line, in this process where one rank is enough: what it does and how it refuses."

import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from gpt2_cases import config
from plain import make_plain
from safetensors.torch import load_file, save_file
from tokenizers import normalizers

from megatron_edu import cli
from megatron_edu.cli import checks, command, options, parse
from megatron_edu.cli import demo as demo_verb
from megatron_edu.cli import generate as generate_verb
from megatron_edu.cli import presets as presets_verb
from megatron_edu.cli import train as train_verb
from megatron_edu.config import PRESETS
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.token_writer import TokenFileWriter
from megatron_edu.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_edu.data.wordpiece import load_wordpiece, train_wordpiece
from megatron_edu.errors import Stopped
from megatron_edu.failures import PACKAGE
from megatron_edu.files import mark_folder
from megatron_edu.models.architecture import ARCHITECTURES
from megatron_edu.models.bert import Bert
from megatron_edu.files import MARK
from megatron_edu.data.prepare import prepare, prepare_documents
from megatron_edu.ranks import RankError
from megatron_edu.training.checkpoint import (
    latest_checkpoint,
    load_config,
    load_model,
    load_state,
    save_checkpoint,
)
from megatron_edu.training.journal import read_metrics

TEXT = "The cat sat on the mat, and the dog barked at the cat.\n\n"
SHORT = (
    "--preset tiny --batch-size 4 --eval-batches 1 --num-layers 1 --max-seq-len 16 --dropout 0"
).split()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "The same documents as .txt, as .jsonl, and prepared."
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text(TEXT * 600)
    lines = (json.dumps({"body": TEXT * 10}) + "\n" for _ in range(40))
    (folder / "a.jsonl").write_text("".join(lines))
    source, out = str(folder / "a.jsonl"), str(folder / "ready")
    cli.main(["prepare", source, "--text-field", "body", "--vocab-size", "280", "--out", out])
    return folder


def train(corpus, out, data="ready", steps=2, more=()):
    cli.main([
        "train", *SHORT, "--data", str(corpus / data), "--out", str(out), "--steps", str(steps),
        *map(str, more),
    ])


def losses(run):
    return [line["loss"] for line in read_metrics(run)]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    "Four steps on one rank, with a checkpoint after each second one."
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(corpus, out, steps=4, more=["--save-every", 2])
    return out


def refusal(capsys, *args):
    "Standard error of a command that ends with status 2 and no traceback."
    with pytest.raises(SystemExit) as end:
        cli.main([str(arg) for arg in args])
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


# ------------------------------------------------------------------------------------------ help


def help_of(capsys, verb):
    with pytest.raises(SystemExit) as end:
        cli.main([*verb.split(), "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def explanations(text):
    "Option and what is said of it, without the default."
    body = re.sub(r"[│╭╮╰╯─]", " ", text)
    parts = re.split(r"\n\s+(?=-|[A-Z]+ |\[)", body)
    for part in parts:
        name = re.match(r"(--[a-z][a-z0-9-]+)", part)
        if name:
            words = part.split("\n")
            first = re.split(r"\s{2,}", words[0].strip(), maxsplit=1)
            said = " ".join(first[1:] + words[1:])
            yield name[1], re.sub(r"\((default|required).*", "", " ".join(said.split())).strip()


WITH_OPTIONS = [name for name in options.VERBS if name not in ("presets", "doctor", "break")]
BERTS = "train --model bert", "train --preset bert-336m", "demo --model bert"


@pytest.mark.parametrize("verb", [*WITH_OPTIONS, *BERTS])
def test_help_explains_every_option(capsys, verb):
    said = dict(explanations(help_of(capsys, verb)))
    assert said, verb
    unexplained = [name for name, text in said.items() if not text]
    assert not unexplained


@pytest.mark.parametrize(
    ("verb", "preset"), [("train", "tiny"), ("train --model bert", "bert-tiny")]
)
def test_help_of_train_offers_every_field(capsys, verb, preset):
    text = help_of(capsys, verb)
    config = options.preset_arguments(preset).config
    for part in (config.model, config.run, config.optimizer, config.parallel):
        for field in dataclasses.fields(part):
            offered = re.search(rf"--{field.name.replace('_', '-')}[ ,]", text) is not None
            assert offered == (field.name not in ("pp", "cp")), field.name
    assert "--data" in text and "--tokenizer" in text and "--text-field" in text


def default_of(text, option):
    "What the help says an option is if it is not given."
    flat = " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
    last = flat[flat.rindex(f"{option} ") :]        # the usage may name it first
    return re.search(r"\(default: (.*?)\)", last)[1]


def test_help_shows_the_defaults_of_the_model(capsys):
    gpt2, bert = help_of(capsys, "train"), help_of(capsys, "train --model bert")
    paper = help_of(capsys, "train --preset bert-336m")
    assert "--layer-norm {pre,post}" in bert and "--layer-norm {" not in gpt2
    assert "--num-token-types INT" in bert and "--num-token-types" not in gpt2
    wanted = {"--model": "bert", "--preset": "bert-laptop", "--decay": "linear", "--gelu": "exact"}
    assert {option: default_of(bert, option) for option in wanted} == wanted
    wanted = {"--model": "gpt2", "--preset": "laptop", "--decay": "cosine", "--gelu": "tanh"}
    assert {option: default_of(gpt2, option) for option in wanted} == wanted
    wanted = {
        "--preset": "bert-336m", "--lr": "0.0001", "--min-lr": "0.0", "--warmup-steps": "10000",
        "--batch-size": "1024", "--steps": "2000000", "--num-layers": "24", "--vocab-size": "30522",
    }
    assert {option: default_of(paper, option) for option in wanted} == wanted


def test_help_of_train_says_whose_defaults_it_shows(capsys):
    for verb in ("train", "train --model bert", "train --preset gpt2-355m"):
        said = re.sub(r"[│╭╮╰╯─\s]+", " ", help_of(capsys, verb))
        assert "--model bert --help shows those of a BERT" in said
        assert "--preset NAME --help those of any other preset" in said
        assert "Without arguments" not in said      # of a class, where a preset says otherwise


def test_help_of_the_demo_shows_the_defaults_of_the_model(capsys):
    cases = ("demo", "gpt2", "runs/demo"), ("demo --model bert", "bert", "runs/demo-bert")
    for verb, model, out in cases:
        text = help_of(capsys, verb)
        assert default_of(text, "--model") == model and default_of(text, "--out") == out


def test_without_a_verb_the_verbs_are_listed(capsys):
    for args in ([], ["--help"], ["-h"]):
        cli.main(args)
        text = capsys.readouterr().out
        assert all(f"  {verb}" in text for verb in options.VERBS)


@pytest.mark.parametrize("verb", ["train", "prepare", "generate", "convert"])
def test_a_verb_without_options(capsys, verb):
    (line,) = refusal(capsys, verb).splitlines()
    assert line.startswith(f"megatron-edu {verb}: Missing") and f"{verb} --help" in line


def test_an_unknown_verb(capsys):
    said = refusal(capsys, "trian")
    assert said.startswith("megatron-edu trian: no such verb; nearest is train; the verbs are demo")
    assert "nearest" not in refusal(capsys, "zzz")


# ----------------------------------------------------------------------------------------- train


def test_the_fixed_spelling_with_ranks(corpus, tmp_path, capfd):
    out = tmp_path / "run"
    cli.main(
        f"train {' '.join(SHORT)} --data {corpus / 'a.txt'} --out {out} --tp 2 --dp 1 --steps 4 "
        "--save-every 2 --seed 1".split()
    )
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3, 4]
    assert {path.name for path in out.glob("step-*")} == {"step-00000002", "step-00000004"}
    printed = capfd.readouterr().out
    assert "2 ranks (tp=2, dp=1), backend gloo" in printed and "step 4/4" in printed


@pytest.mark.parametrize("grid", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_other_ranks(corpus, run, tmp_path, grid):
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "step-00000004")
    more = ["--resume", "auto", "--tp", grid[0], "--dp", grid[1], "--save-every", 2]
    train(corpus, copy, steps=4, more=more)
    assert losses(copy)[:2] == losses(run)[:2]
    assert losses(copy) == pytest.approx(losses(run), abs=2e-5)
    assert latest_checkpoint(copy).name == "step-00000004"


def test_the_configuration_is_printed_a_paragraph_a_concern(corpus, tmp_path, capsys):
    train(corpus, tmp_path / "run", steps=1, more=["--seed", 5, "--no-compile"])
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split()[0] for line in lines if line[:1].isalpha()][:5]
    assert heads == ["model", "run", "optimizer", "parallel", "data"]
    text = " ".join(lines)
    assert "num_layers=1" in text and "seed=5" in text and "vocab_size=280" in text
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize(
    "data", ["ready", "ready/tokens", "ready/tokens.bin", "ready/tokens.idx", "a.txt", "a.jsonl"]
)
def test_every_kind_of_data(corpus, tmp_path, data):
    train(corpus, tmp_path / "run", data, 1, ["--text-field", "body"])
    assert len(losses(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "tokenizer.json").is_file()
    if data.startswith("ready/"):
        train(corpus, tmp_path / "again", "ready", 1)
        assert losses(tmp_path / "run") == losses(tmp_path / "again")


def test_a_vocabulary_without_a_tokenizer_is_the_presets(tmp_path, corpus):
    for kind in ("bin", "idx"):
        shutil.copy(corpus / "ready" / f"tokens.{kind}", tmp_path / f"bare.{kind}")
    train(tmp_path, tmp_path / "run", "bare", 1)
    assert load_model(latest_checkpoint(tmp_path / "run")).config.vocab_size == 512
    assert not (tmp_path / "run" / "tokenizer.json").exists()


def test_presets_decide_the_other_defaults():
    tiny, paper = (
        options.preset_arguments(name).config for name in ("tiny", "gpt2-355m")
    )
    assert tiny.model.num_layers == 2 and tiny.run.steps == 400 and tiny.run.batch_size == 16
    assert tiny.run.eval_every == tiny.run.save_every == 100
    recipe = tiny.optimizer
    assert (recipe.lr, recipe.min_lr, recipe.warmup_steps) == (2e-3, 2e-4, 40)
    assert paper.model.num_layers == 24 and paper.optimizer.lr == 1.5e-4
    assert paper.run.steps == 300_000 and paper.run.batch_size == 512


@pytest.mark.parametrize(
    ("line", "preset"),
    [
        ("", "laptop"),
        ("--model gpt2", "laptop"),
        ("--model bert", "bert-laptop"),
        ("--model=bert", "bert-laptop"),
        ("--preset bert-336m", "bert-336m"),
        ("--preset=bert-tiny --model=bert", "bert-tiny"),
        ("--model gpt2 --preset tiny", "tiny"),
        ("--preset laptop --preset bert-1.3b", "bert-1.3b"),
    ],
)
def test_model_and_preset_imply_each_other(line, preset):
    assert options.choose_preset(line.split()) == preset
    kind = options.preset_arguments(preset).model
    assert kind == ("bert" if preset.startswith("bert") else "gpt2")


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("bert")])
def test_a_preset_of_bert_brings_its_recipe(preset):
    given = options.preset_arguments(preset)
    run, rates = given.config.run, given.config.optimizer
    assert given.model == "bert" and given.config.model == PRESETS[preset]
    assert rates.decay == "linear" and rates.min_lr == 0
    if preset in ("bert-tiny", "bert-laptop"):
        assert (run.steps, run.batch_size, rates.lr, rates.warmup_steps) == (2000, 16, 5e-4, 200)
    else:
        assert (run.steps, run.batch_size) == (2_000_000, 1024)
        assert (rates.lr, rates.warmup_steps) == (1e-4, 10_000)


@pytest.mark.parametrize("preset", ["gpt2-355m", "bert-336m"])
def test_what_the_recipe_leaves_to_the_device_can_be_chosen(preset):
    words = f"--preset {preset} --no-recompute --precision bf16 --data x --out y".split()
    default = options.train_defaults(words)
    found = parse.parse("train", words).config
    assert (default.config.run.recompute, default.config.run.precision) == (True, "fp32")
    assert (found.run.recompute, found.run.precision) == (False, "bf16")


def arguments(*words):
    "What `train` is told, as far as it looks for tokens."
    return parse.parse("train", ["--preset", "tiny", *map(str, words)])


def test_a_preset_may_be_given_in_one_word(capsys):
    text = refusal(capsys, "train", "--preset=huge", "--data", "x", "--out", "y")
    assert "preset 'huge' is unknown" in text


def test_text_is_tokenized_as_the_options_say(corpus, tmp_path, monkeypatch):
    seen, made = [], SimpleNamespace(file=None, lines=list)
    monkeypatch.setattr(train_verb, "prepare_text", lambda *args: seen.append(args) or made)
    monkeypatch.setattr(train_verb, "read_source", lambda folder: {"inputs": []})
    texts, out, given = (corpus / "a.txt", corpus / "a.jsonl"), tmp_path / "run", corpus / "ready"
    options = "--data", *texts, "--out", out, "--text-field", "body"
    train_verb.find_tokens(arguments(*options, "--vocab-size", 400))
    train_verb.find_tokens(arguments(*options, "--tokenizer", given, "--lossy"))
    rest = "body", "bpe"
    first, second = (texts, out, None, 400, *rest, False), (texts, out, given, 512, *rest, True)
    assert seen == [first, second]


def test_tokens_that_a_run_left_before_its_first_checkpoint_are_written_anew(corpus, tmp_path):
    "They may be of other text. Those that were changed since are not ours to remove."
    mark_folder(tmp_path, "run")
    options = "--out", tmp_path, "--text-field", "body", "--data"
    first = len(train_verb.find_tokens(arguments(*options, corpus / "a.jsonl")).file)
    assert len(train_verb.find_tokens(arguments(*options, corpus / "a.txt")).file) != first
    (tmp_path / "tokens.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match="tokens.bin is not as it was written"):
        train_verb.find_tokens(arguments(*options, corpus / "a.jsonl"))


def test_a_token_file_comes_alone(corpus, tmp_path, capsys):
    data = corpus / "ready" / "tokens.bin", corpus / "a.txt"
    text = refusal(capsys, "train", *SHORT, "--out", tmp_path / "run", "--data", *data)
    assert "tokens.bin: file that is not read as text" in text


def test_a_run_that_exists_is_not_overwritten(corpus, run, capsys):
    before = sorted(path.name for path in run.iterdir())
    text = refusal(capsys, "train", *SHORT, "--data", corpus / "ready", "--out", run)
    assert "holds a run (step-00000004)" in text and "--resume auto" in text
    assert sorted(path.name for path in run.iterdir()) == before


# ------------------------------------------------------------------- train: refused before ranks


def test_the_module_runs_as_a_program():
    "As `torchrun -m megatron_edu.cli` starts it; it did nothing, and ended well."
    command = [sys.executable, "-m", "megatron_edu.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: megatron-edu VERB")


@pytest.fixture
def no_ranks(monkeypatch):
    for module in (generate_verb, train_verb):
        monkeypatch.setattr(
            module, "launch", lambda *args, **kwargs: pytest.fail("ranks were started")
        )


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tp", 3], "tp=3: it must divide num_heads=4, .*_size=384 of .* use --tp 1 or 2 or 4$"),
        (["--tp", 4, "--ffn-hidden-size", 90], "ffn_hidden_size=90 .* use --tp 1 or 2$"),
        (["--tp", 2, "--vocab-multiple", 101], "size=303 .* --tp 1, or give --vocab-multiple a m"),
        (["--dp", 3], "--batch-size 4 does not divide .* on 3 data-parallel ranks"),
        (["--micro-batch", 3], "train: --batch-size 4 does not divide into .* of 3 .* use 3 or 6$"),
        (["--tp", 0], "tp=0: an axis has at least 1 rank"),
        (["--precision", "tf32"], "tf32: .* products .* on GPUs, .* use --precision fp32 or bf16$"),
        (["--preset", "huge"], "preset 'huge' is unknown; use one of tiny, laptop"),
        (["--model", "t5"], "model 't5' is unknown; use one of gpt2, bert"),
        (["--model", "bert"], "--model bert --preset tiny: .* is a gpt2; .* use one of bert-tiny,"),
        (["--layer-norm", "post"], "--layer-norm"),
        (["--hidden-size", 66], "hidden_size=66 does not divide by num_heads=4"),
        (["--steps", 0], "steps=0: must be at least 1"),
        (["--lr", -1], "lr=-1.0: must be a number above 0"),
        (["--max-seq-len", 100_000], "of --max-seq-len 100000 .* use a --max-seq-len from"),
        (["--max-seq-len", 2000], " 1 documents hold .* of --max-seq-len 2000 "),      # held out
        (["--tokenizer", "absent.json"], "absent.json: no tokenizer there"),
    ],
)
def test_options_that_cannot_be(corpus, tmp_path, capsys, options, words):
    text = refusal(
        capsys, "train", *SHORT, "--data", corpus / "ready", "--out", tmp_path / "run", *options
    )
    assert re.search(words, " ".join(text.split())), text
    assert not (tmp_path / "run").exists()


def test_only_whole_words_become_options():
    "Not the parts of a path, nor of another name."
    said = "global_batch 4, seq_len 9: /a/seq_len/b, seq_len.txt, max_seq_len, seq_lens"
    with pytest.raises(ValueError) as error, checks.command_words():
        raise ValueError(said)
    words = said.replace("global_batch", "--batch-size").replace("seq_len 9", "--max-seq-len 9")
    assert str(error.value) == words


def short_index(folder):
    path = folder / "tokens.idx"
    path.write_bytes(path.read_bytes()[:-8])


def wrong_magic(folder):
    path = folder / "tokens.idx"
    path.write_bytes(b"NOTMAGIC" + path.read_bytes()[8:])


def short_tokens(folder):
    path = folder / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])


def no_index(folder):
    (folder / "tokens.idx").unlink()


def large_ids(folder):
    for name in ("tokenizer.json", "tokens.idx", "tokens.bin"):
        (folder / name).unlink()
    with TokenFileWriter(folder / "tokens", dtype=np.int32) as writer:
        for _ in range(2):
            writer.append([1] * 100 + [512])
            writer.end_document()


def one_document(folder):
    for name in ("tokens.idx", "tokens.bin"):
        (folder / name).unlink()
    with TokenFileWriter(folder / "tokens", 300) as writer:
        writer.append([1] * 100)


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (short_index, "tokens.idx: cut short"),
        (wrong_magic, "tokens.idx: begins with"),
        (short_tokens, "tokens.bin: cut short"),
        (no_index, "tokens.idx: no such file"),
        (large_ids, "token id 512 .* outside the vocabulary of 512"),
        (one_document, "1 documents cannot be split in 2 parts; .* divide it among more files"),
    ],
)
def test_a_token_file_that_is_damaged(corpus, tmp_path, capsys, damage, words):
    data = shutil.copytree(corpus / "ready", tmp_path / "data")
    damage(data)
    out = tmp_path / "run"
    text = refusal(capsys, "train", *SHORT, "--data", data, "--out", out)
    assert re.search(words, text), text
    assert not out.exists()


@pytest.mark.usefixtures("no_ranks")
def test_text_that_is_none(corpus, tmp_path, capsys):
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "a.pdf").write_text("x")
    rest = *SHORT, "--out", tmp_path / "run", "--data"
    assert "no such path" in refusal(capsys, "train", *rest, tmp_path / "absent.txt")
    assert "an empty corpus" in refusal(capsys, "train", *rest, tmp_path / "blank.txt")
    assert "is not read as text" in refusal(capsys, "train", *rest, tmp_path / "a.pdf")
    assert "no string in field 'text'" in refusal(capsys, "train", *rest, corpus / "a.jsonl")


def content(folder):
    "What lies in a folder: every file below it."
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHER_TEXT = ["Quick zebras jump over lazy wolves. A fox waits! Bright owls vex it."] * 9


def other_tokens(folder, model="gpt2", **options):
    "Another text, prepared by a tokenizer of its own."
    (folder / "other.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in OTHER_TEXT))
    options |= {"kind": ARCHITECTURES[model].tokenizer, "overwrite": True}
    prepare((folder / "other.jsonl",), folder / "other", **options)
    return folder / "other"


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("data", ["other", "other.jsonl", "ready"])
def test_a_run_keeps_its_tokenizer(corpus, sentences, run, bert_run, tmp_path, capsys, kind, data):
    "Another one beside the tokens, or named: refused, and the run is as it was."
    own, ready = {"gpt2": (run, corpus / "ready"), "bert": (bert_run, sentences)}[kind]
    other, kept = other_tokens(tmp_path, kind, vocab_size=280), content(own)
    options = [*(SHORT if kind == "gpt2" else SMALL_BERT), "--steps", 9, "--resume", "auto"]
    named = {"other": [], "other.jsonl": ["--tokenizer", other], "ready": ["--tokenizer", other]}
    path = ready if data == "ready" else tmp_path / data
    text = refusal(capsys, "train", *options, "--data", path, "--out", own, *named[data])
    if data == "ready":
        assert f"--tokenizer {other}: {ready}/tokens was not written by it" in text
    else:
        assert f"{own} was trained with another tokenizer, {own}/tokenizer.json" in text
        command = f"prepare TEXT --model {kind} --tokenizer {own}/tokenizer.json --out FOLDER"
        assert f"megatron-edu {command}, or choose another --out" in text
    assert content(own) == kept


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_run_does_not_go_on_with_other_text(corpus, run, bert_run, capsys, kind):
    "Nor by its own tokenizer: its order of samples would be another one."
    own = {"gpt2": run, "bert": bert_run}[kind]
    kept, options = content(own), (*(SHORT if kind == "gpt2" else SMALL_BERT), "--resume", "auto")
    text = refusal(capsys, "train", *options, "--data", corpus / "a.txt", "--out", own)
    assert "text is not tokenized again for it" in text and f"--init-from {own} and anot" in text
    assert content(own) == kept


@pytest.mark.usefixtures("no_ranks")
def test_other_tokens_for_a_run_without_a_tokenizer(corpus, run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    kept, rest = content(copy), ("--out", copy, "--resume", "auto", "--steps", 9)
    other = other_tokens(tmp_path, vocab_size=270)
    text = refusal(capsys, "train", *SHORT, "--data", other, *rest)
    assert "not the tokenizer" in text and "was trained with" in text
    other_tokens(tmp_path, vocab_size=300)
    text = refusal(capsys, "train", *SHORT, "--data", other, *rest)
    assert "has 300 tokens, and the weights know 280 ids" in text
    assert content(copy) == kept


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_tokenizer_that_did_not_write_the_tokens(
    corpus, sentences, tmp_path, capsys, kind
):
    "Of the same size, so that every id exists in both."
    size, ready, options = {
        "gpt2": (280, corpus / "ready", SHORT), "bert": (40, sentences, SMALL_BERT)
    }[kind]
    other = other_tokens(tmp_path, kind, vocab_size=max(size, 60)) / "tokenizer.json"
    text = refusal(
        capsys, "train", *options, "--data", ready, "--tokenizer", other, "--out", tmp_path / "run"
    )
    assert f"--tokenizer {other}: {ready}/tokens was not written by it, but by {ready}" in text
    assert "leave --tokenizer out" in text
    assert f"megatron-edu prepare TEXT --model {kind} --tokenizer {other}" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("gpt2", ["--max-seq-len", 32], "max_seq_len is 16, and 32 here; .* --max-seq-len 16,"),
        ("gpt2", ["--gelu", "exact"], "gelu is tanh, and exact here; go on with --gelu tanh,"),
        ("gpt2", ["--ffn-hidden-size", 64], "go on with --ffn-hidden-size 256, or choose another"),
        ("gpt2", ["--vocab-multiple", 64], "go on with --vocab-multiple 128, or choose another"),
        ("gpt2", ["--layer-norm-eps", 0.1], "go on with --layer-norm-eps 1e-05, or choose another"),
        (
            "gpt2", ["--num-layers", 2, "--hidden-size", 32],
            "num_layers is 1, and 2 here, hidden_size .* --num-layers 1 --hidden-size 64",
        ),
        ("bert", ["--layer-norm", "post"], "layer_norm is pre, and post here; .*norm pre,"),
        ("bert", ["--num-token-types", 3], "go on with --num-token-types 2,"),
        ("bert", ["--max-seq-len", 32], "max_seq_len is 16, and 32 here; .* --max-seq-len 16,"),
    ],
)
def test_a_run_of_another_model_is_told_by_its_options(
    corpus, sentences, run, bert_run, capsys, kind, options, words
):
    own, ready, short = {
        "gpt2": (run, corpus / "ready", SHORT), "bert": (bert_run, sentences, SMALL_BERT)
    }[kind]
    kept, rest = content(own), ("--resume", "auto", "--steps", 9)
    text = refusal(capsys, "train", *short, "--data", ready, "--out", own, *rest, *options)
    assert f"{own}/step-00000004 is of another model" in text
    assert re.search(words, " ".join(text.split())), text
    assert content(own) == kept


@pytest.mark.usefixtures("no_ranks")
def test_ranks_that_do_not_divide_are_refused_before_text_is_read(corpus, tmp_path, capsys):
    rest = "--data", corpus / "a.txt", "--out", tmp_path / "run", "--tp", 3
    assert "use --tp 1 or 2 or 4" in refusal(capsys, "train", *SHORT, *rest)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_run_that_is_done_says_so(corpus, sentences, run, bert_run, capsys, kind):
    own, ready, short = {
        "gpt2": (run, corpus / "ready", SHORT), "bert": (bert_run, sentences, SMALL_BERT)
    }[kind]
    kept = content(own)
    for steps in (4, 3):
        words = "train", *short, "--data", ready, "--out", own, "--steps", steps, "--resume", "auto"
        cli.main([str(word) for word in words])
        last = f"{own}/step-00000004: 4 of {steps} steps are done; to go on, give more --steps\n"
        assert capsys.readouterr().out == last
    assert content(own) == kept


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_sequences_longer_than_any_document_are_told(
    corpus, sentences, tmp_path, capsys, monkeypatch, kind
):
    "Before the first rank starts, so that nobody waits without a word."
    monkeypatch.setattr(train_verb, "launch", lambda *args: print("ranks start"))
    ready, short, extra, rest = {
        "gpt2": (corpus / "ready", SHORT, 0, "a sample is of several"),
        "bert": (sentences, SMALL_BERT, 3, "the rest of a sample is padding"),
    }[kind]
    longest = int(np.diff(TokenFile(ready / "tokens").document_starts).max())
    for length in (longest + extra, longest + extra + 1):
        more = "--max-seq-len", length, "--validation", 0.5, "--eval-batches", 3
        words = "train", *short, "--data", ready, "--out", tmp_path / "run", *more
        cli.main([str(word) for word in words])
        *_, note, samples, start = capsys.readouterr().out.splitlines()
        assert start == "ranks start"
        told = f"length     {length} tokens; the longest document has {longest}, {rest}"
        assert (note == told) == (length > longest + extra), note
        assert ("a validation on 12 samples" in samples) == (length > longest + extra)


def test_what_may_change_when_a_run_goes_on(corpus, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    more = ["--dropout", 0.2, "--recompute", "--ffn-hidden-size", 256, "--vocab-multiple", 384]
    train(corpus, copy, steps=5, more=["--resume", "auto", "--init-std", 0.01, *more])
    assert len(losses(copy)) == 5


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("source", ["tokens", "text"])
def test_a_vocabulary_size_beside_a_tokenizer(
    corpus, sentences, tmp_path, capsys, kind, source
):
    size, ready, short = {
        "gpt2": (280, corpus / "ready", SHORT), "bert": (40, sentences, SMALL_BERT)
    }[kind]
    data = [ready] if source == "tokens" else [corpus / "a.txt", "--tokenizer", ready]
    rest = "--vocab-size", 1000, "--out", tmp_path / "run"
    text = refusal(capsys, "train", *short, "--data", *data, *rest)
    assert f"--vocab-size 1000: {ready}" in text and f" has {size} tokens" in text
    assert "leave --vocab-size out" in text and f"--model {kind} --vocab-size 1000" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_ranks")
def test_a_missing_option_is_named(corpus, tmp_path, capsys):
    assert "--out" in refusal(capsys, "train", "--data", corpus / "ready")
    text = refusal(capsys, "train", "--data", corpus / "ready", "--out", tmp_path, "--stepz", 3)
    assert "--stepz" in text


@pytest.mark.parametrize("verb", ["demo", "bench", "train", "prepare", "convert"])
def test_quiet_is_an_option_of_every_verb_that_reports(monkeypatch, capsys, verb):
    "And `main` obeys it, whatever the verb's module does."
    asked = SimpleNamespace(quiet=True)
    monkeypatch.setattr(command, "parse", lambda name, words: asked)
    module = SimpleNamespace(run=lambda told: print("progress", told))
    monkeypatch.setattr(command, "import_module", lambda name: module)
    assert "quiet" in {field.name for field in dataclasses.fields(options.VERBS[verb].arguments)}
    cli.main([verb])
    assert capsys.readouterr().out == ""
    asked.quiet = False
    cli.main([verb])
    assert "progress" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("generate x --top-k 5.5", "--top-k 5.5: must be a whole number in digits, or None;"),
        ("generate x --tokens 1e3", "--tokens 1e3: must be a whole number in digits;"),
        ("generate x --tp=2.0", "--tp 2.0: must be a whole number in digits;"),
        ("train --out x --data y --micro-batch half", "--micro-batch half: must be a whole number"),
        ("train --out x --data y --num-layers inf", "--num-layers inf: must be a whole number in"),
        ("bench --rounds 2,5", "--rounds 2,5: must be a whole number in digits;"),
        ("demo --steps \u2500", "--steps \\u2500: must be a whole number in digits;"),
        ("prepare x --out y --vocab-size " + "x" * 999, f"--vocab-size {'x' * 40}: must be a"),
        ("generate x --top-p half", "--top-p half: must be a number;"),
        ("generate x --seed -1", "generate: seed=-1: must be from 0"),
        ("generate x --stop\u2500", "Unrecognized options: --stop\u2500"),
    ],
)
def test_what_is_no_number_is_said_with_its_option_and_rule(capsys, words, text):
    said = refusal(capsys, *words.split())
    assert text in said and "parsing" not in said and "int()" not in said


def test_numbers_that_may_be_none_are_read():
    read = parse.parse("generate", ["x", "--top-k", "None"])
    assert (read.sampling.top_k, parse.parse("generate", ["x", "--top-k", "7"]).sampling.top_k) == (
        None, 7
    )


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize("more", [[], ["--resume", "never"], ["--preset", "tiny"]])
def test_without_data_a_run_that_is_there_is_named_with_the_way_to_go_on(run, capsys, more):
    text = refusal(capsys, "train", "--out", run, *more)
    assert f"{run} holds a run (step-00000004)" in text and "go on with --resume auto" in text
    cli.main(["train", "--out", str(run), "--resume", "auto"])      # the remedy
    assert "4 of 4 steps are done" in capsys.readouterr().out


def test_without_data_a_converted_model_is_named_with_the_way_to_begin(run, tmp_path, capsys):
    there, back = tmp_path / "there", tmp_path / "back"
    cli.main(["convert", "--from", str(run), "--to", str(there)])
    cli.main(["convert", "--from", str(there), "--to", str(back), "--format", "megatron_edu"])
    assert f"--init-from {back} and another --out" in refusal(capsys, "train", "--out", back)
    assert "Missing" in refusal(capsys, "train", "--out", tmp_path / "new")


@pytest.mark.usefixtures("no_ranks")
def test_ranks_of_torchrun_do_not_all_write_the_token_file(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_verb, "under_torchrun", lambda: True)
    data = corpus / "a.txt", corpus / "a.jsonl"
    text = refusal(capsys, "train", *SHORT, "--out", tmp_path / "run", "--data", *data)
    assert f"{data[0]}, {data[1]} is no token file" in text
    assert "run megatron-edu prepare first" in text and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        FloatingPointError("step 3: loss nan"),
        ValueError("sizes differ"),
        OSError("disk full"),
        RankError(1, "rank 1 failed: killed"),
    ],
)
def test_a_failure_inside_is_one_message(capsys, monkeypatch, error):
    presets_fail(monkeypatch, error)
    assert refusal(capsys, "presets") == f"megatron-edu presets: {error}\n"


def presets_fail(monkeypatch, error, file=PACKAGE / "some_module.py"):
    "Let the verb `presets` raise an exception as code of that file does."
    space = {"error": error}
    exec(compile("def run(asked):\n    raise error", str(file), "exec"), space)
    monkeypatch.setattr(presets_verb, "run", space["run"])


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyError("x"), AssertionError("y")])
def test_what_nobody_expected_keeps_its_traceback_in_a_file(monkeypatch, capsys, error):
    presets_fail(monkeypatch, error)
    unforeseen(capsys, type(error))


def test_an_error_of_another_library_is_not_the_users(monkeypatch, capsys):
    presets_fail(monkeypatch, ValueError("what does it mean?"), "site-packages/other.py")
    unforeseen(capsys, ValueError)


def unforeseen(capsys, kind):
    with pytest.raises(SystemExit) as end:
        cli.main(["presets"])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1
    assert line.startswith(f"megatron-edu presets: unforeseen {kind.__name__}: ")
    kept = Path(line.rpartition(" ")[2])
    text = kept.read_text()
    kept.unlink()
    assert "Traceback" in text and kind.__name__ in text


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (Stopped(signal.SIGHUP, "step 3 is saved"), 129, "step 3 is saved"),
    ],
)
def test_a_signal_ends_with_its_status(capsys, monkeypatch, error, code, line):
    presets_fail(monkeypatch, error)
    with pytest.raises(SystemExit) as end:
        cli.main(["presets"])
    assert end.value.code == code
    assert capsys.readouterr().err == f"megatron-edu presets: {line}\n"


# ------------------------------------------------------------------- prepare, generate, convert


def test_prepare_with_a_given_tokenizer(corpus, tmp_path, capsys):
    given = tmp_path / "given.json"
    train_tokenizer(["other words"], 260).save(given)
    source, out = str(corpus / "a.txt"), str(tmp_path / "out")
    cli.main(["prepare", source, "--tokenizer", str(given), "--out", out])
    file = TokenFile(tmp_path / "out" / "tokens")
    printed = capsys.readouterr().out
    assert printed == f"{len(file)} documents, {file.num_tokens:,} tokens in {out}\n"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        MARK, "source.json", "tokenizer.json", "tokens.bin", "tokens.idx"
    ]
    assert load_tokenizer(tmp_path / "out").core.get_vocab() == (
        load_tokenizer(given).core.get_vocab()
    )


def test_prepare_says_once_what_the_tokenizer_changed(corpus, tmp_path, capsys):
    core = train_tokenizer(["other words"], 260).core
    core.normalizer = normalizers.Lowercase()
    core.save(str(tmp_path / "given.json"))
    (tmp_path / "a.txt").write_text("The Cat sat.")
    options = ["--tokenizer", str(tmp_path / "given.json"), "--out", str(tmp_path / "out")]
    cli.main(["prepare", str(tmp_path / "a.txt"), *options])
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("normalizer changed the letters of 1 documents") == 1


def test_prepare_refuses_what_holds_no_text(tmp_path, capsys):
    text = refusal(capsys, "prepare", tmp_path / "absent", "--out", tmp_path / "out")
    assert "no such path" in text and not (tmp_path / "out").exists()


def vocabulary_files(folder):
    "The files that GPT-2 and BERT were published with, of small vocabularies."
    pieces = train_wordpiece(OTHER_TEXT, 60).core.get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(pieces, key=pieces.get)))
    train_tokenizer(OTHER_TEXT, 300).core.model.save(str(folder), "gpt2")
    (folder / "gpt2").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / f"gpt2-{name}", folder / "gpt2" / name)


WORDS = {"gpt2": "byte-level BPE", "bert": "WordPiece vocabulary"}


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("bert", ["gpt2-vocab.json", "gpt2-merges.txt", "gpt2", "ready", "ready/tokenizer.json"]),
        ("gpt2", ["vocab.txt", "sentences", "sentences/tokenizer.json"]),
    ],
)
def test_prepare_says_whose_a_tokenizer_is(corpus, sentences, tmp_path, capsys, model, names):
    vocabulary_files(tmp_path)
    other = {"bert": "gpt2", "gpt2": "bert"}[model]
    source, out = corpus / "a.txt", tmp_path / "out"
    for name in names:
        path = tmp_path / name if (tmp_path / name).exists() else corpus / name
        words = "prepare", source, "--model", model, "--tokenizer", path, "--out", out
        text = refusal(capsys, *words)
        assert f"{path}: a {WORDS[other]}, and a {WORDS[model]} is needed" in text
        assert f"go on with --model {other}, or" in text and not out.exists()


@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_prepare_says_what_is_wrong_with_a_tokenizer_of_nobody(corpus, tmp_path, capsys, model):
    (tmp_path / "words.txt").write_text("one\ntwo\n")
    words = "--model", model, "--tokenizer", tmp_path / "words.txt", "--out", tmp_path / "out"
    text = refusal(capsys, "prepare", corpus / "a.txt", *words)
    assert f"words.txt, read as a {WORDS[model]} (see --model): " in text


def written(capsys, *args):
    capsys.readouterr()
    cli.main([str(arg) for arg in ("generate", *args)])
    return capsys.readouterr().out


def test_generate_continues_a_prompt(run, capsys):
    text = written(capsys, run, "--prompt", "The cat", "--tokens", 10)
    assert text.startswith("The cat") and len(text) > len("The cat\n")
    again = written(capsys, run / "step-00000004", "--prompt", "The cat", "--tokens", 10)
    assert again == text
    other = written(capsys, run, "--prompt", "The cat", "--tokens", 10, "--seed", 2)
    assert other != text
    greedy = [
        written(capsys, run, "--temperature", 0, "--tokens", 5, "--seed", seed) for seed in (1, 2)
    ]
    assert greedy[0] == greedy[1]


def test_without_a_prompt_a_new_document_begins(run, capsys):
    text = written(capsys, run, "--prompt", "", "--tokens", 5)
    assert text.startswith("<|endoftext|>") and len(text) > len("<|endoftext|>\n")


def test_generate_on_two_ranks_writes_the_same(run, capfd):
    texts = [written(capfd, run, "--tokens", 10, "--tp", tp) for tp in (1, 2)]
    assert texts[0] == texts[1]


def test_nothing_is_written_if_one_rank_cannot_read_its_weights(run, tmp_path, capfd):
    "The number that is none lies in the slice of the second rank alone."
    shutil.copytree(run, tmp_path / "run")
    path = make_plain(latest_checkpoint(tmp_path / "run")) / "model.safetensors"
    weights = load_file(path)
    weights["wte.weight"][-1] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", str(tmp_path / "run"), "--tp", "2", "--prompt", "The"])
    out, said = capfd.readouterr()
    assert end.value.code == 2 and out == ""
    assert "wte.weight is not finite everywhere; use another checkpoint" in said


@pytest.fixture(scope="module")
def brief(run, tmp_path_factory):
    "A run whose model draws every token from the same shares: one in five ends the document."
    folder = tmp_path_factory.mktemp("brief")
    model, eod_id = load_model(latest_checkpoint(run)), load_tokenizer(run).eod_id
    others = model.config.vocab_size - 1
    with torch.no_grad():
        for weight in (model.ln_f.weight, model.ln_f.bias, model.wte.weight):
            weight.zero_()
        model.ln_f.bias[0] = 1
        model.wte.weight[eod_id, 0] = math.log(others / 4)
    save_checkpoint(folder, 0, model)
    shutil.copy(run / "tokenizer.json", folder)
    return folder


def test_generate_ends_with_the_document(brief, capfd):
    words = brief, "--prompt", "The cat", "--tokens", 30, "--seed", 2
    free, ended = (written(capfd, *words, stop) for stop in ("--no-stop", "--stop"))
    first, mark, rest = free.removesuffix("\n").partition("<|endoftext|>")
    assert len(first) > len("The cat") and len(rest) > 20 and mark in rest
    assert ended == f"{first}{mark}\n"
    assert [written(capfd, *words, "--tp", tp) for tp in (1, 2)] == [ended] * 2


def test_the_mark_of_an_empty_prompt_does_not_end_the_text(brief, capsys):
    text = written(capsys, brief, "--prompt", "", "--tokens", 30, "--seed", 2)
    assert text.count("<|endoftext|>") == 2 and text.endswith("<|endoftext|>\n")


def test_the_tokenizer_of_a_run_is_found_from_within(run, monkeypatch):
    for place in (run, run / "step-00000004"):
        monkeypatch.chdir(place)
        assert checks.run_tokenizer(Path(".")).read_bytes() == (run / "tokenizer.json").read_bytes()


def test_generate_refuses(run, tmp_path, capsys):
    assert "absent: no such folder" in refusal(capsys, "generate", tmp_path / "absent")
    assert "metrics.jsonl: a file" in refusal(capsys, "generate", run / "metrics.jsonl")
    assert "nearest is --version" in refusal(capsys, "--versoin")
    assert "holds no tokenizer.json" in refusal(capsys, "generate", tmp_path)
    assert "into --prompt -" in refusal(capsys, "generate", run, "--prompt", "caf\udce9")
    assert "into --prompt -" in refusal(capsys, "generate", run, "--prompt=caf\udce9")
    assert "rename the file" in refusal(capsys, "generate", "caf\udce9")
    assert "tokens=0: must be a whole" in refusal(capsys, "generate", run, "--tokens", 0)
    assert "too large" in refusal(capsys, "generate", run, "--tokens", 10**20)     # nothing printed
    assert "top_p=2.0" in refusal(capsys, "generate", run, "--top-p", 2)
    shutil.copy(run / "tokenizer.json", tmp_path)
    assert "config.json cannot be read as a checkpoint" in refusal(capsys, "generate", tmp_path)


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize("tp", [0, 3, 8])
def test_generate_refuses_ranks_that_do_not_divide_the_model(run, capsys, tp):
    text = refusal(capsys, "generate", run, "--tp", tp)
    sizes = "num_heads=4, ffn_hidden_size=256 and padded_vocab_size=384"
    assert f"tp={tp}: it must divide {sizes} of the model" in text
    assert text.endswith("use --tp 1 or 2 or 4\n")


@pytest.mark.parametrize(
    ("sizes", "fit"),
    [
        ({"num_heads": 4, "ffn_hidden_size": 90}, [1, 2]),
        ({"num_heads": 6}, [1, 2]),
        ({"num_heads": 6, "vocab_size": 103, "vocab_multiple": 3}, [1, 3]),
        ({"num_heads": 6, "vocab_multiple": 6}, [1, 2, 3, 6]),
    ],
)
def test_heads_feed_forward_and_padded_vocabulary_decide_the_ranks(sizes, fit):
    found = []
    for tp in range(1, 9):
        try:
            checks.check_split(config(**sizes), tp)
            found.append(tp)
        except ValueError as error:
            assert f"use --tp {' or '.join(map(str, fit))}" in str(error)
    assert found == fit


@pytest.mark.usefixtures("no_ranks")
def test_generate_refuses_a_model_of_another_library(run, tmp_path, capsys):
    cli.main(f"convert --from {run} --to {tmp_path / 'theirs'}".split())
    text = refusal(capsys, "generate", tmp_path / "theirs", "--tp", 2)
    assert "config.json describes no gpt2 and no bert (KeyError('model'))" in text
    assert "convert" in text


def test_convert_both_ways_with_the_tokenizer(run, tmp_path, capsys):
    there, back = tmp_path / "there", tmp_path / "back"
    there.mkdir()       # empty
    cli.main(f"convert --from {run} --to {there} --format huggingface".split())
    cli.main(f"convert --from {there} --to {back} --format megatron_edu".split())
    count = load_config(latest_checkpoint(run)).num_parameters()
    said = f"{count:,} parameters in {there}; compared with transformers"
    assert capsys.readouterr().out.startswith(said)
    assert load_state(latest_checkpoint(back))["step"] == 0
    tokenizers = {(folder / "tokenizer.json").read_bytes() for folder in (run, there, back)}
    assert len(tokenizers) == 1
    assert transformers.GPT2LMHeadModel.from_pretrained(there).config.vocab_size == 280
    a, b = (load_model(latest_checkpoint(folder)).state_dict() for folder in (run, back))
    assert all(torch.equal(a[name][:280], b[name][:280]) for name in a)
    texts = [written(capsys, folder, "--tokens", 8) for folder in (run, back)]
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("no_ranks")
def test_a_model_without_its_own_tokenizer(run, tmp_path, capsys):
    there, back = tmp_path / "there", tmp_path / "back"
    cli.main(f"convert --from {run} --to {there}".split())
    (there / "tokenizer.json").unlink()
    cli.main(f"convert --from {there} --to {back} --format megatron_edu".split())
    assert f"{there} holds no tokenizer, and none is written" in capsys.readouterr().err
    said = refusal(capsys, "generate", back)
    assert "holds no tokenizer.json; put that of its model there" in said
    other = train_tokenizer(["a Zebra a Zebra"] * 9, 263)
    other.core.add_tokens([f"<{n}>" for n in range(30)])
    other.save(back / "tokenizer.json")
    text = refusal(capsys, "generate", back, "--prompt", "<29>")
    assert "the tokenizer of another model" in text and "knows ids up to 279" in text


def test_convert_takes_an_older_vocabulary_of_a_gpt2_along(run, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    cli.main(f"convert --from {run} --to {there}".split())
    core = load_tokenizer(there).core
    (there / "tokenizer.json").unlink()
    core.model.save(str(there))
    assert (there / "vocab.json").exists() and (there / "merges.txt").exists()
    cli.main(f"convert --from {there} --to {back} --format megatron_edu".split())
    assert load_tokenizer(back).core.get_vocab() == core.get_vocab()


def test_convert_refuses(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for form in ("huggingface", "megatron_edu"):
        text = refusal(
            capsys, "convert", "--from", run, "--to", tmp_path / "full", "--format", form
        )
        assert "is a folder with files that are not ours" in text


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize(
    ("source", "form", "words"),
    [
        ("own", "megatron_edu", "a model of megatron-edu already; .* with --format huggingface"),
        ("own/step-00000004", "megatron_edu", "a model of megatron-edu already; .* --format hugg"),
        ("theirs", "huggingface", "a folder of transformers already; .* --format megatron_edu$"),
        ("nowhere", "huggingface", "no such folder; .* is made from a run, or .*; name one$"),
        ("nowhere", "megatron_edu", "no such folder; .* that transformers saved; name one$"),
        ("tokens", "huggingface", "a prepared text; .* is made from a run, or .*; name one$"),
        ("tokens", "megatron_edu", "a prepared text; .* that transformers saved; name one$"),
        ("empty", "huggingface", "a folder without a model; .* is made from a run"),
        ("own/metrics.jsonl", "huggingface", "a file; .* is made from a run"),
    ],
)
def test_convert_says_what_a_folder_is(
    corpus, sentences, run, bert_run, tmp_path, capsys, kind, source, form, words
):
    (tmp_path / "empty").mkdir()
    links = {"gpt2": (run, corpus / "ready"), "bert": (bert_run, sentences)}[kind]
    for name, target in zip(("own", "tokens"), links, strict=True):
        (tmp_path / name).symlink_to(target)
    cli.main(f"convert --from {tmp_path}/own --to {tmp_path}/theirs".split())
    path, to = tmp_path / source, tmp_path / "new"
    text = refusal(capsys, "convert", "--from", path, "--to", to, "--format", form)
    assert text.startswith(f"megatron-edu convert: {path}: ")
    assert re.search(words, text.strip()), text
    assert not to.exists()


# ------------------------------------------------------------------------------------------ BERT

SMALL_BERT = (
    "--preset bert-tiny --batch-size 4 --eval-batches 1 --num-layers 1 --max-seq-len 16 --dropout 0"
).split()


def train_bert(data, out, steps=2, more=()):
    words = "train", *SMALL_BERT, "--data", data, "--out", out, "--steps", steps, *more
    cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def sentences(corpus):
    "The corpus as BERT reads it."
    source, out = str(corpus / "a.jsonl"), str(corpus / "sentences")
    options = "--model bert --text-field body --vocab-size 40".split()
    cli.main(["prepare", source, *options, "--out", out])
    return corpus / "sentences"


@pytest.fixture(scope="module")
def bert_run(sentences, tmp_path_factory):
    "Four steps of a BERT on one rank, with a checkpoint after each second one."
    out = tmp_path_factory.mktemp("bert") / "whole"
    train_bert(sentences, out, 4, ["--save-every", 2])
    return out


def test_prepare_for_bert_writes_sentences(corpus, tmp_path, capsys):
    source, out = str(corpus / "a.jsonl"), str(tmp_path / "out")
    cli.main(["prepare", source, "--model", "bert", "--text-field", "body", "--out", out])
    tokens, pieces = TokenFile(tmp_path / "out" / "tokens"), load_wordpiece(tmp_path / "out")
    assert pieces.decode(tokens[0].tolist()) == TEXT.strip().lower()
    assert (len(tokens.document_offsets) - 1, len(tokens)) == (40, 400)
    printed = capsys.readouterr().out
    assert f"40 documents, 400 sentences, {tokens.num_tokens:,} tokens in" in printed


def test_prepare_for_bert_with_a_vocabulary(corpus, sentences, tmp_path):
    vocab = load_wordpiece(sentences).core.get_vocab()
    given, out = tmp_path / "vocab.txt", tmp_path / "out"
    given.write_text("".join(f"{token}\n" for token in sorted(vocab, key=vocab.get)))
    words = "prepare", corpus / "a.jsonl", "--model", "bert", "--tokenizer", given, "--out", out
    cli.main([str(word) for word in (*words, "--text-field", "body")])
    assert load_wordpiece(out).core.get_vocab() == vocab
    for kind in ("bin", "idx"):
        assert (out / f"tokens.{kind}").read_bytes() == (sentences / f"tokens.{kind}").read_bytes()


def test_a_bert_is_trained_with_ranks_and_writes_both_losses(sentences, bert_run, tmp_path, capfd):
    train_bert(sentences, tmp_path / "run", 4, ["--save-every", 2, "--tp", 2])
    assert losses(tmp_path / "run") == pytest.approx(losses(bert_run), abs=2e-5)
    for run in (tmp_path / "run", bert_run):
        lines, model = read_metrics(run), load_model(latest_checkpoint(run))
        assert isinstance(model, Bert) and model.config.vocab_size == 40
        for line in lines:
            assert line["loss"] == pytest.approx(line["mlm_loss"] + line["sop_loss"], abs=1e-5)
        assert "val_sop_accuracy_before" in lines[0] and "val_mlm_accuracy" in lines[-1]
    printed = capfd.readouterr().out
    assert "2 ranks (tp=2, dp=1), backend gloo" in printed and "accuracy: mlm" in printed


@pytest.mark.parametrize("grid", [(2, 1), (1, 2)])
def test_a_bert_goes_on_with_other_ranks(sentences, bert_run, tmp_path, grid):
    copy = shutil.copytree(bert_run, tmp_path / "copy")
    shutil.rmtree(copy / "step-00000004")
    train_bert(sentences, copy, 4, ["--resume", "auto", "--tp", grid[0], "--dp", grid[1]])
    assert losses(copy)[:2] == losses(bert_run)[:2]
    assert losses(copy) == pytest.approx(losses(bert_run), abs=2e-5)


def test_text_becomes_sentences_in_the_run_of_a_bert(corpus, tmp_path):
    train_bert(corpus / "a.jsonl", tmp_path / "run", 1, ["--text-field", "body"])
    tokens, pieces = TokenFile(tmp_path / "run" / "tokens"), load_wordpiece(tmp_path / "run")
    assert len(tokens) == 400 and len(losses(tmp_path / "run")) == 1
    config = load_model(latest_checkpoint(tmp_path / "run")).config
    assert config.vocab_size == pieces.vocab_size
    train_bert(corpus / "a.jsonl", tmp_path / "run", 2, ["--resume", "auto"])   # has its tokens
    assert len(losses(tmp_path / "run")) == 2


def test_the_options_of_bert_reach_the_model(sentences, tmp_path, capsys):
    more = ["--layer-norm", "post", "--num-token-types", 3, "--gelu", "tanh"]
    train_bert(sentences, tmp_path / "run", 1, more)
    config = load_model(latest_checkpoint(tmp_path / "run")).config
    assert (config.layer_norm, config.num_token_types, config.gelu) == ("post", 3, "tanh")
    assert "layer_norm=post" in capsys.readouterr().out


def bare(sentences, folder):
    "A token file of sentences without its tokenizer."
    for kind in ("bin", "idx"):
        shutil.copy(sentences / f"tokens.{kind}", folder / f"bare.{kind}")
    return folder / "bare"


def test_a_bare_token_file_takes_a_named_tokenizer(sentences, tmp_path):
    named = ["--tokenizer", sentences / "tokenizer.json"]
    train_bert(bare(sentences, tmp_path), tmp_path / "run", 1, named)
    train_bert(sentences, tmp_path / "again", 1)
    assert losses(tmp_path / "run") == losses(tmp_path / "again")
    assert load_wordpiece(tmp_path / "run").vocab_size == 40


@pytest.mark.usefixtures("no_ranks")
def test_a_bare_token_file_needs_a_tokenizer(sentences, tmp_path, capsys):
    data = bare(sentences, tmp_path)
    text = refusal(capsys, "train", *SMALL_BERT, "--data", data, "--out", tmp_path / "run")
    assert "bare: no tokenizer.json beside it" in text and "name that with --tokenizer" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tp", 3], "tp=3: it must divide num_heads=4, .* use --tp 1 or 2 or 4$"),
        (["--dp", 3], "--batch-size 4 does not divide .* on 3 data-parallel ranks"),
        (["--dp", 3, "--batch-size", 16], "must be a multiple of 3; use 15 or 18$"),
        (["--micro-batch", 3], "train: --batch-size 4 does not divide into .* of 3 .* use 3 or 6$"),
        (["--tp", 2, "--vocab-multiple", 61], "size=61 .* --tp 1, or give --vocab-multiple a m"),
        (["--max-seq-len", 4], "train: --max-seq-len 4; 3 special tokens"),
        (["--layer-norm", "both"], "--layer-norm"),
        (["--num-token-types", 0], "num_token_types=0: must be a whole number, at least 1"),
        (["--model", "gpt2"], "--model gpt2 --preset bert-tiny: .* is a bert"),
        (["--validation", 0], "validation=0.0: must be a share of the documents"),
        (["--tokenizer", "absent.txt"], "absent.txt.* no tokenizer there.* vocab.txt"),
    ],
)
def test_options_that_a_bert_cannot_have(sentences, tmp_path, capsys, options, words):
    run = tmp_path / "run"
    text = refusal(capsys, "train", *SMALL_BERT, "--data", sentences, "--out", run, *options)
    assert re.search(words, " ".join(text.split())), text
    assert not run.exists()


@pytest.mark.usefixtures("no_ranks")
def test_the_other_models_tokens_are_refused(corpus, sentences, tmp_path, capsys):
    rest = "--out", tmp_path / "run", "--data"
    text = refusal(capsys, "train", *SHORT, *rest, sentences)
    assert f"{sentences}/tokenizer.json: a WordPiece vocabulary, and a byte-level BPE" in text
    assert "go on with --model bert, or prepare the text with" in text
    assert "megatron-edu prepare --model gpt2" in text and "eod_token" not in text
    pieces = "--tokenizer", sentences / "tokenizer.json"
    for more in ((), pieces):
        text = refusal(capsys, "train", *SMALL_BERT, *rest, corpus / "ready", *more)
        assert f"{corpus}/ready/tokenizer.json: a byte-level BPE, and a WordPiece" in text
        assert "go on with --model gpt2, or prepare the text with" in text
        assert "megatron-edu prepare --model bert" in text and "train_wordpiece" not in text
    alone = bare(corpus / "ready", tmp_path)
    text = refusal(capsys, "train", *SMALL_BERT, *rest, alone, *pieces)
    assert "token id" in text and "outside the vocabulary" in text
    lone = prepare_documents(["The cat sat on the mat."] * 9, tmp_path, load_wordpiece(sentences))
    text = refusal(capsys, "train", *SMALL_BERT, *rest, lone.prefix)
    assert "none of " in text and "documents has two sentences" in text
    assert "write the file with megatron-edu prepare --model bert, or add text" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_ranks")
def test_a_run_does_not_go_on_as_the_other_model(corpus, run, bert_run, capsys):
    resume = "--resume", "auto", "--data", corpus / "ready", "--out"
    text = refusal(capsys, "train", *SMALL_BERT, *resume, run)
    assert "holds a run of a gpt2, which cannot go on as a bert; go on with --model gpt2" in text
    text = refusal(capsys, "train", *SHORT, *resume, bert_run)
    assert "holds a run of a bert, which cannot go on as a gpt2; go on with --model bert" in text


@pytest.mark.usefixtures("no_ranks")
def test_generate_refuses_a_bert_and_says_what_to_use(bert_run, capsys):
    text = refusal(capsys, "generate", bert_run)
    assert "has no next token; generate with a GPT-2, or ask" in text and "fill_mask" in text


ORDERS = {"pre": "MegatronBertForPreTraining", "post": "BertForPreTraining"}


@pytest.mark.parametrize("order", ORDERS)
def test_convert_a_bert_both_ways_with_its_tokenizer(sentences, tmp_path, order):
    run, there, back = (tmp_path / name for name in ("run", "there", "back"))
    train_bert(sentences, run, 1, ["--layer-norm", order])
    cli.main(f"convert --from {run} --to {there} --format huggingface".split())
    cli.main(f"convert --from {there} --to {back} --format megatron_edu".split())
    theirs = getattr(transformers, ORDERS[order]).from_pretrained(there)
    assert theirs.config.vocab_size == 40
    assert len({(folder / "tokenizer.json").read_bytes() for folder in (run, there, back)}) == 1
    a, b = (load_model(latest_checkpoint(folder)) for folder in (run, back))
    assert b.config.layer_norm == order
    b = b.state_dict()
    assert all(torch.equal(x[:40], b[name][:40]) for name, x in a.state_dict().items())


def test_convert_takes_a_checkpoint_of_weights_alone(run, tmp_path, capsys):
    for name in ("config.json", "index.json", "model-00000.safetensors", MARK):
        shutil.copy(run / "step-00000004" / name, tmp_path)
    cli.main(f"convert --from {tmp_path} --to {tmp_path / 'theirs'}".split())
    assert transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "theirs").config.n_layer == 1
    (tmp_path / "config.json").write_text('{"architecture"')
    text = refusal(capsys, "convert", "--from", tmp_path, "--to", tmp_path / "new")
    assert "config.json cannot be read as a checkpoint's file" in text


def test_convert_says_in_a_line_which_heads_are_new(bert_run, tmp_path, capsys):
    there, encoder, back = (tmp_path / name for name in ("there", "encoder", "back"))
    cli.main(f"convert --from {bert_run} --to {there}".split())
    transformers.AutoModel.from_pretrained(there).save_pretrained(encoder)
    capsys.readouterr()
    cli.main(f"convert --from {encoder} --to {back} --format megatron_edu".split())
    line, tokenizer = capsys.readouterr().err.splitlines()
    assert tokenizer.startswith(f"megatron-edu convert: {encoder} holds no tokenizer")
    assert line.startswith(f"megatron-edu convert: {encoder} has no sentence-order head, no ")
    assert line.endswith("which start from initial weights: train them before use")


def test_convert_takes_an_older_vocabulary_along(bert_run, tmp_path, capsys):
    there, back = tmp_path / "there", tmp_path / "back"
    cli.main(f"convert --from {bert_run} --to {there}".split())
    vocab = load_wordpiece(there).core.get_vocab()
    (there / "tokenizer.json").unlink()
    lines = "".join(f"{token}\n" for token in sorted(vocab, key=vocab.get))
    (there / "vocab.txt").write_text(lines)
    cli.main(f"convert --from {there} --to {back} --format megatron_edu".split())
    assert load_wordpiece(back).core.get_vocab() == vocab
    (there / "vocab.txt").write_text("the\ncat\n")
    options = "--to", tmp_path / "new", "--format", "megatron_edu"
    text = refusal(capsys, "convert", "--from", there, *options)
    assert "without [PAD]" in text and not (tmp_path / "new").exists()


def test_the_demo_of_each_model_is_called(monkeypatch, tmp_path):
    called, lights = {}, []
    monkeypatch.setattr(demo_verb, "show_lights", lambda kind, say: lights.append(kind) or True)
    for model, name in (("gpt2", "gpt2.demo"), ("bert", "bert.demo_bert")):
        name = f"megatron_edu.demo.{name}"
        monkeypatch.setattr(name, lambda asked, say, m=model: called.update({m: asked}))
    cli.main(["demo", "--out", str(tmp_path), "--steps", "3", "--quiet"])
    cli.main(["demo", "--model", "bert", "--tp", "4"])
    assert lights == ["gpt2", "bert"] and called["gpt2"].quiet and not called["bert"].quiet
    assert (called["gpt2"].model, called["gpt2"].steps, called["gpt2"].out) == ("gpt2", 3, tmp_path)
    assert (called["bert"].model, called["bert"].steps, called["bert"].tp) == ("bert", 2000, 4)
