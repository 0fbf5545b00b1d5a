"A place to write: what may be a target, what may be replaced, and whose the folder of a run is."

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_edu import files, owner
from megatron_edu.config import GPT2Config
from megatron_edu.data.token_writer import TokenFileWriter
from megatron_edu.files import (
    KINDS,
    LOCK,
    MARK,
    beside,
    changed,
    check_file,
    check_folder,
    check_space,
    empty_run,
    kind_in,
    lock_number,
    mark_folder,
    note,
    read_mark,
    remove_files,
    rename_folder,
    written_files,
    written_folder,
)
from megatron_edu.models.gpt2 import GPT2
from megatron_edu.owner import own_run
from megatron_edu.training.checkpoint import save_checkpoint

TINY = GPT2Config(1, 16, 2, vocab_size=16, max_seq_len=8, vocab_multiple=8, dropout=0.0)
QUICK = {"touch": 0.2, "silence": 1.0}  # seconds
SPACE = namedtuple("Space", "total used free")


def picture(folder) -> dict:
    "All that lies in a folder: types, modes, times, targets and content."
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        regular = stat.S_ISREG(info.st_mode)
        content = path.read_bytes() if regular else None
        target = os.readlink(path) if path.is_symlink() else None
        found[path.relative_to(folder)] = (
            info.st_ino,
            info.st_mode,
            info.st_mtime_ns,
            content,
            target,
        )
    return found


def run_of(folder):
    "A run with two checkpoints, metrics and tokens, all noted."
    model = GPT2(TINY)
    for step in (1, 2):
        save_checkpoint(folder, step, model)
    with TokenFileWriter(folder / "tokens", 100) as writer:
        writer.append([1, 2, 3])
    with written_files(folder / "metrics.jsonl") as (path,):
        path.write_text('{"step": 1}\n')
    return folder


def prepared(folder):
    with written_folder(folder, "prepared") as partial:
        with TokenFileWriter(partial / "tokens", 100) as writer:
            writer.append([1, 2, 3])
        (partial / "tokenizer.json").write_text("{}")
    return folder


def exported(folder):
    with written_folder(folder, "huggingface") as partial:
        save_file({"x": torch.ones(3)}, partial / "model.safetensors")
        (partial / "config.json").write_text("{}")
    return folder


def without_mark(folder):
    for path in folder.rglob(MARK):
        path.unlink()
    return folder


# ------------------------------------------------------------------------------------------------
# What may be a target


def a_socket(path):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(path))


def foreign(path):
    path.mkdir()
    (path / "thesis.tex").write_text("the only copy")


def a_foreign_metrics(path):
    path.mkdir()
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')


def foreign_tokens(path):
    path.mkdir()
    (path / "tokens.bin").write_bytes(b"x" * 64)
    (path / "tokens.idx").write_bytes(b"y" * 64)


def a_foreign_checkpoint(path):
    (path / "step-00000001").mkdir(parents=True)
    (path / "step-00000001" / "config.json").write_text("{}")
    (path / "step-00000001" / "state.json").write_text("[1]")


def a_mark_that_is_none(path):
    foreign(path)
    (path / MARK).write_text('{"format": 1, "kind": "run", "files": {"../../x": {}}}')


def a_mark_that_is_a_link(path):
    prepared(path)
    (path / MARK).rename(path.with_name("aside"))
    (path / MARK).symlink_to(path.with_name("aside"))
    (path / "tokens.idx").unlink()


