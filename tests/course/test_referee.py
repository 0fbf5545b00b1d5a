"""The referee: right answers are green, wrong ones get their kind's hint, and none hurts it."""

import pytest
import torch
from course.puzzle_files import NAMES, answers, emptied, run, solution, wrong_file

from megatron_edu.course.puzzles import PUZZLES
from megatron_edu.course.referee import SIZES, examine, judge
from megatron_edu.ranks import Ranks

SHORT = 4.0     # seconds that a rank waits in vain
WRONG = [(name, at) for name in NAMES for at in range(len(wrong_file(name)["WRONG"]))]


def test_every_puzzle_has_its_files():
    assert NAMES == sorted(PUZZLES)
    for name in NAMES:
        kinds = [kind for kind, *_ in wrong_file(name)["WRONG"]]
        assert len(kinds) >= 3 and "right" not in kinds


@pytest.mark.parametrize("name", NAMES)
def test_a_right_answer_is_green(cpu_ranks, name):
    verdict = examine(name, *answers(solution(name)), world=cpu_ranks)
    assert verdict.kind == "right", str(verdict)
    assert verdict.size == SIZES[-1] and verdict.report.passed and all(verdict.others.values())
    shown = str(verdict).splitlines()
    assert shown[0] == f"{name}: right, on 2 and on 4 ranks"
    assert len(shown) >= 6 and all(line.startswith("green") for line in shown[1:])


@pytest.mark.parametrize("name, at", WRONG)
def test_a_wrong_answer_gets_the_hint_of_its_kind(cpu_ranks, name, at):
    kind, *answer = wrong_file(name)["WRONG"][at]
    verdict = examine(name, *answer, world=cpu_ranks)
    assert verdict.kind == kind, str(verdict)
    assert str(verdict).splitlines()[-1] == f"hint: {verdict.hint}" and len(verdict.hint) > 20


def test_a_sum_that_is_left_unused_is_told_from_one_that_is_not_made(cpu_ranks):
    wrong = wrong_file("f")
    left, none = (
        examine("f", wrong[each], world=cpu_ranks) for each in ("leaves_the_sum", "no_sum")
    )
    assert left.kind == none.kind == "partial"
    assert "left unused" in left.hint and "left unused" not in none.hint


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_one_is_not_written_yet(name, capsys):
    judge(name, *answers(emptied(solution(name))))
    assert capsys.readouterr().out == f"{name}: not written yet\n"


def test_one_empty_method_is_enough():
    class half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, group):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            "Comes later."
            pass

    assert examine("f", half).kind == "unwritten"


def test_what_is_right_on_two_ranks_alone_is_caught(cpu_ranks):
    verdict = examine("f", wrong_file("f")["half_for_two"], world=cpu_ranks)
    assert (verdict.size, verdict.kind) == (4, "backward")
    assert str(verdict).startswith("f: right on 2 ranks, not right on 4\n")


CELL = """
lock = threading.Lock()
def one_rank_alone(x, weight, bias, group):
    y = x @ weight.t() + bias
    return y if group.rank() else all_reduce(y, group)

def another_collective(x, weight, bias, group):
    return all_gather(x, group) if group.rank() else all_reduce(x, group)

def one_rank_alone_backward(x, weight, bias, group):
    y = x @ weight.t() + bias
    if group.rank() == 0:
        y.register_hook(lambda dy: all_reduce(dy, group))
    return y

def raises(x, weight, bias, group):
    return x.no_such_thing

def raises_on_one_rank(x, weight, bias, group):
    if group.rank() == 1:
        raise SystemExit(3)
    return all_reduce(x, group)

def none_on_one_rank(x, weight, bias, group):
    if group.rank() == 0:
        return x @ weight.t() + bias

def a_number(x, weight, bias, group):
    return 3.0

def another_shape(x, weight, bias, group):
    return x

def another_type(x, weight, bias, group):
    return (x @ weight.t() + bias).float()

def changes_x(x, weight, bias, group):
    return x.mul_(2) @ weight.t() + bias

def never_ends(x, weight, bias, group):
    while True:
        pass

def dies(x, weight, bias, group):
    os._exit(7)

def takes_a_lock(x, weight, bias, group):
    with lock:
        return x
"""
KINDS = {
    "one_rank_alone": "waits",
    "another_collective": "waits",
    "one_rank_alone_backward": "waits",
    "raises": "raises",
    "raises_on_one_rank": "raises",
    "none_on_one_rank": "none",
    "a_number": "shape",
    "another_shape": "shape",
    "another_type": "shape",
    "changes_x": "in_place",
    "never_ends": "slow",
    "dies": "died",
    "takes_a_lock": "sent",
}


HEAD = "import os, threading\nfrom megatron_edu.comm import all_gather, all_reduce\n"


@pytest.fixture(scope="module")
def impatient_ranks():
    worlds = {size: Ranks(size, timeout=SHORT, threads=1) for size in SIZES}
    yield worlds.get
    for world in worlds.values():
        world.close()


@pytest.mark.parametrize("name", KINDS)
def test_whatever_stops_it_there_is_a_verdict(impatient_ranks, name):
    "And the ranks are there for the next answer."
    verdict = examine("column_linear", run(HEAD + CELL)[name], world=impatient_ranks)
    assert verdict.kind == KINDS[name], str(verdict)
    assert verdict.report is None and len(str(verdict).splitlines()) <= 3
    assert "Traceback" not in str(verdict) and str(verdict).startswith("column_linear: not right")
    assert examine("f", *answers(solution("f")), world=impatient_ranks).kind == "right"


def test_a_puzzle_that_does_not_exist():
    with pytest.raises(KeyError, match="there is no puzzle 'h'; there are f, g, pair"):
        examine("h", print)


@pytest.mark.parametrize("answer", [None, ..., 3])
def test_what_is_no_answer(answer):
    assert examine("f", answer).kind == "answer"


def test_it_judges_on_ranks_of_its_own(capsys):
    judge("g", *answers(solution("f")))
    shown = capsys.readouterr().out
    assert shown.startswith("g: not right on 2 ranks\n") and "the parts add up to it" in shown
