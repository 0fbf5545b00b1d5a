"`megatron-edu break`: every mistake by its name, what is printed of it, and the lessons it names."

import io
import sys
from pathlib import Path

import pytest

from megatron_edu import cli
from megatron_edu.cli import breaking
from megatron_edu.cli.breaking import examine_on_rank, find_mutant, listing, summary, table
from megatron_edu.cli.paint import paint
from megatron_edu.course.mutants import LESSONS, Mutant, Verdict
from megatron_edu.course.mutants_bert import BERT_MUTANTS
from megatron_edu.course.mutants_gpt2 import MUTANTS
from megatron_edu.testing import Report

EVERY = MUTANTS | BERT_MUTANTS
ROOT = Path(__file__).resolve().parents[2]
GREEN, RED = Report(0, 1e-16, 1e-16, 0), Report(0, 0.2, 0.3, 0.7)


@pytest.fixture
def here(cpu_ranks, monkeypatch):
    "Ranks that are there already."

    class Kept:
        def __init__(self, size):
            self.world = cpu_ranks(size)

        def __enter__(self):
            return self.world

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(breaking, "Ranks", Kept)


@pytest.mark.parametrize(
    "name",
    [
        "no_f",
        "row_bias_everywhere",
        "logits_by_the_embedding",
        "token_bias_summed",
        "mean_of_means",
    ],
)
def test_a_mistake_is_made_and_told(here, capsys, name):
    cli.main(["break", name])
    text, mutant = capsys.readouterr().out, EVERY[name]
    for said in (mutant.mistake, mutant.rule, mutant.target, *mutant.lesson):
        assert said in text
    assert f"{2 * mutant.dp} ranks (tp=2" in text and "\x1b" not in text
    rows = [line for line in text.splitlines() if line.endswith(("green", "red"))]
    assert len(rows) == 7 and all(row.split().count("green") >= 1 for row in rows)
    assert any(row.endswith("red") for row in rows)


def test_what_is_said_of_no_f(here, capsys):
    cli.main(["break", "no_f"])
    assert "\nloss bit-identical, gradients wrong, norm wrong\n" in capsys.readouterr().out


def all_verdicts(names, kind):
    "Of the code as it is, and with each mistake, in one world."
    dp = EVERY[names[0]].dp
    return examine_on_rank(kind, dp), {
        n: examine_on_rank(kind, dp, EVERY[n], **EVERY[n].changes) for n in names
    }


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("kind, mutants", [("gpt2", MUTANTS), ("bert", BERT_MUTANTS)])
def test_every_mistake_is_seen_by_its_name(cpu_ranks, kind, mutants, dp):
    names = [name for name in mutants if mutants[name].dp == dp]
    right, verdicts = cpu_ranks(2 * dp)(all_verdicts, names, kind)[0]
    assert right.red == [] and list(verdicts) == names
    for name, wrong in verdicts.items():
        identical = wrong.loss == right.loss and "loss" not in wrong.red
        assert wrong.red and ("bit-identical" in summary(right, wrong)) == identical, name


def test_the_list_has_every_name_and_mistake_once(capsys):
    cli.main(["break"])
    lines = capsys.readouterr().out.splitlines()
    listed = [line.strip() for line in lines if line.startswith("  ")]
    assert sorted(line.split()[0] for line in listed) == sorted(EVERY)
    assert all(line.endswith(EVERY[line.split()[0]].mistake) for line in listed)
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    "name, near",
    [
        ("no_ff", "no_f"),
        ("row-bias-everywhere", "row_bias_everywhere"),
        ("sop_summed", None),
        ("42", None),
    ],
)
def test_an_unknown_mistake(capsys, name, near):
    with pytest.raises(SystemExit) as end:
        cli.main(["break", name])
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.count("\n") == 1 and repr(name) in text
    assert near is None or f"nearest is {near};" in text


@pytest.mark.parametrize("right, wrong", [(GREEN, GREEN), (RED, RED)])
def test_checks_that_tell_no_difference_are_a_verdict(monkeypatch, capsys, right, wrong):
    class Silent:
        def __init__(self, size):
            pass

        def __enter__(self):
            return lambda fn, kind, dp, mutant: [Verdict(wrong if mutant else right, 1.0, ())]

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(breaking, "Ranks", Silent)
    with pytest.raises(SystemExit) as end:
        cli.main(["break", "no_f"])
    assert end.value.code == 3


@pytest.mark.parametrize(
    "report, loss, others, said",
    [
        (
            GREEN,
            1.0,
            ("masks",),
            "loss bit-identical, gradients right, norm right, dropout masks wrong",
        ),
        (GREEN, 1.0 + 1e-15, (), "loss right, gradients right, norm right"),
        (
            Report(0, 0.1, 0, 0),
            1.0,
            (),
            "loss bit-identical, gradients of sharded parameters wrong, norm right",
        ),
        (
            Report(1, 0, 0.1, 1),
            2.0,
            (),
            "loss wrong, gradients of replicated parameters wrong, norm wrong",
        ),
    ],
)
def test_a_summary(report, loss, others, said):
    assert summary(Verdict(GREEN, 1.0, ()), Verdict(report, loss, others)) == said


@pytest.mark.parametrize("name", EVERY)
def test_the_lesson_of_a_mistake_exists(name):
    lesson, section = EVERY[name].lesson
    assert (ROOT / lesson).is_file() and section.startswith(("section", "appendix"))


def test_the_nearest_entry_decides_the_lesson():
    def lesson(target):
        return Mutant("", "", "", target, print).lesson

    assert lesson("models.attention.sharded_randomness") == LESSONS["tensor_parallel.random"]
    assert lesson("models.attention.ColumnParallelLinear") == LESSONS["models.attention"]
    used = {EVERY[name].lesson for name in EVERY}
    assert used == set(LESSONS.values())


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "term, no_color, colored", [("xterm", "", True), ("xterm", "1", False), ("dumb", "", False)]
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, term, no_color, colored):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert (paint("x", "red") == "\x1b[31mx\x1b[0m") == colored
    both = table([Verdict(GREEN, 1.0, ()), Verdict(RED, 1.0, ())])
    assert both.count("\x1b[31m") == (3 if colored else 0)
    assert both.count("\x1b[32m") == (11 if colored else 0)


def test_names_are_what_users_type():
    assert {"no_f", "no_g", "row_bias_everywhere"} <= set(MUTANTS)
    assert all(name.isidentifier() and name == name.lower() for name in EVERY)
    assert find_mutant("no_f").mistake in listing()
