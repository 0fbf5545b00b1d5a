"The loop: what a run writes, and what it survives."

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from limits import HANG, wait_for

from megatron_edu import reference
from megatron_edu.config import GPT2Config
from megatron_edu.data.gpt2 import GPT2Samples, split_documents
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.token_writer import TokenFileWriter
from megatron_edu.errors import Stopped
from megatron_edu.files import MARK, mark_folder
from megatron_edu.mesh import ParallelDims
from megatron_edu.models import build_model
from megatron_edu.models.block import Block
from megatron_edu.training import checkpoint, journal, loop, step
from megatron_edu.training.checkpoint import (
    checkpoint_folder,
    latest_checkpoint,
    load_model,
    load_state,
)
from megatron_edu.training.journal import Journal, plot_metrics, read_metrics, validation_losses
from megatron_edu.training.loop import stop_requested, train
from megatron_edu.training.optimizer import OptimizerConfig
from megatron_edu.training.run import Data, RunConfig, TrainConfig
from megatron_edu.training.validation import validate

TINY = GPT2Config(2, 32, 4, vocab_size=90, max_seq_len=16, dropout=0.0, vocab_multiple=24)
DROPOUT = replace(TINY, dropout=0.1)
RECIPE = OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2)

PARTS = split_documents(20, (0.9, 0.1))      # documents to train on, and held out

@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    "A token file of 20 documents that count upwards, so that there is something to learn."
    prefix = tmp_path_factory.mktemp("data") / "tokens"
    generator = np.random.default_rng(0)
    with TokenFileWriter(prefix, 90) as writer:
        for _ in range(20):
            writer.append((generator.integers(90) + np.arange(generator.integers(80, 160))) % 90)
            writer.end_document()
    return prefix


def plan(out, model=TINY, tp=1, dp=1, optimizer=RECIPE, **settings) -> TrainConfig:
    given = {"steps": 6, "batch_size": 4, "save_every": 3, "eval_every": 3, "eval_batches": 2}
    run = RunConfig(out, **{**given, "validation": 0.1, **settings})
    return TrainConfig(model, run, optimizer, ParallelDims(tp=tp, dp=dp))


def run_here(config, prefix, device="cpu"):
    "Train on every rank of the grid; each rank's model."
    return train(config, TokenFile(prefix), config.parallel.build(device), device)


def run_quietly(config, prefix, device):
    "The same, without a result."
    run_here(config, prefix, device)


def losses(out) -> list[float]:
    return [line["loss"] for line in read_metrics(out)]


def stopped_after_three(out, copy) -> Path:
    "A run's folder as it was after step 3, with the metrics that a kill at step 5 leaves."
    shutil.copytree(out, copy)
    shutil.rmtree(checkpoint_folder(copy, 6))
    text = "".join(json.dumps(line) + "\n" for line in read_metrics(out)[:5])
    (copy / "metrics.jsonl").write_text(text + '{"step": 6, "lo')
    return copy


def same_weights(a, b, atol=0.0):
    states = [load_model(folder).state_dict() for folder in (a, b)]
    torch.testing.assert_close(*states, rtol=0, atol=atol)


