"Ranks of one command and of torchrun: they meet, they end together, and no port is open to others."

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from limits import FOREVER, HANG, wait_for

from megatron_edu.cli import train as train_verb
from megatron_edu.cli.parse import parse
from megatron_edu.comm import all_reduce, broadcast
from megatron_edu.data.token_writer import TokenFileWriter
from megatron_edu.errors import Stopped
from megatron_edu.mesh import ParallelDims
from megatron_edu.models import gpt2
from megatron_edu.models.block import Block
from megatron_edu.ranks import RankError
from megatron_edu.training import launch as launch_module
from megatron_edu.training.checkpoint import latest_checkpoint
from megatron_edu.training.journal import read_metrics
from megatron_edu.training.launch import choose_backend, launch

LISTENING = "0A"        # state of a socket in /proc/net/tcp
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def listening(pid: int) -> list[str]:
    "Addresses, in hex, at which a process waits for others."
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:
            pass
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                found.append(fields[1].split(":")[0])
    return found


def alive(pid: int) -> bool:
    "Whether a process runs; one that ended and waits for its parent does not."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def look_around(groups, device, factor):
    "What this rank sees; all ranks' views come together on rank 0."
    group = groups.tp_group or groups.dp_group
    total = torch.ones(()) * (dist.get_rank() + 1)
    dist.all_reduce(total, group=group)
    view = {
        "rank": dist.get_rank(),
        "total": factor * total.item(),
        "device": str(device),
        "backend": dist.get_backend(),
        "listening": listening(os.getpid()),
        "launcher": listening(os.getppid()),
        "parent": os.getppid(),
    }
    views = [None] * dist.get_world_size()
    dist.all_gather_object(views, view)
    return views


@pytest.fixture
def gloo(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_the_ear_of_this_test_hears():
    with socket.create_server(("0.0.0.0", 0)) as server:
        assert server and "00000000" in listening(os.getpid())
    with socket.create_server(("127.0.0.1", 0)):
        assert LOOPBACK[0] in listening(os.getpid())


@pytest.mark.world(2)
def test_ranks_meet_and_nobody_listens_beyond_this_machine(gloo):
    said = []
    before, handler = listening(os.getpid()), signal.getsignal(signal.SIGTERM)
    views = launch(look_around, ParallelDims(tp=2), 10, say=said.append)
    assert [view["rank"] for view in views] == [0, 1]
    assert [view["total"] for view in views] == [30, 30]
    assert {view["backend"] for view in views} == {"gloo"}
    assert {view["parent"] for view in views} == {os.getpid()}
    for view in views:
        assert view["listening"], "gloo waits at a port of the loopback device"
        assert set(view["listening"]) <= set(LOOPBACK)
        assert view["launcher"] == before
    assert said == ["2 ranks (tp=2, dp=1), backend gloo: no GPU here: on the CPU"]
    assert signal.getsignal(signal.SIGTERM) is handler


def one_rank(groups, device):
    return groups.tp_group, groups.dp_group, dist.is_initialized(), str(device)


def test_one_rank_is_this_process(gloo):
    said = []
    assert launch(one_rank, ParallelDims(), say=said.append) == (None, None, False, "cpu")
    assert said == ["1 rank, no communication, device cpu"]


@pytest.mark.parametrize(
    ("gpus", "ranks_here", "backend", "reason"),
    [(0, 2, "gloo", "no GPU"), (1, 2, "gloo", "1 GPUs for 2 ranks"), (2, 2, "nccl", "2 GPUs")],
)
def test_the_backend_and_its_reason(monkeypatch, gpus, ranks_here, backend, reason):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert choose_backend(ranks_here)[0] == backend
    assert reason in choose_backend(ranks_here)[1]


def fail_on_one(groups, device, error):
    "Rank 1 fails; the others wait for it."
    if dist.get_rank() == 1:
        if error is None:
            ParallelDims(tp=0)      # refused by this package
        raise error
    dist.all_reduce(torch.ones(()))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (None, "ValueError: tp=0: an axis has at least 1 rank; pass tp>=1"),
        (OSError(28, "No space left on device"), "OSError: No space left on device"),
        (KeyError("no such key"), "KeyError: 'no such key'"),
    ],
)
def test_one_failing_rank_ends_all_and_is_reported_once(gloo, capfd, error, line):
    with pytest.raises(RankError) as caught:
        launch(fail_on_one, ParallelDims(dp=2), error)
    assert caught.value.rank == 1 and caught.value.message == f"rank 1 failed: {line}"
    unforeseen = isinstance(error, KeyError)
    assert ("in fail_on_one" in caught.value.trace) == unforeseen == bool(caught.value.trace)
    assert capfd.readouterr().err == ""


