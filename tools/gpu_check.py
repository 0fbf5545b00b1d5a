#!/usr/bin/env python3
"""What a machine with GPUs allows, checked and timed: python tools/gpu_check.py [--out FOLDER]

It needs torch 2.11 or later and numpy, no network, and less than 8 minutes. Rungs, from ranks that
run everywhere to ranks that want two GPUs, each passed, failed, refused or not possible here:

  a  gloo on the CPU, two ranks
  b  gloo on CUDA tensors, two ranks on one GPU
  c  NCCL, one rank
  d  NCCL, two ranks on one GPU, which tell NCCL that they are on different hosts
  e  NCCL, a GPU for each of two ranks, or of four where there are four

On each: the four checks and 20 training steps of a GPT-2 and a BERT, in float64. Then one GPU is
timed, in the order that --plan prints: first without torch.compile, in it bf16 before tf32 before
fp32. A timing that would not end within --seconds is dropped and named, so that the last of the
order go first; two ranks are timed only while half of the seconds are left. All of it runs in child
processes that are ended at a limit (tools/gpu_ranks.py). Exit status: 0 if all that is possible
here passed, else 3.
"""

import argparse
import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import gpu_ranks
from gpu_ranks import (
    DATASHEET,
    FORMULA,
    GRIDS,
    ROOT,
    RUNGS,
    STEPS,
    Timing,
    estimate,
    one_line,
    order,
    parts_of,
)

RUNG_SECONDS = 150      # that a rung may take
ANSWER_SECONDS = 120    # that the timed process may be silent

# ------------------------------------------------------------------------------------ the rungs


def ranks_of(name: str, facts: dict) -> int:
    "Ranks of a rung on this machine."
    return 4 if name == "e" and facts["gpus"] >= 4 else RUNGS[name].ranks


def obstacle(name: str, facts: dict) -> str | None:
    "Why a rung is not possible on this machine, if it is not."
    rung = RUNGS[name]
    if facts["gpus"] < rung.gpus:
        return f"GPUs needed: {rung.gpus}, found: {facts['gpus']}"
    if rung.backend == "nccl" and not facts["nccl"]:
        return "this torch has no NCCL"
    return None


def environment(name: str | None, rank: int = 0) -> dict[str, str]:
    "Of one child process. The ranks are on this machine: they talk over its loopback."
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    own = {"PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": loopback}
    if name is not None and RUNGS[name].backend == "nccl":
        own["NCCL_SOCKET_IFNAME"] = loopback
    if name is not None and RUNGS[name].own_hosts:
        # NCCL refuses two ranks of one host on one GPU. Between hosts it takes sockets.
        own |= {"NCCL_HOSTID": f"megatron-edu-{rank}", "NCCL_NET": "Socket"}
    return {"OMP_NUM_THREADS": "1", **os.environ, **own}


# ------------------------------------------------------------------------------ child processes


def child_command(spec: dict) -> list[str]:
    "How a child is started."
    return [sys.executable, str(Path(gpu_ranks.__file__).resolve()), json.dumps(spec)]


def start(spec: dict, folder: str, rank: int) -> subprocess.Popen:
    "One child, in a session of its own, so that what it starts can be ended with it."
    with open(Path(folder, f"errors_{rank}"), "wb") as errors:
        return subprocess.Popen(
            child_command(spec | {"rank": rank, "folder": folder}),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env=environment(spec.get("rung"), rank), start_new_session=True,
        )


def listen(rank: int, process: subprocess.Popen, heard: queue.Queue) -> None:
    "Put what a child prints into the queue."
    for line in process.stdout:
        with contextlib.suppress(ValueError):       # a line that some library printed
            answer = json.loads(line)
            if isinstance(answer, dict) and "kind" in answer:
                heard.put((rank, answer))