def test_a_process_that_trains_keeps_what_a_step_frees(tmp_path, tokens, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "keep_freed_memory", lambda: seen.append("keeps"))
    monkeypatch.setattr(loop, "begin_run", lambda *args: seen.append("begins") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_here(plan(tmp_path / "run"), tokens)
    assert seen == ["keeps", "begins"]


def test_a_run_writes_one_line_a_step_and_whole_checkpoints(tmp_path, tokens, capsys):
    run_here(plan(tmp_path, log_every=2), tokens)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    wanted = {"step", "loss", "lr", "grad_norm", "ms", "tokens_per_s"}
    assert all(wanted <= line.keys() for line in lines)
    assert [step for step, _ in validation_losses(lines)] == [0, 3, 6]
    assert lines[0]["lr"] == pytest.approx(5e-3) and lines[-1]["lr"] == pytest.approx(1e-3)
    folders = [MARK, "loss.png", "metrics.jsonl", "step-00000003", "step-00000006"]
    assert sorted(path.name for path in tmp_path.iterdir()) == folders
    assert load_state(tmp_path / "step-00000006") == {"step": 6, "consumed": 24}
    config = json.loads((tmp_path / "step-00000006" / "config.json").read_text())
    assert config["run"]["batch_size"] == 4 and config["optimizer"]["lr"] == 1e-2
    printed = capsys.readouterr().out
    assert "step 1/6 " in printed and "step 3/6 " not in printed and "step 6/6 " in printed


@pytest.mark.parametrize("seed", [1, 5])
def test_the_first_loss_is_the_references_and_training_lowers_it(tmp_path, tokens, seed):
    "Weights and samples are those of the seed."
    config = plan(tmp_path, steps=40, save_every=40, eval_every=40, seed=seed)
    run_here(config, tokens)
    samples = GPT2Samples(TokenFile(tokens), 16, 160, seed, PARTS[0])
    batch = samples.batch(range(4))
    first = reference.GPT2(TINY, seed=seed).loss(batch["input_ids"], batch["labels"]).item()
    assert losses(tmp_path)[0] == pytest.approx(first, abs=1e-5)
    (_, before), (_, after) = validation_losses(read_metrics(tmp_path))
    assert after < before - 1
    assert not (torch.tensor(losses(tmp_path)) == losses(tmp_path)[0]).all()


def test_the_last_step_is_validated_and_the_blocks_are_compiled(tmp_path, tokens, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module)))
    run_here(plan(tmp_path / "a", eval_every=4), tokens)
    assert [step for step, _ in validation_losses(read_metrics(tmp_path / "a"))] == [0, 4, 6]
    assert compiled == []
    run_here(plan(tmp_path / "b", steps=1, compile=True), tokens)
    assert compiled == [Block, Block]


def test_a_line_says_how_fast_and_how_long(tmp_path, monkeypatch, capsys):
    "Of a run that went on at step 60, two seconds a step: ten steps later 30 are left."
    now = [1000.0]
    monkeypatch.setattr(journal.time, "perf_counter", lambda: now[0])
    told = Journal(plan(tmp_path, steps=100, log_every=5), 60, active=True)
    numbers = {"loss": 4.0, "lr": 1e-3, "grad_norm": 0.5}
    now[0] += 20
    told.write(70, 0.5, **numbers)
    told.write(71, 0.5, **numbers)      # no fifth step
    line = "step 70/100  loss 4.0000  lr 1.00e-03  norm 0.500  128 tokens/s  500 ms  ETA 01:00\n"
    assert capsys.readouterr().out == line
    assert read_metrics(tmp_path) == [
        {"step": step, **numbers, "ms": 500.0, "tokens_per_s": 128} for step in (70, 71)
    ]


def test_a_line_says_both_accuracies(tmp_path, capsys):
    numbers = {"val_loss": 3.0, "val_mlm_loss": 2.5, "val_sop_loss": 0.5}
    shares = {"val_mlm_accuracy": 0.25, "val_sop_accuracy": 0.75}
    Journal(plan(tmp_path), 0, active=True).say_validation(3, {**numbers, **shares})
    text = "loss 3.0000 (mlm 2.5000, sop 0.5000)  accuracy: mlm 25.0%, sop 75.0%\n"
    assert capsys.readouterr().out == f"step 3  validation {text}"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_a_bar_goes_on_where_the_run_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", Terminal())
    told = Journal(plan(tmp_path, steps=100), 60, active=True)
    assert (told.bar.n, told.bar.total) == (60, 100)
    told.write(61, 0.5, loss=4.0, lr=1e-3, grad_norm=0.5)
    assert told.bar.n == 61 and capsys.readouterr().out == ""
    told.say("saved")
    told.close()
    assert told.bar.disable and capsys.readouterr().out == "saved\n"
    other = Journal(plan(tmp_path, steps=100), 60, active=False)
    assert other.bar is None


