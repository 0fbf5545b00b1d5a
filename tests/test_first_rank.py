"What ranks tell each other: words of one for all, and a meeting without a collective."

import sys
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_edu import first_rank
from megatron_edu.first_rank import Meeting, any_text, share_text


def texts(own):
    rank = dist.get_rank()
    return any_text(own[rank], dist.group.WORLD), share_text(own[rank], dist.group.WORLD)


@pytest.mark.parametrize("own", [["", "", ""], ["", "b", "c"], ["a", "", ""], ["", "", "é" * 600]])
def test_the_first_text_is_everyones(cpu_ranks, own):
    first = next(filter(None, own), "")
    for found, shared in cpu_ranks(3)(texts, own):
        assert found == first.encode()[:1000].decode(errors="ignore") and shared == own[0]


def test_alone_a_text_is_ones_own():
    assert any_text("x", None) == "x" and any_text("", None) == ""
    meeting = Meeting("alone")
    meeting.say("topic", "")
    assert meeting.hear("topic", [0]) == [""]


def meet(name, late=None):
    "What this rank hears of all, and says meanwhile; a late one waits for two notices of each."
    meeting, lines = Meeting(name), []

    def write(text):
        lines.append(text)
        if "".join(lines).count("\n") == 2:
            meeting.say("noticed")

    if meeting.rank == late:
        meeting.hear("noticed", [rank for rank in range(meeting.size) if rank != late])
    meeting.say("ready", f"{name} {meeting.rank}")
    note = mock.Mock(write=write)
    with mock.patch.object(first_rank, "PATIENCE", 0.1), mock.patch.object(sys, "stderr", note):
        heard = meeting.hear("ready", range(meeting.size))
    return heard, "".join(lines)


def test_a_late_rank_is_named_and_waited_for(cpu_ranks):
    answers = cpu_ranks(3)(meet, "late", 1)
    assert all(heard == ["late 0", "late 1", "late 2"] for heard, _ in answers)
    for rank in (0, 2):
        said = [line for line in answers[rank][1].splitlines() if "for rank 1 (ready)" in line]
        assert len(said) >= 2
        assert all(line.startswith(f"rank {rank} has waited ") for line in said)


def second(name):
    "Whether what this rank said in another meeting is heard in this one."
    Meeting(f"{name} before").say("ready", "early")
    meeting = Meeting(name)
    return meeting.store.check([f"ready/{meeting.rank}"])


def test_meetings_of_two_names_do_not_mix(cpu_ranks):
    assert cpu_ranks(2)(second, "second") == [False, False]


def test_no_collective_is_made(cpu_ranks):
    def quiet():
        from megatron_edu.comm import Ledger

        with Ledger() as ledger:
            meet("quiet")
        return len(ledger.records)

    assert cpu_ranks(2)(quiet) == [0, 0]
