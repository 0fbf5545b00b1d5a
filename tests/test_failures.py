"What is told to the user as one line, and what stays an exception that nobody foresaw."

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import torch

from megatron_edu.cli.net import signals_raise
from megatron_edu.config import GPT2Config
from megatron_edu.errors import RankError, Stopped
from megatron_edu.failures import PACKAGE, in_words, raised_by_us
from megatron_edu.interop import compare


def caught(call, *args):
    with pytest.raises(BaseException) as error:
        call(*args)
    return error.value


def as_code_of(file, source):
    "A function `f`, compiled as if it stood in that file."
    space = {}
    exec(compile(source, str(file), "exec"), space)
    return space["f"]


def test_a_raise_of_the_package_is_an_answer():
    error = caught(lambda: GPT2Config(1, 10, 3, vocab_size=10, max_seq_len=4))
    assert raised_by_us(error) and in_words(error) == str(error)


@pytest.mark.parametrize(
    "source",
    ["def f(): int('x')", "def f(): {}['x']", "def f(): [].pop()",
     "def f(): import json; json.loads('{')"],
)
def test_what_breaks_in_the_package_is_no_answer(source):
    error = caught(as_code_of(PACKAGE / "some_module.py", source))
    assert not raised_by_us(error) and in_words(error) is None


def test_a_raise_elsewhere_is_no_answer():
    error = caught(as_code_of("site-packages/other.py", "def f(): raise ValueError('hm')"))
    assert in_words(error) is None


def test_a_raise_that_passes_through_blocks_is_an_answer():
    source = (
        "import contextlib\n@contextlib.contextmanager\ndef g():\n    try:\n        yield\n"
        "    finally:\n        pass\n"
        "def f():\n    with g():\n        try:\n            int('x')\n"
        "        except ValueError:\n            raise ValueError('x: a number') from None\n"
    )
    assert in_words(caught(as_code_of(PACKAGE / "some_module.py", source))) == "x: a number"


@pytest.mark.parametrize("kind", [KeyError, AssertionError, IndexError, Exception])
def test_not_every_raise_is_an_answer(kind):      # `assert` is a raise, too
    source = f"def f(): raise {kind.__name__}('x')"
    assert in_words(caught(as_code_of(PACKAGE / "some_module.py", source))) is None


def nested():
    json.loads("[" * 100_000)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: open("/no/such/file"), "/no/such/file: No such file or directory"),
        (lambda: torch.empty(2**50), "memory ran out"),
        (lambda: bytearray(2**60), "memory ran out"),
        (nested, "a file is nested too deeply"),
    ],
)
def test_what_the_machine_refuses_is_said(call, words):
    assert in_words(caught(call)).startswith(words)


def test_a_compiler_that_is_missing():
    from torch._inductor.exc import InvalidCxxCompiler

    said = in_words(InvalidCxxCompiler())
    assert said.startswith("torch.compile failed") and "--compile" in said


def test_another_error_of_a_library_is_not_foreseen(tmp_path):
    (tmp_path / "x").write_bytes(b"no tensors")
    error = caught(safetensors.safe_open, tmp_path / "x", "pt")
    assert in_words(error) is None


def test_exceptions_of_a_run_have_their_numbers():
    import pickle

    rank = pickle.loads(pickle.dumps(RankError(3, "rank 3 failed: it")))
    assert (rank.rank, str(rank)) == (3, "rank 3 failed: it")
    stop = pickle.loads(pickle.dumps(Stopped(signal.SIGHUP)))
    assert (stop.status, str(stop)) == (129, "stopped by SIGHUP")


def test_a_hangup_that_was_ignored_from_the_start_ends_no_verb():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)   # as under nohup
    try:
        with signals_raise():
            signal.raise_signal(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(Stopped), signals_raise():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_library_takes_a_stop_for_its_own_failure():
    def backend(graph, inputs):
        raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped) as caught:
        torch.compile(torch.sin, backend=backend)(torch.ones(2))
    assert caught.value.status == 143


def test_a_stop_during_the_comparison_of_a_conversion(monkeypatch):
    def stop(model, folder):
        raise Stopped(signal.SIGHUP)

    monkeypatch.setattr(compare, "compare_with_transformers", stop)
    monkeypatch.setattr(compare, "reason_to_skip", lambda config: None)
    with pytest.raises(Stopped):
        compare.check_conversion(SimpleNamespace(config=None), Path("anywhere"))