def test_the_picture_shows_the_losses_of_the_metrics(tmp_path, monkeypatch):
    drawn = []

    def save(figure, path, **options):
        drawn.append(figure)
        Path(path).write_bytes(b"picture")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    mark_folder(tmp_path, "run")
    names = ("mlm_loss", "sop_loss", "mlm_accuracy", "sop_accuracy")
    lines = [
        {"step": 1, "mlm_loss": 5.0, "sop_loss": 0.75, "val_loss": 1.0},
        {"step": 2, "mlm_loss": 4.0, "sop_loss": 0.5, "val_loss": 1.0},
    ]
    for k, name in enumerate(names, start=1):
        lines[0][f"val_{name}_before"], lines[1][f"val_{name}"] = k / 8, k / 16
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_metrics(tmp_path) == tmp_path / "loss.png"
    mlm, sop, shares = drawn[0].axes
    found = [
        (line.get_label(), line.get_xdata().tolist(), line.get_ydata().tolist())
        for ax in (mlm, sop, shares) for line in ax.lines
    ]
    assert found == [
        ("training", [1, 2], [5.0, 4.0]), ("validation", [0, 2], [1 / 8, 1 / 16]),
        ("training", [1, 2], [0.75, 0.5]), ("validation", [0, 2], [2 / 8, 2 / 16]),
        ("masked words", [0, 2], [3 / 8, 3 / 16]), ("sentence order", [0, 2], [4 / 8, 4 / 16]),
    ]
    assert "masked words" in mlm.get_ylabel() and "sentence order" in sop.get_ylabel()


def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(tmp_path, tokens, capsys):
    whole = tmp_path / "whole"
    run_here(plan(whole, DROPOUT), tokens)
    copy = stopped_after_three(whole, tmp_path / "copy")
    run_here(plan(copy, DROPOUT, resume="auto"), tokens)
    assert losses(copy) == losses(whole) and len(losses(copy)) == 6
    same_weights(whole / "step-00000006", copy / "step-00000006")
    assert "going on from" in capsys.readouterr().out


@pytest.mark.parametrize(("tp", "dp", "then"), [(2, 1, (1, 2)), (1, 2, (2, 1)), (2, 1, (1, 1))])
def test_a_resumed_run_on_another_grid_has_the_same_losses(
    ranks, device, tmp_path, tokens, tp, dp, then
):
    whole, data = tmp_path / "whole", (tokens, device)
    ranks(2)(run_quietly, plan(whole, tp=tp, dp=dp), *data)
    copy = stopped_after_three(whole, tmp_path / "copy")
    config = plan(copy, tp=then[0], dp=then[1], resume="auto")
    run_here(config, *data) if then == (1, 1) else ranks(2)(run_quietly, config, *data)
    assert losses(copy)[:3] == losses(whole)[:3]
    assert losses(copy) == pytest.approx(losses(whole), abs=2e-5)
    same_weights(whole / "step-00000006", copy / "step-00000006", atol=1e-4)


def test_dropout_is_drawn_anew_every_step_and_from_the_seed(tmp_path, tokens):
    for name, settings in {"a": {}, "b": {}, "c": {"seed": 2}}.items():
        torch.manual_seed(len(name) + 40)
        torch.rand(ord(name))
        run_here(plan(tmp_path / name, DROPOUT, **settings), tokens)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a")[0] != losses(tmp_path / "c")[0]


def test_going_on_uses_the_samples_that_are_left(tmp_path, tokens, monkeypatch):
    read = []
    real = GPT2Samples.batch

    def noted(self, indices):
        read.extend(indices)
        return real(self, indices)

    run_here(plan(tmp_path / "whole"), tokens)
    copy = stopped_after_three(tmp_path / "whole", tmp_path / "copy")
    monkeypatch.setattr(GPT2Samples, "batch", noted)
    run_here(plan(copy, resume="auto"), tokens)
    validation = list(range(8))
    assert read == list(range(12, 24)) + validation


@pytest.mark.parametrize("dp", [1, 2])
def test_micro_batches_add_up_to_the_batch(ranks, device, tmp_path, tokens, dp):
    data = tokens, device
    run_here(plan(tmp_path / "whole"), *data)
    config = plan(tmp_path / "micro", dp=dp, micro_batch=1)
    run_here(config, *data) if dp == 1 else ranks(2)(run_quietly, config, *data)
    assert losses(tmp_path / "micro") == pytest.approx(losses(tmp_path / "whole"), abs=2e-5)
    same_weights(tmp_path / "whole/step-00000006", tmp_path / "micro/step-00000006", atol=1e-4)