REFUSED = {  # how the target is made, and what the message says
    "file": (lambda p: p.write_text("the only copy"), "is a file"),
    "empty file": (lambda p: p.touch(), "is a file"),
    "fifo": (os.mkfifo, "is a named pipe"),
    "socket": (a_socket, "is a socket"),
    "link to a file": (
        lambda p: p.symlink_to(p.with_name("x")) or p.with_name("x").touch(),
        "link",
    ),
    "link to nothing": (lambda p: p.symlink_to("nothing"), "is a symbolic link"),
    "link to itself": (lambda p: p.symlink_to(p.name), "is a symbolic link"),
    "link to a folder": (lambda p: p.with_name("d").mkdir() or p.symlink_to("d"), "symbolic link"),
    "link to one of ours": (lambda p: p.symlink_to(prepared(p.with_name("ours"))), "symbolic link"),
    "foreign folder": (foreign, "files that are not ours"),
    "foreign metrics": (a_foreign_metrics, "files that are not ours"),
    "foreign tokens": (foreign_tokens, "files that are not ours"),
    "foreign checkpoint": (a_foreign_checkpoint, "files that are not ours"),
    "a hidden file": (lambda p: p.mkdir() or (p / ".git").touch(), "files that are not ours"),
    "an empty folder in it": (lambda p: (p / "sub").mkdir(parents=True), "files that are not ours"),
    "a false mark": (a_mark_that_is_none, "files that are not ours"),
    "a mark that is a link": (a_mark_that_is_a_link, "files that are not ours"),
}
OTHERS = {
    "run": (exported, prepared),
    "prepared": (run_of, exported),
    "huggingface": (run_of, prepared),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["run", "prepared", "checkpoint", "huggingface"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_ours_is_refused_and_untouched(tmp_path, what, kind, overwrite):
    make, message = REFUSED[what]
    make(tmp_path / "target")
    before = picture(tmp_path)
    with pytest.raises(ValueError, match=f"target.*{message}.*; name another place"):
        check_folder(tmp_path / "target", kind, overwrite=overwrite)
    with pytest.raises(ValueError, match=message):
        with written_folder(tmp_path / "target", kind, overwrite=overwrite):
            pytest.fail("work began")
    with pytest.raises(ValueError, match="already"):
        check_file(tmp_path / "target")
    assert picture(tmp_path) == before


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_folder_of_ours_for_another_verb_is_refused(tmp_path, kind, marked):
    for number, make in enumerate(OTHERS[kind]):
        target = make(tmp_path / str(number))
        if not marked:
            without_mark(target)
        for overwrite in (False, True):
            with pytest.raises(
                ValueError, match=f"{target} is .*{KINDS[kind]} that we wrote; name"
            ):
                check_folder(target, kind, overwrite=overwrite)


@pytest.mark.parametrize("name", [".", "", "..", "/", "sub/..", "../here", "absolute"])
def test_the_folder_one_stands_in_is_no_target(tmp_path, monkeypatch, name):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    path = tmp_path / "here" if name == "absolute" else Path(name)
    for kind in ("run", "prepared"):
        with pytest.raises(ValueError, match="the folder that this command runs in, or one around"):
            check_folder(path, kind)


def test_nothing_can_be_made_below_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nothing")
    for above, what in (("file", "a file"), ("dangling", "a symbolic link")):
        for name in ("x", "x/y"):
            path = tmp_path / above / name
            for check in (check_file, lambda p: check_folder(p, "run")):
                with pytest.raises(
                    ValueError, match=f"{above} is {what}, and no folder can be made"
                ):
                    check(path)
    for name in ("a" * 300, "null\0byte"):
        with pytest.raises(ValueError, match="cannot be looked for .*; name another place"):
            check_folder(tmp_path / name, "run")


def test_absent_and_empty_targets_are_written(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "around").symlink_to("real")  # a link above the target is the user's way
    for name in ("new", "deep/er/new", "empty", "around/new"):
        prepared(tmp_path / name)
        assert kind_in(tmp_path / name) == "prepared"
        assert changed(tmp_path / name) == []
        assert not list((tmp_path / name).parent.glob("*.partial"))


def test_a_run_is_written_into_and_others_are_kept(tmp_path):
    check_folder(run_of(tmp_path / "run"), "run")
    for make, kind in ((prepared, "prepared"), (exported, "huggingface")):
        target = make(tmp_path / kind)
        with pytest.raises(ValueError, match="holds .* already.*or replace it with --overwrite"):
            check_folder(target, kind)
        check_folder(target, kind, overwrite=True)


def test_folders_from_before_the_mark(tmp_path):
    run, text = without_mark(run_of(tmp_path / "run")), without_mark(prepared(tmp_path / "text"))
    assert kind_in(run) == "run" and kind_in(text) == "prepared"
    assert kind_in(run / "step-00000001") == "checkpoint"
    check_folder(run, "run")
    for folder, kind in ((run, "run"), (text, "prepared")):
        with pytest.raises(ValueError, match="before folders were marked.*remove it yourself"):
            check_folder(folder, kind, overwrite=True)
    save_checkpoint(run, 3, GPT2(TINY))
    assert read_mark(run)["kind"] == "run"
    with pytest.raises(ValueError, match="not as it was written: .*step-00000001"):
        check_folder(run, "run", overwrite=True)


def test_a_run_that_has_no_checkpoint_yet_is_known_by_its_first_line(tmp_path):
    line = dict.fromkeys(("step", "loss", "lr", "grad_norm", "ms", "tokens_per_s"), 1)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    check_folder(tmp_path, "run")
    with pytest.raises(ValueError, match="is a run; .* a prepared text that we wrote"):
        check_folder(tmp_path, "prepared")


def test_a_mark_of_a_newer_version_is_said(tmp_path):
    text = prepared(tmp_path / "text")
    mark = json.loads((text / MARK).read_text())
    (text / MARK).write_text(json.dumps({**mark, "format": 2}))
    with pytest.raises(ValueError, match="is of format 2, and 1 is known here"):
        check_folder(text, "prepared", overwrite=True)


# ------------------------------------------------------------------------------------------------
# What may be replaced

CHANGES = {
    "a file added": lambda p: (p / "thoughts.txt").write_text("mine"),
    "a hidden file added": lambda p: (p / ".notes").touch(),
    "a folder added": lambda p: (p / "backup").mkdir(),
    "a link added": lambda p: (p / "link").symlink_to("/"),
    "a byte changed": lambda p: (p / "tokens.bin").write_bytes(
        b"\7" + (p / "tokens.bin").read_bytes()[1:]
    ),
    "a file grown": lambda p: (p / "tokens.bin").open("ab").write(b"x"),
    "a file removed": lambda p: (p / "tokens.idx").unlink(),
    "a file that is a link": lambda p: (
        (p / "tokens.idx").rename(p.with_name("i")) and (p / "tokens.idx").symlink_to("../i")
    ),
    "a partial of nobody": lambda p: (p / ".x.01234567.partial").touch(),
}
NESTED = {
    "a file added to a checkpoint": lambda p: (p / "step-00000001" / "notes").touch(),
    "a byte of weights": lambda p: (
        (p / "step-00000002" / "model-00000.safetensors").open("r+b").write(b"\1")
    ),
    "a mark of a checkpoint": lambda p: (p / "step-00000002" / MARK).write_text("{}"),
    "a checkpoint copied": lambda p: shutil.copytree(p / "step-00000001", p / "step-00000009"),
    "a checkpoint removed": lambda p: shutil.rmtree(p / "step-00000001"),
    "a line of metrics": lambda p: (p / "metrics.jsonl").open("a").write('{"step": 2}\n'),
}


@pytest.mark.parametrize("change", CHANGES | NESTED)
def test_a_folder_that_was_changed_is_not_replaced(tmp_path, change):
    make, kind = (run_of, "run") if change in NESTED else (prepared, "prepared")
    target = make(tmp_path / "target")
    check_folder(target, kind, overwrite=True)
    (CHANGES | NESTED)[change](target)
    before = picture(tmp_path)
    with pytest.raises(
        ValueError, match="not as it was written: .* added, changed or removed since"
    ):
        check_folder(target, kind, overwrite=True)
    with pytest.raises(ValueError, match="not as it was written"):
        if kind == "run":
            empty_run(target)
        else:
            with written_folder(target, kind, overwrite=True):
                pytest.fail("work began")
    assert picture(tmp_path) == before


def test_an_unchanged_folder_is_replaced_whole(tmp_path):
    target = prepared(tmp_path / "target")
    with written_folder(target, "prepared", overwrite=True) as partial:
        (partial / "other").write_text("new")
        assert (target / "tokens.bin").exists()
    assert sorted(path.name for path in target.iterdir()) == [MARK, "other"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_is_added_while_the_new_one_is_written_is_kept(tmp_path):
    target = prepared(tmp_path / "target")
    with pytest.raises(ValueError, match="thoughts.txt"):
        with written_folder(target, "prepared", overwrite=True) as partial:
            (partial / "other").write_text("new")
            (target / "thoughts.txt").write_text("mine")
    assert (target / "thoughts.txt").read_text() == "mine" and (target / "tokens.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("make", [foreign, lambda p: p.write_text("mine")])
def test_a_target_that_comes_while_the_folder_is_written_is_kept(tmp_path, make):
    with pytest.raises(OSError):
        with written_folder(tmp_path / "target", "prepared") as partial:
            (partial / "other").write_text("new")
            make(tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target").is_file() or (tmp_path / "target" / "thesis.tex").exists()


def test_a_run_is_emptied_file_by_file(tmp_path):
    run = run_of(tmp_path / "run")
    with own_run(run):
        empty_run(run)
        assert sorted(path.name for path in run.iterdir()) == [MARK, LOCK]
        run_of(run)
    assert changed(run) == []


def test_single_files_are_removed_only_as_they_were_written(tmp_path):
    run = run_of(tmp_path / "run")
    (run / "tokens.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match="tokens.bin is not as it was written"):
        remove_files(run, "tokens.bin", "absent")
    remove_files(run, "metrics.jsonl")
    assert not (run / "metrics.jsonl").exists() and (run / "tokens.bin").read_bytes() == b"mine"
    assert changed(run) == ["tokens.bin"]


def test_a_checkpoint_is_replaced_by_its_own_step_unless_it_was_changed(tmp_path):
    for _ in range(2):
        folder = save_checkpoint(tmp_path, 1, GPT2(TINY))
    assert changed(tmp_path) == []
    (folder / "notes.txt").write_text("mine")
    before = picture(tmp_path)
    with pytest.raises(OSError, match="notes.txt was added"):
        save_checkpoint(tmp_path, 1, GPT2(TINY))
    assert picture(tmp_path) == before
    rename_folder(folder, folder.with_name("step-00000001.aside"))
    save_checkpoint(tmp_path, 1, GPT2(TINY))
    assert changed(tmp_path) == ["step-00000001.aside/notes.txt"]


@pytest.mark.parametrize("make", [foreign, lambda p: p.write_text("mine"), prepared])
def test_a_checkpoint_goes_into_a_run_and_nowhere_else(tmp_path, make):
    make(tmp_path / "target")
    before = picture(tmp_path)
    with pytest.raises(OSError, match="a run that we wrote"):
        save_checkpoint(tmp_path / "target", 1, GPT2(TINY))
    assert picture(tmp_path) == before


# ------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_failed_writer_removes_what_is_its_own(tmp_path, failure):
    others = tmp_path / ".target.01234567.partial"
    others.mkdir()
    with pytest.raises(failure), written_folder(tmp_path / "new" / "target", "run") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "half").touch()
        raise failure
    with (
        pytest.raises(failure),
        written_files(tmp_path / "deep" / "x", tmp_path / "deep" / "y") as some,
    ):
        some[0].touch()
        raise failure
    assert list(tmp_path.iterdir()) == [others]


def test_partial_names_are_unique_and_short_enough(tmp_path):
    names = {beside(tmp_path / ("ö" * 127)).name for _ in range(50)}
    assert len(names) == 50
    (tmp_path / names.pop()).touch()
    with written_files(tmp_path / ("ö" * 127)) as (partial,):
        partial.touch()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path / "run", 1, GPT2(TINY))
        prepared(tmp_path / "text")
    finally:
        os.umask(before)
    for path in [*(tmp_path / "run").rglob("*"), tmp_path / "text", *(tmp_path / "text").iterdir()]:
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask, path


def test_the_name_of_a_file_is_on_disk_when_it_is_given(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    with written_files(tmp_path / "x") as (partial,):
        partial.touch()
    assert synced == [(tmp_path / "x").stat().st_ino, tmp_path.stat().st_ino]


def test_the_name_of_a_folder_is_on_disk_when_it_is_given(tmp_path, monkeypatch):
    out, synced = tmp_path / "out", []

    def fsync(number):
        synced.append((os.fstat(number).st_ino, out.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with written_folder(out, "prepared") as partial:
        (partial / "x").touch()
    assert synced[-1] == (tmp_path.stat().st_ino, True)     # after the name was given
    assert ((out / "x").stat().st_ino, False) in synced and (out.stat().st_ino, False) in synced


def test_a_file_that_is_taken_meanwhile_is_kept(tmp_path):
    with pytest.raises(ValueError, match="is a file already"):
        with written_files(tmp_path / "x") as (partial,):
            partial.write_text("ours")
            (tmp_path / "x").write_text("mine")
    assert (tmp_path / "x").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_mark_does_not_name_what_failed(tmp_path):
    run = run_of(tmp_path / "run")
    before = read_mark(run)
    with pytest.raises(ValueError, match="is a file already"):
        with written_files(run / "new") as (partial,):
            partial.write_text("ours")
            (run / "new").write_text("mine")
    assert read_mark(run) == before


def test_only_files_of_a_run_are_renewed(tmp_path):
    run = run_of(tmp_path / "run")
    with written_files(run / "metrics.jsonl", replace=True) as (partial,):
        partial.write_text("new\n")
    assert changed(run) == []
    (run / "link").symlink_to("metrics.jsonl")
    text = prepared(tmp_path / "text")
    for path in (text / "tokens.bin", run / "link", run / "step-00000001"):
        with pytest.raises(ValueError, match="already, and nothing is written over"):
            with written_files(path, replace=True):
                pytest.fail("work began")


def test_a_mark_is_never_half_there(tmp_path, monkeypatch):
    run = run_of(tmp_path / "run")
    before = (run / MARK).read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.json, "dump", full)
    with pytest.raises(OSError, match="No space"):
        note(run, "metrics.jsonl")
    assert (run / MARK).read_bytes() == before and not list(run.glob("*.partial"))


def test_space_is_checked_before_a_save(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(Path(path))
        return SPACE(10**9, 0, 20 << 20)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_space(tmp_path / "a" / "b", 4 << 20)
    with pytest.raises(OSError, match="needs 5.2 MB and 17 MB to spare, .* has 21.0 MB free; free"):
        check_space(tmp_path / "a" / "b", 5 << 20)
    assert set(asked) == {tmp_path}
    model = GPT2(GPT2Config(1, 256, 2, vocab_size=4096, max_seq_len=8, dropout=0.0))
    with pytest.raises(OSError, match="step-00000001 could not be saved .* has 21.0 MB free"):
        save_checkpoint(tmp_path, 1, model)
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, sys
from pathlib import Path
from megatron_edu.files import written_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with written_folder(Path(sys.argv[1]), "prepared", overwrite=True) as partial:
        (partial / "tokens.bin").write_bytes(bytes(200_000))
except OSError as error:
    print(error)
"""


def test_a_write_that_fails_leaves_the_old_folder(tmp_path):
    target = prepared(tmp_path / "target")
    before = picture(tmp_path)
    command = [sys.executable, "-c", FULL, str(target)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "File too large" in out.stdout, out
    assert picture(tmp_path) == before


# ------------------------------------------------------------------------------------------------
# The owner of a run


def locked(folder, age=0.0, **fields):
    "The lock of an owner that touched it `age` seconds ago."
    folder.mkdir(exist_ok=True)
    mark_folder(folder, "run")
    record = {**owner._record(), **fields}
    (folder / LOCK).write_text(json.dumps(record))
    then = time.time() - age
    os.utime(folder / LOCK, (then, then))
    return record["number"]


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_at_work_is_not_entered(tmp_path):
    run = tmp_path / "run"
    with own_run(run, **QUICK) as first:
        time.sleep(1.5)  # it touches: no silence
        with pytest.raises(ValueError, match=f"run at work, of process {os.getpid()}; wait"):
            with own_run(run, **QUICK):
                pytest.fail("two owners")
        first.still_mine()
        (run / "x").touch()
    assert sorted(path.name for path in run.iterdir()) == [MARK, "x"]


def test_two_that_come_at_once(tmp_path):
    told, both = [], threading.Barrier(8)

    def come():
        both.wait()
        try:
            with own_run(tmp_path / "run", **QUICK) as mine:
                told.append(mine.number)
                ended.wait()
        except ValueError as error:
            told.append(str(error))

    ended = threading.Event()
    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(told) < 8:
        time.sleep(0.01)
    ended.set()
    for thread in threads:
        thread.join()
    assert sum("run at work" not in text for text in told) == 1


@pytest.mark.parametrize("lock", [True, False])
def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path, lock):
    if lock:
        locked(tmp_path / "run", age=100, pid=dead_pid())
    for failure in (None, ValueError, KeyboardInterrupt):
        with contextlib.suppress(ValueError, KeyboardInterrupt):
            with own_run(tmp_path / "run" / "deep" if not lock else tmp_path / "run", **QUICK):
                if failure:
                    raise failure
    left = [path for path in tmp_path.rglob("*")]
    assert left == ([tmp_path / "run"] if lock else [])


@pytest.mark.parametrize(
    ("fields", "age", "result"),
    [
        ({"pid": "dead"}, 100, "taken"),  # the process is gone, and silent
        ({"pid": "dead"}, 0, "waited"),  # gone, but is there a copy of it?
        ({"started": "1"}, 100, "taken"),  # another process has its pid
        ({}, 100, "refused"),  # it is there, stopped perhaps
        ({"boot_id": "other"}, 0.5, "refused"),  # another machine, heard of
        ({"boot_id": "other"}, 100, "taken"),  # another machine, silent
        ({"pid_namespace": "other", "pid": "dead"}, 0.5, "refused"),
        ({"boot_id": None, "pid_namespace": None}, 100, "taken"),  # no /proc
        ({"pid": "x"}, 0.5, "refused"),
        ({"pid": None, "number": 7}, 100, "taken"),  # not a lock that we write
    ],
)
def test_when_an_owner_counts_as_gone(tmp_path, fields, age, result):
    run, said = tmp_path / "run", []
    if fields.get("pid") == "dead":
        fields = {**fields, "pid": dead_pid()}
    number = locked(run, age, **fields)
    if result == "refused":
        with pytest.raises(ValueError, match="run at work.*; wait for its end, or name another"):
            with own_run(run, say=said.append, **QUICK):
                pytest.fail("taken from a living owner")
        assert lock_number(run) == number and said == []
        return
    with own_run(run, say=said.append, **QUICK) as mine:
        assert lock_number(run) == mine.number != number
    assert len(said) == (result == "waited")
    assert all("is gone; waiting" in text for text in said)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"number": ["x"]}', "[" * 100_000])
def test_a_lock_that_says_nothing_is_judged_by_silence(tmp_path, content):
    locked(tmp_path / "run")
    (tmp_path / "run" / LOCK).write_text(content)
    with pytest.raises(ValueError, match="counts as gone after 1 s"):
        with own_run(tmp_path / "run", **QUICK):
            pytest.fail("taken")
    os.utime(tmp_path / "run" / LOCK, (0, 0))
    with own_run(tmp_path / "run", **QUICK) as mine:
        mine.still_mine()


def test_what_is_no_lock_is_not_removed(tmp_path):
    for make in (lambda p: p.mkdir(), lambda p: p.symlink_to("nothing")):
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        mark_folder(run, "run")
        make(run / LOCK)
        before = picture(run)
        with pytest.raises(ValueError, match="is no file, and so not of ours"):
            with own_run(run, touch=0.2, silence=-1):
                pytest.fail("taken")
        assert picture(run) == before


def test_a_copy_of_the_machine_keeps_its_run(tmp_path):
    "Same boot id and namespace, a pid that is not here, and a lock that is touched."
    number = locked(tmp_path / "run", pid=dead_pid())
    ended = threading.Event()
    copy = owner.Owner(tmp_path / "run", number)
    thread = threading.Thread(target=owner._touch, args=(copy, 0.1, ended))
    thread.start()
    said = []
    try:
        with pytest.raises(ValueError, match="its lock is touched, though process"):
            with own_run(tmp_path / "run", touch=0.5, say=said.append):
                pytest.fail("taken from a living owner")
    finally:
        ended.set()
        thread.join()
    assert len(said) == 1 and lock_number(tmp_path / "run") == number


def test_the_clock_of_the_disk_decides(tmp_path, monkeypatch):
    locked(tmp_path / "run", age=0.5, boot_id="other")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with pytest.raises(ValueError, match="the last was [01] s ago"):
        with own_run(tmp_path / "run", **QUICK):
            pytest.fail("taken")


def test_a_new_owner_removes_the_partial_names_of_the_dead_one_alone(tmp_path):
    run = tmp_path / "run"
    number = locked(run, age=100, pid=dead_pid())
    dead = [beside(run / "step-00000001"), beside(run / "tokens.bin")]
    assert all(number in path.name for path in dead)
    dead[0].mkdir()
    (dead[0] / "model.safetensors").touch()
    dead[1].touch()
    kept = [
        ".x.01234567.partial",
        ".x.0123456789abcdef-01234567.partial",
        "notes.partial",
        ".a.old",
    ]
    for name in kept:
        (run / name).touch()
    (run / f".x.{number}.partial").mkdir()
    with own_run(run, **QUICK):
        pass
    left = {path.name for path in run.iterdir()}
    assert left == {MARK, f".x.{number}.partial", *kept}


def test_an_owner_that_lost_its_folder_saves_nothing(tmp_path):
    run = tmp_path / "run"
    with own_run(run, **QUICK) as mine:
        save_checkpoint(run, 1, GPT2(TINY), owner=mine)
        (run / LOCK).unlink()  # somebody tidied up
        save_checkpoint(run, 2, GPT2(TINY), owner=mine)
        assert lock_number(run) == mine.number
        other = locked(run)
        with pytest.raises(OSError, match="was taken by another run .*stops and saves nothing"):
            save_checkpoint(run, 3, GPT2(TINY), owner=mine)
        os.utime(run / LOCK, (0, 0))
        time.sleep(0.6)
        assert (run / LOCK).stat().st_mtime == 0  # it does not touch the other's lock
    assert lock_number(run) == other and not (run / "step-00000003").exists()


KILLED = """
import sys, time
from pathlib import Path
from megatron_edu.files import beside
from megatron_edu.owner import own_run
run = Path(sys.argv[1])
with own_run(run, touch=0.2):
    beside(run / "step-00000001").mkdir()
    print("owned", flush=True)
    time.sleep(60)
"""


def test_after_a_kill_the_run_goes_on(tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, run], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "owned\n"
    with pytest.raises(ValueError, match=f"of process {process.pid}; wait"):
        with own_run(run, **QUICK):
            pytest.fail("taken")
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and stays a zombie
    assert owner._started(process.pid) is None
    said = []
    with own_run(run, touch=0.2, say=said.append):
        assert sorted(path.name for path in run.iterdir()) == [MARK, LOCK]
    process.wait()
    assert all("waiting 0 s" in text for text in said)
