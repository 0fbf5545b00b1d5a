#!/usr/bin/env python3
"""What a machine with GPUs allows, checked and timed: python tools/gpu_check.py [--out FOLDER]

It needs torch 2.11 or later and numpy, no network, and less than 8 minutes. Rungs, from a process
group that runs everywhere to one that needs two GPUs, each passed, failed, refused or not possible:

  a  gloo on the CPU, two ranks
  b  gloo on CUDA tensors, two ranks on one GPU
  c  NCCL, one rank
  d  NCCL, two ranks on one GPU, which tell NCCL that they are on different hosts
  e  NCCL, two GPUs (four, where there are four)

Each rung makes the four checks and 20 training steps of a GPT-2 and a BERT in float64. Then one
GPU is timed, in the order of `ORDER`: first without torch.compile, bf16 before tf32 before fp32.
What would not end within --seconds is dropped and named, so the last of that order go first; and
two ranks are timed only while half of the seconds are left. Everything runs in child processes
with a time limit. Exit status: 0 if all that is possible passed, else 3.
"""

import argparse
import contextlib
import json
import math
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta, timezone
from itertools import pairwise, product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatron_edu import reference
from megatron_edu.comm import all_reduce
from megatron_edu.config import PRESETS, BertConfig, GPT2Config, ModelConfig
from megatron_edu.mesh import ParallelDims, ParallelGroups
from megatron_edu.models import build_model
from megatron_edu.tensor_parallel.norm import clip_grad_norm
from megatron_edu.tensor_parallel.shard import shard_state_dict
from megatron_edu.testing import CHECKS, compare_with_reference

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
LOSS_BOUND = 1e-9       # largest difference of a loss from the reference's, in float64
FALL = 0.9              # the last loss must be below this share of the first
MEET_SECONDS = 60       # that a collective may wait for the other ranks
RUNG_SECONDS = 150      # that a rung may take
ANSWER_SECONDS = 120    # that the timed process may be silent

# ------------------------------------------------------------------------------------ the rungs


@dataclass(frozen=True)
class Rung:
    "A way for ranks to talk."

    title: str
    backend: str
    device: str
    ranks: int
    gpus: int               # that it needs
    own_hosts: bool = False # each rank tells NCCL that it is on a host of its own


RUNGS = {
    "a": Rung("gloo on the CPU, two ranks", "gloo", "cpu", 2, 0),
    "b": Rung("gloo on CUDA tensors, two ranks on one GPU", "gloo", "cuda", 2, 1),
    "c": Rung("NCCL, one rank", "nccl", "cuda", 1, 1),
    "d": Rung("NCCL, two ranks on one GPU by distinct host ids", "nccl", "cuda", 2, 1, True),
    "e": Rung("NCCL, a GPU for each of two or four ranks", "nccl", "cuda", 2, 2),
}
GRIDS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(2, 2), (4, 1)]}     # ranks: (tp, dp) in turn


def ranks_of(name: str, facts: dict) -> int:
    "Ranks of a rung on this machine."
    return 4 if name == "e" and facts["gpus"] >= 4 else RUNGS[name].ranks


def obstacle(name: str, facts: dict) -> str | None:
    "Why a rung is not possible on this machine, if it is not."
    rung = RUNGS[name]
    if facts["gpus"] < rung.gpus:
        return f"{rung.gpus} GPU needed, {facts['gpus']} found"
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


# ----------------------------------------------------------------------- what a rank does on one

SMALL = dict(num_layers=2, hidden_size=64, num_heads=4, vocab_size=101, max_seq_len=32)
MODELS: dict[str, ModelConfig] = {
    "GPT-2": GPT2Config(**SMALL, dropout=0.0, vocab_multiple=64),
    "BERT": BertConfig(**SMALL, dropout=0.0, vocab_multiple=64),
}