def test_bf16_multiplies_coarsely_and_keeps_fp32_weights(tmp_path, tokens):
    run_here(plan(tmp_path / "fp32"), tokens)
    model = run_here(plan(tmp_path / "bf16", precision="bf16"), tokens)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    fine, coarse = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert fine != coarse
    assert coarse == pytest.approx(fine, rel=2e-2)


@pytest.mark.parametrize("dp", [1, 2])
def test_nan_stops_names_the_step_and_keeps_the_checkpoint(ranks, device, tmp_path, tokens, dp):
    config = plan(tmp_path, dp=dp, optimizer=OptimizerConfig(lr=1e30, warmup_steps=0), save_every=1)
    message = "step 2: loss nan.* weights are those of step 1.*step-00000001; lower the learning"
    with pytest.raises((FloatingPointError, RuntimeError), match=message):
        data = tokens, device
        run_here(config, *data) if dp == 1 else ranks(2)(run_quietly, config, *data)
    assert len(losses(tmp_path)) == 1 and math.isfinite(losses(tmp_path)[0])
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    load_model(latest_checkpoint(tmp_path))


def test_nan_before_any_checkpoint_says_that_there_is_none(tmp_path, tokens):
    config = plan(tmp_path, optimizer=OptimizerConfig(lr=1e30, warmup_steps=0))
    with pytest.raises(FloatingPointError, match="step 2: .* the last checkpoint is none; lower"):
        run_here(config, tokens)


@pytest.mark.parametrize("tp", [1, 2])
def test_weights_that_are_not_finite_are_not_saved(ranks, device, tmp_path, tokens, tp):
    "The loss of the step was finite: its update was not."
    config = plan(tmp_path, tp=tp, optimizer=OptimizerConfig(lr=3e38, warmup_steps=0), save_every=1)
    words = "step 1: .* is not saved; .* none"
    with pytest.raises((FloatingPointError, RuntimeError), match=words):
        data = tokens, device
        run_here(config, *data) if tp == 1 else ranks(2)(run_quietly, config, *data)
    assert latest_checkpoint(tmp_path) is None


def test_nan_in_the_gradient_alone_stops_before_the_weights_change(tmp_path, tokens, monkeypatch):
    seen = []
    real = step.clip_grad_norm

    def poisoned(model, clip):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if len(seen) == 4:
            model.ln_f.bias.grad[0] = math.nan
        return real(model, clip)

    monkeypatch.setattr(step, "clip_grad_norm", poisoned)
    models = []
    real_begin = loop.begin_run
    monkeypatch.setattr(loop, "begin_run", lambda *a: models.append(real_begin(*a)) or models[-1])
    with pytest.raises(FloatingPointError, match="step 4: loss [0-9.]+, gradient norm nan"):
        run_here(plan(tmp_path), tokens)
    torch.testing.assert_close(dict(models[0].model.named_parameters()), seen[3], rtol=0, atol=0)
    assert models[0].step == 3


SCRIPT = """
import sys
from pathlib import Path
import test_loop
from megatron_edu.errors import Stopped
try:
    config = test_loop.plan(Path(sys.argv[1]), steps=10**6, save_every=10**6)
    test_loop.run_here(config, sys.argv[2])
except Stopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(stopped.status)
"""


def wait_for_steps(out: Path, count: int, process) -> None:
    "Until the metrics have that many lines."
    def done():
        assert process.poll() is None, process.communicate()
        return len(read_metrics(out)) >= count

    wait_for(done, f"{count} lines of metrics")


