"""All checks of the repository, stage by stage: python tools/checks.py [stage ...]

Every stage runs, also after one that failed; the exit status is 1 if any did.
"""

import configparser
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import readme

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LIBRARY = "megatron_edu"
LINTED = [LIBRARY, "tests", "tools", "setup.py"]
COLUMNS = 100
CHAPTER_WORKERS = min(2, os.cpu_count() or 1)


@contextmanager
def copy_of_notebooks() -> Iterator[Path]:
    "A temporary folder with settings.ini and nbs/, in which nbdev may write."
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "settings.ini", folder)
        ignore = shutil.ignore_patterns(".ipynb_checkpoints")
        shutil.copytree(ROOT / "nbs", Path(folder, "nbs"), ignore=ignore)
        yield Path(folder)


def run_quietly(command: list, **options) -> list[str]:
    "Run a command. What it printed if it failed, else nothing."
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    return [result.stdout.strip() or f"exit status {result.returncode}"] * (result.returncode != 0)


def notebooks(root: Path) -> list[Path]:
    "Every notebook below nbs/, in reading order."
    return sorted(p for p in root.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def generated(root: Path) -> dict[str, bytes]:
    "Path and content of every module of the library below `root`."
    paths = [path for path in root.glob(LIBRARY + "/**/*.py") if path.name != "_modidx.py"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def library() -> list[str]:
    "megatron_edu/ is what the notebooks export"
    with copy_of_notebooks() as copy:
        problems = run_quietly([BIN / "nbdev_export"], cwd=copy)
        if problems:
            return problems
        made, kept = generated(copy), generated(ROOT)
    for name in sorted(made.keys() | kept.keys()):
        if name not in kept:
            problems.append(f"{name} is missing; run `make export`")
        elif name not in made:
            problems.append(f"{name} comes from no notebook; delete it")
        elif made[name] != kept[name]:
            problems.append(f"{name} differs from its notebook; run `make export`")
    return problems


def clean() -> list[str]:
    "notebooks are stripped of what changes from run to run"
    problems = []
    with copy_of_notebooks() as copy:
        problems += run_quietly([BIN / "nbdev_clean"], cwd=copy)
        for path in notebooks(ROOT):
            name = path.relative_to(ROOT)
            if path.read_bytes() != (copy / name).read_bytes():
                problems.append(f"{name} is not clean; run `make clean`")
            notebook = json.loads(path.read_text(encoding="utf-8"))
            if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
                problems.append(f"{name} has no kernelspec named python3 in its metadata")
            outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
            if any(output["output_type"] == "error" for output in outputs):
                problems.append(f"{name} keeps a failed cell; execute it again")
    return problems


def lint() -> list[str]:
    "ruff, and lines of at most 100 columns"
    targets = [target for target in LINTED if (ROOT / target).exists()]
    problems = run_quietly([BIN / "ruff", "check", "--quiet", *targets], cwd=ROOT)
    for target in targets:
        for path in sorted((ROOT / target).rglob("*.py")) or [ROOT / target]:
            problems += [f"{path.relative_to(ROOT)}:{n} is too long" for n in long_lines(path)]
    return problems


def long_lines(path: Path) -> list[int]:
    "Numbers of the lines over 100 columns, without the `__all__` that nbdev wraps at 120."
    numbers, in_all = [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        in_all = in_all or line.startswith("__all__ = [")
        if len(line) > COLUMNS and not in_all and path.name != "_modidx.py":
            numbers.append(number)
        in_all = in_all and not line.endswith("]")
    return numbers


def front_page() -> list[str]:
    "README.md is what nbs/index.ipynb makes"
    files = readme.render(ROOT)
    kept = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("nbs/images/index-output*")}
    problems = [
        f"{name} is stale; run `make readme`"
        for name in sorted(files.keys() | kept)
        if not (ROOT / name).exists() or files.get(name) != (ROOT / name).read_bytes()
    ]
    missing = readme.broken_links(ROOT, files["README.md"].decode())
    return problems + [f"README.md refers to {name}, which is not there" for name in missing]


def chapters() -> list[str]:
    "every chapter is executed, each in a process of its own"
    with ThreadPoolExecutor(CHAPTER_WORKERS) as pool:
        return [problem for problem in pool.map(execute, notebooks(ROOT)) if problem]


def hang() -> float:
    "Seconds after which a chapter hangs, and is ended: the limit of pytest.ini for a test."
    ini = configparser.ConfigParser()
    ini.read(ROOT / "pytest.ini", encoding="utf-8")
    return ini.getfloat("pytest", "faulthandler_timeout")


def execute(path: Path) -> str:
    "Execute one notebook and print its seconds. What went wrong, or nothing."
    start, name, limit = time.perf_counter(), path.relative_to(ROOT), hang()
    process = subprocess.Popen(
        [BIN / "nbdev_test", "--path", name],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=limit)
        passed = process.returncode == 0 and "Success." in printed
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        passed, printed = False, f"still running after {limit:g} s"
    verdict = "" if passed else "  FAILED"
    print(f"   {time.perf_counter() - start:6.1f} s  {name}{verdict}", flush=True)
    return "" if passed else f"{name}:\n{printed.strip()}"


def tests() -> list[str]:
    "pytest"
    status = subprocess.run([sys.executable, "-m", "pytest"], cwd=ROOT).returncode
    return [f"pytest ended with exit status {status}"] * (status != 0)


STAGES: list[Callable[[], list[str]]] = [library, clean, lint, front_page, chapters, tests]


def main(names: list[str]) -> int:
    unknown = set(names) - {stage.__name__ for stage in STAGES}
    if unknown:
        known = ", ".join(stage.__name__ for stage in STAGES)
        print(f"no such stage: {', '.join(sorted(unknown))}; the stages are {known}")
        return 2
    failed, start = [], time.perf_counter()
    for stage in STAGES:
        if names and stage.__name__ not in names:
            continue
        print(f"== {stage.__name__}: {stage.__doc__}", flush=True)
        begun = time.perf_counter()
        problems = stage()
        for problem in problems:
            print("   " + problem.replace("\n", "\n   "))
        verdict = "FAILED" if problems else "ok"
        print(f"== {stage.__name__}: {verdict}, {time.perf_counter() - begun:.1f} s", flush=True)
        failed += [stage.__name__] if problems else []
    verdict = "failed: " + ", ".join(failed) if failed else "all stages passed"
    print(f"== {verdict}, {time.perf_counter() - start:.1f} s")
    return int(bool(failed))


if __name__ == "__main__":
    # `make test &` ignores Ctrl-C, and what it starts would, too: some checks are of Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