def kill_one(groups, device, folder):
    "Rank 1 is killed in the middle of a run."
    (folder / str(dist.get_rank())).write_text(str(os.getpid()))
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(()))


def test_a_killed_rank_is_reported_and_nobody_is_left(gloo, tmp_path):
    with pytest.raises(RankError, match="rank 1 of 2 died: SIGKILL; the system does") as caught:
        launch(kill_one, ParallelDims(dp=2), tmp_path)
    assert caught.value.rank == 1
    pids = [int((tmp_path / rank).read_text()) for rank in ("0", "1")]
    assert not any(map(alive, pids))


def through_ddp(group):
    replicas = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3), process_group=group)
    stop_rank_1()
    replicas(torch.ones(2, 3)).sum().backward()


def through_memory(group):
    all_reduce(torch.ones(4), group)
    stop_rank_1()
    all_reduce(torch.ones(5), group)


def through_gloo(group):
    stop_rank_1()
    broadcast(torch.ones(6), group)


def no_collective(group):
    "Rank 1 is busy with something else."
    if dist.get_rank() == 1:
        time.sleep(FOREVER)
    all_reduce(torch.ones(7), group)


def stop_rank_1():
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def late(groups, device, waits):
    waits(groups.dp_group)


@pytest.mark.parametrize(
    ("waits", "collective", "condition"),
    [
        (through_memory, r"all_reduce of \(5,\) float32 over dp", "its process is stopped"),
        (through_gloo, r"broadcast of \(6,\) float32 over dp", "its process is stopped"),
        (through_ddp, "collective [0-9]+ over dp, one of PyTorch's own", "its process is stopped"),
        (no_collective, r"all_reduce of \(7,\) float32 over dp", "it is busy"),
    ],
)
def test_a_late_rank_and_its_collective_are_named(
    gloo, monkeypatch, capfd, waits, collective, condition
):
    "First in a line, and at the limit in the error that ends all ranks."
    monkeypatch.setenv("MEGATRON_EDU_NOTICE", "2")
    monkeypatch.setenv("MEGATRON_EDU_TIMEOUT", "8")
    words = f"rank 1 has not joined {collective}, in which rank 0 has waited for"
    with pytest.raises(RankError, match=f"^{words} 8 s: {condition}.*ranks were ended$") as caught:
        launch(late, ParallelDims(dp=2), waits)
    assert caught.value.rank == 1 and caught.value.trace == ""
    lines = capfd.readouterr().err.splitlines()
    assert any(re.match(f"{words} 2 s: {condition}.*; at 8 s all ranks end$", x) for x in lines)
    assert all(line.startswith("rank 1 has ") for line in lines)


def stopped_for_a_while(groups, device):
    "Rank 0 wakes rank 1 when the line about it has been printed."
    pids = [None] * 2
    dist.all_gather_object(pids, os.getpid())
    if dist.get_rank() == 0:
        threading.Timer(6, os.kill, (pids[1], signal.SIGCONT)).start()
    stop_rank_1()
    return all_reduce(torch.ones(()), groups.dp_group).item()


def test_a_run_goes_on_when_a_late_rank_comes(gloo, monkeypatch, capfd):
    monkeypatch.setenv("MEGATRON_EDU_NOTICE", "2")
    assert launch(stopped_for_a_while, ParallelDims(dp=2)) == 2
    assert "rank 1 has not joined all_reduce of () float32 over dp" in capfd.readouterr().err


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(sys.path),    # the package that is tested, and these tests
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}

TRAIN = """
import sys
from pathlib import Path
import test_launch
sys.exit(test_launch.in_one_line(test_launch.launch_training, Path(sys.argv[1])))
"""


def in_one_line(function, *args) -> int:
    "Status of a command, which says why it ended early."
    try:
        function(*args)
        return 0
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except RankError as error:
        print(error, file=sys.stderr)
        return 2


OWN = str(Path(launch_module.__file__).parents[1])     # the package


def way_to_a_block(groups, device, plan) -> list[str]:
    "Own functions on a rank's stack, outermost first, where a step reaches its first block."
    ways = []

    class Watched(Block):
        def forward(self, *args):
            if torch.is_grad_enabled() and not ways:    # before the first step comes a validation
                frame, names = sys._getframe(), []
                while frame is not None:
                    own = frame.f_code.co_filename.startswith(OWN)
                    names += [frame.f_code.co_name] * own
                    frame = frame.f_back
                ways.append(names[::-1])
            return super().forward(*args)

    gpt2.Block = Watched
    train_verb.train_on_rank(groups, device, plan)
    return ways[0]


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2)])
def test_the_way_from_a_ranks_entry_to_its_first_block(tmp_path, tp, dp, record_property):
    "Counted for the record; what is tested is that it was seen whole."
    with TokenFileWriter(tmp_path / "tokens", 90) as writer:
        for _ in range(10):
            writer.append(list(range(90)))
            writer.end_document()
    line = f"--data {tmp_path}/tokens --out {tmp_path}/run --steps 1 --tp {tp} --dp {dp}"
    words = ["--preset", "tiny", "--vocab-size", "96", *line.split()]
    plan = train_verb.make_plan(parse("train", words))
    names = [*launch(way_to_a_block, plan.config.parallel, plan), "forward"]
    record_property("own frames from a rank's entry to the first block", len(names))
    print(len(names), "own frames:", " > ".join(names))
    assert names[0] == "_run" and "train_step" in names