def await_end(rank: int, process: subprocess.Popen, heard: queue.Queue) -> None:
    "Put the end of a child into the queue: its output may stay open, in what it started."
    code = process.wait()
    time.sleep(0.5)         # for its last lines
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    heard.put((rank, {"kind": "ended", "reason": how}))


def end(process: subprocess.Popen) -> None:
    "Kill a child and all that it started."
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):    # in the driver it may not be killable
        process.wait(5)
    process.stdin.close()


def last_words(folder: str, rank: int) -> str:
    "The last line that a child wrote to its standard error."
    lines = Path(folder, f"errors_{rank}").read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing said")


def next_answer(heard: queue.Queue, waiting: set, seconds: float, folder: str):
    "Rank and answer of the next child of some to speak. Silence and an early end are errors."
    finish = time.monotonic() + seconds
    while True:
        try:
            rank, answer = heard.get(timeout=max(0.0, finish - time.monotonic()))
        except queue.Empty:
            who = ", ".join(map(str, sorted(waiting)))
            reason = f"rank {who}: no answer within {max(0.0, seconds):.0f} s"
            return None, {"kind": "error", "reason": reason}
        if rank not in waiting:
            continue
        if answer["kind"] == "ended":
            answer["reason"] += f": {one_line(last_words(folder, rank))}"
        if answer["kind"] in ("ended", "error"):
            answer = {"kind": "error", "reason": f"rank {rank}: {answer['reason']}"}
        return rank, answer


def all_reasons(first: dict, heard: queue.Queue, others: set, folder: str) -> dict:
    "An error with those of the other ranks: the first to speak may only have lost one that failed."
    reasons = [first["reason"]]
    while others:
        rank, answer = next_answer(heard, others, 3, folder)
        if rank is None:
            break
        others = others - {rank}
        if answer["kind"] == "error":
            reasons.append(answer["reason"])
    return {"kind": "error", "reason": "; ".join(reasons)}


def converse(spec: dict, size: int, limit: float, silence: float) -> Iterator[tuple[int, dict]]:
    """Start `size` children with one task; yield rank and answer until all are done.

    A child that fails, or that is silent for too long, ends all: "error" is the last answer.
    """
    heard, finish = queue.Queue(), time.monotonic() + limit
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        children, waiting = [], set(range(size))
        try:
            for rank in range(size):
                children.append(start(spec | {"size": size}, folder, rank))
                for task in (listen, await_end):
                    told = rank, children[rank], heard
                    threading.Thread(target=task, args=told, daemon=True).start()
            while waiting:
                seconds = min(silence, finish - time.monotonic())
                rank, answer = next_answer(heard, waiting, seconds, folder)
                if answer["kind"] == "done":
                    waiting = waiting - {rank}
                elif answer["kind"] == "error":
                    others = set() if rank is None else waiting - {rank}
                    yield rank, all_reasons(answer, heard, others, folder)
                    return
                else:
                    yield rank, answer
        finally:
            for process in children:
                end(process)


# ------------------------------------------------------------------------------------- the page


class Page:
    "All results so far, written to two files after each."

    def __init__(self, out: Path, facts: dict, commit: str, seconds: float):
        self.out, self.begun = out, time.monotonic()
        self.finish = self.begun + seconds
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        self.data = {
            "date": date, "commit": commit, "machine": facts, "seconds_allowed": seconds,
            "formula": FORMULA, "rungs": {}, "timings": [],
        }

    def left(self) -> float:
        "Seconds until the deadline."
        return self.finish - time.monotonic()

    def note(self, line: str) -> None:
        "Print a line, at once, and write the files."
        print(line, flush=True)
        self.data["seconds"] = round(time.monotonic() - self.begun, 1)
        self.out.mkdir(parents=True, exist_ok=True)
        pages = {"json": json.dumps(self.data, indent=1, allow_nan=False) + "\n"}
        pages["md"] = table(self.data)
        for kind, text in pages.items():
            partial = self.out / f"gpu_check.{kind}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.out / f"gpu_check.{kind}")

    def code(self) -> int:
        "Exit status: 3 if something possible did not pass."
        rungs = [found["status"] in ("failed", "dropped") for found in self.data["rungs"].values()]
        timings = [found["status"] == "failed" for found in self.data["timings"]]
        return 3 if any(rungs + timings) else 0


