"""Worlds of processes: what they return, how they fail, and that nothing of them stays."""

import gc
import importlib
import linecache
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from limits import FOREVER, HANG, wait_for

from megatron_edu import ranks as ranks_module
from megatron_edu.comm import all_reduce, broadcast
from megatron_edu.machine import cpu_count
from megatron_edu.mesh import ParallelDims
from megatron_edu.ranks import RankError, Ranks

ROOT = Path(__file__).resolve().parents[1]


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def all_gone(pids: list[int]) -> bool:
    "No process of these numbers is left, now or soon."
    wait_for(lambda: not any(map(exists, pids)), f"the end of processes {pids}")
    return True


def sum_of_ranks() -> int:
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return total.item()


@pytest.fixture(scope="module")
def four():
    """One object for all cases: after each failure it must start new ranks.

    Its ranks may wait for each other longer than a test may last: a failure that is noticed only
    at the limit hangs here."""
    with Ranks(4, timeout=FOREVER, threads=1) as world:
        yield world


@pytest.fixture
def folder():
    "A new folder whose name is short, as the name of a socket in it has a limit of 104 characters."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        yield Path(name)


# What a call gives


def test_results_are_a_list_in_order_of_rank(four):
    def late_first(factor, plus=0):
        time.sleep(0.02 * (4 - dist.get_rank()))
        return factor * dist.get_rank() + plus

    assert four(late_first, 10, plus=1) == [1, 11, 21, 31]
    assert four(dist.get_world_size) == [4] * 4


def test_collectives_work_in_the_default_group(four):
    assert four(sum_of_ranks) == [6] * 4
    assert four(lambda: dist.group.WORLD.size()) == [4] * 4


