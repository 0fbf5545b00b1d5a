"Who is late: boards written by hand, and a clock that does not run by itself."

import os
from types import SimpleNamespace

import pytest

from megatron_edu import watch
from megatron_edu.watch import Board, Doing, Lookout, Place, notice, patience

WORLD, LEFT, RIGHT = "world 0 0,1,2,3", "tp 1 0,1", "tp 1 2,3"
ACROSS, BESIDE = "dp 2 0,2", "dp 2 1,3"


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watch.time, "monotonic", clock)
    return clock


def watched(clock, numbers, silent=(), states=(), inside=(), first=0, seconds=100):
    "Look at ranks that have begun these collectives, for a while in which nothing goes on."
    board = Board.make(len(numbers))
    lookout, found = Lookout(board, first), []
    for beat in range(seconds):
        for rank, groups in enumerate(numbers):
            state = dict(states).get(rank, "running")
            pulse = 0 if rank in silent else beat
            what = dict(inside).get(rank, "")
            place = Place(rank, os.getpid(), state, pulse, what, what, dict(groups))
            board.write(place)
        clock.now += 1
        found.append(lookout.look())
    return found


EVEN = [{WORLD: 9}] * 4
CASES = {
    "all go on alike": (EVEN, {}, None),
    "one is behind": (
        [{WORLD: 9}, {WORLD: 9}, {WORLD: 8}, {WORLD: 9}],
        {},
        "rank 2 has not joined",
    ),
    "the cause of a chain": (
        [
            {LEFT: 5, ACROSS: 3, WORLD: 1},
            {LEFT: 4, BESIDE: 3, WORLD: 1},
            {RIGHT: 5, ACROSS: 3, WORLD: 1},
            {RIGHT: 4, BESIDE: 2, WORLD: 1},
        ],
        {},
        "rank 3 has not joined collective 3 over dp",
    ),
    "a group that it has not made yet": (
        [{WORLD: 9, LEFT: 1}, {WORLD: 9}, {WORLD: 9}, {WORLD: 9}],
        {},
        "rank 1 has not joined collective 1 over tp",
    ),
    "one is silent, all numbers alike": (
        EVEN,
        {"silent": [1]},
        "rank 1 has kept the others waiting for 60 s: its process gives no sign of life",
    ),
    "one is silent, another behind it": (
        [{WORLD: 9}, {WORLD: 8}, {WORLD: 9}, {WORLD: 8}],
        {"silent": [3]},
        "rank 3 has not joined collective 9 over world",
    ),
    "one has returned": (
        [{WORLD: 9}, {WORLD: 8}, {WORLD: 9}, {WORLD: 9}],
        {"states": [(1, "done")]},
        "it has returned",
    ),
    "all are silent": (EVEN, {"silent": range(4)}, None),
    "all have ended": ([{WORLD: 9}, {WORLD: 8}], {"states": [(0, "done"), (1, "done")]}, None),
    "what it is missing from": (
        [{WORLD: 9}, {WORLD: 8}],
        {"inside": [(0, "all_gather of (3,) float32 over world")]},
        "rank 1 has not joined all_gather of (3,) float32 over world, in which rank 0 has waited",
    ),
    "a collective of another group": (
        [{WORLD: 9}, {WORLD: 8}],
        {"inside": [(0, "all_gather of (3,) float32 over tp")]},
        "collective 9 over world, one of PyTorch's own",
    ),
    "the ranks of the second machine": (
        [{WORLD: 9}, {WORLD: 8}],
        {"first": 2},
        "rank 3 has not joined collective 9 over world, one of PyTorch's own, in which rank 2",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_cause_is_named_once(clock, case):
    numbers, more, words = CASES[case]
    lines = [line for line in watched(clock, numbers, **more) if line is not None]
    assert len(lines) == (words is not None)
    assert words is None or words in lines[0]


def test_nothing_is_said_before_the_minute(clock):
    lines = watched(clock, [{WORLD: 9}, {WORLD: 8}])
    assert lines.index(next(line for line in lines if line)) in (60, 61)
    assert not any(watched(clock, [{WORLD: 9}, {WORLD: 8}], seconds=59))


def test_a_terminal_that_stopped_all_of_them_accuses_nobody(clock):
    board = Board.make(2)
    lookout = Lookout(board)

    def look(beats):
        for rank, beat in enumerate(beats):
            board.write(Place(rank, os.getpid(), "running", beat, groups={WORLD: 9}))
        clock.now += 1
        return lookout.look()

    assert not any(look((beat, beat)) for beat in range(90))
    clock.now += 3600  # Ctrl-Z, and an hour later fg; rank 0 is the first to move
    assert look((90, 89)) is None and look((91, 89)) is None


def test_a_place_half_written_is_not_read():
    board = Board.make(2)
    whole = Place(1, 7, "running", 3, "x", "y", {WORLD: 1})
    board.write(whole)
    assert board.read(1) == whole and board.read(0) == Place(0)
    board.memory[4096 + 20] ^= 1
    assert board.read(1) == Place(1)


def test_what_a_rank_does_is_noted_without_holding_its_group():
    group = SimpleNamespace(group_name="1", group_desc="mesh_tp")
    tensor = SimpleNamespace(shape=(2, 3), dtype="torch.float32")
    doing = Doing()
    assert doing.describe() == ""
    doing.begin("all_reduce", tensor, group)
    assert doing.inside and doing.describe() == "all_reduce of (2, 3) float32 over tp"
    assert group not in vars(doing).values() and group not in doing.last
    doing.end()
    assert not doing.inside and doing.begun["1"] == 1


@pytest.mark.parametrize(
    ("limit", "name"), [(notice, "MEGATRON_EDU_NOTICE"), (patience, "MEGATRON_EDU_TIMEOUT")]
)
def test_limits_come_from_the_environment(monkeypatch, limit, name):
    monkeypatch.delenv(name, raising=False)
    assert limit() == {"MEGATRON_EDU_NOTICE": 60, "MEGATRON_EDU_TIMEOUT": 600}[name]
    monkeypatch.setenv(name, "2.5")
    assert limit() == 2.5
    for wrong in ("a minute", "0", "-1", "nan", "inf"):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(ValueError, match=f"{name}={wrong}: not a number of seconds"):
            limit()
