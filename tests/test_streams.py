"Streams that are closed, that lose their reader, and that cannot write every letter."

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from megatron_edu.streams import hushed, patient_streams

LONG = "import sys\nfrom megatron_edu.streams import patient_streams\nwith patient_streams():\n"


def shell(code, redirect):
    "Exit status and both streams of a program, started by a shell with a redirection."
    command = f'"{sys.executable}" -c "$CODE" {redirect}'
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], env={"CODE": code, "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, cwd=".",
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("redirect", ["| true", "| head -1 >/dev/null", ">&-"])
def test_a_reader_that_leaves_does_not_end_the_work(tmp_path, redirect):
    code = f"{LONG}    for i in range(20000):\n        print(i, flush=i % 7 == 0)\n"
    code += f"    open({str(tmp_path / 'done')!r}, 'w')\n"
    assert shell(code, redirect) == (0, "", "")
    assert (tmp_path / "done").exists()


def test_closed_standard_error():
    code = LONG + "    print('lost', file=sys.stderr)\n    print(sys.stderr.isatty())\n"
    assert shell(code, "2>&-") == (0, "False\n", "")


@pytest.mark.parametrize("strict", [True, False])
def test_letters_that_a_stream_does_not_have(monkeypatch, strict):
    raw = io.BytesIO()

    class Rigid(io.TextIOWrapper):
        reconfigure = property(lambda self: (_ for _ in ()).throw(AttributeError))

    kind = Rigid if strict else io.TextIOWrapper
    monkeypatch.setattr(sys, "stdout", kind(raw, encoding="ascii", errors="strict"))
    with patient_streams():
        print("na\u00efve \u4e2d \udce9")
    assert raw.getvalue() == b"na\\xefve \\u4e2d \\udce9\n"


def test_a_full_disk_is_not_a_reader_that_left():
    code = LONG + "    print('x')\n"
    status, _, errors = shell(code, "> /dev/full")
    assert status == 1 and "No space left on device" in errors


@pytest.mark.parametrize("words", [["presets"], ["--version"], ["train", "--help"]])
def test_output_that_cannot_be_written_is_named_with_a_remedy(words):
    code = f"from megatron_edu.cli import main\nmain({words!r})\n"
    status, _, errors = shell(code, "> /dev/full")
    assert status == 2 and errors.count("\n") == 1
    assert "standard output could not be written (No space left on device); make room" in errors


@pytest.mark.parametrize("quiet", [False, True])
def test_a_quiet_verb_prints_nothing_and_shows_no_bar(monkeypatch, capsys, quiet):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)

    def work(config, text):
        print(text)
        list(tqdm(range(2), disable=None))
        print("a remark", file=sys.stderr)
        return text

    assert hushed(work)(SimpleNamespace(quiet=quiet), "words") == "words"
    out, err = capsys.readouterr()
    assert out == "words\n" * (not quiet) and (err == "a remark\n") == quiet
    assert hushed(work)(SimpleNamespace(), "words") and capsys.readouterr().out == "words\n"


@pytest.mark.parametrize("words", [["nonsense"], ["generate", "absent"], ["presets"]])
def test_a_refusal_that_cannot_be_said_is_still_a_refusal(words):
    code = f"from megatron_edu.cli import main\nmain({words!r})\n"
    assert shell(code, "> /dev/full 2> /dev/full") == (2, "", "")


def test_streams_are_put_back():
    before = sys.stdout, sys.stderr
    with patient_streams(), patient_streams():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before