def launch_training(folder):
    "A run of two ranks that nobody waits to the end of."
    import test_loop

    config = test_loop.plan(folder / "run", tp=2, steps=10**6, save_every=10**6)
    launch(train_on_rank, config.parallel, config, folder / "tokens")


def train_on_rank(groups, device, config, prefix):
    import test_loop

    (config.run.out.parent / f"pid{dist.get_rank()}").write_text(str(os.getpid()))
    test_loop.train(config, test_loop.TokenFile(prefix), groups, device)


@pytest.fixture
def training(tmp_path):
    "A run of two ranks in processes of its own, whose step no one has seen yet."
    import test_loop

    with test_loop.TokenFileWriter(tmp_path / "tokens", 90) as writer:
        for _ in range(10):
            writer.append(list(range(90)))
            writer.end_document()
    with started(tmp_path, TRAIN, tmp_path) as process:
        test_loop.wait_for_steps(tmp_path / "run", 2, process)
        yield process
    assert not any(alive(int((tmp_path / f"pid{rank}").read_text())) for rank in (0, 1))


@contextlib.contextmanager
def started(folder, text, *args, command=(sys.executable,), **variables):
    "A script in a session of its own, of which nothing is left afterwards."
    script = folder / "go.py"
    script.write_text(text)
    process = subprocess.Popen(
        [*command, str(script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | variables,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("receiver", ["launcher", "all", "rank 1"])
def test_a_signal_saves_and_the_status_says_so(tmp_path, training, receiver, number):
    if receiver == "launcher":
        training.send_signal(number)
    elif receiver == "all":
        os.killpg(training.pid, number)     # as a terminal does
    else:
        os.kill(int((tmp_path / "pid1").read_text()), number)
    _, errors = training.communicate(timeout=HANG)
    step = read_metrics(tmp_path / "run")[-1]["step"]
    assert errors == f"stopped by {number.name} at step {step}; go on with --resume auto\n"
    assert training.returncode == 128 + number
    assert latest_checkpoint(tmp_path / "run").name == f"step-{step:08d}"


def test_ctrl_c_twice_ends_at_once(tmp_path, training):
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGSTOP)       # the step does not end
    training.send_signal(signal.SIGINT)
    for line in training.stdout:
        if line.startswith("stopping after the step in work"):
            break
    training.send_signal(signal.SIGINT)
    _, errors = training.communicate(timeout=HANG)
    assert errors == "stopped at once by a second SIGINT; what was not saved is lost\n"
    assert training.returncode == 130


HUP, INT, TERM = signal.SIGHUP, signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("asked", "twice"),
    [([INT], False), ([HUP, HUP], False), ([HUP, INT], False), ([INT, INT], True),
     ([TERM, HUP, INT], True)],
)
def test_a_second_hangup_of_a_terminal_is_no_second_request(asked, twice):
    crew = launch_module._Crew(ParallelDims(dp=2), 60, print)
    crew.asked = asked
    assert crew.asked_twice() == twice


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.0, 1.0, 2.5])
def test_a_signal_while_ranks_start_ends_in_one_line(tmp_path, number, delay):
    with started(tmp_path, START) as process:
        assert process.stdout.readline().startswith("2 ranks")
        time.sleep(delay)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=HANG)
    assert len(errors.splitlines()) == 1 and errors.startswith(f"stopped by {number.name}")
    assert process.returncode == 128 + number


@pytest.mark.parametrize("attempt", range(4))      # the second one must hit an instant
def test_a_rank_that_is_asked_again_on_its_way_out_says_nothing(tmp_path, attempt):
    "As when a terminal asks all, and the launcher passes it on: whenever the second one comes."
    with started(tmp_path, START.replace("sleep_long", "asked_all_the_time")) as process:
        _, errors = process.communicate(timeout=HANG)
    assert errors.splitlines() == ["stopped by SIGINT; nothing was to be saved"]
    assert process.returncode == 128 + signal.SIGINT


ASK = """
import os, signal, sys
rank = int(sys.argv[1])
try:
    while os.getppid() == rank:
        os.kill(rank, signal.SIGINT)
except ProcessLookupError:      # gone and reaped since the question: what this waits for
    pass
"""