@contextlib.contextmanager
def endless_run(folder: Path, tokens: Path, **options):
    "A run in a process of its own, which somebody has to stop."
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tokens)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=environment, **pipes, **options)
    try:
        wait_for_steps(folder, 2, process)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(tmp_path, tokens, number):
    with endless_run(tmp_path, tokens) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=HANG)
    step = read_metrics(tmp_path)[-1]["step"]
    assert process.returncode == 128 + number
    assert errors == f"stopped by {number.name} at step {step}; go on with --resume auto\n"
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, step)
    state = load_state(latest_checkpoint(tmp_path))
    assert (state["step"], state["consumed"]) == (step, 4 * step)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_from_the_start_stays_ignored(tmp_path, tokens, number):
    "As nohup does with a hangup, and a shell with Ctrl-C for what runs in the background."
    ignore = {"preexec_fn": lambda: signal.signal(number, signal.SIG_IGN)}
    with endless_run(tmp_path, tokens, **ignore) as process:
        process.send_signal(number)
        wait_for_steps(tmp_path, len(read_metrics(tmp_path)) + 3, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=HANG)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_second_request_ends_at_once_but_a_second_hangup_does_not():
    with stop_requested() as asked:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGINT):    # of a closed terminal
            signal.raise_signal(number)
        with pytest.raises(Stopped, match="stopped at once by a second SIGTERM") as caught:
            signal.raise_signal(signal.SIGTERM)
    assert caught.value.status == 143 and len(asked) == 4


def interrupt_the_second(config, prefix, device):
    "A polite kill reaches the second rank alone, in its second step."
    groups, steps = config.parallel.build(device), []
    real = loop.seed_replica

    def counted(*numbers):
        steps.append(numbers)
        if len(steps) == 2 and groups.tp_rank == 1:
            signal.raise_signal(signal.SIGTERM)
        real(*numbers)

    loop.seed_replica = counted
    try:
        with pytest.raises(Stopped) as caught:
            train(config, TokenFile(prefix), groups, device)
    finally:
        loop.seed_replica = real
    return len(steps), caught.value.signal


def test_all_ranks_stop_where_one_is_interrupted(ranks, device, tmp_path, tokens):
    ended = ranks(2)(interrupt_the_second, plan(tmp_path, tp=2), tokens, device)
    assert ended == [(2, signal.SIGTERM)] * 2
    assert latest_checkpoint(tmp_path).name == "step-00000002"


@pytest.mark.parametrize("step", [4, 6])
def test_who_stops_a_run_at_its_last_step_is_not_told_to_go_on(
    tmp_path, tokens, monkeypatch, step
):
    asked = iter([0] * (step - 1) + [signal.SIGTERM])
    monkeypatch.setattr(loop, "_any_rank", lambda *args: next(asked))
    told = pytest.raises(Stopped, match="at step 4; go on with --resume auto")
    with told if step == 4 else contextlib.nullcontext():
        run_here(plan(tmp_path), tokens)
    assert latest_checkpoint(tmp_path).name == f"step-{step:08}"


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_requested() as asked:
        assert asked == []
        signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is before


def held_out(config, prefix, device) -> float:
    "Validation loss of the initial model on a grid."
    groups = config.parallel.build(device)
    data = Data.open(TokenFile(prefix), config, groups, torch.device(device))
    model = build_model(config.model, groups.tp_group).to(device)
    found = validate(model, data)
    assert model.training and validate(model, data) == found
    return found["val_loss"]


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1), (1, 2)])
def test_validation_loss_is_the_mean_over_the_held_out_documents(
    ranks, device, tmp_path, tokens, tp, dp
):
    config, data = plan(tmp_path, DROPOUT, tp=tp, dp=dp), (tokens, device)
    found = ranks(tp * dp)(held_out, config, *data)[-1]
    batch = GPT2Samples(TokenFile(tokens), 16, 8, 1, PARTS[1]).batch(range(8))
    model = reference.GPT2(DROPOUT).eval()
    expected = model.loss(batch["input_ids"], batch["labels"]).item()
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_finished_run_has_nothing_left_to_do(tmp_path, tokens):
    run_here(plan(tmp_path), tokens)
    before = read_metrics(tmp_path)
    run_here(plan(tmp_path, resume="auto"), tokens)
    assert read_metrics(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"micro_batch": 0}, "micro_batch=0: must be at least 1"),
        ({"log_every": 0}, "log_every=0: must be at least 1"),
        ({"validation": 1.0}, "validation=1.0: must be a share"),
        ({"validation": 0.5, "test": 0.5}, "test=0.5: must be a share .* validation=0.5 leaves"),
        ({"test": -0.1}, "test=-0.1: must be a share of the documents, from 0 to"),
        ({"seed": -1}, "seed=-1: must be from 0 to "),
        ({"split_seed": -1}, "split_seed=-1: must be from 0 to "),
        ({"micro_batch": 3}, "global_batch 4 does not divide into micro-batches of 3"),
    ],
)
def test_bad_settings_name_value_and_rule(tmp_path, tokens, settings, message):
    with pytest.raises(ValueError, match=message):
        run_here(plan(tmp_path / "run", **settings), tokens)
    assert not (tmp_path / "run").exists()