def timing_row(found: dict, machine: dict) -> str:
    "One row of the table."
    flags = ["yes" if found[flag] else "no" for flag in ("recompute", "compile")]
    head = [found.get("rung", "one GPU"), found["model"], found["batch"], found["tp"]]
    head += [found["precision"], *flags]
    if found["status"] != "measured":
        why = found.get("reason", "the loss is not finite")
        return row(*head, f"{found['status']}: {why}", *[""] * 6)
    low, middle, high = (1000 * x for x in found["seconds"])
    top = DATASHEET.get(machine["gpu"], {}).get(found["precision"])
    peak = found["peak_bytes"]
    return row(
        *head, f"{middle:.1f} ({low:.1f}-{high:.1f})", f"{found['tokens_per_second']:,.0f}",
        "" if peak is None else f"{peak / 1e9:.1f}", f"{found['flops_per_second'] / 1e12:.1f}",
        f"{found['share_of_gemm']:.2f}",
        f"{found['flops_per_second'] / (top * found.get('gpus', 1)):.2f}" if top else "",
        f"{found['first_step_seconds']:.1f}",
    )


def row(*cells) -> str:
    "Cells as a row of a Markdown table."
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def highest(rungs: dict) -> str:
    "The last rung that passed."
    passed = [name for name in rungs if rungs[name]["status"] == "passed"]
    return f"{max(passed)} ({RUNGS[max(passed)].title})" if passed else "none"


def summary(name: str, found: dict) -> str:
    "The worst numbers of a rung in words."
    errors = [e for r in found["results"] for e in r.get("errors", {}).values()]
    steps = [r["difference"] for r in found["results"] if "difference" in r]
    worst = [max(map(float, each)) for each in (errors, steps) if each]
    words = zip(("largest error of the four checks", f"of the losses of {STEPS} steps"), worst)
    numbers = ", ".join(f"{what} {value:.1e}" for what, value in words)
    return "; ".join(filter(None, (found.get("reason"), numbers)))


def table(data: dict) -> str:
    "The page: machine, rungs, timings."
    m = data["machine"]
    lines = [
        "# GPU check", "",
        f"{data['date']}, commit {data['commit']}: {m['gpu']} ({m['gpus']} found, "
        f"{m['memory'] / 1e9:.0f} GB), driver {m['driver']}, CUDA {m['cuda']}, "
        f"NCCL {m['nccl'] or 'none'}, torch {m['torch']}, Python {m['python']}. "
        f"{data.get('seconds', 0):.0f} s of {data['seconds_allowed']:.0f} s. "
        f"Highest rung passed: {highest(data['rungs'])}.", "",
        row("rung", "", "verdict", "numbers, or why not"), row(*["---"] * 4),
    ]
    for name, found in data["rungs"].items():
        lines.append(row(name, RUNGS[name].title, found["status"], summary(name, found)))
    if data["timings"]:
        lines += [
            "", f"FLOPs of a step: {data['formula']}. Peaks: the matrix products of a layer, timed "
            "in the same run, precision and shapes; and the dense rate of the data sheet, where it "
            "is the H200's. Presets as they are, dropout included, sequences of full length.", "",
            row(
                "rung", "model", "batch", "tp", "precision", "recompute", "compile",
                "ms a step: median (quartiles)", "tokens/s", "peak GB", "TFLOP/s",
                "share of GEMM", "share of data sheet", "first step s",
            ),
            row(*["---"] * 14), *(timing_row(found, m) for found in data["timings"]),
        ]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------ the ladder