@pytest.mark.parametrize("size", [1, 3, 5])
def test_any_number_of_ranks(size):
    with Ranks(size, threads=1) as world:
        assert world(sum_of_ranks) == [size * (size - 1) // 2] * size


def test_the_same_processes_serve_every_call(four):
    pids = four(os.getpid)
    assert four(os.getpid) == pids
    assert len({os.getpid(), *pids}) == 5


def test_functions_classes_and_tensors_travel_by_value(four):
    offset = torch.arange(3.0)

    class Shift:
        def __init__(self, by):
            self.by = by

        def __call__(self, x):
            return x + self.by + offset

    x = torch.zeros(3)
    for rank, result in enumerate(four(lambda: Shift(dist.get_rank())(x.add_(1)))):
        assert torch.equal(result, 1 + rank + torch.arange(3.0))
    assert torch.equal(x, torch.zeros(3))


def test_prints_come_labelled_in_order_of_rank(four, capsys):
    def greet():
        time.sleep(0.02 * (4 - dist.get_rank()))
        print("one")
        print("two", dist.get_rank())

    four(greet)
    expected = "".join(f"[rank {rank}] one\n[rank {rank}] two {rank}\n" for rank in range(4))
    assert capsys.readouterr().out == expected


def test_prints_of_a_call_that_fails_are_shown(four, capsys):
    def fail():
        print("before")
        raise ValueError("no")

    with pytest.raises(RankError):
        four(fail)
    assert capsys.readouterr().out == "".join(f"[rank {r}] before\n" for r in range(4))


# How a call fails


def divide():
    return 1 / (dist.get_rank() - 2)


def test_a_failure_is_one_traceback_with_its_rank(four, capfd):
    with pytest.raises(RankError) as caught:
        four(divide)
    message = str(caught.value)
    assert caught.value.rank == 2
    assert message.startswith("rank 2 of 4 failed:\nTraceback")
    assert message.count("Traceback") == message.count("ZeroDivisionError") == 1
    assert "return 1 / (dist.get_rank() - 2)" in message
    assert ", in _run" not in message
    assert capfd.readouterr().err == ""


def test_the_lowest_rank_is_named_when_all_fail(four):
    def fail():
        time.sleep(0.02 * (4 - dist.get_rank()))
        raise ValueError(f"from {dist.get_rank()}")

    with pytest.raises(RankError, match="ValueError: from 0") as caught:
        four(fail)
    assert caught.value.rank == 0


def test_a_failure_is_reported_while_the_others_wait_in_a_collective(four):
    def fail_on_3():
        if dist.get_rank() == 3:
            raise KeyError("lost")
        dist.barrier()

    with pytest.raises(RankError, match="KeyError: 'lost'") as caught:
        four(fail_on_3)
    assert caught.value.rank == 3


def test_a_source_line_of_a_notebook_cell_is_in_the_traceback(four):
    source = "def in_a_cell():\n    raise ValueError('here')\n"
    linecache.cache["/nowhere/cell_1.py"] = (len(source), None, source.splitlines(True), "")
    cell = {"__name__": "__main__"}
    exec(compile(source, "/nowhere/cell_1.py", "exec"), cell)
    with pytest.raises(RankError) as caught:
        four(cell["in_a_cell"])
    assert "    raise ValueError('here')\n" in str(caught.value)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_errors_that_end_a_program_are_reported_too(four, error):
    def leave():
        raise error()

    with pytest.raises(RankError, match=error.__name__):
        four(leave)


def test_a_result_that_cannot_travel_is_an_error_of_its_rank(four):
    with pytest.raises(RankError, match="pickle") as caught:
        four(lambda: threading.Lock() if dist.get_rank() == 1 else None)
    assert caught.value.rank == 1


def test_an_argument_that_cannot_travel_leaves_the_ranks_alone(four):
    pids = four(os.getpid)
    with pytest.raises(TypeError, match="pickle"):
        four(print, threading.Lock())
    assert four(os.getpid) == pids


def test_the_next_call_after_a_failure_has_new_ranks(four):
    before = four(os.getpid)
    with pytest.raises(RankError):
        four(divide)
    assert all_gone(before)
    assert four(sum_of_ranks) == [6] * 4
    assert not set(before) & set(four(os.getpid))


# A rank that skips a collective


def skip_on_1(make_group):
    group = make_group()
    if dist.get_rank() != 1:
        dist.all_reduce(torch.ones(1), group=group)


@pytest.mark.parametrize(
    "make_group",
    [
        pytest.param(lambda: dist.group.WORLD, id="all ranks"),
        pytest.param(lambda: dist.new_group([0, 1]), id="new_group"),
        pytest.param(lambda: ParallelDims(tp=2, dp=2).build().tp_group, id="mesh"),
    ],
)
def test_a_skipped_collective_ends_at_the_time_limit(make_group):
    with Ranks(4, timeout=2, threads=1) as world:
        pids = world(os.getpid)
        with pytest.raises(RankError) as caught:
            world(skip_on_1, make_group)
        assert caught.value.rank == 0
        assert "rank 0 waited in a collective that another rank did not join" in str(caught.value)
        assert "limit 2 s" in str(caught.value)
        assert str(caught.value).count("Traceback") == 1
        assert all_gone(pids)
        world.timeout = HANG
        assert world(sum_of_ranks) == [6] * 4


def test_ranks_may_meet_later_than_a_collective_may_wait(monkeypatch):
    process = multiprocessing.get_context("forkserver").Process
    start = process.start

    def start_late(rank):
        if rank.name == "rank 1":
            time.sleep(1)
        start(rank)

    def limit():
        options = dist.group.WORLD._get_backend(torch.device("cpu")).options
        return options._timeout.total_seconds()

    monkeypatch.setattr(process, "start", start_late)
    with Ranks(2, timeout=0.2, threads=1) as world:
        assert world(limit) == [0.2, 0.2]


def test_ranks_that_had_finished_are_named():
    with Ranks(3, timeout=2, threads=1) as world:
        with pytest.raises(RankError, match=r"ranks that had finished: \[1\]"):
            world(skip_on_1, lambda: dist.group.WORLD)


# A rank that dies


def die_on_2(then):
    if dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    then()


@pytest.mark.parametrize(
    "then",
    [
        pytest.param(lambda: dist.barrier(), id="collective"),
        pytest.param(lambda: time.sleep(FOREVER), id="sleep"),
    ],
)
def test_a_killed_rank_is_reported_without_a_limit_and_nothing_stays(four, then):
    pids = four(os.getpid)
    with pytest.raises(RankError, match="rank 2 of 4 died: SIGKILL") as caught:
        four(die_on_2, then)
    assert caught.value.rank == 2
    assert all_gone(pids)
    assert four(sum_of_ranks) == [6] * 4


def test_a_rank_killed_between_calls_is_reported_by_the_next(four):
    pids = four(os.getpid)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(RankError, match="rank 1 of 4 died: SIGKILL"):
        four(time.sleep, FOREVER)
    assert all_gone(pids)
    assert four(sum_of_ranks) == [6] * 4


def test_a_rank_that_exits_is_reported_with_its_code(four):
    with pytest.raises(RankError, match="rank 0 of 4 died: exit code 3"):
        four(os._exit, 3)


# The end


@pytest.mark.parametrize("how", ["close", "with", "forget"])
def test_the_ranks_end_with_their_object(how, folder, monkeypatch, four):
    four(os.getpid)  # the fork server is there, and its socket in the usual place
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    world = Ranks(2, threads=1)
    pids = world(os.getpid)
    assert all(map(exists, pids)) and list(folder.glob("megatron_edu_ranks_*"))
    if how == "close":
        world.close()
    elif how == "with":
        with world:
            pass
    else:
        del world
        gc.collect()
    assert all_gone(pids)
    assert not list(folder.glob("megatron_edu_ranks_*"))


def test_a_closed_world_starts_again(four):
    before = four(os.getpid)
    four.close()
    four.close()
    assert not set(before) & set(four(os.getpid))


def start_script(folder: Path, text: str, **variables: str) -> subprocess.Popen:
    "Run a plain script, without `__main__` guard, in a session of its own."
    header = "import os, sys, time\nfrom megatron_edu.ranks import Ranks\n"
    header += "print('top', flush=True)\n"
    (folder / "tmp").mkdir()
    script = folder / "script.py"
    script.write_text(header + textwrap.dedent(text))
    return subprocess.Popen(
        [sys.executable, script],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def nothing_stays(folder: Path, pids: list[int]) -> bool:
    "No process of a script, and no file of a world, now or soon: a rank may leave last."
    files = "tmp/megatron_edu_ranks_*"
    wait_for(lambda: not list(folder.glob(files)), f"the end of {files}")
    return all_gone(pids)


def first_lines(process: subprocess.Popen) -> list[int]:
    "Process numbers of the ranks, which a script prints in its second line."
    assert process.stdout.readline() == "top\n"
    return [int(pid) for pid in process.stdout.readline().split()]


PIDS = "ranks = Ranks(2)\nprint(*ranks(os.getpid), flush=True)\n"


@pytest.mark.parametrize(
    ("ending", "code", "traceback"),
    [
        ("", 0, ""),
        ("raise ValueError('stop')", 1, "ValueError: stop"),
        ("sys.exit(7)", 7, ""),
        ("os._exit(5)", 5, ""),
        ("ranks(lambda: 1 / 0)", 1, "RankError: rank 0 of 2 failed"),
    ],
    ids=["end", "raise", "sys.exit", "os._exit", "rank error"],
)
def test_a_script_without_guard_leaves_nothing(folder, ending, code, traceback):
    process = start_script(folder, PIDS + ending)
    pids = first_lines(process)
    rest, errors = process.communicate(timeout=HANG)
    assert process.returncode == code
    assert rest == ""
    assert errors.count(traceback) == 1 if traceback else errors == ""
    assert len(pids) == 2 and nothing_stays(folder, pids)


def test_ranks_end_when_their_parent_is_killed_even_if_they_are_busy(folder):
    text = f"""
        def busy():
            open(f"{folder}/busy{{os.getpid()}}", "w").close()
            while True:
                pass

        ranks(busy)
    """
    process = start_script(folder, PIDS + textwrap.dedent(text))
    pids = first_lines(process)
    wait_for(lambda: len(list(folder.glob("busy*"))) == 2, "two busy ranks")
    assert all(map(exists, pids))
    process.kill()
    process.communicate(timeout=HANG)
    assert nothing_stays(folder, pids)


def all_end(process: subprocess.Popen) -> bool:
    "Whether the script and all its family end: whoever lives holds the script's standard output."
    try:
        process.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return False
    return True


@pytest.mark.parametrize("delay", [0.05, 0.3, 0.8, 1.5])
def test_nobody_outlives_a_parent_killed_while_it_starts(folder, delay):
    process = start_script(folder, PIDS + f"time.sleep({FOREVER})")
    assert process.stdout.readline() == "top\n"
    time.sleep(delay)
    process.kill()
    assert all_end(process)
    assert nothing_stays(folder, [])


def test_a_rank_that_comes_late_ends_though_its_neighbour_has_swept_up(folder):
    text = """
        import multiprocessing, shutil, signal, tempfile
        from pathlib import Path

        Process = multiprocessing.get_context("forkserver").Process
        start = Process.start

        def start_and_sweep(process):
            start(process)
            for path in Path(tempfile.gettempdir()).glob("megatron_edu_ranks_*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if process.name == "rank 1":
                time.sleep(1.5)
                os.kill(os.getpid(), signal.SIGKILL)

        Process.start = start_and_sweep
    """
    process = start_script(folder, textwrap.dedent(text) + PIDS)
    assert all_end(process)
    assert process.returncode == -signal.SIGKILL
    assert nothing_stays(folder, [])


def test_ctrl_c_ends_the_ranks_and_the_object_stays_usable(folder):
    text = f"""
        def sleep():
            open(f"{folder}/asleep{{os.getpid()}}", "w").close()
            time.sleep({FOREVER})

        try:
            ranks(sleep)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        print(*ranks(os.getpid), flush=True)
    """
    process = start_script(folder, PIDS + textwrap.dedent(text))
    before = first_lines(process)
    wait_for(lambda: len(list(folder.glob("asleep*"))) == 2, "two ranks asleep")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the script and to its ranks
    rest, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0 and errors == ""
    interrupted, after = rest.splitlines()
    assert interrupted == "interrupted"
    assert not set(before) & set(after.split())
    assert nothing_stays(folder, before + [int(pid) for pid in after.split()])


def test_ctrl_c_between_calls_leaves_the_ranks_alone(folder):
    text = f"""
        try:
            print("in between", flush=True)
            time.sleep({FOREVER})
        except KeyboardInterrupt:
            print(*ranks(os.getpid), flush=True)
    """
    process = start_script(folder, PIDS + textwrap.dedent(text))
    before = first_lines(process)
    assert process.stdout.readline() == "in between\n"
    os.killpg(process.pid, signal.SIGINT)
    rest, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0 and errors == ""
    assert [int(pid) for pid in rest.split()] == before
    assert nothing_stays(folder, before)


# Side by side


def test_two_worlds_at_once():
    with Ranks(2, threads=1) as two, Ranks(3, threads=1) as three:
        for _ in range(3):
            assert two(sum_of_ranks) == [1] * 2
            assert three(sum_of_ranks) == [3] * 3
        assert not set(two(os.getpid)) & set(three(os.getpid))


def test_threads_may_each_have_a_world():
    main = sys.modules["__main__"]

    def one_world(size):
        with Ranks(size, threads=1) as world:
            return [world(sum_of_ranks) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(one_world, [2, 3, 2, 3]))
    assert results == [[[1] * 2] * 3, [[3] * 3] * 3] * 2
    assert sys.modules["__main__"] is main


def test_threads_may_share_a_world(four):
    def slow_echo(value):
        time.sleep(0.005)
        return value, sum_of_ranks()

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda value: four(slow_echo, value), range(12)))
    assert results == [[(value, 6)] * 4 for value in range(12)]