def test_pipelines_and_foreign_ids_are_refused(tmp_path, tokens):
    with pytest.raises(ValueError, match="pp=2: this loop has no pipeline"):
        TrainConfig(TINY, RunConfig(tmp_path), parallel=ParallelDims(pp=2))
    with pytest.raises(ValueError, match="outside the vocabulary of 50"):
        run_here(plan(tmp_path / "run", replace(TINY, vocab_size=50)), tokens)


def test_a_full_disk_loses_no_line_of_the_metrics(tmp_path, monkeypatch):
    "Resuming drops lines of steps done anew: what is left is written aside, then renamed."
    lines = [{"step": number, "loss": 1.0} for number in range(1, 5)]
    mark_folder(tmp_path, "run")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def full(path, content):
        with path.open("wb") as stream:
            stream.write(content[:7])
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            journal._keep_lines(tmp_path, 2)
    assert read_metrics(tmp_path) == lines
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARK, "metrics.jsonl"]
    journal._keep_lines(tmp_path, 2)
    assert read_metrics(tmp_path) == lines[:2]
    dropped = (tmp_path / journal.DROPPED).read_text().splitlines()
    assert [json.loads(line) for line in dropped] == lines[2:]


@pytest.mark.parametrize("grid", [(1, 1), (2, 2)])
def test_checkpoints_in_the_background_are_those_of_a_run_that_waits(
    ranks, device, tokens, tmp_path, grid
):
    for mode in ("background", "sync"):
        settings = {"save_mode": mode, "save_every": 1, "keep_last": None}
        asked = plan(tmp_path / mode, DROPOUT, *grid, **settings)
        ranks(grid[0] * grid[1])(run_quietly, asked, tokens, device)
    assert losses(tmp_path / "background") == losses(tmp_path / "sync")
    for number in range(1, 7):
        folders = [checkpoint_folder(tmp_path / mode, number) for mode in ("background", "sync")]
        names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
        assert names[0] == names[1]
        for name in names[0]:
            if name.endswith(".safetensors") or name in ("index.json", "state.json"):
                assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


@pytest.mark.parametrize("mode", ["background", "sync"])
def test_a_run_removes_its_older_checkpoints(tokens, tmp_path, mode):
    asked = plan(tmp_path / "run", save_every=1, keep_last=2, keep_every=3, save_mode=mode)
    run_here(asked, tokens)
    names = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert names == ["step-00000003", "step-00000005", "step-00000006"]
    run_here(replace(asked, run=replace(asked.run, steps=8, resume="auto")), tokens)
    names = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert names == ["step-00000003", "step-00000006", "step-00000007", "step-00000008"]


def elsewhere(config, prefix, device, blind):
    "What this rank is told if one of the ranks looks at another disk; what lies there then."
    patched = {"SHARED": 0.3} | ({"lock_number": lambda out: None} if blind else {})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in patched.items():
            patch.setattr(loop, name, value)
        try:
            run_here(config, prefix, device)
        except ValueError as error:
            return str(error)