def timings_of(name: str, page: Page, facts: dict) -> list[dict]:
    "One timing on two ranks, while half of the seconds are left. None on the CPU and on one rank."
    if RUNGS[name].device == "cpu" or ranks_of(name, facts) == 1 or not facts["ampere"]:
        return []
    timing = Timing("gpt2-124m", "bf16", False, False, 4, tp=ranks_of(name, facts))
    if page.left() < page.data["seconds_allowed"] / 2:
        reason = "less than half of the seconds are left"
        dropped = {"rung": name, **asdict(timing), "status": "dropped", "reason": reason}
        note_timing(page, dropped)
        return []
    return [asdict(timing)]


def keep(page: Page, name: str, rank: int, answer: dict) -> None:
    "Write one answer of a rung down. Where ranks disagree, the one that did not pass counts."
    found = page.data["rungs"][name]
    if answer["kind"] == "timing":
        if rank == 0:
            note_timing(page, answer)
    elif rank == 0 or not answer["passed"]:
        found["results"].append(answer | {"rank": rank})
        words = {key: value for key, value in answer.items() if key not in ("kind", "passed")}
        verdict = "passed" if answer["passed"] else "FAILED"
        text = ", ".join(f"{key} {value}" for key, value in words.items())
        page.note(f"     rank {rank}: {verdict} {answer['kind']}: {text}")


def climb(name: str, page: Page, facts: dict) -> None:
    "Try one rung."
    rung, begun = RUNGS[name], time.monotonic()
    found = page.data["rungs"][name] = {"title": rung.title, "status": "running", "results": []}
    reason = obstacle(name, facts)
    if reason or page.left() < 10:
        found["status"] = "not possible here" if reason else "dropped"
        found["reason"] = reason or f"{page.left():.0f} s left"
        page.note(f"{name}  {rung.title}: {found['status']}: {found['reason']}")
        return
    page.note(f"{name}  {rung.title}")
    spec = {"do": "rung", "rung": name, "timings": timings_of(name, page, facts)}
    size, limit = ranks_of(name, facts), min(RUNG_SECONDS, page.left())
    error = None
    with contextlib.closing(converse(spec, size, limit, limit)) as answers:
        for rank, answer in answers:
            if answer["kind"] == "error":
                error = answer["reason"]
            else:
                keep(page, name, rank, answer)
    checked = sum(r["rank"] == 0 for r in found["results"]) == results_of(name, size)
    timed = any(timing.get("rung") == name for timing in page.data["timings"])
    if error and checked and spec["timings"] and not timed:     # the checks are not to blame
        failed = {"rung": name, **spec["timings"][0], "status": "failed", "reason": error}
        note_timing(page, failed)
        error = None
    found["seconds"] = round(time.monotonic() - begun, 1)
    found["status"], found["reason"] = verdict_of(name, found["results"], size, error)
    page.note(f"{name}  {found['status']} {found['reason']}")


def results_of(name: str, size: int) -> int:
    "How many results a rank has when a rung is done."
    return 1 + len(GRIDS[size]) * len(parts_of(RUNGS[name]))


def verdict_of(name: str, results: list, size: int, error: str | None) -> tuple[str, str]:
    "Status and reason. Two ranks on one GPU that cannot even meet were refused by NCCL."
    if error and RUNGS[name].own_hosts and not results:
        return "refused", error
    red = [f"{r['kind']} of {r.get('model', 'all')}" for r in results if not r["passed"]]
    expected = results_of(name, size)
    if not (red or error) and len(results) != expected:
        error = f"{len(results)} of {expected} results"
    reasons = list(dict.fromkeys(red)) + ([error] if error else [])
    return "failed" if reasons else "passed", ", ".join(reasons)