def batch_of(config: ModelConfig, device: torch.device, rows: int = 8) -> dict[str, torch.Tensor]:
    "Random ids and labels, some of which do not count; of a BERT also segments and their order."
    generator = torch.Generator().manual_seed(0)
    shape = (rows, config.max_seq_len)
    ids, labels = torch.randint(config.vocab_size, (2, *shape), generator=generator)
    share = torch.linspace(0.9, 0.3, rows)[:, None]         # replicas count different numbers
    labels[torch.rand(shape, generator=generator) > share] = -100
    batch = {"input_ids": ids, "labels": labels}
    if isinstance(config, BertConfig):
        length = config.max_seq_len - torch.arange(rows)[:, None]      # of what is no padding
        batch["attention_mask"] = (torch.arange(config.max_seq_len) < length).long()
        batch["token_types"] = torch.randint(2, shape, generator=generator)
        batch["sentence_order"] = torch.randint(2, (rows,), generator=generator)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def pair_of(config: ModelConfig, group, device: torch.device) -> tuple[nn.Module, nn.Module]:
    "Sharded model and reference in float64, with equal weights and no zero among them."
    kind = reference.Bert if isinstance(config, BertConfig) else reference.GPT2
    full = kind(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in full.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.05 * noise
    full = full.to(device)
    model = build_model(config, group).double().to(device)
    model.load_state_dict(shard_state_dict(full.state_dict(), model))
    return model, full


def number(x: float) -> float | str:
    "For JSON, which has no infinity and no NaN."
    return x if math.isfinite(x) else str(x)


def four_checks(name: str, groups: ParallelGroups, device: torch.device) -> dict:
    "The four checks of one model, on all replicas."
    from megatron_edu.training.data_parallel import DataParallel    # see `lone_package`

    model, full = pair_of(MODELS[name], groups.tp_group, device)
    replicas = DataParallel(model, groups.dp_group)
    batch = batch_of(MODELS[name], device)
    report = compare_with_reference(replicas, full, **batch, dp_group=groups.dp_group)
    errors = {check: number(getattr(report, check)) for check in CHECKS}
    return {"kind": "four checks", "model": name, "errors": errors, "passed": report.passed}


def train(model, module: nn.Module, batch: dict, clip: Callable, **shared) -> list[torch.Tensor]:
    "The losses of 20 steps of AdamW on one batch, each before its update."
    from megatron_edu.training.optimizer import OptimizerConfig, make_optimizer

    config = OptimizerConfig(lr=3e-3, warmup_steps=0)
    optimizer, losses = make_optimizer(module, config), []
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        loss = model.loss(**batch, **shared)
        loss.backward()
        clip(module, config.clip)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def training(name: str, groups: ParallelGroups, device: torch.device) -> dict:
    "20 steps on all replicas and of the reference: the loss must fall, and be the reference's."
    from megatron_edu.training.data_parallel import DataParallel

    model, full = pair_of(MODELS[name], groups.tp_group, device)
    batch, dp = batch_of(MODELS[name], device), groups.dims.dp
    rows = {name: tensor.chunk(dp)[groups.dp_rank] for name, tensor in batch.items()}
    shared = {"num_tokens": (batch["labels"] != -100).sum() / dp}
    if "sentence_order" in batch:
        shared["num_samples"] = len(batch["sentence_order"]) / dp
    replicas = DataParallel(model, groups.dp_group)
    ours = torch.stack(train(replicas, model, rows, clip_grad_norm, **shared))
    ours = (all_reduce(ours, groups.dp_group) / dp).tolist()
    clip = lambda module, limit: nn.utils.clip_grad_norm_(module.parameters(), limit)  # noqa: E731
    theirs = torch.stack(train(full, full, batch, clip)).tolist()
    worst = max(map(lambda a, b: abs(a - b) if a == a else math.inf, ours, theirs))
    passed = worst <= LOSS_BOUND and ours[-1] < FALL * ours[0]
    ends = {"first": number(ours[0]), "last": number(ours[-1]), "difference": number(worst)}
    return {"kind": f"{STEPS} steps", "model": name, **ends, "passed": passed}


def meet(device: torch.device) -> dict:
    "The collectives that the library uses, each on numbers that are known beforehand."
    size, rank = dist.get_world_size(), dist.get_rank()
    total = torch.full((3,), rank + 1.0, device=device)
    dist.all_reduce(total)
    largest = torch.tensor(float(rank), device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    pieces = torch.empty(size, device=device)
    dist.all_gather_into_tensor(pieces, torch.full((1,), float(rank), device=device))
    piece = torch.empty(1, device=device)
    dist.reduce_scatter_tensor(piece, torch.arange(float(size), device=device))
    word = torch.full((1,), float(rank), device=device)
    dist.broadcast(word, src=size - 1)
    found = [*total.tolist(), largest.item(), *pieces.tolist(), piece.item(), word.item()]
    want = [size * (size + 1) / 2] * 3 + [size - 1, *range(size), size * rank, size - 1]
    return {"kind": "collectives", "passed": found == want}


def join(spec: dict) -> torch.device:
    "Make this process one rank of the rung's world."
    rung, rank = RUNGS[spec["rung"]], spec["rank"]
    device = torch.device("cpu")
    if rung.device == "cuda":
        device = torch.device("cuda", rank if spec["rung"] == "e" else 0)
        torch.cuda.set_device(device)
        torch.cuda.init()       # now: a mesh would choose another device for itself
    dist.init_process_group(
        rung.backend, init_method=f"file://{spec['folder']}/meeting", rank=rank,
        world_size=spec["size"], timeout=timedelta(seconds=MEET_SECONDS),
    )
    return device


def rung_answers(spec: dict) -> Iterator[dict]:
    "All that one rank finds out on a rung."
    device = join(spec)
    yield meet(device)
    for tp, dp in GRIDS[spec["size"]]:
        groups = ParallelDims(tp=tp, dp=dp).build(device.type)
        for part in (four_checks, training):
            for name in MODELS:
                yield {"tp": tp, "dp": dp, **part(name, groups, device)}
    for timing in (Timing(**fields) for fields in spec["timings"]):
        groups = ParallelDims(tp=timing.tp).build(device.type)
        yield {"rung": spec["rung"], **outcome(timing, groups, device, {})}


# ------------------------------------------------------------------------------------ the clock

SIZES = {"gpt2-124m": 16, "gpt2-355m": 16, "gpt2-1.2b": 8}     # preset and largest batch
WARM_UP = 3             # steps that are not timed; torch.compile works in the first
MOST, LEAST = 10, 3     # steps that are timed
PATIENCE = 4.0          # seconds of timed steps, unless LEAST take longer
COMPILING = 25.0        # seconds that torch.compile is thought to need, until it was seen
# FLOP/s that a step is thought to reach until this machine's matrix products were timed.
GUESS = {"bf16": 200e12, "tf32": 120e12, "fp32": 35e12}
REACHED = 0.4           # share of the matrix products' rate that a step is thought to reach
# Dense rates from NVIDIA's data sheet of the H200 SXM.
DATASHEET = {"NVIDIA H200": {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12}}
FORMULA = (
    "6 x tokens x (layers x (4 h h + 2 h f) + h x padded vocabulary) for the matrix weights, and "
    "6 x tokens x layers x s x h for attention, causal and so half; recomputation is not counted"
)


@dataclass(frozen=True)
class Timing:
    "One training step to be timed."

    model: str          # name of a preset
    precision: str      # "bf16": autocast; "tf32"; "fp32": true
    recompute: bool
    compile: bool       # torch.compile, block by block
    batch: int          # sequences
    tp: int = 1

    @property
    def config(self) -> GPT2Config:
        "The preset, dropout included, but for what is switched here."
        return replace(PRESETS[self.model], recompute=self.recompute)

    @property
    def tokens(self) -> int:
        "Of one step."
        return self.batch * self.config.max_seq_len

    def __str__(self) -> str:
        with_ = " ".join(w for w in ("recompute", "compile") if getattr(self, w)) or "plain"
        return f"{self.model} {self.precision} {with_} batch {self.batch} tp={self.tp}"


def flops(config: ModelConfig, tokens: int) -> float:
    "Floating-point operations of one step by `FORMULA`."
    h, layers = config.hidden_size, config.num_layers
    weights = layers * (4 * h * h + 2 * h * config.ffn_size) + h * config.padded_vocab_size
    return 6 * tokens * (weights + layers * config.max_seq_len * h)


def predicted_bytes(config: ModelConfig, batch: int) -> float:
    "Of a step in fp32 without recomputation: weights, gradients, moments, activations, logits."
    stream = batch * config.max_seq_len * config.hidden_size
    kept = 17 * config.num_layers * stream + 1024 * config.padded_vocab_size
    return 4 * (4 * config.num_parameters() + kept)


def batch_for(model: str, memory: int) -> int:
    "The largest batch, halved until three quarters of the GPU's memory are predicted to do."
    batch = SIZES[model]
    while batch > 1 and predicted_bytes(PRESETS[model], batch) > 0.75 * memory:
        batch //= 2
    return batch


def order(facts: dict) -> list[Timing]:
    "All timings of one GPU, the most wanted first."
    kinds = product((False, True), ("bf16", "tf32", "fp32"), SIZES, (False, True))
    batches = {model: batch_for(model, facts["memory"]) for model in SIZES}
    return [
        Timing(model, precision, recompute, compiled, batches[model])
        for compiled, precision, model, recompute in kinds
    ]


def estimate(timing: Timing, rate: float | None = None, compiling: float = COMPILING) -> float:
    "Seconds that a timing will take: building, warm-up, timed steps, torch.compile."
    work = flops(timing.config, timing.tokens) * (4 / 3 if timing.recompute else 1)
    step = work / (GUESS[timing.precision] if rate is None else REACHED * rate)
    timed = min(max(PATIENCE, LEAST * step), MOST * step)
    return 2 + WARM_UP * step + timed + (compiling if timing.compile else 0)


def seconds_each(fn: Callable[[], object], times: int, device: torch.device) -> list[float]:
    "Seconds of each of several calls, on a GPU from events between them."
    if device.type == "cpu":
        marks = [time.perf_counter()]
        for _ in range(times):
            fn()
            marks.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        fn()
        event.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1000 for begin, end in pairwise(events)]


def set_precision(precision: str) -> None:
    "fp32 is true fp32; in bf16 what autocast leaves in fp32 is true fp32 too."
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def gemm_rate(timing: Timing, device: torch.device) -> float:
    "FLOP/s over the four matrix products of a layer, in the timing's precision and shapes."
    config, m = timing.config, timing.tokens
    h, f, tp = config.hidden_size, config.ffn_size, timing.tp
    dtype = torch.bfloat16 if timing.precision == "bf16" else torch.float32
    set_precision(timing.precision)
    work = seconds = 0.0
    for k, n in ((h, 3 * h // tp), (h // tp, h), (h, f // tp), (f // tp, h)):
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device)
        b = b.to(dtype)
        seconds_each(lambda: torch.mm(a, b), 3, device)     # noqa: B023
        seconds += statistics.median(seconds_each(lambda: torch.mm(a, b), 10, device))  # noqa: B023
        work += 2 * m * k * n
    return work / seconds


def blank_model(config: ModelConfig, group, device: torch.device) -> nn.Module:
    "The model with weights drawn on the device: on the CPU that would take longer than the steps."
    with torch.device("meta"):
        model = build_model(config, group)
    model.to_empty(device=device)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=config.init_std)
        else:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
    return model


def step_of(timing: Timing, groups: ParallelGroups, device: torch.device) -> Callable:
    "A training step: forward, backward, norm and clipping, AdamW. It never waits for the GPU."
    from megatron_edu.training.optimizer import OptimizerConfig, make_optimizer

    config = timing.config
    model = blank_model(config, groups.tp_group, device)
    if timing.compile:
        torch._dynamo.reset()       # else the graphs of other timings count against its limit
        for block in model.blocks:
            block.compile()
    optimizer = make_optimizer(model, OptimizerConfig())
    shape = (2, timing.batch, config.max_seq_len)
    ids, labels = torch.randint(config.vocab_size, shape, device=device)
    num_tokens, bf16 = float(timing.tokens), timing.precision == "bf16"

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model.loss(ids, labels, num_tokens=num_tokens)
        loss.backward()
        clip_grad_norm(model, 1.0)
        optimizer.step()
        return loss.detach()

    return step


def measure(timing: Timing, groups: ParallelGroups, device: torch.device, rate: float) -> dict:
    "Medians over the timed steps, and the peak of the memory in them."
    set_precision(timing.precision)
    step = step_of(timing, groups, device)
    warm = seconds_each(step, WARM_UP, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # The ranks of a group must make equally many steps.
    last = all_reduce(torch.tensor(warm[-1], device=device), groups.tp_group, "max").item()
    times = min(MOST, max(LEAST, int(PATIENCE / last)))
    low, middle, high = statistics.quantiles(
        seconds_each(step, times, device), n=4, method="inclusive"
    )
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    loss, speed = step().item(), flops(timing.config, timing.tokens) / middle
    return {
        "status": "measured" if math.isfinite(loss) else "failed",
        "steps": times, "seconds": [low, middle, high], "first_step_seconds": warm[0],
        "tokens_per_second": timing.tokens / middle, "peak_bytes": peak, "loss": number(loss),
        "flops_per_second": speed, "gemm_flops_per_second": rate * timing.tp,
        "share_of_gemm": speed / (rate * timing.tp),
    }


def outcome(timing: Timing, groups, device: torch.device, rates: dict) -> dict:
    "A measurement, or why there is none. Keeps the rates of matrix products for the next."
    found = {"kind": "timing", **asdict(timing)}
    key = timing.model, timing.precision, timing.batch, timing.tp
    try:
        if key not in rates:
            rates[key] = gemm_rate(timing, device)
        return found | measure(timing, groups, device, rates[key])
    except torch.OutOfMemoryError as error:
        return found | {"status": "out of memory", "reason": one_line(error)}
    except Exception as error:
        return found | {"status": "failed", "reason": one_line(error)}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def grid_answers(spec: dict) -> Iterator[dict]:
    "Timings of one GPU, as long as the next one would end before the deadline."
    device, groups = torch.device(spec["device"]), ParallelDims().build()
    rates, compiling = {}, None
    for timing in (Timing(**fields) for fields in spec["timings"]):
        key = timing.model, timing.precision, timing.batch, timing.tp
        needed = estimate(timing, rates.get(key), COMPILING if compiling is None else compiling)
        left = spec["deadline"] - time.time()
        if needed > left:
            reason = f"about {needed:.0f} s needed, {max(0.0, left):.0f} s left"
            yield {"kind": "timing", **asdict(timing), "status": "dropped", "reason": reason}
            continue
        yield {"kind": "begun"}
        found = outcome(timing, groups, device, rates)
        if timing.compile and "first_step_seconds" in found:
            compiling = max(compiling or 0.0, found["first_step_seconds"])
        yield found


# ------------------------------------------------------------------------------ child processes


def one_line(error: BaseException | str) -> str:
    "The words of an error; of NCCL's, with what it says last, which is the cause."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else repr(error)
    for line, after in pairwise(lines):
        text += f" {after}" if line == "Last error:" else ""
    name = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return (name + text)[:300]


def probe_answers(spec: dict) -> Iterator[dict]:
    "What there is on this machine."
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts = {"gpus": gpus, "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    nccl = dist.is_nccl_available() and gpus > 0
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if nccl else ""
    facts["python"] = sys.version.split()[0]
    facts["gpu"] = torch.cuda.get_device_name(0) if gpus else "none"
    facts["memory"] = torch.cuda.get_device_properties(0).total_memory if gpus else 0
    facts["ampere"] = gpus > 0 and torch.cuda.get_device_capability(0) >= (8, 0)
    facts["driver"] = "none"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        printed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        facts["driver"] = printed.stdout.split()[0]
    yield {"kind": "facts", **facts}


ANSWERS = {"probe": probe_answers, "rung": rung_answers, "grid": grid_answers}


def lone_package(name: str) -> None:
    """A package without what its __init__ imports.

    Two modules of `training` are wanted here; the package would bring tokenizers and pictures.
    """
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT / name.replace(".", "/"))]
        sys.modules[name] = package


def leave_with_parent() -> None:
    "Wait until the parent closes this process's input, or is gone, and end it."
    sys.stdin.buffer.read()
    os._exit(1)


def child(spec: dict) -> None:
    "Print answers, one JSON object a line. Never returns: a tidy end would wait for lost peers."
    threading.Thread(target=leave_with_parent, daemon=True).start()
    lone_package("megatron_edu.training")
    code = 0
    try:
        for answer in ANSWERS[spec["do"]](spec):
            print(json.dumps(answer, allow_nan=False), flush=True)
        print(json.dumps({"kind": "done"}), flush=True)
    except BaseException as error:
        code = 1
        print(json.dumps({"kind": "error", "reason": one_line(error)}), flush=True)
    sys.stderr.flush()
    os._exit(code)


def child_command(spec: dict) -> list[str]:
    "How a child is started."
    return [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(spec)]


def start(spec: dict, folder: str, rank: int) -> subprocess.Popen:
    "One child, in a session of its own, so that what it starts can be ended with it."
    with open(Path(folder, f"errors_{rank}"), "wb") as errors:
        return subprocess.Popen(
            child_command(spec | {"rank": rank, "folder": folder}),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env=environment(spec.get("rung"), rank), start_new_session=True,
        )


def listen(rank: int, process: subprocess.Popen, heard: queue.Queue) -> None:
    "Put what a child prints into the queue, and None after its end."
    for line in process.stdout:
        with contextlib.suppress(ValueError):       # a line that some library printed
            answer = json.loads(line)
            if isinstance(answer, dict) and "kind" in answer:
                heard.put((rank, answer))
    heard.put((rank, None))


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


def converse(spec: dict, size: int, limit: float, silence: float) -> Iterator[tuple[int, dict]]:
    """Start `size` children with one task; yield rank and answer until all are done.

    A child that fails, or that says nothing for too long, ends all, and its words come as "error".
    """
    heard, finish = queue.Queue(), time.monotonic() + limit
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        children, done = [], set()
        try:
            for rank in range(size):
                children.append(start(spec | {"size": size}, folder, rank))
                told = rank, children[rank], heard
                threading.Thread(target=listen, args=told, daemon=True).start()
            while len(done) < size:
                patience = min(silence, finish - time.monotonic())
                try:
                    rank, answer = heard.get(timeout=max(0.0, patience))
                except queue.Empty:
                    late = min(set(range(size)) - done)
                    reason = f"no answer within {max(0.0, patience):.0f} s"
                    yield late, {"kind": "error", "reason": reason}
                    return
                if answer is None and rank not in done:
                    said = last_words(folder, rank)
                    answer = {"kind": "error", "reason": f"ended early: {one_line(said)}"}
                if answer is None:
                    continue
                if answer["kind"] == "done":
                    done.add(rank)
                    continue
                yield rank, answer
                if answer["kind"] == "error":
                    return
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
        red = {"rungs": ("failed", "dropped"), "timings": ("failed",)}
        return 3 if any(each["status"] in red["rungs"] for each in self.data["rungs"].values())\
            or any(each["status"] in red["timings"] for each in self.data["timings"]) else 0


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
        f"{found['flops_per_second'] / (top * found['tp']):.2f}" if top else "",
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
        page.data["timings"].append(dropped)
        return []
    return [asdict(timing)]


def keep(page: Page, name: str, rank: int, answer: dict) -> None:
    "Write one answer of a rung down. Where ranks disagree, the one that did not pass counts."
    found = page.data["rungs"][name]
    if answer["kind"] == "timing":
        if rank == 0:
            page.data["timings"].append(answer)
            page.note("     " + timing_row(answer, page.data["machine"]))
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
                error = f"rank {rank}: {answer['reason']}"
            else:
                keep(page, name, rank, answer)
    found["seconds"] = round(time.monotonic() - begun, 1)
    found["status"], found["reason"] = verdict_of(name, found["results"], size, error)
    page.note(f"{name}  {found['status']} {found['reason']}")


def verdict_of(name: str, results: list, size: int, error: str | None) -> tuple[str, str]:
    "Status and reason. Two ranks on one GPU that cannot even meet were refused by NCCL."
    if error and RUNGS[name].own_hosts and not results:
        return "refused", error
    red = [f"{r['kind']} of {r.get('model', 'all')}" for r in results if not r["passed"]]
    expected = 1 + len(GRIDS[size]) * 2 * len(MODELS)
    if not (red or error) and len(results) != expected:
        error = f"{len(results)} of {expected} results"
    reasons = list(dict.fromkeys(red)) + ([error] if error else [])
    return "failed" if reasons else "passed", ", ".join(reasons)


def time_one_gpu(page: Page, facts: dict) -> None:
    "All timings of one GPU. A process that dies or hangs costs one timing, and the next goes on."
    waiting = [timing for timing in order(facts)]
    if not facts["ampere"]:
        lost = [timing for timing in waiting if timing.precision != "fp32"]
        reason = f"{facts['gpu']} has neither bf16 nor tf32"
        for timing in lost:
            note_timing(page, asdict(timing) | {"status": "not possible here", "reason": reason})
        waiting = [timing for timing in waiting if timing not in lost]
    while waiting:
        spec = {"do": "grid", "device": "cuda:0", "timings": [asdict(t) for t in waiting]}
        spec["deadline"] = time.time() + page.left() - 5
        limit, begun = page.left(), False
        with contextlib.closing(converse(spec, 1, limit, ANSWER_SECONDS)) as answers:
            for _, answer in answers:
                begun = answer["kind"] == "begun"
                if answer["kind"] == "timing":
                    note_timing(page, answer)
                    waiting.pop(0)
                elif answer["kind"] == "error":
                    status = "dropped" if page.left() <= 0 else "failed"
                    failed = {"status": status, "reason": answer["reason"]}
                    note_timing(page, asdict(waiting.pop(0)) | failed)
        if not begun and page.left() <= 0:
            break
    for timing in waiting:
        reason = {"status": "dropped", "reason": "no time is left"}
        note_timing(page, asdict(timing) | reason)


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
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
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
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        child(options.child)
    unknown = sorted(set(options.rungs) - set(RUNGS))
    if unknown or not options.rungs or not 0 < options.seconds < math.inf:
        parser.error(f"rungs are letters of {''.join(RUNGS)}; --seconds is above 0")
    begun = time.monotonic()
    names = "".join(name for name in RUNGS if name in options.rungs)
    facts = probe()
    if options.plan:
        print(plan(names, facts, options.seconds))
        return 0
    # Whoever ends this process ends its children: their processes are ended on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
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
    sys.exit(main())