def test_ranks_that_do_not_share_the_runs_folder_stop_before_the_first_step(
    ranks, device, tokens, tmp_path
):
    def on_rank(config, prefix):
        return elsewhere(config, prefix, device, torch.distributed.get_rank() == 1)

    told = ranks(2)(on_rank, plan(tmp_path / "run", dp=2), tokens)
    assert told[0] == told[1] and told[0].startswith("rank 1 on ")
    assert "must be a folder that all machines share" in told[0]
    assert not list(tmp_path.glob("run/step-*")) and not losses(tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written_is_said_and_the_run_goes_on(
    tokens, tmp_path, monkeypatch, capsys
):
    real = checkpoint.write_pieces

    def full(path, pieces):
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        return real(path, pieces)

    monkeypatch.setattr(checkpoint, "write_pieces", full)
    run_here(plan(tmp_path / "run", save_every=2), tokens)
    names = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert names == ["step-00000002", "step-00000006"]
    said = capsys.readouterr().out
    assert said.count("no checkpoint: ") == 1
    assert "step-00000004 could not be saved ([Errno 28] No space left on device" in said
    assert said.index("step-00000004 could not") < said.index("step-00000006")


@pytest.mark.parametrize("mode, step", [("background", 6), ("sync", 2)])
def test_without_its_last_checkpoint_a_run_fails(tokens, tmp_path, monkeypatch, mode, step):
    real = checkpoint.write_pieces

    def full(path, pieces):
        if f"step-0000000{step}" in str(path):
            raise OSError(28, "No space left on device")
        return real(path, pieces)

    monkeypatch.setattr(checkpoint, "write_pieces", full)
    with pytest.raises(OSError, match=f"step-0000000{step} could not be saved"):
        run_here(plan(tmp_path / "run", save_every=2, save_mode=mode), tokens)


def test_validation_of_a_bert_makes_few_logits_at_a_time(monkeypatch):
    import bert_cases
    from megatron_edu.training import validation

    model, _ = bert_cases.pair(bert_cases.config(), None, torch.float64, "cpu")
    batch = bert_cases.batch(model.config, rows=4)
    masked = (batch["labels"] != -100).sum().item()
    rows, logits = [], type(model).logits

    def counted(self, x, *rest):
        rows.append(len(x))
        return logits(self, x, *rest)

    monkeypatch.setattr(type(model), "logits", counted)
    with torch.no_grad():
        whole = validation.bert_sums(model.eval(), batch)
        monkeypatch.setattr(validation, "CHUNK", 3)
        pieces = validation.bert_sums(model, batch)
    assert masked > 3 and rows[0] == masked and max(rows[1:]) == 3 and sum(rows[1:]) == masked
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("before", ["highest", "high"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_products_of_a_gpu_are_what_was_asked_for_and_the_setting_is_put_back(before, precision):
    usual = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = before == "high"
    try:
        with pytest.raises(KeyError), step.float32_products(precision, torch.device("cuda")):
            wanted = "high" if precision == "tf32" else "highest"
            assert torch.get_float32_matmul_precision() == wanted
            assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
            raise KeyError
        assert torch.get_float32_matmul_precision() == before
        assert torch.backends.cudnn.allow_tf32 == (before == "high")
    finally:
        torch.set_float32_matmul_precision(usual[0])
        torch.backends.cudnn.allow_tf32 = usual[1]


def test_steps_and_validation_multiply_as_was_asked(monkeypatch, tmp_path, tokens):
    asked = set()

    def noted(name):
        return lambda precision, device: asked.add((name, precision)) or contextlib.nullcontext()

    monkeypatch.setattr("megatron_edu.training.step.float32_products", noted("step"))
    monkeypatch.setattr("megatron_edu.training.validation.float32_products", noted("validation"))
    run_here(plan(tmp_path, precision="tf32", steps=1), tokens)
    assert asked == {("step", "tf32"), ("validation", "tf32")}


@pytest.mark.parametrize(
    ("precision", "words"), [("tf32", "a CPU has no such products"), ("fp16", "is unknown; use")]
)
def test_a_precision_that_is_not_to_be_had_is_refused(tmp_path, tokens, precision, words):
    config = plan(tmp_path)
    object.__setattr__(config.run, "precision", precision)      # as if nobody had checked it
    with pytest.raises(ValueError, match=words):
        run_here(config, tokens)
