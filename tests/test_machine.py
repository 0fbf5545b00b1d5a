"Cores and memory of this process: what control groups and affinity leave of the machine's."

import os
import platform
import resource

import pytest

from megatron_edu import machine
from megatron_edu.config import PRESETS
from megatron_edu.memory import check_memory, training_bytes
from megatron_edu.ranks import Ranks

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    "Write control groups of a version into a folder, and let `machine` read them."

    def make(lines, files):
        own = tmp_path / "own"
        own.write_text("".join(f"{line}\n" for line in lines))
        for name, text in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(machine, "OWN_GROUPS", own)
        monkeypatch.setattr(machine, "CGROUPS", tmp_path / "groups")
        monkeypatch.setattr(machine, "system_memory", lambda: 100 * GIB)
        if hasattr(os, "sched_getaffinity"):
            monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
        else:
            monkeypatch.setattr(os, "cpu_count", lambda: 64)

    return make


def test_the_smallest_limit_on_the_way_to_the_root_counts(groups):
    groups(
        ["0::/jobs/mine"],
        {
            "jobs/memory.max": f"{8 * GIB}\n",
            "jobs/memory.current": f"{3 * GIB}\n",
            "jobs/mine/memory.max": "max\n",
            "jobs/mine/memory.current": f"{GIB}\n",
            "jobs/mine/cpu.max": "350000 100000\n",
            "jobs/cpu.max": "max 100000\n",
        },
    )
    assert machine.available_memory() == 5 * GIB
    assert machine.cpu_count() == 4  # three and a half


def test_a_container_sees_its_own_group_as_the_root(groups):
    files = {
        "memory.max": str(4 * GIB),
        "memory.current": str(GIB),
        "cpu.max": "200000 100000",
        "memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
    }
    groups(["0::/"], files)
    assert machine.available_memory() == 3 * GIB + GIB // 2
    assert machine.cpu_count() == 2


def test_the_first_version_has_a_folder_for_each_kind(groups):
    groups(
        ["4:memory:/box", "7:cpu,cpuacct:/box", "1:name=systemd:/other"],
        {
            "memory/box/memory.limit_in_bytes": str(2 * GIB),
            "memory/box/memory.usage_in_bytes": str(GIB),
            "cpu,cpuacct/box/cpu.cfs_quota_us": "100000",
            "cpu,cpuacct/box/cpu.cfs_period_us": "50000",
        },
    )
    assert machine.available_memory() == GIB
    assert machine.cpu_count() == 2


def test_no_limit_and_a_limit_that_is_overdrawn(groups):
    groups(["0::/"], {"memory.max": "max", "memory.current": "5", "cpu.max": "max 100000"})
    assert (machine.available_memory(), machine.cpu_count()) == (100 * GIB, 64)
    groups(["0::/"], {"memory.max": str(GIB), "memory.current": str(2 * GIB)})
    assert machine.available_memory() == 0


def test_a_garbled_group_is_passed_over(groups):
    groups(["0::/"], {"memory.max": "\n", "memory.current": "many", "cpu.max": "1 2 3"})
    assert (machine.available_memory(), machine.cpu_count()) == (100 * GIB, 64)


def test_affinity_counts():
    if not hasattr(os, "sched_getaffinity"):
        assert machine.cpu_count() == os.cpu_count()
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.cpu_count() == 1
    finally:
        os.sched_setaffinity(0, before)


def new_pages() -> int:
    "Pages that the system hands out while 128 MiB come and go in blocks of 16, a second time."
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [bytearray(2**24) for _ in range(8)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_rank_keeps_what_it_frees():
    pages = 2**27 // resource.getpagesize()
    with Ranks(1) as world:
        (new,) = world(new_pages)
    # Another system's library may do as it likes.
    assert new < (0.1 if platform.libc_ver()[0] == "glibc" else 1.1) * pages


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (3 * GIB, "3.0 GiB"),
        (2.5 * 2**50, "2,560.0 TiB"),
    ],
)
def test_bytes_in_words(count, text):
    assert machine.in_bytes(count) == text


def test_training_takes_16_bytes_a_parameter_and_replica():
    tiny = PRESETS["tiny"]
    assert training_bytes(tiny, dp=3) == 48 * tiny.num_parameters()


def test_what_cannot_fit_is_refused_with_the_estimate():
    need = training_bytes(PRESETS["gpt2-8.3b"])
    with pytest.raises(
        ValueError, match=r"a model: at least 123\.\d GiB .* 8\.0 GiB are .*--force"
    ):
        check_memory(need, "a model", room=8 * GIB)
    check_memory(need, "a model", room=need)
