"""Worlds of ranks for the tests, kept for the whole session, and the count of distributed cases."""

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from megatron_edu.ranks import Ranks

# The least number of distributed cases a full run on gloo must have run. It follows the suite:
# raise it to the printed count whenever cases are added, so that none is lost unnoticed.
DISTRIBUTED_FLOOR = 2200

# Files that take longest: they begin first, so that no worker is left with one of them at the end.
LONGEST = ["training/test_launch.py", "test_fuzz.py", "test_ranks.py", "cli/test_together.py"]

# Why a test may be skipped on gloo. Any other skip fails the session.
DATA_UNSET = "MEGATRON_EDU_DATA is unset: it names the folder of development data"

distributed: set[str] = set()   # ids of the cases that ran something on at least 2 ranks
barred: list[str] = []          # ids of the cases skipped for a reason not allowed above
running: list[str] = []         # id of the case that runs now
left_out: list[str] = []        # ids of the cases that want more GPUs than there are


class World(Ranks):
    "Ranks that note which test used them."

    def __call__(self, fn, *args, **kwargs):
        if self.size >= 2:
            distributed.update(running)
        return super().__call__(fn, *args, **kwargs)


def session_worlds(backend: str):
    "A function that makes a world of n ranks once; at the end they are closed."
    worlds: dict[int, World] = {}

    def world(size: int) -> World:
        if backend == "nccl" and size > torch.cuda.device_count():
            pytest.skip(f"{size} ranks need {size} GPUs, here are {torch.cuda.device_count()}")
        if size not in worlds:
            worlds[size] = World(size, backend=backend, threads=1)
        return worlds[size]

    yield world
    for each in worlds.values():
        each.close()


@pytest.fixture(scope="session")
def ranks(request):
    "`ranks(n)` is a world of n ranks, made once a session. A world that failed starts anew."
    yield from session_worlds(request.config.getoption("--backend"))


@pytest.fixture(scope="session")
def cpu_ranks(request):
    "The same with gloo, whatever the option says: for what computes on the CPU in any case."
    if request.config.getoption("--backend") == "gloo":
        yield request.getfixturevalue("ranks")
    else:
        yield from session_worlds("gloo")


@pytest.fixture(scope="session")
def device(request) -> str:
    "Where tensors of the ranks live: each rank has made its own GPU the current one."
    return "cuda" if request.config.getoption("--backend") == "nccl" else "cpu"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    "The folder of development data; a test that needs it is skipped where there is none."
    if not os.environ.get("MEGATRON_EDU_DATA"):
        pytest.skip(DATA_UNSET)
    return Path(os.environ["MEGATRON_EDU_DATA"])


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        choices=["gloo", "nccl"],
        default="gloo",
        help="gloo: ranks on the CPU (default). nccl: rank r on GPU r",
    )


def pytest_configure(config):
    # What runs in the background (`pytest &`, nohup) ignores these, and so would what it starts:
    # some tests are of them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    config.addinivalue_line("markers", "world(n): the case uses n ranks, with nccl n GPUs")


def ranks_wanted(item) -> int:
    "Ranks a case uses: of its mark `world(n)`, else the product of its parameters tp, dp and pp."
    if "ranks" not in item.fixturenames:
        return 0
    mark = item.get_closest_marker("world")
    if mark:
        return mark.args[0]
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return math.prod(parameters.get(axis, 1) for axis in ("tp", "dp", "pp"))


def pytest_collection_modifyitems(config, items):
    "The longest files first. With nccl, leave out the cases that want more GPUs than there are."
    names = [str(Path(__file__).parent / name) for name in LONGEST]
    items.sort(key=lambda item: names.index(str(item.path)) if str(item.path) in names else 99)
    if config.getoption("--backend") == "gloo":
        return
    fitting = [item for item in items if ranks_wanted(item) <= torch.cuda.device_count()]
    large = [item for item in items if ranks_wanted(item) > torch.cuda.device_count()]
    config.hook.pytest_deselected(items=large)
    left_out.extend(item.nodeid for item in large)
    items[:] = fitting


def pytest_runtest_logstart(nodeid):
    running[:] = [nodeid]


def pytest_runtest_logreport(report):
    if report.skipped and DATA_UNSET not in str(report.longrepr):
        barred.append(report.nodeid)


def is_full_run(config) -> bool:
    "Everything was asked for: no path, no -k, no -m, no other selection."
    option = config.option
    chosen = option.keyword or option.markexpr or option.deselect or option.collectonly
    chosen = chosen or option.ignore or getattr(option, "lf", False) or option.maxfail
    return config.args_source is config.ArgsSource.TESTPATHS and not chosen


def complaints(config) -> list[str]:
    "Why a session in which no test failed fails all the same."
    if config.getoption("--backend") != "gloo":
        return []
    found = [f"{nodeid} was skipped: on gloo every case runs" for nodeid in barred]
    if is_full_run(config) and len(distributed) < DISTRIBUTED_FLOOR:
        found.append(
            f"{len(distributed)} distributed cases ran, fewer than the floor {DISTRIBUTED_FLOOR} "
            "in tests/conftest.py: find what no longer runs, or lower the floor with a reason"
        )
    return found


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    "With `-n`: a worker ended, and hands over which cases ran on several ranks there."
    distributed.update(getattr(node, "workeroutput", {}).get("distributed", []))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["distributed"] = sorted(distributed)
        return
    if exitstatus == pytest.ExitCode.OK and complaints(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.section("distributed")
    for nodeid in left_out:
        terminalreporter.line(f"left out, too few GPUs: {nodeid}")
    count = f"distributed cases: {len(distributed)} ran (floor {DISTRIBUTED_FLOOR})"
    terminalreporter.line(count)
    for complaint in complaints(config):
        terminalreporter.line(complaint, red=True)
