"What a newcomer types first: answered at once, in plain words, in colours only where wanted."

import io
import json
import re
import subprocess
import sys

import pytest
import torch

import megatron_edu
from megatron_edu import cli
from megatron_edu.cli.options import VERBS, train_defaults
from megatron_edu.training.journal import read_metrics

LIGHT = """
import contextlib, io, json, sys
import megatron_edu
from megatron_edu import cli
heavy = {"torch", "numpy", "tokenizers", "transformers", "matplotlib"}
found = {"import": sorted(heavy & set(sys.modules))}
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            cli.main(words)
    found[" ".join(words)] = sorted(heavy & set(sys.modules))
print(json.dumps(found))
"""


def test_help_and_mistakes_need_no_torch():
    lines = [["--help"], ["--version"], [], ["trian"], ["train", "--preset", "gpt9"]]
    lines += [[verb, "--help"] for verb in VERBS]
    lines += [[verb, "--no-such-option", "3"] for verb in VERBS]
    lines += [
        ["train", "--model", "bert", "--help"],
        ["train", "--data", "x", "--out", "y", "--lr", "-1"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps(lines)], capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert len(found) == len(lines) + 1 and not any(found.values()), found


def test_the_package_says_what_it_is():
    assert megatron_edu.__doc__ and re.fullmatch(r"\d+\.\d+\.\d+", megatron_edu.__version__)
    names = "Ranks ParallelDims GPT2 GPT2Config Bert BertConfig PRESETS check_equivalence train"
    assert {*names.split(), "load_huggingface", "save_huggingface"} <= megatron_edu.PUBLIC.keys()
    for name in megatron_edu.PUBLIC:
        assert getattr(megatron_edu, name) is not None and name in dir(megatron_edu)
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(megatron_edu, "no_such_" + "name")


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_one_example_that_can_be_read(capsys, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "200")
    text = help_of(capsys, verb)
    (example,) = re.findall(r"Example: megatron-edu (.*)", text)
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', example)]
    assert words[0] == verb
    cli.parse.parse(verb, words[1:])
    assert "Raises" not in text and "config." not in text


@pytest.mark.parametrize("words", [["--pp", "2"], ["--pp=1"], ["--parallel.pp", "1"]])
def test_there_is_no_option_for_a_pipeline(capsys, words):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--data", "x", "--out", "y", *words])
    assert end.value.code == 2 and words[0].split("=")[0] in capsys.readouterr().err
    assert "--pp" not in help_of(capsys, "train")


def test_the_grid_is_what_the_options_say():
    asked = cli.parse.parse("train", "--data x --out y --tp 4 --dp 2".split())
    assert (asked.config.parallel.tp, asked.config.parallel.dp, asked.config.parallel.pp) == (
        4,
        2,
        1,
    )
    with pytest.raises(ValueError, match="tp"):
        cli.parse.parse("train", "--data x --out y --tp 0".split())


@pytest.mark.parametrize(
    "line, warmup",
    [
        ("", 40),
        ("--steps 30", 3),
        ("--steps=5", 0),
        ("--steps 30 --warmup-steps 7", 7),
        ("--model bert --steps 100", 10),
        ("--preset gpt2-355m --steps 30", 3000),
    ],
)
def test_the_warm_up_of_a_small_preset_follows_the_steps(line, warmup):
    asked = cli.parse.parse("train", ["--data", "x", "--out", "y", *line.split()])
    assert asked.config.optimizer.warmup_steps == warmup


def test_steps_that_are_no_number_are_the_parsers_business():
    assert train_defaults(["--steps", "many"]).config.optimizer.warmup_steps == 40


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("verb", ["train", "break"])
@pytest.mark.parametrize("no_color, colored", [("", True), ("1", False)])
def test_no_color_is_for_help_too(monkeypatch, verb, no_color, colored):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    assert ("\x1b[" in sys.stdout.getvalue()) == colored


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    "Text, prepared."
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text(
        "The cat sat on the mat, and the dog barked at the cat.\n\n" * 600
    )
    words = "prepare", folder / "a.txt", "--vocab-size", 280, "--out", folder / "ready"
    cli.main([str(word) for word in words])
    return folder / "ready"


@pytest.mark.parametrize("quiet", [False, True])
def test_a_quiet_run_writes_its_metrics(ready, tmp_path, capfd, monkeypatch, quiet):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    small = "--preset tiny --batch-size 4 --eval-batches 1 --num-layers 1 --max-seq-len 16".split()
    words = ["train", *small, "--data", str(ready), "--out", str(tmp_path / "run"), "--steps", "2"]
    cli.main([*words, *["--quiet"] * quiet])
    out, err = capfd.readouterr()
    assert (out == err == "") == quiet and ("epochs " in out) != quiet
    assert len(read_metrics(tmp_path / "run")) == 2


def test_quiet_ranks(ready, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    small = "--preset tiny --batch-size 4 --eval-batches 1 --num-layers 1 --max-seq-len 16".split()
    words = ["train", *small, "--data", str(ready), "--out", str(tmp_path / "run"), "--steps", "1"]
    cli.main([*words, "--tp", "2", "--quiet"])
    assert capfd.readouterr() == ("", "") and len(read_metrics(tmp_path / "run")) == 1
