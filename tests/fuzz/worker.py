"""Run cases, each in a process forked for it: python tests/fuzz/worker.py [NAME ...]

With names, those cases alone, and their folders stay. Without, names are read from standard input
as a JSON list, and a JSON object of verdicts is written.
"""

import contextlib
import faulthandler
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
for library in ("OMP", "OPENBLAS", "MKL"):  # a process with threads cannot be forked safely
    os.environ[f"{library}_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from limits import HANG  # noqa: E402

from fuzz import world  # noqa: E402
from fuzz.cases import CLEAN, Accepted, Case, read_tensors  # noqa: E402
from fuzz.all_cases import CASES  # noqa: E402

MEMORY = 1 << 30  # bytes that a case may have of its own
SECONDS = 120  # of a core, after which a case counts as hung
AT_ONCE = 2  # cases


def preload() -> None:
    "Import here what each case would import for itself, and see that no thread came of it."
    import importlib

    import torch

    from megatron_edu.cli.options import VERBS

    for verb in VERBS.values():
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(f"megatron_edu.cli.{verb.module}")
    for kind in ("gpt2", "bert", "megatron_bert"):
        importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    torch.set_num_threads(1)
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/task")) == 1, "a thread runs here: forks would hang"


# The child


def limited(memory: int) -> None:
    "Take memory and processor time away from this process."
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))


def command(words: tuple[str, ...]) -> int:
    "The exit status of the command, in this process."
    from megatron_edu.cli import main

    try:
        main(list(words))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def in_child(folder: Path, words: tuple[str, ...]) -> int:
    "Start a process that runs the command in a folder; its output goes to files beside it."
    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(folder)
        os.setsid()
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            path = os.devnull if number == 0 else f"{folder}.{name}"
            mode = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(path, mode), number)
        faulthandler.enable()
        os.mkdir(f"{folder}.tmp")
        os.environ["TMPDIR"] = f"{folder}.tmp"  # where a traceback would be written
        tempfile.tempdir = None
        signal.alarm(int(HANG / 4))
        limited(MEMORY)
        status = command(words)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        status = 99
    os._exit(status)


# The parent


def snapshot(folder: Path) -> dict[str, str]:
    "What lies in a folder: the content of files, the targets of links."
    found = {}
    for root, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(root, name)
            where = str(path.relative_to(folder))
            if path.is_symlink():
                found[where] = f"-> {os.readlink(path)}"
            elif path.is_file():
                found[where] = hashlib.sha1(path.read_bytes()).hexdigest()
            else:
                found[where] = "folder" if path.is_dir() else "special"
    return found


def value(words: tuple[str, ...], option: str) -> str:
    "What a line says after an option, at last."
    found = [after for word, after in zip(words, words[1:], strict=False) if word == option]
    return found[-1]


def result(folder: Path, words: tuple[str, ...], printed: str) -> object:
    "What a verb made: tokens, losses, text or weights."
    verb = words[0]
    if verb == "generate":
        return printed
    out = Path(os.path.normpath(folder / value(words, "--to" if verb == "convert" else "--out")))
    if verb == "prepare":
        return [
            hashlib.sha1((out / f"tokens.{e}").read_bytes()).hexdigest() for e in ("bin", "idx")
        ]
    if verb == "train":
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return [[line[name] for name in ("step", "loss", "grad_norm")] for line in lines]
    files = [path for path in sorted(out.rglob("*.safetensors")) if "optimizer" not in path.name]
    return [hashlib.sha1(read_tensors(path)[1]).hexdigest() for path in files]


def one_line(words: tuple[str, ...], said: str) -> bool:
    "Whether standard error holds lines of the command alone, and one refusal at the end."
    return bool(said) and all(line.startswith("megatron-edu") for line in said.splitlines())