def asked_all_the_time(groups, device):
    "A rank that another process goes on asking to stop until it is gone."
    subprocess.Popen([sys.executable, "-c", ASK, str(os.getpid())])
    time.sleep(FOREVER)


START = """
import sys
import test_launch
from megatron_edu.mesh import ParallelDims
run = test_launch.launch, test_launch.sleep_long, ParallelDims(dp=2)
sys.exit(test_launch.in_one_line(*run))
"""


def sleep_long(groups, device):
    time.sleep(FOREVER)


@pytest.mark.parametrize("delay", [0.3, 1.0, 2.5])
def test_no_rank_outlives_a_launcher_killed_while_they_start(tmp_path, delay):
    with started(tmp_path, START) as process:
        assert process.stdout.readline().startswith("2 ranks")
        time.sleep(delay)
        process.kill()
        process.communicate(timeout=HANG)   # until the last one that can write there has ended


JOIN = """
import os
import sys
import test_launch
from megatron_edu.mesh import ParallelDims
test_launch.torch.cuda.device_count = lambda: 8 * int(os.environ["RANK"])   # none on rank 0
for view in test_launch.launch(test_launch.look_around, ParallelDims(dp=2), 10):
    sys.stdout.write(f"view {view['rank']} {view['total']}\\n")     # one write: two ranks share it
"""


def torchrun(folder) -> list[str]:
    "How two ranks are started, so that they meet in a file."
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", str(folder / "meet")]
    return command + ["--rdzv-conf", "store_type=file", "--local-addr", "127.0.0.1"]


def test_ranks_of_torchrun_join(tmp_path):
    with started(tmp_path, JOIN, command=torchrun(tmp_path)) as process:
        printed, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors
    lines = sorted(line for line in printed.splitlines() if line.startswith("view"))
    assert [line.split() for line in lines] == [["view", r, "30.0"] for r in "0011"]
    assert printed.count("2 ranks of torchrun (tp=1, dp=2), backend gloo") == 1


JOIN_AND_FAIL = """
import sys
import test_launch
from megatron_edu.mesh import ParallelDims
try:
    test_launch.launch(test_launch.fail_under_torchrun, ParallelDims(dp=2), sys.argv[1])
except BaseException as error:
    if error.speaks:
        print("ENDED", error, file=sys.stderr, flush=True)
    sys.exit(2)
"""


def fail_under_torchrun(groups, device, how):
    all_reduce(torch.ones(()), groups.dp_group)
    if how == "both":
        raise ValueError("the same on each")
    if dist.get_rank() == 1 and how == "one":
        dist.all_reduce(torch.ones(()), async_op=True)      # a tidy end would wait for rank 0
        raise ValueError("on one alone")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with launch_module.handled(signal.SIG_IGN):     # as a step in work takes a request to stop
        all_reduce(torch.ones(()), groups.dp_group)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("both", "ENDED the same on each"),
        ("one", "ENDED on one alone"),
        ("killed", "ranks [1] died; all ranks end"),
    ],
)
def test_under_torchrun_one_rank_speaks_once_and_nobody_waits(tmp_path, how, line):
    with started(tmp_path, JOIN_AND_FAIL, how, command=torchrun(tmp_path)) as process:
        _, errors = process.communicate(timeout=HANG)
    said = [each for each in errors.splitlines() if "ENDED" in each or each.startswith("ranks")]
    assert said == [line] and process.returncode != 0


@pytest.mark.parametrize("gpus", [(8, 0), (0, 8), (1, 8), (8, 8)])
def test_machines_with_different_gpus_agree_on_the_backend(monkeypatch, gpus):
    "Two machines of two ranks; each thread is a rank."
    counts = {0: gpus[0], 1: gpus[0], 2: gpus[1], 3: gpus[1]}
    own = threading.local()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: counts[own.rank])
    store = dist.HashStore()

    def agree(rank):
        own.rank = rank
        return launch_module._agree(store, rank, 4, 2)

    with ThreadPoolExecutor(4) as pool:
        agreed = list(pool.map(agree, range(4)))
    assert len(set(agreed)) == 1
    assert agreed[0][0] == ("nccl" if min(gpus) >= 2 else "gloo")


def test_a_process_that_has_ended_is_not_there():
    "Nor one that its parent has not asked for yet: torchrun asks late."
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        wait_for(lambda: not alive(ended.pid), "its end")
        assert launch_module.exists(os.getpid()) and not launch_module.exists(ended.pid)
    assert not launch_module.exists(ended.pid)


def test_the_limit_of_a_collective_leaves_time_to_save(monkeypatch):
    monkeypatch.delenv("MEGATRON_EDU_TIMEOUT", raising=False)
    assert launch_module.patience() >= 300
