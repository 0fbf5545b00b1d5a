"Ranks of one command and of torchrun: they meet, they end together, and no port is open to others."

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from limits import FOREVER, HANG

from megatron_edu.mesh import ParallelDims
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
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in os.environ
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
        raise error
    dist.all_reduce(torch.ones(()))


@pytest.mark.parametrize(
    ("error", "trace"),
    [(ValueError("7 is no even number"), False), (KeyError("no such key"), True)],
)
def test_one_failing_rank_ends_all_and_is_reported_once(gloo, capfd, error, trace):
    with pytest.raises(RankError, match="rank 1 failed") as caught:
        launch(fail_on_one, ParallelDims(dp=2), error)
    message = str(caught.value)
    assert caught.value.rank == 1
    assert str(error) in message and "Connection closed" not in message
    assert ("in fail_on_one" in message) == trace
    noise = capfd.readouterr().err
    assert "fail" not in noise and "Terminating" not in noise


def kill_one(groups, device, folder):
    "Rank 1 is killed in the middle of a run."
    (folder / str(dist.get_rank())).write_text(str(os.getpid()))
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(()))


def test_a_killed_rank_is_reported_and_nobody_is_left(gloo, tmp_path):
    with pytest.raises(RankError, match="rank 1 failed: Signal 9 .SIGKILL.") as caught:
        launch(kill_one, ParallelDims(dp=2), tmp_path)
    assert caught.value.rank == 1
    pids = [int((tmp_path / rank).read_text()) for rank in ("0", "1")]
    assert not any(map(alive, pids))


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.path.dirname(__file__),
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}

TRAIN = """
import sys
from pathlib import Path
import test_launch
if __name__ == "__main__":
    test_launch.launch_training(Path(sys.argv[1]))
"""


def launch_training(folder):
    "A run of two ranks that nobody waits to the end of."
    import test_loop

    config = test_loop.plan(folder / "run", tp=2, steps=10**6, save_every=10**6)
    launch(train_on_rank, config.parallel, config, folder / "tokens")


def train_on_rank(groups, device, config, prefix):
    import test_loop

    (config.run.out.parent / f"pid{dist.get_rank()}").write_text(str(os.getpid()))
    test_loop.train(config, test_loop.TokenFile(prefix), groups, device)


def test_ctrl_c_at_the_launcher_saves_on_all_ranks(tmp_path):
    import test_loop

    with test_loop.TokenFileWriter(tmp_path / "tokens", 90) as writer:
        for _ in range(10):
            writer.append(list(range(90)))
            writer.end_document()
    script = tmp_path / "go.py"
    script.write_text(TRAIN)
    command = [sys.executable, str(script), str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    try:
        test_loop.wait_for_steps(tmp_path / "run", 2, process)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=HANG)
    finally:
        process.kill()
    step = read_metrics(tmp_path / "run")[-1]["step"]
    assert f"stopped at step {step}; go on with --resume auto" in printed, errors
    assert latest_checkpoint(tmp_path / "run").name == f"step-{step:08d}"
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not any(alive(int((tmp_path / f"pid{rank}").read_text())) for rank in (0, 1))


START = """
import test_launch
from megatron_edu.mesh import ParallelDims
if __name__ == "__main__":
    test_launch.launch(test_launch.sleep_long, ParallelDims(dp=2))
"""


def sleep_long(groups, device):
    time.sleep(FOREVER)


@pytest.mark.parametrize("delay", [0.3, 1.0, 2.5])
def test_no_rank_outlives_a_launcher_killed_while_they_start(tmp_path, delay):
    script = tmp_path / "go.py"
    script.write_text(START)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline().startswith("2 ranks")
        time.sleep(delay)
        process.kill()
        process.communicate(timeout=HANG)   # until the last one that can write there has ended
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


JOIN = """
import sys
import test_launch
from megatron_edu.mesh import ParallelDims
for view in test_launch.launch(test_launch.look_around, ParallelDims(dp=2), 10):
    sys.stdout.write(f"view {view['rank']} {view['total']}\\n")     # one write: two ranks share it
"""


def test_ranks_of_torchrun_join(tmp_path):
    script = tmp_path / "go.py"
    script.write_text(JOIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", str(tmp_path / "meet")]
    command += ["--rdzv-conf", "store_type=file", "--local-addr", "127.0.0.1", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=HANG)
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("view"))
    assert [line.split() for line in lines] == [["view", r, "30.0"] for r in "0011"]
    assert done.stdout.count("2 ranks of torchrun (tp=1, dp=2), backend gloo") == 1


def test_the_limit_of_a_collective_leaves_time_to_save():
    assert launch_module.TIMEOUT >= 300


def test_ranks_have_the_time_to_save_after_ctrl_c(tmp_path):
    "The launcher kills ranks that do not end in time: PyTorch's own limit is half a minute."
    settings = launch_module._local(2, str(tmp_path))
    assert settings.shutdown_timeout == launch_module.TIMEOUT == 600