def time_one_gpu(page: Page, facts: dict) -> None:
    "All timings of one GPU. A process that dies or hangs costs one timing, and the next goes on."
    waiting = order(facts)
    if not facts["ampere"]:
        lost = [timing for timing in waiting if timing.precision != "fp32"]
        reason = f"{facts['gpu']} has neither bf16 nor tf32"
        for timing in lost:
            note_timing(page, asdict(timing) | {"status": "not possible here", "reason": reason})
        waiting = [timing for timing in waiting if timing not in lost]
    while waiting and page.left() > 5:
        spec = {"do": "grid", "device": "cuda:0", "timings": [asdict(t) for t in waiting]}
        spec["deadline"] = time.time() + page.left() - 5
        with contextlib.closing(converse(spec, 1, page.left(), ANSWER_SECONDS)) as answers:
            for _, answer in answers:
                if answer["kind"] == "timing":
                    note_timing(page, answer)
                    waiting.pop(0)
                elif answer["kind"] == "error":
                    status = "dropped" if page.left() <= 0 else "failed"
                    failed = {"status": status, "reason": answer["reason"]}
                    note_timing(page, asdict(waiting.pop(0)) | failed)
    for timing in waiting:
        note_timing(page, asdict(timing) | {"status": "dropped", "reason": "no time is left"})


def note_timing(page: Page, found: dict) -> None:
    "Write one timing down."
    page.data["timings"].append(found)
    page.note("     " + timing_row(found, page.data["machine"]))


def plan(names: str, facts: dict, seconds: float) -> str:
    "What would run: rungs, then timings with estimated seconds, in the order in which they run."
    lines = [f"{n}  {RUNGS[n].title}: {obstacle(n, facts) or 'possible'}" for n in names]
    if not facts["gpus"]:
        lines.append("no GPU here: no timing; with the memory of an H200 they would be, in order")
        facts = facts | {"memory": 141 * 10**9}
    total = 0.0
    for timing in order(facts):
        total += estimate(timing)
        late = "" if total <= seconds else "  beyond --seconds: dropped unless others are faster"
        lines.append(f"{estimate(timing):5.0f} s  {timing}{late}")
    return "\n".join([*lines, f"{total:5.0f} s  in all, besides the rungs"])


def probe() -> dict:
    "Facts about this machine, from a child: a driver that hangs must not hang us."
    answers = list(converse({"do": "probe"}, 1, 120, 120))
    if answers[0][1]["kind"] != "facts":
        raise SystemExit(f"this machine cannot be asked: {answers[0][1]['reason']}")
    return answers[0][1]


def commit_here() -> str:
    "The commit of the repository, if git knows it."
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def main(arguments: list[str] | None = None) -> int:
    "Climb, time, write. Exit status: 0 if all that is possible passed, else 3."
    parser = argparse.ArgumentParser(description="Check and time what this machine's GPUs allow.")
    parser.add_argument("--rungs", default="abcde", help="which to try, e.g. abc")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the page")
    parser.add_argument("--seconds", type=float, default=460.0, help="for everything")
    parser.add_argument("--commit", help="that is checked, where there is no git")
    parser.add_argument("--plan", action="store_true", help="say what would run, and run nothing")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.rungs) - set(RUNGS))
    if unknown or not options.rungs or not 0 < options.seconds < math.inf:
        parser.error(f"rungs are letters of {''.join(RUNGS)}; --seconds is above 0")
    begun = time.monotonic()
    names = "".join(name for name in RUNGS if name in options.rungs)
    facts = probe()
    if options.plan:
        print(plan(names, facts, options.seconds))
        return 0
    page = Page(options.out, facts, options.commit or commit_here(), options.seconds)
    page.finish -= time.monotonic() - begun
    page.note(f"{facts['gpu']}, {facts['gpus']} found; torch {facts['torch']}")
    for name in names:
        climb(name, page, facts)
    if facts["gpus"] and names != "a":
        time_one_gpu(page, facts)
    page.note("\n" + table(page.data))
    return page.code()


if __name__ == "__main__":
    # Whoever ends this process ends its children, on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
