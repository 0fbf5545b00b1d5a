"`megatron-edu doctor`: a line each, no traceback whatever breaks, and nothing that is private."

import os
import shutil
import subprocess
import sys
import threading
import types
from collections import namedtuple
from importlib import metadata

import pytest
import torch

from megatron_edu import cli
from megatron_edu.cli import doctor
from megatron_edu.cli.doctor import LOOKS, Finding, examine_machine

PATIENCE = 300.0  # seconds: this machine may be busy


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(doctor, "LIMIT", PATIENCE)


@pytest.fixture
def quick(monkeypatch, cpu_ranks):
    "Ranks that are there already."

    class Kept:
        def __init__(self, size, **options):
            self.world = cpu_ranks(size)

        def __enter__(self):
            return self.world

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr("megatron_edu.ranks.Ranks", Kept)


def told(capsys, status=0):
    "State and text by name, as the command prints them."
    if status:
        with pytest.raises(SystemExit) as end:
            cli.main(["doctor"])
        assert end.value.code == status
    else:
        cli.main(["doctor"])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err and err == ""
    lines = out.splitlines()[:-2]
    assert all(line[:8].strip() in ("ok", "remark", "not ok") for line in lines)
    return {line[8:23].strip(): (line[:8].strip(), line[23:]) for line in lines}, out


@pytest.mark.world(2)
def test_what_is_said_of_a_machine_on_which_all_is_well(capsys, quick):
    found, out = told(capsys)
    names = "megatron_edu Python torch numpy tokenizers safetensors transformers".split()
    names += "system CPU cores memory ranks".split()
    for name in names + ["C++ compiler", "disk here", "disk TMPDIR", "open files"]:
        assert name in found and found[name][1], name
    assert found["ranks"][0] == found["torch"][0] == "ok" and out.endswith("\nranks can run here\n")
    assert found["torch"][1] == torch.__version__


def test_the_ranks_are_real(capsys):
    assert told(capsys)[0]["ranks"][0] == "ok"


def fail(error):
    def look():
        raise error

    return look


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), RuntimeError(""), SystemExit(4), ImportError("a\nb\nc")]
)
def test_a_look_that_breaks_costs_its_own_line(capsys, monkeypatch, name, error):
    for each in LOOKS:
        monkeypatch.setitem(LOOKS, each, lambda each=each: [Finding(each, "fine")])
    monkeypatch.setitem(LOOKS, name, fail(error))
    vital = name in ("torch", "ranks")
    found, out = told(capsys, 3 if vital else 0)
    assert (
        found[name][0] == ("not ok" if vital else "remark")
        and type(error).__name__ in found[name][1]
    )
    assert [state for state, _ in found.values()].count("ok") == len(LOOKS) - 1
    assert ("ranks cannot run here" in out) == vital


def test_a_look_that_hangs_is_named(capsys, monkeypatch):
    release = threading.Event()
    for each in LOOKS:
        monkeypatch.setitem(LOOKS, each, lambda each=each: [Finding(each, "fine")])
    monkeypatch.setitem(LOOKS, "ranks", lambda: release.wait() and [])
    monkeypatch.setattr(doctor, "patience", lambda: 0.5)
    found, _ = told(capsys, 3)
    release.set()
    assert (
        found["ranks"] == ("not ok", found["ranks"][1])
        and "no answer within 0.5 s" in found["ranks"][1]
    )


@pytest.mark.parametrize(
    "load, cores, seconds", [(0.1, 2, 18), (2, 2, 18), (4, 2, 36), (500, 2, 90)]
)
def test_where_others_work_one_waits_longer(monkeypatch, load, cores, seconds):
    monkeypatch.setattr(doctor, "LIMIT", 18.0)
    monkeypatch.setattr(doctor, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    assert doctor.patience() == seconds


def states(look):
    return {each.name: each.state for each in look()}


Usage = namedtuple("Usage", "total used free")


def test_what_is_short_is_remarked_with_a_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "available_memory", lambda: 1 << 20)
    monkeypatch.setattr(doctor, "cpu_count", lambda: 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(9, 9, 100))
    monkeypatch.setattr("resource.getrlimit", lambda which: (64, 64))
    looks = doctor.look_at_memory, doctor.look_at_system, doctor.look_at_disk, doctor.look_at_files
    found = {each.name: each for look in looks for each in look()}
    for name in ("memory", "cores", "disk here", "disk TMPDIR", "open files"):
        assert found[name].state == "remark" and ";" in found[name].text
    monkeypatch.setattr(doctor, "available_memory", lambda: None)
    assert "unknown" in doctor.look_at_memory()[0].text


@pytest.mark.parametrize(
    "there, state", [(["g++", "compiles"], "ok"), (["g++"], "remark"), ([], "remark")]
)
def test_a_compiler_must_compile(monkeypatch, there, state):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    result = subprocess.CompletedProcess([], 0 if "compiles" in there else 1)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: result)
    assert states(doctor.look_at_compiler) == {"C++ compiler": state}


def test_packages_that_are_not_there(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    found = states(doctor.look_at_packages)
    assert found.pop("transformers") == "ok" and set(found.values()) == {"not ok"}


def test_versions_that_are_too_old(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    assert states(doctor.look_at_torch) == {"torch": "not ok"}
    assert states(doctor.look_at_python)["Python"] == "not ok"


def test_gpus_and_nccl(monkeypatch):
    card = types.SimpleNamespace(name="A Card", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    for there, last in (True, "2.27.3"), (False, "install a build"):
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda there=there: there)
        found = doctor.look_at_gpus()
        assert [each.name for each in found] == ["GPU 0", "GPU 1", "NCCL"] and last in found[2].text
        assert found[0].text == "A Card, 80.0 GiB, compute capability 9.0"


@pytest.mark.parametrize(
    "sums, rank_state, memory_state",
    [
        ([(3.0, 3.0)] * 2, "ok", "ok"),
        ([(3.0, None)] * 2, "ok", "remark"),
        ([(3.0, 2.0), (3.0, 3.0)], "ok", "not ok"),
        ([(3.0, None), (3.0, 3.0)], "ok", "not ok"),
        ([(2.0, 3.0)] * 2, "not ok", None),
    ],
)
def test_what_two_ranks_add_up(monkeypatch, sums, rank_state, memory_state):
    class Adding:
        def __init__(self, size, **options):
            pass

        def __enter__(self):
            return lambda fn: sums

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr("megatron_edu.ranks.Ranks", Adding)
    found = states(doctor.look_at_ranks)
    assert found["ranks"] == rank_state and found.get("shared memory") == memory_state


def test_nothing_private_is_said(capsys, monkeypatch, tmp_path, quick):
    home = tmp_path / "home_of_somebody"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(home)
    monkeypatch.setitem(LOOKS, "disk", fail(OSError(13, "Permission denied", str(home / "x"))))
    out = told(capsys)[1]
    assert "home_of_somebody" not in out and "hf_secret" not in out and "'~/x'" in out
    assert (
        os.uname().nodename not in out.replace(os.uname().release, "")
        or len(os.uname().nodename) < 4
    )


def test_it_begins_without_torch():
    code = (
        "import sys, megatron_edu.cli.doctor; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_findings_come_in_the_order_of_the_looks(monkeypatch):
    for each in LOOKS:
        monkeypatch.setitem(LOOKS, each, lambda each=each: [Finding(each, "fine")])
    assert [each.name for each in examine_machine()] == list(LOOKS)
