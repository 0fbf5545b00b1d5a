"""tools/gpu_check.py: its lowest rung for real, all else with stand-ins for what is not here."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_edu.config import PRESETS, BertConfig, GPT2Config
from megatron_edu.mesh import ParallelDims
from megatron_edu.models import build_model
from megatron_edu.scaling.contenders import Work
from megatron_edu.testing import ATOL, CHECKS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import gpu_check  # noqa: E402
import gpu_ranks  # noqa: E402
from gpu_ranks import STEPS, Timing  # noqa: E402

NO_GPU = {
    "gpus": 0, "nccl": "", "memory": 0, "ampere": False, "gpu": "none", "torch": "2.11.0",
    "cuda": "none", "driver": "none", "python": "3.12.3",
}
H200 = NO_GPU | {
    "gpus": 1, "nccl": "2.28.9", "memory": 150_000_000_000, "ampere": True, "gpu": "NVIDIA H200",
    "cuda": "13.0", "driver": "580.1",
}
CPU, ALONE = torch.device("cpu"), ParallelDims().build()
TINY = Timing("tiny", "bf16", False, False, batch=2)


# -------------------------------------------------------------------------- the lowest rung


def verdicts(rung: dict) -> dict[tuple, dict]:
    "Results of a rung by kind, model and grid."
    return {(r["kind"], r["model"], r["tp"], r["dp"]): r for r in rung["results"][1:]}


ABSENT = [
    "cloudpickle", "matplotlib", "nbdev", "safetensors", "sentencex", "tokenizers", "tqdm",
    "transformers", "tyro",
]
WITHOUT = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def bare(folder: Path) -> dict[str, str]:
    "An environment in which every Python starts without the modules that a machine may lack."
    (folder / "sitecustomize.py").write_text(WITHOUT)
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def test_absent_modules_are_absent_for_the_library(tmp_path):
    "Else the next test does not prove that they are not needed."
    for name in ABSENT:
        command = [sys.executable, "-c", f"import {name}"]
        done = subprocess.run(command, env=bare(tmp_path), capture_output=True, text=True)
        assert f"No module named '{name}'" in done.stderr


def test_the_lowest_rung_from_the_command_line(tmp_path):
    "As on a bare machine: from PYTHONPATH, torch and numpy alone, not in the repository."
    command = [ROOT / "tools/gpu_check.py", "--rungs", "a", "--out", "page", "--commit", "abc123"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=bare(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "page/gpu_check.json").read_text())
    assert data["commit"] == "abc123" and data["machine"]["torch"] == torch.__version__
    rung = data["rungs"]["a"]
    assert rung["status"] == "passed" and rung["results"][0]["kind"] == "collectives"
    found = verdicts(rung)
    for model in ("GPT-2", "BERT"):
        for tp, dp in ((2, 1), (1, 2)):
            checks = found["four checks", model, tp, dp]
            steps = found[f"{STEPS} steps", model, tp, dp]
            assert list(checks["errors"]) == list(CHECKS)
            assert checks["passed"] and max(checks["errors"].values()) <= ATOL
            assert steps["passed"] and steps["last"] < 0.9 * steps["first"]
            assert steps["difference"] <= gpu_ranks.LOSS_BOUND
    assert len(found) == 8 and data["timings"] == []
    page = (tmp_path / "page/gpu_check.md").read_text()
    assert "| a | gloo on the CPU, two ranks | passed |" in page
    assert "Highest rung passed: a (gloo on the CPU, two ranks)" in page
    assert page in done.stdout
    names = sorted(path.name for path in (tmp_path / "page").iterdir())
    assert names == ["gpu_check.json", "gpu_check.md"]


def with_children(tmp_path: Path, prepare: str) -> mock._patch:
    "Children that run some lines before their task."
    script = tmp_path / "child.py"
    lines = ["import sys", f"sys.path[:0] = {[str(ROOT), str(ROOT / 'tools')]!r}", prepare]
    lines += ["import json, gpu_ranks", "gpu_ranks.child(json.loads(sys.argv[1]))"]
    script.write_text("\n".join(lines))
    command = lambda spec: [sys.executable, str(script), json.dumps(spec)]  # noqa: E731
    return mock.patch.object(gpu_check, "child_command", command)


NO_F = """
from megatron_edu.comm import Pending
from megatron_edu.tensor_parallel import mappings
mappings.all_reduce_start = lambda x, group, op="sum": Pending(x, None)
"""


def test_a_model_without_f_turns_the_rung_red(tmp_path):
    with with_children(tmp_path, NO_F), mock.patch.object(gpu_check, "probe", lambda: NO_GPU):
        code = gpu_check.main(["--rungs", "a", "--out", str(tmp_path)])
    rung = json.loads((tmp_path / "gpu_check.json").read_text())["rungs"]["a"]
    assert code == 3 and rung["status"] == "failed"
    assert rung["reason"] == ", ".join(
        f"{kind} of {model}" for kind in ("four checks", "20 steps") for model in ("GPT-2", "BERT")
    )
    for (kind, _, tp, _), result in verdicts(rung).items():
        assert result["passed"] == (tp == 1)
        if kind == "four checks" and tp == 2:
            assert result["errors"]["loss"] <= ATOL < result["errors"]["norm"]
    assert "Highest rung passed: none" in (tmp_path / "gpu_check.md").read_text()


# ---------------------------------------------------------------- children that fail or hang


def conversation(script: str, size: int = 1, limit: float = 60.0, silence: float = 60.0):
    "What children say that run a script, which knows its task as `spec`."
    text = "import json, sys, os, time, signal\nspec = json.loads(sys.argv[1])\n" + script
    command = lambda spec: [sys.executable, "-c", text, json.dumps(spec)]  # noqa: E731
    with mock.patch.object(gpu_check, "child_command", command):
        return list(gpu_check.converse({"do": "test"}, size, limit, silence))


SAY = "say = lambda **answer: print(json.dumps(answer), flush=True)\n"


def test_answers_of_all_children_in_the_order_of_each():
    script = SAY + "print('NCCL version 2', 7)\nprint('[1]')\n"
    script += "say(kind='x', n=0)\nsay(kind='x', n=1)\nsay(kind='done')"
    answers = conversation(script, size=2)
    for rank in range(2):
        assert [answer["n"] for r, answer in answers if r == rank] == [0, 1]
    assert len(answers) == 4


FAILURES = {
    "dies": ("os.kill(os.getpid(), signal.SIGSEGV)", "rank 0: SIGSEGV: nothing said"),
    "says why": ("sys.exit('too old a driver')", "rank 0: exit status 1: too old a driver"),
    "ends early": ("sys.exit()", "rank 0: exit status 0: nothing said"),
    "raises": ("say(kind='error', reason='RuntimeError: no')", "rank 0: RuntimeError: no"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_child_that_fails_is_an_error_after_its_answers(how):
    script, reason = FAILURES[how]
    answers = conversation(SAY + "say(kind='x')\n" + script)
    assert answers == [(0, {"kind": "x"}), (0, {"kind": "error", "reason": reason})]


def test_the_error_of_the_rank_that_began_it_is_told_too():
    script = SAY + "say(kind='error', reason='lost a peer') if spec['rank'] else os.abort()"
    (_, answer), = conversation(script, size=2)
    assert "rank 1: lost a peer" in answer["reason"] and "rank 0: SIGABRT" in answer["reason"]


def gone(pid: int) -> bool:
    "Whether a process has ended, waited for or not."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("limits", [(500.0, 600.0), (600.0, 500.0)])
def test_a_child_that_hangs_is_ended_with_all_that_it_started(limits):
    script = SAY + "import subprocess\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    script += "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    script += "say(kind='pids', pids=[os.getpid(), other.pid])\ntime.sleep(600)"
    patience = []
    wait = gpu_check.next_answer

    def hurried(heard, waiting, seconds, folder):
        patience.append(seconds)
        return wait(heard, waiting, seconds if len(patience) == 1 else 0.1, folder)

    with mock.patch.object(gpu_check, "next_answer", hurried):
        (_, pids), (_, error) = conversation(script, 1, *limits)
    assert error == {"kind": "error", "reason": "rank 0: no answer within 0 s"}
    assert len(patience) == 2 and all(400 < seconds <= 500 for seconds in patience)
    for _ in range(600):        # the kernel may take its time
        if all(map(gone, pids["pids"])):
            break
        time.sleep(0.1)
    assert all(map(gone, pids["pids"]))


def test_a_child_ends_when_its_parent_is_gone():
    "However the parent ended: its end of the pipe is closed."
    reader, writer = os.pipe()
    ended = []
    with open(reader, "rb") as stream:
        fake = SimpleNamespace(buffer=stream)
        with mock.patch("sys.stdin", fake), mock.patch("os._exit", ended.append):
            thread = threading.Thread(target=gpu_ranks.leave_with_parent)
            thread.start()
            assert thread.is_alive() and not ended
            os.close(writer)
            thread.join()
    assert ended == [1]


def test_errors_in_one_line():
    nccl = "NCCL error in: x.cpp:93, invalid usage\nncclInvalidUsage\nLast error:\nDuplicate GPU"
    assert gpu_ranks.one_line(RuntimeError(nccl)) == (
        "RuntimeError: Duplicate GPU: NCCL error in: x.cpp:93, invalid usage"
    )
    assert gpu_ranks.one_line("a\nb") == "a"
    assert gpu_ranks.one_line(ValueError()) == "ValueError"
    assert len(gpu_ranks.one_line("x" * 1000)) == 300


# --------------------------------------------------------------------- rungs on other machines


@pytest.mark.parametrize(
    "facts, possible",
    [
        (NO_GPU, "a"),
        (H200, "abcd"),
        (H200 | {"nccl": ""}, "ab"),
        (H200 | {"gpus": 2}, "abcde"),
        (H200 | {"gpus": 8}, "abcde"),
    ],
)
def test_which_rungs_a_machine_allows(facts, possible):
    found = {name: gpu_check.obstacle(name, facts) for name in gpu_check.RUNGS}
    assert "".join(name for name in found if found[name] is None) == possible
    assert all("GPUs needed" in why or "no NCCL" in why for why in found.values() if why)
    sizes = [gpu_check.ranks_of(name, facts) for name in "abcde"]
    assert sizes == [2, 2, 1, 2, 4 if facts["gpus"] >= 4 else 2]
    assert all(tp * dp == size for size, grids in gpu_ranks.GRIDS.items() for tp, dp in grids)


def test_only_rung_d_has_hosts_of_its_own(monkeypatch):
    monkeypatch.delenv("NCCL_HOSTID", raising=False)
    two = [gpu_check.environment("d", rank) for rank in range(2)]
    assert two[0]["NCCL_HOSTID"] != two[1]["NCCL_HOSTID"]
    assert all(own["NCCL_NET"] == "Socket" and own["NCCL_SOCKET_IFNAME"] for own in two)
    for name in (None, "a", "b", "c", "e"):
        own = gpu_check.environment(name, 1)
        assert "NCCL_HOSTID" not in own and own["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
        assert ("NCCL_SOCKET_IFNAME" in own) == (name in ("c", "e"))


@pytest.mark.parametrize("name, rank, device", [
    ("a", 1, "cpu"), ("b", 1, "cuda:0"), ("c", 0, "cuda:0"), ("d", 1, "cuda:0"), ("e", 1, "cuda:1"),
])
def test_the_world_of_each_rung(name, rank, device):
    calls = mock.Mock()
    with (
        mock.patch("torch.cuda.set_device", calls.set_device),
        mock.patch("torch.cuda.init", calls.init),
        mock.patch("torch.distributed.init_process_group", calls.join),
    ):
        spec = {"rung": name, "rank": rank, "size": 2, "folder": "/there"}
        assert gpu_ranks.join(spec) == torch.device(device)
    (backend,), options = calls.join.call_args
    assert backend == ("gloo" if name in "ab" else "nccl")
    assert (options["rank"], options["world_size"]) == (rank, 2)
    assert options["init_method"] == "file:///there/meeting"
    order = [call[0] for call in calls.mock_calls]
    assert order == (["join"] if name == "a" else ["set_device", "init", "join"])


def climbed(name, answers, tmp_path, facts=H200, seconds=400.0):
    "A rung whose children say what is given."
    page = gpu_check.Page(tmp_path, facts, "abc", seconds)
    with mock.patch.object(gpu_check, "converse", lambda *_: (a for a in answers)):
        gpu_check.climb(name, page, facts)
    assert json.loads((tmp_path / "gpu_check.json").read_text())["rungs"] == page.data["rungs"]
    return page.data["rungs"][name], page


def results(name, size):
    "Green answers of all ranks."
    one = [{"kind": "collectives", "passed": True}]
    for tp, dp in gpu_ranks.GRIDS[size]:
        for part, model in gpu_ranks.parts_of(gpu_ranks.RUNGS[name]):
            kind = "four checks" if part is gpu_ranks.four_checks else "20 steps"
            one.append({"kind": kind, "model": model, "tp": tp, "dp": dp, "passed": True})
    return [(rank, dict(answer)) for answer in one for rank in range(size)]


ERROR = (0, {"kind": "error", "reason": "rank 0: DistBackendError: Duplicate GPU"})


def test_verdicts(tmp_path):
    good = results("d", 2)
    assert climbed("d", good, tmp_path)[0]["status"] == "passed"
    found, page = climbed("d", [ERROR], tmp_path)
    assert found["status"] == "refused" and "Duplicate GPU" in found["reason"]
    assert page.code() == 0, "NCCL may refuse two ranks on one GPU"
    for name, answers in {"b": [ERROR], "d": [*good[:4], ERROR], "c": results("c", 1)[:-1]}.items():
        found, page = climbed(name, answers, tmp_path)
        assert found["status"] == "failed" and found["reason"] and page.code() == 3
    found, page = climbed("e", good, tmp_path)
    assert found["status"] == "not possible here" and page.code() == 0
    found, page = climbed("b", good, tmp_path, seconds=5.0)
    assert found["status"] == "dropped" and page.code() == 3


def test_a_rank_that_disagrees_makes_the_rung_fail(tmp_path):
    answers = results("b", 2)
    answers[7][1]["passed"] = False     # rank 1 of the fourth
    found, _ = climbed("b", answers, tmp_path)
    assert (found["status"], found["reason"]) == ("failed", "20 steps of GPT-2")


def test_a_failed_timing_leaves_the_checks_alone(tmp_path):
    found, page = climbed("b", [*results("b", 2), ERROR], tmp_path)
    assert found["status"] == "passed" and page.code() == 3
    timing, = page.data["timings"]
    assert (timing["rung"], timing["tp"], timing["status"]) == ("b", 2, "failed")


def test_two_ranks_are_timed_only_while_half_of_the_seconds_are_left(tmp_path):
    page = gpu_check.Page(tmp_path, H200, "abc", 400.0)
    assert len(gpu_check.timings_of("b", page, H200)) == 1
    for name, facts in {"a": H200, "c": H200, "b": H200 | {"ampere": False}}.items():
        assert gpu_check.timings_of(name, page, facts) == []
    assert page.data["timings"] == []
    page.finish -= 250
    assert gpu_check.timings_of("b", page, H200) == []
    assert page.data["timings"][0]["status"] == "dropped"


# --------------------------------------------------------------------------------- the clock


@pytest.mark.parametrize("name", [n for n, c in PRESETS.items() if isinstance(c, GPT2Config)])
def test_flops_count_every_matrix_weight_six_times_a_token(name):
    config = PRESETS[name]
    tokens = 2 * config.max_seq_len
    assert gpu_ranks.flops(config, tokens) == Work(config, 2).flops
    counts, h, n = config.parameter_counts(), config.hidden_size, config.num_layers
    biases = n * (3 * h + h + config.ffn_size + h)
    matrices = counts["attention"] + counts["mlp"] + counts["tokens"] - biases
    attention = gpu_ranks.flops(config, tokens) - 6 * matrices * tokens
    # 2 products of (s, d) by (d, s) a head, 3 times with the backward pass; causal: half of it
    assert attention == 3 * 2 * (2 * config.max_seq_len * h) * tokens * n / 2


def test_the_order_of_the_timings():
    timings = gpu_ranks.order(H200)
    assert len(set(timings)) == len(timings) == 36
    plain, compiled = timings[:18], timings[18:]
    assert not any(t.compile for t in plain) and all(t.compile for t in compiled)
    for half in (plain, compiled):
        assert [t.precision for t in half] == ["bf16"] * 6 + ["tf32"] * 6 + ["fp32"] * 6
        assert [t.model for t in half[:6]] == sorted(2 * list(gpu_ranks.SIZES), key=list(
            gpu_ranks.SIZES).index)
        assert [t.recompute for t in half] == [False, True] * 9
    assert {t.model: t.batch for t in timings} == gpu_ranks.SIZES, "an H200 has room for all"


def test_smaller_gpus_get_smaller_batches():
    sizes = [gpu_ranks.batch_for("gpt2-1.2b", gigabytes * 10**9) for gigabytes in (8, 40, 80, 141)]
    assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[-1] == 8
    config = PRESETS["gpt2-1.2b"]
    assert gpu_ranks.predicted_bytes(config, 1) > 16 * config.num_parameters()


def test_estimates_follow_the_measured_rate():
    timing = gpu_ranks.order(H200)[0]
    slow, fast = (gpu_ranks.estimate(timing, rate) for rate in (1e12, 1e15))
    assert slow > 10 * fast
    step = gpu_ranks.flops(timing.config, timing.tokens) / (gpu_ranks.REACHED * 1e12)
    assert slow == pytest.approx(2 + step * (gpu_ranks.WARM_UP + gpu_ranks.LEAST))
    compiled = replace(timing, compile=True)
    assert gpu_ranks.estimate(compiled, 1e15, compiling=7.0) == pytest.approx(fast + 7.0)
    recomputed = gpu_ranks.estimate(replace(timing, recompute=True), 1e12)
    assert recomputed - 2 == pytest.approx((slow - 2) * 4 / 3)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_measurement(precision, recompute):
    timing = replace(TINY, precision=precision, recompute=recompute)
    rates = {}
    with mock.patch.multiple(gpu_ranks, WARM_UP=2, MOST=3):
        found = gpu_ranks.outcome(timing, ALONE, CPU, rates)
    assert found["status"] == "measured" and found["peak_bytes"] is None
    low, middle, high = found["seconds"]
    assert 0 < low <= middle <= high and found["first_step_seconds"] > 0
    assert found["tokens_per_second"] == pytest.approx(2 * 64 / middle)
    speed = gpu_ranks.flops(PRESETS["tiny"], 2 * 64) / middle
    assert found["share_of_gemm"] == pytest.approx(speed / rates["tiny", precision, 2, 1])
    assert 4 < found["loss"] < 8        # ln 512 is 6.2
    assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
    torch.set_float32_matmul_precision("highest")


def test_recompute_precision_and_blocks_reach_the_step():
    seen = []
    for timing in (TINY, replace(TINY, recompute=True, compile=True, precision="fp32")):
        with (
            mock.patch("torch.utils.checkpoint.checkpoint") as checkpoint,
            mock.patch("torch.nn.Module.compile") as compiled,
            mock.patch("torch.autocast", wraps=torch.autocast) as autocast,
            mock.patch("megatron_edu.models.gpt2.checkpoint", checkpoint),
        ):
            checkpoint.side_effect = lambda block, *args, **_: block(*args)
            gpu_ranks.step_of(timing, ALONE, CPU)()
            enabled = autocast.call_args.kwargs["enabled"]
            seen.append((checkpoint.call_count, compiled.call_count, enabled))
    assert seen == [(0, 0, True), (2, 2, False)]


def test_the_model_that_is_timed_has_all_its_weights_drawn():
    config = PRESETS["tiny"]
    model = gpu_ranks.blank_model(config, None, CPU)
    want = build_model(config)
    assert model.config == config
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, want)]
    assert shapes[0] == shapes[1]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(config.init_std, rel=0.1), name
        else:
            assert parameter.unique().tolist() == [1.0 if name.endswith("weight") else 0.0], name


def failing(error):
    def gemm_rate(*_):
        raise error

    return mock.patch.object(gpu_ranks, "gemm_rate", gemm_rate)


def test_out_of_memory_is_a_result_and_other_errors_are_failures():
    with failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")):
        found = gpu_ranks.outcome(TINY, ALONE, CPU, {})
    assert found["status"] == "out of memory" and found["reason"].endswith("20 GiB.")
    with failing(RuntimeError("no kernel image")):
        found = gpu_ranks.outcome(TINY, ALONE, CPU, {})
    assert (found["status"], found["reason"]) == ("failed", "RuntimeError: no kernel image")
    row = gpu_check.timing_row(found, H200)
    assert "failed: RuntimeError: no kernel image" in row and row.count("|") == 15


def test_a_gpu_is_timed_by_events_between_the_calls():
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(log)
            log.append("event")

        def elapsed_time(self, other):      # milliseconds
            assert log[-1] == "synchronize"
            return 1000.0 * (other.at - self.at)

    with (
        mock.patch("torch.cuda.Event", Event),
        mock.patch("torch.cuda.synchronize", lambda device: log.append("synchronize")),
    ):
        seconds = gpu_ranks.seconds_each(lambda: log.append("call"), 3, torch.device("cuda"))
    assert seconds == [2.0, 2.0, 2.0]
    assert log == ["synchronize", "event", *["call", "event"] * 3, "synchronize"]


# ------------------------------------------------------------------- dropping, and the page


def grid(seconds: float, timings: list[Timing], outcome) -> list[dict]:
    "What the timed process says with so many seconds left, on a clock that outcomes move."
    clock = [1000.0]
    fake = SimpleNamespace(time=lambda: clock[0], perf_counter=time.perf_counter)

    def timed(timing, groups, device, rates):
        clock[0] += outcome(timing)
        return {"kind": "timing", **asdict(timing), "status": "measured",
                "first_step_seconds": 6.0}

    spec = {"device": "cpu", "timings": [asdict(t) for t in timings], "deadline": 1000 + seconds}
    with mock.patch.object(gpu_ranks, "time", fake), mock.patch.object(gpu_ranks, "outcome", timed):
        return [a for a in gpu_ranks.grid_answers(spec) if a["kind"] == "timing"]


def test_the_last_timings_are_dropped_and_named():
    timings = gpu_ranks.order(H200)
    found = grid(100.0, timings, gpu_ranks.estimate)
    assert [Timing(**{k: a[k] for k in asdict(TINY)}) for a in found] == timings
    measured = [i for i, a in enumerate(found) if a["status"] == "measured"]
    dropped = [a for a in found if a["status"] == "dropped"]
    assert len(measured) + len(dropped) == 36 and len(dropped) > 18
    assert all(not timings[i].compile for i in measured), "compiled ones go first"
    assert measured[:9] == list(range(9))
    assert all(re.fullmatch(r"about \d+ s needed, \d+ s left", a["reason"]) for a in dropped)
    assert sum(gpu_ranks.estimate(timings[i]) for i in measured) <= 100


def test_enough_time_drops_nothing_and_what_compiling_took_is_learnt():
    timings = gpu_ranks.order(H200)
    assert {a["status"] for a in grid(1000.0, timings, gpu_ranks.estimate)} == {"measured"}
    compiled = [t for t in timings if t.compile and t.precision == "bf16"]
    quick = grid(60.0, compiled, lambda timing: 8.0)    # 25 s each were thought to be needed
    assert [a["status"] for a in quick] == ["measured"] * 6


def test_a_process_that_dies_costs_one_timing(tmp_path):
    timings = gpu_ranks.order(H200)
    starts = []

    def converse(spec, size, limit, silence):
        starts.append(len(spec["timings"]))
        yield 0, {"kind": "begun"}
        if len(starts) == 1:
            yield 0, {"kind": "timing", **spec["timings"][0], "status": "out of memory"}
            yield 0, {"kind": "begun"}
            yield None, {"kind": "error", "reason": "rank 0: no answer within 120 s"}
            return
        for fields in spec["timings"]:
            yield 0, {"kind": "timing", **fields, "status": "dropped", "reason": "late"}

    page = gpu_check.Page(tmp_path, H200, "abc", 400.0)
    with mock.patch.object(gpu_check, "converse", converse):
        gpu_check.time_one_gpu(page, H200)
    assert starts == [36, 34]
    statuses = [found["status"] for found in page.data["timings"]]
    assert statuses == ["out of memory", "failed"] + ["dropped"] * 34
    assert [found["model"] for found in page.data["timings"]] == [t.model for t in timings]
    assert page.code() == 3


def test_without_time_all_are_dropped_and_an_old_gpu_has_fp32_alone(tmp_path):
    page = gpu_check.Page(tmp_path, H200, "abc", 1.0)
    gpu_check.time_one_gpu(page, H200 | {"ampere": False, "gpu": "Tesla T4"})
    statuses = [(found["precision"], found["status"]) for found in page.data["timings"]]
    assert statuses[:24] == [(p, "not possible here") for p in ["bf16"] * 6 + ["tf32"] * 6] * 2
    assert statuses[24:] == [("fp32", "dropped")] * 12 and page.code() == 0


MEASURED = {
    "kind": "timing", **asdict(TINY), "status": "measured", "steps": 10,
    "seconds": [0.09, 0.1, 0.12], "first_step_seconds": 3.25, "tokens_per_second": 163_840.0,
    "peak_bytes": 12_300_000_000, "bytes_before": 0, "loss": 10.9, "flops_per_second": 49.45e12,
    "gemm_flops_per_second": 98.9e12, "share_of_gemm": 0.5,
}


def test_the_table(tmp_path):
    page = gpu_check.Page(tmp_path, H200, "abc", 400.0)
    page.data["rungs"] = {
        "a": {"status": "passed", "results": [{"errors": {"loss": 2e-16}, "passed": True}]},
        "b": {"status": "passed", "results": [{"difference": 3e-15}, {"difference": "nan"}]},
        "c": {"status": "failed", "reason": "this | that", "results": []},
    }
    page.data["timings"] = [MEASURED, MEASURED | {"precision": "fp32", "rung": "e", "gpus": 2}]
    page.note("")
    text = (tmp_path / "gpu_check.md").read_text()
    assert re.search(r"\n20\d\d-\d\d-\d\d \d\d:\d\d UTC, commit abc: NVIDIA H200 \(1 ", text)
    for word in ("driver 580.1", "CUDA 13.0", "NCCL 2.28.9", "torch 2.11.0", gpu_ranks.FORMULA):
        assert word in text
    assert "Highest rung passed: b (gloo on CUDA tensors" in text
    assert "largest error of the four checks 2.0e-16" in text and "this / that" in text
    assert (
        "| one GPU | tiny | 2 | 1 | bf16 | no | no | 100.0 (90.0-120.0) | 163,840 | 12.3 | 49.5 | "
        "0.50 | 0.05 | 3.2 |" in text
    )
    assert "| e | tiny | 2 | 1 | fp32 |" in text and "| 0.50 | 0.37 | 3.2 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {5, 15}


def test_numbers_that_json_has_not_are_words():
    found = {"loss": gpu_ranks.number(float("inf")), "norm": gpu_ranks.number(float("nan"))}
    assert json.dumps(found, allow_nan=False) == '{"loss": "inf", "norm": "nan"}'
    assert gpu_check.summary("a", {"results": [{"errors": found}]}).endswith("inf")


def test_the_plan(tmp_path, capsys):
    with mock.patch.object(gpu_check, "probe", lambda: H200):
        assert gpu_check.main(["--plan", "--out", str(tmp_path), "--seconds", "200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "a  gloo on the CPU, two ranks: possible",
        "b  gloo on CUDA tensors, two ranks on one GPU: possible",
    ]
    assert lines[4].endswith("GPUs needed: 2, found: 1") and len(lines) == 5 + 36 + 1
    assert "beyond --seconds" in lines[-2] and "beyond --seconds" not in lines[5]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [["--rungs", "ax"], ["--rungs", ""], ["--seconds", "nan"]])
def test_wrong_options_are_refused_before_anything_runs(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        gpu_check.main(wrong)
    assert caught.value.code == 2 and "rungs are letters of abcde" in capsys.readouterr().err


def test_bert_batches_have_what_replicas_need():
    config = gpu_ranks.MODELS["BERT"]
    assert isinstance(config, BertConfig)
    first, second = (gpu_ranks.batch_of(config, CPU) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "equal on every rank"
    counted = (first["labels"] != -100).sum(1)
    assert counted[:4].sum() > counted[4:].sum() > 0, "replicas count different numbers"
    assert not first["attention_mask"].all() and first["attention_mask"][:, 0].all()


def test_a_termination_ends_the_children(tmp_path):
    command = [sys.executable, ROOT / "tools/gpu_check.py", "--rungs", "a", "--out", tmp_path]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    for line in process.stdout:
        if line.startswith("a  "):
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    process.stdout.close()
    mine = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(process.pid) in parent_of(p)]
    assert mine == []


def parent_of(cmdline: Path) -> list[str]:
    "The parent of a process, if it is one of tools/gpu_ranks.py."
    try:
        if b"gpu_ranks.py" not in cmdline.read_bytes():
            return []
        return (cmdline.parent / "stat").read_text().rpartition(")")[2].split()[1:2]
    except OSError:
        return []
