"""What the child processes of tools/gpu_check.py do: facts, checks, training steps, timings.

`python tools/gpu_ranks.py TASK` prints answers, one JSON object a line.
"""

import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
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

# ------------------------------------------------------------------------------------- the facts


def one_line(error: BaseException | str) -> str:
    "The words of an error; of NCCL's first the last, which are the cause."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [after for line, after in pairwise(lines) if line == "Last error:"]
    name = [] if isinstance(error, str) else [type(error).__name__]
    return ": ".join(name + causes + lines[:1])[:300]


def lone_package(name: str) -> None:
    """A package without what its __init__ imports.

    Two modules of `training` are wanted here; the package would bring tokenizers and pictures.
    """
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT / name.replace(".", "/"))]
        sys.modules[name] = package


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

SMALL = dict(num_layers=2, hidden_size=64, num_heads=4, vocab_size=101, max_seq_len=32)
MODELS: dict[str, ModelConfig] = {
    "GPT-2": GPT2Config(**SMALL, dropout=0.0, vocab_multiple=64),
    "BERT": BertConfig(**SMALL, dropout=0.0, vocab_multiple=64),
    # As many words as GPT-2 has: a GPU has other kernels for rows that long.
    "GPT-2, all words": GPT2Config(**SMALL | {"vocab_size": 50_257}, dropout=0.0),
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


PARTS = [(four_checks, "GPT-2"), (four_checks, "BERT"), (training, "GPT-2"), (training, "BERT")]


def parts_of(rung: Rung) -> list[tuple[Callable, str]]:
    "What is done on each grid of a rung, and with which model."
    return PARTS + [(four_checks, "GPT-2, all words")] * (rung.device == "cuda")


def rung_answers(spec: dict) -> Iterator[dict]:
    "All that one rank finds out on a rung."
    device = join(spec)
    yield meet(device)
    for tp, dp in GRIDS[spec["size"]]:
        groups = ParallelDims(tp=tp, dp=dp).build(device.type)
        for part, model in parts_of(RUNGS[spec["rung"]]):
            yield {"tp": tp, "dp": dp, **part(model, groups, device)}
    for timing in (Timing(**fields) for fields in spec["timings"]):
        groups = ParallelDims(tp=timing.tp).build(device.type)
        gpus = spec["size"] if spec["rung"] == "e" else 1
        yield {"rung": spec["rung"], "gpus": gpus, **outcome(timing, groups, device, {})}


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
        "The preset, dropout included."
        return PRESETS[self.model]

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


def products(a: torch.Tensor, b: torch.Tensor, times: int) -> None:
    "A matrix product so many times: one alone may take less than the events around it."
    for _ in range(times):
        torch.mm(a, b)


def gemm_rate(timing: Timing, device: torch.device) -> float:
    "FLOP/s over the four matrix products of a layer, in the timing's precision and shapes."
    config, m = timing.config, timing.tokens
    h, f, tp = config.hidden_size, config.ffn_size, timing.tp
    dtype = torch.bfloat16 if timing.precision == "bf16" else torch.float32
    set_precision(timing.precision)
    work = seconds = 0.0
    for k, n in ((h, 3 * h // tp), (h // tp, h), (h, f // tp), (f // tp, h)):
        a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
        ten = partial(products, a, b, 10)
        ten()
        seconds += statistics.median(seconds_each(ten, 5, device)) / 10
        work += 2 * m * k * n
    return work / seconds


def blank_model(config: ModelConfig, group, device: torch.device) -> nn.Module:
    "The model with weights drawn on the device: on the CPU that would take longer than the steps."
    model = build_model(config, group, seed=None)
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
    model.recompute = timing.recompute
    if timing.compile:
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
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
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
        "tokens_per_second": timing.tokens / middle, "peak_bytes": peak, "bytes_before": before,
        "loss": number(loss), "flops_per_second": speed,
        "gemm_flops_per_second": rate * timing.tp, "share_of_gemm": speed / (rate * timing.tp),
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
        if timing.compile:
            torch._dynamo.reset()       # it keeps graphs, and they keep the model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def grid_answers(spec: dict) -> Iterator[dict]:
    "Timings of one GPU, as long as the next one would end before the deadline."
    device, groups = torch.device(spec["device"]), ParallelDims().build()
    # With recomputation torch.compile finds in its cache what it made without: learnt apart.
    rates, compiling = {}, {False: COMPILING, True: COMPILING}
    for timing in (Timing(**fields) for fields in spec["timings"]):
        key = timing.model, timing.precision, timing.batch, timing.tp
        needed = estimate(timing, rates.get(key), compiling[timing.recompute])
        left = spec["deadline"] - time.time()
        if needed > left:
            reason = f"about {needed:.0f} s needed, {max(0.0, left):.0f} s left"
            yield {"kind": "timing", **asdict(timing), "status": "dropped", "reason": reason}
            continue
        yield {"kind": "begun"}
        found = outcome(timing, groups, device, rates)
        if timing.compile and "first_step_seconds" in found:
            compiling[timing.recompute] = found["first_step_seconds"]
        yield found


ANSWERS = {"probe": probe_answers, "rung": rung_answers, "grid": grid_answers}


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


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
