"Under torchrun one rank reads the command and decides: the others follow, whatever they see."

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from limits import FOREVER, HANG, wait_for

from megatron_edu import cli
from megatron_edu.models.gpt2 import GPT2
from megatron_edu.training.checkpoint import load_config, save_checkpoint
from megatron_edu.training.journal import read_metrics

TEXT = "The cat sat on the mat, and the dog barked at the cat.\n\n"
SHORT = (
    "--preset tiny --batch-size 4 --eval-batches 1 --num-layers 1 --max-seq-len 16 --dropout 0"
)

# A rank whose view of the disk is its own: the listing of a folder lacks some names, as that of a
# network's disk does for a while. A folder that is named can be opened all the same.
RANK = f"""
import json
import os
import sys
import time
from pathlib import Path

from megatron_edu import cli
from megatron_edu.cli import train

hidden, happens = json.loads(os.environ["VIEW"])
listed = Path.glob
Path.glob = lambda *args: (path for path in listed(*args) if path.name not in hidden)


def fail(arguments):
    raise KeyError("nobody foresaw it")


def wait(arguments):
    Path("decides").touch()
    time.sleep({FOREVER})


train.make_plan = {{"": train.make_plan, "fails": fail, "waits": wait}}[happens]
cli.main()
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Tokens, and a run with two checkpoints that write different texts."
    folder = tmp_path_factory.mktemp("made")
    with contextlib.chdir(folder):
        Path("text.txt").write_text(TEXT * 600)
        cli.main("prepare text.txt --vocab-size 280 --out tokens --quiet".split())
        line = f"train {SHORT} --data tokens --out run --steps 4 --save-every 2 --quiet"
        cli.main(line.split())
        earlier = Path("run/step-00000002")
        config = load_config(earlier)
        shutil.rmtree(earlier)
        save_checkpoint(Path("run"), 2, GPT2(config, None, seed=5))
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    "A copy of that as the current folder."
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def environment(**variables: str) -> dict[str, str]:
    package = str(Path(cli.__file__).parents[2])
    return os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": "1"} | variables


@contextlib.contextmanager
def two_ranks(line, hidden=((), ()), happens=""):
    "Two processes that some launcher has started as ranks; nothing is left of them afterwards."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    Path("rank.py").write_text(RANK)
    ranks = []
    for rank in "01":
        view = json.dumps([hidden[int(rank)], happens if rank == "0" else "waits"])
        own = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", "VIEW": view}
        ranks.append(subprocess.Popen(
            [sys.executable, "rank.py", *line.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**where, **own),
        ))
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def ended(ranks) -> tuple[list[int], list[str], list[str]]:
    "Statuses of the ranks, what each has said, and what each has complained of."
    said = [rank.communicate(timeout=HANG) for rank in ranks]
    complaints = [
        [line for line in errors.splitlines() if line.startswith("megatron-edu")]
        for _, errors in said
    ]
    return [rank.returncode for rank in ranks], [out for out, _ in said], complaints


ALL = ("step-00000002", "step-00000004")
GO_ON = "train --out run --resume auto --steps 6 --dp 2"


@pytest.mark.parametrize("hidden", [ALL, ALL[1:]])
def test_a_run_goes_on_where_the_first_rank_says(here, hidden):
    with two_ranks(GO_ON, ((), hidden)) as ranks:
        status, said, complaints = ended(ranks)
    assert status == [0, 0] and complaints == [[], []]
    assert "going on from run/step-00000004" in said[0] and said[1] == ""
    assert [line["step"] for line in read_metrics("run")] == [1, 2, 3, 4, 5, 6]


GENERATE = "generate run --prompt cat --tokens 20 --temperature 0"


@pytest.mark.parametrize("hidden", [ALL, ALL[1:]])
def test_the_first_rank_chooses_the_checkpoint_that_writes(here, capsys, hidden):
    texts = []
    for folder in "run", "run/step-00000002":
        cli.main(f"{GENERATE} {folder}".replace(" run", "", 1).split())
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
    with two_ranks(f"{GENERATE} --tp 2", ((), hidden)) as ranks:
        status, said, complaints = ended(ranks)
    assert status == [0, 0] and complaints == [[], []]
    assert said == [texts[0], ""]


@pytest.mark.parametrize(
    ("line", "hidden", "happens", "status", "words"),
    [
        (f"train {SHORT} --data tokens --out run", ((), ALL), "", 2, "run holds a run (step-00"),
        (GO_ON, (ALL, ()), "", 2, "Missing"),
        (f"{GENERATE} --tp 2", (ALL, ()), "", 2, "name the folder of a run"),
        (f"{GO_ON} --stepz 3", ((), ()), "", 2, "nearest is --steps"),
        (GO_ON, ((), ()), "fails", 1, "unforeseen KeyError: 'nobody foresaw it'"),
    ],
)
def test_what_the_first_rank_refuses_is_said_once(here, line, hidden, happens, status, words):
    with two_ranks(line, hidden, happens) as ranks:
        statuses, _, (first, second) = ended(ranks)
    assert statuses == [status, status]
    assert len(first) == 1 and words in first[0] and second == []
    if status == 1:
        Path(first[0].rpartition(" ")[2]).unlink()


def test_help_is_printed_once(here):
    with two_ranks("train --help") as ranks:
        status, said, complaints = ended(ranks)
    assert status == [0, 0] and complaints == [[], []]
    assert said[0].count("--init-from") >= 1 and said[1] == ""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, [143, 143]), (signal.SIGKILL, [-9, 2])]
)
def test_nobody_waits_for_a_first_rank_that_is_gone(here, number, status):
    with two_ranks(GO_ON, happens="waits") as ranks:
        wait_for(Path("decides").exists, "the first rank")
        ranks[0].send_signal(number)
        assert ended(ranks)[0] == status


def test_a_rank_that_waits_for_a_decision_can_be_stopped(here):
    with two_ranks(GO_ON, happens="waits") as ranks:
        wait_for(Path("decides").exists, "the first rank")
        ranks[1].send_signal(signal.SIGTERM)
        assert ranks[1].wait(HANG) == 143 and ranks[0].poll() is None


def torchrun(line: str) -> subprocess.CompletedProcess:
    "Its agent keeps the store; there rank 0 is a guest like the others."
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "meet", "--local-addr", "127.0.0.1"]
    command += ["--rdzv-conf", "store_type=file", "-m", "megatron_edu.cli"]
    words = [*command, *line.split()]
    return subprocess.run(words, capture_output=True, text=True, timeout=HANG, env=environment())


def test_ranks_of_torchrun_write_as_one_process_does(here, capsys):
    cli.main(GENERATE.split())
    done = torchrun(f"{GENERATE} --tp 2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == capsys.readouterr().out


def test_torchrun_itself_hears_one_refusal(here):
    "All ranks end with the status of the first: the launcher has to end none."
    done = torchrun("train --out run --resume auto --steps 6 --seed 9 --dp 2")
    lines = [line for line in done.stderr.splitlines() if line.startswith("megatron-edu")]
    assert len(lines) == 1 and "go on with --seed" in lines[0] and done.returncode == 1


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_ranks_that_know_of_no_place_to_meet_say_so(monkeypatch, capsys, verb):
    "As where a batch system has set the variables of a job."
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert "MASTER_ADDR expected, but not set" in line and "take RANK and WORLD_SIZE out" in line
