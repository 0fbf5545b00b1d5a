"What ranks tell each other: words of one for all, and a meeting without a collective."

import sys
import time
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


def meet(name, seconds):
    "What this rank hears of all, when the second one is late; and what is printed meanwhile."
    meeting, lines = Meeting(name), []
    if meeting.rank == 1:
        time.sleep(seconds)
    meeting.say("ready", f"{name} {meeting.rank}")
    note = mock.Mock(write=lines.append)
    with mock.patch.object(first_rank, "PATIENCE", 0.1), mock.patch.object(sys, "stderr", note):
        heard = meeting.hear("ready", range(meeting.size))
    return heard, "".join(lines)


def test_a_late_rank_is_named_and_waited_for(cpu_ranks):
    answers = cpu_ranks(3)(meet, "late", 0.5)
    assert all(heard == ["late 0", "late 1", "late 2"] for heard, _ in answers)
    for rank in (0, 2):
        said = answers[rank][1].splitlines()
        assert len(said) >= 2 and all("s for rank 1 (ready)" in line for line in said)
        assert said[0].startswith(f"rank {rank} has waited 0 s")
    assert answers[1][1] == ""


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
            meet("quiet", 0)
        return len(ledger.records)

    assert cpu_ranks(2)(quiet) == [0, 0]