def judge(case: Case, folder: Path, status: int, before: dict, clean: dict) -> str:
    "What is wrong with how a case ended; nothing if it is what was stated."
    printed = Path(f"{folder}.stdout").read_text(errors="replace")
    said = Path(f"{folder}.stderr").read_text(errors="replace")
    kept = [path.read_text() for path in Path(f"{folder}.tmp").glob("megatron-edu-*.txt")]
    report = f"\nstatus {status}\nstdout {printed[-1500:]}\nstderr {said[-1500:]}\n" + "\n".join(
        kept
    )
    if isinstance(case.expected, Accepted):
        if status:
            return f"not accepted{report}"
        if not re.search(case.expected.saying, said + printed):
            return f"accepted without {case.expected.saying!r}{report}"
        try:
            found = result(folder, case.line, printed)
        except (OSError, ValueError) as error:
            return f"accepted, but without a result ({error}){report}"
        wanted = clean[case.expected.like]
        return "" if found == wanted else f"accepted, but {found} is not {wanted}{report}"
    if status != 2:
        return f"not refused{report}"
    if not one_line(case.line, said):
        return f"refused, but not in a line of its own{report}"
    last = said.splitlines()[-1]
    missing = [each for each in case.expected.naming if not re.search(each, last)]
    if missing:
        return f"refused without naming {missing}{report}"
    after = snapshot(folder)
    changed = sorted(where for where, what in before.items() if after.get(where) != what)
    return f"refused, but changed {changed}{report}" if changed else ""


def ready(case: Case, home: Path, clean: Path, number: int) -> Path:
    "A folder of its own for a case, with the clean input that it names, changed."
    folder = home / f"case{number}"
    folder.mkdir()
    for name in {word.split("/")[0] for word in (*case.line, *case.needs)} & set(os.listdir(clean)):
        source = clean / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copy(source, folder / name)
    case.make(folder, case.chance)
    return folder


def run_all(cases: list[Case], home: Path, clean_input: Path, clean: dict, tell) -> None:
    "Run cases, some at once; `tell(case, folder, verdict)` for each."
    waiting, running = list(enumerate(cases)), {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number, case = waiting.pop(0)
            folder = ready(case, home, clean_input, number)
            before = snapshot(folder)
            running[in_child(folder, case.line)] = case, folder, before
        pid, code = os.wait()
        case, folder, before = running.pop(pid)
        status = os.waitstatus_to_exitcode(code)
        tell(case, folder, judge(case, folder, status, before, clean))


def results_of_clean(home: Path, clean_input: Path) -> dict[str, object]:
    "The results of the clean lines. They go well, or nothing can be said of the others."
    found = {}

    def tell(case, folder, verdict):
        printed = Path(f"{folder}.stdout").read_text()
        assert not verdict.startswith("not"), (case.name, verdict)
        found[case.name] = result(folder, case.line, printed)

    lines = {name: tuple(line.split()) for name, line in CLEAN.items()}
    nothing = [
        Case("clean", name, line, Accepted(name), lambda folder, chance: None, ())
        for name, line in lines.items()
    ]
    place = home / "clean"
    place.mkdir()
    run_all(nothing, place, clean_input, dict.fromkeys(lines), tell)
    return found


def make_world(folder: Path) -> None:
    "The clean input, in a process of its own: making it starts threads."
    folder.mkdir()
    pid = os.fork()
    if not pid:
        status = 99
        try:
            os.chdir(folder)
            with contextlib.redirect_stdout(sys.stderr):
                world.make()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0, "the clean input could not be made"


def main(names: list[str]) -> int:
    preload()
    chosen = names or json.load(sys.stdin)
    home, verdicts = Path(tempfile.mkdtemp(prefix="fuzz-")), {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def tell(case, folder, verdict):
        verdicts[f"{case.kind}: {case.name}"] = verdict
        if names:
            print(f"== {case.kind}: {case.name}: {verdict or 'as stated'}\n{folder}", flush=True)

    try:
        begun = time.monotonic()
        make_world(home / "input")
        clean = results_of_clean(home, home / "input")
        place = home / "cases"
        place.mkdir()
        run_all([CASES[name] for name in chosen], place, home / "input", clean, tell)
        print(f"{len(chosen)} cases, {time.monotonic() - begun:.0f} s", file=sys.stderr)
        if not names:
            json.dump(verdicts, sys.stdout)
    finally:
        if not names:
            shutil.rmtree(home, ignore_errors=True)
    return int(any(verdicts.values()) if names else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