# Settings


def test_cores_are_shared_between_the_ranks():
    with Ranks(2) as world:
        assert world(torch.get_num_threads) == [max(1, cpu_count() // 2)] * 2
    with Ranks(2, threads=3) as world:
        assert world(torch.get_num_threads) == [3] * 2
    with Ranks(cpu_count() + 1) as world:
        assert set(world(torch.get_num_threads)) == {1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": 0}, ["Ranks(0)", "at least 1 rank", "size >= 1"]),
        ({"size": -2}, ["Ranks(-2)"]),
        ({"size": 2, "backend": "mpi"}, ["backend='mpi'", "'gloo' or 'nccl'"]),
        ({"size": 2, "timeout": 0}, ["timeout=0", "seconds > 0"]),
        ({"size": 2, "threads": 0}, ["threads=0", "at least 1"]),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError) as caught:
        Ranks(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_nccl_wants_a_gpu_a_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"needs 2 GPUs, one a rank, and finds 1; pass fewer"):
        Ranks(2, backend="nccl")


def test_a_network_device_chosen_for_a_cluster_does_not_matter(folder):
    text = PIDS + "import torch.distributed as dist\nranks(dist.barrier)"
    process = start_script(folder, text, GLOO_SOCKET_IFNAME="nowhere0")
    pids = first_lines(process)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0 and errors == ""
    assert all_gone(pids)


def listening_addresses() -> list[str]:
    "Addresses on which this process waits for connections (Linux): hexadecimal, from /proc."
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    mine = {link.split("[")[1].rstrip("]") for link in links if "socket:[" in link}
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else []:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in mine:  # 0A: listening
                found.append(fields[1].partition(":")[0])
    return found


if sys.platform == "linux":

    def test_ranks_listen_on_the_loopback_device_only(four):
        four(sum_of_ranks)
        addresses = four(listening_addresses)
        assert all(addresses)
        assert {address for each in addresses for address in each} == {"0100007F"}  # 127.0.0.1


def test_a_name_that_looks_like_a_submodule_travels(four):
    "`config` beside `dist` looks like torch.distributed.config, whose type no pickler takes."
    importlib.import_module("torch.distributed.config")

    here = {"__name__": "__main__", "dist": dist, "config": 10}
    exec("def number(): return dist.get_rank() + config", here)
    assert four(here["number"]) == [10, 11, 12, 13]


# A rank that is stopped


def stop_on_1(collective):
    "Rank 1 is stopped before it joins."
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    collective()


@pytest.mark.parametrize(
    ("collective", "words"),
    [
        pytest.param(
            lambda: all_reduce(torch.ones(3), dist.group.WORLD),
            r"all_reduce of \(3,\) float32 over world",
            id="shared memory",
        ),
        pytest.param(
            lambda: broadcast(torch.ones(3, 2), dist.group.WORLD),
            r"broadcast of \(3, 2\) float32 over world",
            id="gloo",
        ),
        pytest.param(lambda: dist.all_reduce(torch.ones(3)), "collective 2 over world", id="raw"),
    ],
)
def test_a_stopped_rank_and_its_collective_are_named(monkeypatch, capfd, collective, words):
    monkeypatch.setenv("MEGATRON_EDU_NOTICE", "1")
    with Ranks(3, timeout=4, threads=1) as world:
        with pytest.raises(RankError, match=f"Rank 1 has not joined {words}.*is stopped"):
            world(stop_on_1, collective)
        assert world(sum_of_ranks) == [3] * 3
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and re.match(f"rank 1 has not joined {words}.*kill -CONT", lines[0])


@pytest.mark.parametrize("value", ["soon", "0", "-3", "nan", "inf"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(monkeypatch, value):
    monkeypatch.setenv("MEGATRON_EDU_NOTICE", value)
    with pytest.raises(ValueError, match=f"MEGATRON_EDU_NOTICE={value}: not a number of seconds"):
        Ranks(2)


# Places for temporary files


def test_a_folder_with_a_long_name_is_no_hindrance(folder):
    deep = folder / ("x" * 90)
    deep.mkdir()
    text = PIDS + "import tempfile\nsys.stderr.write(tempfile.gettempdir())"    # as it was
    process = start_script(folder, text, TMPDIR=str(deep))
    pids = first_lines(process)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0 and errors == str(deep)
    assert all_gone(pids) and not list(deep.iterdir())


def test_without_a_folder_with_a_short_name_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + "x" * 90)
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(OSError, match="a name of 95 letters.*; set TMPDIR to a folder with a name"):
        ranks_module._make_room_for_sockets()


def test_a_folder_that_is_missing_is_no_hindrance(folder):
    process = start_script(folder, PIDS, TMPDIR=str(folder / "missing"))
    assert len(first_lines(process)) == 2
    assert process.communicate(timeout=HANG)[1] == ""


@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0, 2.0])
def test_ctrl_c_while_ranks_start_is_heard_by_the_script_alone(folder, delay):
    text = """
        try:
            ranks = Ranks(2)
            print(*ranks(os.getpid), flush=True)
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    process = start_script(folder, text)
    assert process.stdout.readline() == "top\n"
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=HANG)
    assert printed.splitlines()[-1:] == ["interrupted"] and errors == ""
    assert nothing_stays(folder, [])
