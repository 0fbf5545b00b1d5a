"Going on: from which checkpoint, with which data and options; and weights to begin with."

import json
import os
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from plain import make_plain
from safetensors.torch import load_file, save_file

from megatron_edu import resume
from megatron_edu.cli import main
from megatron_edu.cli import train as train_verb
from megatron_edu.cli.parse import parse
from megatron_edu.config import BertConfig, GPT2Config
from megatron_edu.data import token_file
from megatron_edu.data.gpt2 import GPT2Samples, split_documents
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.token_writer import TokenFileWriter
from megatron_edu.files import mark_folder
from megatron_edu.mesh import ParallelDims
from megatron_edu.models import build_model
from megatron_edu.data.prepare import prepare
from megatron_edu.resume import choose_checkpoint, latest_checkpoint, read_checkpoint
from megatron_edu.settings import OptimizerConfig, RunConfig, TrainConfig
from megatron_edu.training import journal
from megatron_edu.training import run as loop_data
from megatron_edu.training.checkpoint import load_model, load_state, save_checkpoint
from megatron_edu.training.journal import Journal, plot_metrics, read_metrics, validation_losses
from megatron_edu.training.loop import train

TINY = GPT2Config(2, 32, 4, vocab_size=90, max_seq_len=16, dropout=0.1, vocab_multiple=24)
RATES = OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2)


# ------------------------------------------------------------------------------------ the library


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    "A token file of 20 short documents: an epoch has some 130 samples."
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens", 0)


def write_tokens(prefix: Path, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    with TokenFileWriter(prefix, 90) as writer:
        for _ in range(20):
            writer.append((generator.integers(90) + np.arange(generator.integers(80, 160))) % 90)
            writer.end_document()
    return prefix


def plan(out, model=TINY, tp=1, dp=1, optimizer=RATES, **settings) -> TrainConfig:
    given = {"steps": 6, "batch_size": 4, "save_every": 3, "eval_every": 3, "eval_batches": 2}
    run = RunConfig(Path(out), **{**given, "validation": 0.1, **settings})
    return TrainConfig(model, run, optimizer, ParallelDims(tp=tp, dp=dp))


def run_here(config, prefix, device="cpu", **more):
    return train(config, TokenFile(prefix), config.parallel.build(device), device, **more)


@pytest.fixture(scope="module")
def whole(tokens, tmp_path_factory) -> Path:
    "A run of six steps with checkpoints after three and six."
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_here(plan(out), tokens)
    return out


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def unindexed(copy) -> Path:
    "The same, as older versions wrote it."
    for folder in copy.glob("step-*"):
        make_plain(folder)
    return copy


def content(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(out) -> list[float]:
    return [line["loss"] for line in read_metrics(out)]


KINDS = {
    "model": BertConfig,
    "run": RunConfig,
    "optimizer": OptimizerConfig,
    "parallel": ParallelDims,
}


@pytest.mark.parametrize("concern", KINDS)
def test_every_option_has_an_entry(concern):
    "Whoever adds an option decides whether a run may change it."
    names = {each.name for each in fields(KINDS[concern])}
    assert names - set(resume.PLACES) == resume.FIELDS[concern].keys()
    for text in resume.FIELDS[concern].values():
        assert text is resume.STAYS or text


@pytest.mark.parametrize("batch", [1, 3, 4, 20, 64])
def test_a_run_goes_on_with_batches_of_another_size(tokens, copy, monkeypatch, batch):
    "Samples in all are those consumed and those of the steps left, over epochs as well."
    read, real = [], GPT2Samples.batch
    monkeypatch.setattr(
        GPT2Samples, "batch", lambda self, which: read.extend(which) or real(self, which)
    )
    config = plan(copy, batch_size=batch, steps=9, eval_every=100, resume="auto")
    run_here(config, tokens)
    assert read[: 3 * batch] == list(range(24, 24 + 3 * batch))
    assert load_state(copy / "step-00000009") == {"step": 9, "consumed": 24 + 3 * batch}
    assert len(losses(copy)) == 9
    again = plan(copy, batch_size=2, steps=10, eval_every=100, resume="auto")
    run_here(again, tokens)
    assert read_checkpoint(copy / "step-00000010").consumed == 24 + 3 * batch + 2


# What can be wrong with a checkpoint; what must be named.


def change(name, **entries):
    "Write other entries into a JSON file; None: leave them out."

    def damage(folder):
        make_plain(folder)
        found = {**json.loads((folder / name).read_text()), **entries}
        kept = {key: value for key, value in found.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return damage


def change_in(part, **entries):
    "The same one level down in config.json."

    def damage(folder):
        found = json.loads((folder / "config.json").read_text())
        change("config.json", **{part: {**found[part], **entries}})(folder)

    return damage


def write(name, raw):
    return lambda folder: (folder / name).write_bytes(raw)


def tensors(name, edit):
    "Change the tensors of a file."

    def damage(folder):
        found = load_file(make_plain(folder) / name)
        edit(found)
        save_file(found, folder / name)

    return damage


def cut(name, count):
    def damage(folder):
        path = make_plain(folder) / name
        path.write_bytes(path.read_bytes()[:-count])

    return damage


def nan_in(key, value=float("nan")):
    return lambda found: found[key].view(-1).__setitem__(0, value)


def make_file(folder):
    shutil.rmtree(folder)
    folder.write_text("no folder")


W, M = "model.safetensors", "optimizer.safetensors"
DAMAGE = {
    "no state": (lambda f: (f / "state.json").unlink(), "state.json"),
    "state is a list": (write("state.json", b"[6]"), "state.json"),
    "state is zero bytes": (write("state.json", bytes(40)), "state.json"),
    "state is deep": (write("state.json", b"[" * 100_000), "state.json"),
    "state is a folder": (
        lambda f: ((f / "state.json").unlink(), (f / "state.json").mkdir()),
        "state.json",
    ),
    "no step": (change("state.json", step=None), "names no step"),
    "step is a text": (change("state.json", step="6"), "names no step"),
    "step is a bool": (change("state.json", step=True), "names no step"),
    "step is a float": (change("state.json", step=6.0), "names no step"),
    "step is NaN": (change("state.json", step=float("nan")), "names no step"),
    "step below 0": (change("state.json", step=-6), "names no step"),
    "step of another": (change("state.json", step=3, consumed=12), "named after step 6"),
    "no consumed": (change("state.json", consumed=None), "consumed is None"),
    "consumed below 0": (change("state.json", consumed=-1), "consumed is -1"),
    "consumed is a float": (change("state.json", consumed=24.0), "consumed is 24.0"),
    "consumed is another": (change("state.json", consumed=25), "consumed is 25; it must be 24"),
    "consumed is small": (change("state.json", consumed=2), "consumed is 2; it must be 24"),
    "config is cut": (cut("config.json", 9), "config.json"),
    "config is null": (write("config.json", b"null"), "config.json"),
    "config is of another kind": (change("config.json", architecture="t5"), "config.json"),
    "config is of another kind of value": (change("config.json", architecture=[]), "config.json"),
    "model is a text": (change("config.json", model="tiny"), "config.json"),
    "model has a text": (change_in("model", hidden_size="32"), "config.json"),
    "model is wider": (change_in("model", hidden_size=64), W),
    "model is endless": (change_in("model", num_layers=10**12), W),
    "run is a list": (change("config.json", run=[]), "config.json: run"),
    "batch is a text": (change_in("run", batch_size="4"), "config.json: run"),
    "batch is a bool": (change_in("run", batch_size=True), "config.json: run"),
    "batch is another": (change_in("run", batch_size=8), "consumed is 24; it must be 48"),
    "rate is NaN": (change_in("optimizer", lr=float("nan")), "config.json: optimizer"),
    "tp is 0": (change_in("parallel", tp=0), "config.json: parallel"),
    "begun later": (change("config.json", begun={"step": 9, "consumed": 0}), "begun"),
    "begun is a number": (change("config.json", begun=3), "begun"),
    "data is a text": (change("config.json", data="tokens"), "data is damaged"),
    "data has no files": (change_in("data", files=None), "files is damaged"),
    "data has other files": (change_in("data", files=[{"path": 3}]), "files is damaged"),
    "data has a sum below 0": (change_in("data", tokens=-1), "tokens is damaged"),
    "preset is a number": (change("config.json", preset=1), "preset is damaged"),
    "weights are cut": (cut(W, 1), W),
    "weights are longer": (lambda f: (f / W).write_bytes((f / W).read_bytes() + b"x"), W),
    "weights are gone": (lambda f: (f / W).unlink(), W),
    "weights are zero bytes": (write(W, bytes(100)), W),
    "a weight is missing": (tensors(W, lambda t: t.pop("ln_f.bias")), W),
    "a weight too many": (tensors(W, lambda t: t.update(x=torch.ones(1))), W),
    "a weight of another name": (
        tensors(W, lambda t: t.update({"ln_f.gain": t.pop("ln_f.bias")})),
        "ln_f.gain",
    ),
    "a weight of another shape": (
        tensors(W, lambda t: t.update({"wpe.weight": t["wpe.weight"].T.contiguous()})),
        "wpe.weight",
    ),
    "whole numbers": (tensors(W, lambda t: t.update({"ln_f.bias": t["ln_f.bias"].long()})), "I64"),
    "a weight is NaN": (tensors(W, nan_in("blocks.1.mlp.up.weight")), "blocks.1.mlp.up.weight"),
    "a weight is inf": (tensors(W, nan_in("ln_f.bias", float("inf"))), "ln_f.bias"),
    "moments are cut": (cut(M, 100), M),
    "moments are gone": (lambda f: (f / M).unlink(), "lacks the moments"),
    "a moment alone": (tensors(M, lambda t: t.pop("exp_avg.ln_f.bias")), "ln_f.bias has one"),
    "a moment of nothing": (tensors(M, lambda t: t.update(x=torch.ones(1))), M),
    "a moment is NaN": (tensors(M, nan_in("exp_avg.ln_f.bias")), "exp_avg.ln_f.bias"),
    "squares below 0": (tensors(M, nan_in("exp_avg_sq.ln_f.bias", -1.0)), "exp_avg_sq.ln_f.bias"),
    "a file": (make_file, "no folder"),
    "an empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "state.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(unindexed, kind):
    copy, (damage, named) = unindexed, DAMAGE[kind]
    last = copy / "step-00000006"
    damage(last)
    checkpoint, notes, later = choose_checkpoint(copy, "auto")
    assert (checkpoint.step, checkpoint.consumed, later) == (3, 12, [last])
    assert len(notes) == 1 and "step-00000006" in notes[0] and named in notes[0]
    shutil.rmtree(copy / "step-00000003")
    message = "none of its 1 checkpoints is whole.* another --out"
    with pytest.raises(ValueError, match=message) as error:
        choose_checkpoint(copy, "auto")
    assert named in str(error.value)


GONE_PAST = [
    "a weight is NaN", "moments are gone", "no step", "a file", "a moment is NaN",
    "squares below 0",
]


@pytest.mark.parametrize("kind", GONE_PAST)
def test_a_run_goes_on_past_a_damaged_checkpoint_as_if_there_were_none(
    unindexed, whole, tokens, capsys, kind
):
    copy = unindexed
    DAMAGE[kind][0](copy / "step-00000006")
    run_here(plan(copy, resume="auto"), tokens)
    assert losses(copy) == losses(whole)
    states = [load_model(run / "step-00000006").state_dict() for run in (copy, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    said = capsys.readouterr().out
    assert "passed over" in said and "going on from" in said and "step-00000003" in said
    assert "step-00000006 is now step-00000006.aside" in said


@pytest.mark.parametrize("where", ["state.json", W, M])
def test_nothing_hangs_on_a_pipe(unindexed, where):
    copy = unindexed
    path = copy / "step-00000006" / where
    path.unlink()
    os.mkfifo(path)
    checkpoint, notes, _ = choose_checkpoint(copy, "auto")
    assert checkpoint.step == 3 and where in notes[0]


def test_a_given_checkpoint_is_taken_and_nothing_later_is_lost(copy, whole, tokens, capsys):
    run_here(plan(copy, resume=copy / "step-00000003", steps=5, save_every=9), tokens)
    assert losses(copy) != losses(whole)[:5]  # a shorter run has another schedule
    names = sorted(path.name for path in copy.glob("step-*"))
    assert names == ["step-00000003", "step-00000005", "step-00000006.aside"]
    assert latest_checkpoint(copy).name == "step-00000005"
    dropped = [json.loads(line) for line in (copy / journal.DROPPED).read_text().splitlines()]
    assert [line["loss"] for line in dropped] == losses(whole)[3:]
    assert "the lines after step 3, 3, are in metrics.dropped" in capsys.readouterr().out
    run_here(plan(copy, resume=copy / "step-00000003"), tokens)
    assert losses(copy) == losses(whole)
    states = [load_model(run / "step-00000006").state_dict() for run in (copy, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("which", ["run", "other", "name", "none", "aside", "text"])
def test_any_other_folder_is_not_gone_on_from(copy, whole, tmp_path, which):
    shutil.copytree(copy / "step-00000003", copy / "step-3")
    shutil.copytree(copy / "step-00000003", copy / "step-00000003.aside")
    folder = {
        "run": copy,
        "other": whole / "step-00000003",
        "name": copy / "step-3",
        "none": copy / "step-00000004",
        "aside": copy / "step-00000003.aside",
        "text": Path("yes"),
    }[which]
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        choose_checkpoint(copy, folder)
    assert choose_checkpoint(copy, "auto").checkpoint.step == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 2}, "seed is 1, and 2 here; go on with --seed 1, or choose another --out"),
        ({"validation": 0.2}, "validation is 0.1, and 0.2 here; go on with --validation 0.1"),
        ({"split_seed": 5}, "split_seed is 0, and 5 here; go on with --split-seed 0"),
        ({"split_seed": None}, "split_seed is 0, and None here; go on with --split-seed 0"),
        ({"test": 0.1}, "test is 0.0, and 0.1 here; go on with --test 0.0"),
        ({"model": replace(TINY, num_heads=2)}, "num_heads is 4, and 2 here; .* --num-heads 4"),
        ({"model": replace(TINY, vocab_size=91)}, "vocab_size is 90, and 91 here; go on with"),
        ({"model": replace(TINY, tie_embeddings=False)}, "go on with --tie-embeddings, or choose"),
        ({"model": BertConfig(2, 32, 4, 90, 16)}, "of a gpt2, which cannot go on as a bert"),
    ],
)
def test_what_decides_model_and_data_stays(copy, tokens, change, words):
    kept = content(copy)
    with pytest.raises(ValueError, match=words):
        run_here(plan(copy, resume="auto", steps=9, **change), tokens)
    assert content(copy) == kept


def as_it_was_written(run: Path, step: int) -> None:
    "Make the checkpoint one of a time when the last documents of the file were held out."
    path = make_plain(run / f"step-{step:08d}") / "config.json"
    described = json.loads(path.read_text())
    for name in ("split_seed", "test"):
        described["run"].pop(name)
    described["data"].pop("vocab_size")
    path.write_text(json.dumps(described))


@pytest.fixture
def old(tokens, tmp_path, monkeypatch) -> Path:
    "A run of before: six steps by the order of the file, with checkpoints after three and six."
    with monkeypatch.context() as patch:
        patch.setattr(resume, "check_split_seed", lambda config: None)
        run_here(plan(tmp_path / "old", split_seed=None), tokens)
    for step in (3, 6):
        as_it_was_written(tmp_path / "old", step)
    return tmp_path / "old"


def test_a_run_by_the_order_of_the_file_goes_on_by_it(old, tokens, monkeypatch):
    before, parts, real = losses(old), [], loop_data.open_samples
    monkeypatch.setattr(
        loop_data, "open_samples", lambda *args: parts.append(args[-1].tolist()) or real(*args)
    )
    again = plan(old, resume=old / "step-00000003", split_seed=None)
    run_here(again, tokens)
    assert parts == [list(range(18)), [18, 19]] and losses(old) == before
    described = json.loads((old / "step-00000006" / "config.json").read_text())
    assert described["run"]["split_seed"] is None and described["run"]["test"] == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_by_the_order_of_the_file_takes_no_other(old, tokens, seed):
    kept = content(old)
    words = f"split_seed is None, and {seed} here; go on with --split-seed None, or"
    with pytest.raises(ValueError, match=words):
        run_here(plan(old, resume="auto", steps=9, split_seed=seed), tokens)
    assert content(old) == kept


def test_a_new_run_has_no_order_of_the_file(tokens, tmp_path):
    with pytest.raises(ValueError, match="split_seed=None: a new run .* give --split-seed a whole"):
        run_here(plan(tmp_path / "new", split_seed=None), tokens)


def test_the_seed_of_a_run_moves_no_document(tokens, tmp_path, monkeypatch):
    "Only that of the split does; and a test is read by nobody."
    parts, real = [], loop_data.open_samples
    monkeypatch.setattr(
        loop_data, "open_samples", lambda *args: parts.append(set(args[-1].tolist())) or real(*args)
    )
    for number, settings in enumerate(({}, {"seed": 2}, {"split_seed": 1}, {"test": 0.2})):
        run_here(plan(tmp_path / f"{number}", steps=1, **settings), tokens)
    assert parts[0:2] == parts[2:4] and parts[1] != parts[5]
    assert parts[0] | parts[1] == parts[4] | parts[5] == set(range(20))
    read = parts[6] | parts[7]
    assert len(read) == 16 and parts[6].isdisjoint(parts[7])
    assert read == set(range(20)) - set(split_documents(20, (0.7, 0.1, 0.2))[2].tolist())


def test_tokens_are_looked_at_once_in_the_life_of_a_run(copy, tokens, monkeypatch):
    "By the record of the run; a checkpoint without that note has them looked at again."
    looked, real = [], token_file.check_token_ids
    spy = lambda *args: looked.append(1) or real(*args)  # noqa: E731
    monkeypatch.setattr(token_file, "check_token_ids", spy)
    run_here(plan(copy, resume="auto", steps=7), tokens)
    assert looked == []
    make_plain(copy / "step-00000007")
    described = json.loads((copy / "step-00000007" / "config.json").read_text())
    described["data"].pop("vocab_size")
    (copy / "step-00000007" / "config.json").write_text(json.dumps(described))
    run_here(plan(copy, resume="auto", steps=8), tokens)
    assert looked == [1]
    assert json.loads((copy / "step-00000008" / "config.json").read_text())["data"]["vocab_size"]


def test_what_may_change_is_told_with_its_consequence(copy, tokens, capsys):
    model = replace(TINY, dropout=0.0, init_std=0.5, vocab_multiple=48, ffn_hidden_size=128)
    rates = replace(RATES, lr=2e-2, clip=float("inf"))
    run_here(plan(copy, model, optimizer=rates, steps=9, micro_batch=2, resume="auto"), tokens)
    said = capsys.readouterr().out.splitlines()
    told = {line.split(":")[0]: line for line in said if " -> " in line}
    assert told.keys() == {
        "dropout 0.1 -> 0.0",
        "init_std 0.02 -> 0.5",
        "steps 6 -> 9",
        "micro_batch None -> 2",
        "lr 0.01 -> 0.02",
        "clip 1.0 -> inf",
        "learning rate of step 7",
    }
    assert told["learning rate of step 7"].endswith("1.000e-03 -> 4.577e-03")
    text = (copy / "step-00000009" / "config.json").read_text()
    assert '"clip": "inf"' in text and "Infinity" not in text
    capsys.readouterr()
    run_here(plan(copy, model, optimizer=rates, steps=9, micro_batch=2, resume="auto"), tokens)
    assert " -> " not in capsys.readouterr().out


def test_other_tokens_are_refused_and_the_same_are_known_anywhere(copy, tokens, tmp_path):
    other = write_tokens(tmp_path / "other", 1)
    with pytest.raises(ValueError, match="not those that .*00006 was trained on .*init-from"):
        run_here(plan(copy, resume="auto", steps=9), other)
    for kind in ("bin", "idx"):
        shutil.copyfile(f"{tokens}.{kind}", tmp_path / f"moved.{kind}")
    run_here(plan(copy, resume="auto", steps=9), tmp_path / "moved")
    noted = read_checkpoint(copy / "step-00000009").described["data"]
    assert noted["prefix"] == str(tmp_path / "moved")
    assert noted["tokens"] == TokenFile(tokens).num_tokens
    raw = bytearray((tmp_path / "moved.bin").read_bytes())
    raw[2000] ^= 1  # the same number of tokens, one of them another
    (tmp_path / "moved.bin").write_bytes(raw)
    with pytest.raises(ValueError, match="not those that"):
        run_here(plan(copy, resume="auto", steps=12), tmp_path / "moved")


def test_a_run_that_noted_no_data_goes_on(copy, tokens, capsys):
    "As those from before it was noted."
    for folder in copy.glob("step-*"):
        change("config.json", data=None, begun=None)(folder)
    run_here(plan(copy, resume="auto", steps=9), tokens)
    assert "does not say what it was trained on" in capsys.readouterr().out
    assert "data" in read_checkpoint(copy / "step-00000009").described


def test_weights_alone_go_on_with_fresh_moments_and_exactly(tokens, tmp_path, capsys):
    for name in ("whole", "parts"):
        save_checkpoint(tmp_path / name, 5, build_model(TINY))
        run_here(plan(tmp_path / name, resume="auto", steps=9, save_every=2), tokens)
        assert "weights alone" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "parts" / "step-00000009")
    run_here(plan(tmp_path / "parts", resume="auto", steps=9, save_every=2), tokens)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    states = [load_model(tmp_path / n / "step-00000009").state_dict() for n in ("whole", "parts")]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def refuse_on_two(config, prefix, device):
    "What this rank is told, if only the first sees the folder as it is."
    groups = config.parallel.build(device)
    real = resume.choose_checkpoint
    if dist.get_rank() == 1:
        resume.choose_checkpoint = None  # called on the first rank alone
    try:
        return train(config, TokenFile(prefix), groups, device) and "trained"
    except ValueError as error:
        return str(error)
    finally:
        resume.choose_checkpoint = real


@pytest.mark.world(2)
@pytest.mark.parametrize("grid", [{"tp": 2}, {"dp": 2}])
def test_one_rank_decides_and_all_follow(ranks, device, copy, tokens, grid):
    config = plan(copy, resume="auto", steps=9, seed=7, **grid)
    told = ranks(2)(refuse_on_two, config, tokens, device)
    assert told[0] == told[1] and "seed is 1, and 7 here" in told[0]
    DAMAGE["a weight is NaN"][0](copy / "step-00000006")
    told = ranks(2)(refuse_on_two, plan(copy, resume="auto", steps=9, **grid), tokens, device)
    assert told == ["trained", "trained"]
    assert read_checkpoint(copy / "step-00000009").described["begun"] == {"step": 3, "consumed": 12}


# Lines of metrics that are none.

LINES = {
    "zero bytes": bytes(6),
    "cut": b'{"step": 2, "lo',
    "a text": b'"step"',
    "a number": b"2",
    "a list": b"[1, 2]",
    "null": b"null",
    "empty": b"",
    "not UTF-8": b'{"step": 2, "a": "\xff"}',
    "no step": b'{"loss": 1.0}',
    "step 0": b'{"step": 0, "loss": 1.0}',
    "a step that is true": b'{"step": true, "loss": 1.0}',
    "half a step": b'{"step": 2.5, "loss": 1.0}',
    "NaN": b'{"step": 2, "loss": NaN}',
    "infinite": b'{"step": 2, "loss": 1e999}',
    "a loss in words": b'{"step": 2, "loss": "low"}',
    "no loss": b'{"step": 2, "loss": null}',
    "too large": b'{"step": 2, "loss": 1%s}' % (b"0" * 400),
    "deep": b"[" * 100_000,
    "two objects": b'{"step": 2}{"step": 3}',
    "a line break": b"\r",
}


@pytest.mark.parametrize("place", [0, 2, 6])
@pytest.mark.parametrize("kind", LINES)
def test_a_damaged_line_stops_no_run(tmp_path, capsys, kind, place):
    lines = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(1, 7)]
    raw = [*lines[:place], LINES[kind], *lines[place:]]
    mark_folder(tmp_path, "run")
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in raw))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    Journal(plan(tmp_path), 6, active=True)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"line {place + 1} is damaged" in said
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(line + b"\n" for line in lines)
    assert (tmp_path / "metrics.dropped").read_bytes() == LINES[kind] + b"\n"
    plot_metrics(tmp_path)


def test_of_two_lines_of_a_step_the_later_counts(tmp_path, capsys):
    steps = [1, 2, 3, 2, 3, 9, 4]
    raw = "".join(json.dumps({"step": s, "loss": float(i)}) + "\n" for i, s in enumerate(steps))
    mark_folder(tmp_path, "run")
    (tmp_path / "metrics.jsonl").write_text(raw + '{"step": 5, "lo')
    found = [(line["step"], line["loss"]) for line in read_metrics(tmp_path)]
    assert found == [(1, 0.0), (2, 3.0), (3, 4.0), (4, 6.0), (9, 5.0)]
    Journal(plan(tmp_path), 4, active=True)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert "step 2 comes again" in capsys.readouterr().out
    assert len((tmp_path / "metrics.dropped").read_bytes().split(b"\n")) == 5


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1}],
        [{"step": 3, "val_loss": 2.0}],
        [{"step": 1, "mlm_loss": 2.0}],
        [{"step": 1, "loss": 1.0}, {"step": 2, "mlm_loss": 2.0}],
        [{"step": 1, "loss": -1e300}],
    ],
)
def test_any_metrics_can_be_drawn(tmp_path, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert plot_metrics(tmp_path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["loss", "val_loss", "grad_norm"])
def test_json_has_no_nan(tmp_path, name, value):
    for active in (True, False):
        told = Journal(plan(tmp_path), 0, active=active)
        numbers = {"loss": 1.0, "lr": 0.1, "grad_norm": 1.0, name: value}
        with pytest.raises(FloatingPointError, match=f"step 3: {name} is .*lower the learning"):
            told.write(3, 0.1, **numbers)
        with pytest.raises(FloatingPointError, match=f"step 0: {name} is .*lower the learn"):
            told.say_validation(0, numbers)
    assert read_metrics(tmp_path) == []


# ------------------------------------------------------------------------- weights to begin with


def test_a_run_begins_with_the_weights_of_another_and_nothing_else(whole, tokens, tmp_path, capsys):
    out, model = tmp_path / "new", replace(TINY, dropout=0.0)
    run_here(plan(out, model, seed=5, steps=3), tokens, init_from=whole)
    before = [loss for step, loss in validation_losses(read_metrics(out)) if step == 0]
    same = tmp_path / "same"
    run_here(plan(same, model, seed=5, steps=3), tokens, init_from=whole / "step-00000006")
    assert losses(out) == losses(same) != losses(whole)[:3]
    assert "beginning with the weights of" in capsys.readouterr().out
    first = read_checkpoint(out / "step-00000003")
    assert (first.step, first.consumed) == (3, 12) and first.described["init_from"] == str(whole)
    trained = validation_losses(read_metrics(whole))[-1][1]
    assert before == pytest.approx([trained], abs=0.2) and losses(whole)[0] > trained + 0.3
    run_here(plan(out, model, seed=5, steps=5, resume="auto"), tokens, init_from=whole)
    assert "has no effect: the run goes on" in capsys.readouterr().out and len(losses(out)) == 5
    with pytest.raises(ValueError, match="began with the weights of .*; leave it out to go on"):
        run_here(plan(out, model, seed=5, steps=6, resume="auto"), tokens, init_from=same)
    with pytest.raises(ValueError, match="began with weights of its own"):
        run_here(plan(whole, steps=9, resume="auto"), tokens, init_from=out)


def saved(model):
    return lambda folder: save_checkpoint(folder, 1, build_model(model))


def of_another_library(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "t5"}')


def spoiled(folder):
    save_checkpoint(folder, 1, build_model(TINY))
    DAMAGE["a weight is NaN"][0](folder / "step-00000001")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: None, "no such folder; name a run, one of its checkpoints, or a folder that"),
        (lambda f: f.mkdir(), "a folder without a model; name a run"),
        (lambda f: f.write_text("x"), "from: no folder; name a run"),
        (of_another_library, "'t5'.*'gpt2'"),
        (spoiled, "blocks.1.mlp.up.weight is not finite"),
        (saved(replace(TINY, num_layers=1)), "--num-layers 1"),
        (saved(BertConfig(2, 32, 4, 90, 16)), "a bert, and a gpt2"),
    ],
)
def test_what_cannot_be_begun_with(tokens, tmp_path, make, words):
    make(tmp_path / "from")
    with pytest.raises(ValueError, match=words):
        run_here(plan(tmp_path / "out"), tokens, init_from=tmp_path / "from")
    assert not (tmp_path / "out").exists()


def test_initial_weights_are_finite(tokens, tmp_path):
    with pytest.raises(ValueError, match="wte.weight is not finite"):
        run_here(plan(tmp_path / "out", replace(TINY, init_std=1e39)), tokens)
    assert not (tmp_path / "out").exists()


def begin_on_two(config, prefix, device, init_from):
    train(config, TokenFile(prefix), config.parallel.build(device), device, init_from=init_from)


@pytest.mark.world(2)
def test_weights_are_cut_for_any_number_of_ranks(ranks, device, whole, tokens, tmp_path):
    model = replace(TINY, dropout=0.0)
    run_here(plan(tmp_path / "one", model, steps=2), tokens, init_from=whole)
    ranks(2)(begin_on_two, plan(tmp_path / "two", model, steps=2, tp=2), tokens, device, whole)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)


# ------------------------------------------------------------------------------- the command line

TEXT = "The cat sat on the mat, and the dog barked at the cat. Did it hear? It ran away.\n\n"
REMEDY = "Quick zebras jump over lazy wolves. A fox waits! Bright owls vex it, as ever.\n\n"
SHORT = "--preset tiny --batch-size 4 --eval-batches 1 --num-layers 1 --max-seq-len 16 --lr 0.001"
BERT = SHORT.replace("tiny", "bert-tiny")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, request):
    if request.config.getoption("--backend") == "gloo":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def me(line) -> None:
    main(str(line).split())


def refusal(capsys, line) -> str:
    "What a command says that ends with status 2."
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        me(line)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1, said
    return said


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    "Texts, and runs on them of two steps: of text, of tokens, of a BERT."
    folder = tmp_path_factory.mktemp("begun")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text(TEXT * 600)
    (folder / "texts" / "b.jsonl").write_text(json.dumps({"text": TEXT * 200}) + "\n")
    (folder / "other.txt").write_text(REMEDY * 600)
    prepare((folder / "texts",), folder / "ready", vocab_size=280)
    prepare((folder / "texts",), folder / "pieces", vocab_size=60, kind="wordpiece")
    more = "--steps 2 --seed 3 --vocab-size 290"
    me(f"train {SHORT} --data {folder}/texts --out {folder}/run {more}")
    me(f"train {SHORT} --data {folder}/ready --out {folder}/tokens-run --steps 2")
    me(f"train {BERT} --data {folder}/pieces --out {folder}/bert-run --steps 2")
    return folder


@pytest.fixture
def here(begun, tmp_path, monkeypatch) -> Path:
    "A copy of all of it, by which the notes of the runs are the original's."
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fresh(here) -> Path:
    "A run on a text of this very folder."
    me(f"train {SHORT} --data texts other.txt --out fresh --steps 2 --save-every 1")
    return here


def config_of(run, step) -> dict:
    found = json.loads((Path(run) / f"step-{step:08d}" / "config.json").read_text())
    found["run"].pop("resume")
    return found


def test_an_old_run_keeps_its_split_on_the_command_line(here, capsys):
    "Without an option it goes on by the order of the file, and says so."
    as_it_was_written(Path("run"), 2)
    text = refusal(capsys, "train --out run --resume auto --steps 4 --split-seed 0")
    assert "go on with --split-seed None" in text
    me("train --out run --resume auto --steps 3")
    assert "documents, the last ones" in capsys.readouterr().out
    assert config_of("run", 3)["run"]["split_seed"] is None
    me("train --out run --resume auto --steps 4 --split-seed None")
    assert config_of("run", 4)["run"]["split_seed"] is None
    text = refusal(capsys, f"train {SHORT} --data ready --out new --split-seed None")
    assert "split_seed=None: a new run" in text and not Path("new").exists()


def planned(line: str) -> train_verb.Plan:
    return train_verb.make_plan(parse("train", [*SHORT.split(), *line.split()]))


def test_tokens_that_we_wrote_are_not_looked_at_again(here, monkeypatch):
    "Neither for a first run nor for the next; what was touched since is."
    looked, real = [], token_file.check_token_ids
    spy = lambda *args: looked.append(1) or real(*args)  # noqa: E731
    monkeypatch.setattr(token_file, "check_token_ids", spy)
    for name in ("ready", "texts"):
        planned(f"--data {name} --out {name}-run")
    planned("--data ready --out another")
    assert looked == []
    os.utime("ready/tokens.bin", (1, 1))
    planned("--data ready --out third")
    assert looked


@pytest.mark.parametrize("name", ["run", "tokens-run", "bert-run"])
def test_options_that_are_not_given_are_the_runs(here, capsys, name):
    before = config_of(name, 2)
    me(f"train --out {name} --resume auto --steps 4")
    after = config_of(name, 4)
    assert after["run"] == {**before["run"], "steps": 4, "out": name}
    for part in ("model", "optimizer", "parallel", "preset", "data"):
        assert after[part] == before[part]
    changed = [line for line in capsys.readouterr().out.splitlines() if " -> " in line]
    assert [line.split(":")[0] for line in changed] == ["steps 2 -> 4", "learning rate of step 3"]


def older(folder):
    "As it was when recomputation was the model's: on."
    path = make_plain(Path(folder)) / "config.json"
    found = json.loads(path.read_text())
    del found["run"]["recompute"]
    found["model"]["recompute"] = True
    path.write_text(json.dumps(found))


def test_an_older_checkpoint_has_recomputation_among_the_models_fields(here, capsys):
    checkpoint = latest_checkpoint(Path("run"))
    model = resume.load_config(checkpoint)
    older(checkpoint)
    assert resume.load_config(checkpoint) == model == read_checkpoint(checkpoint).model
    assert read_checkpoint(checkpoint).settings.run.recompute
    me("train --out run --resume auto --steps 3")
    assert config_of("run", 3)["run"]["recompute"]
    assert not re.search("recompute .* -> ", capsys.readouterr().out)
    assert "recompute" not in config_of("run", 3)["model"]
    me("train --out run --resume auto --steps 4 --no-recompute")
    assert "recompute True -> False: less memory" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["yes", None, 1])
def test_an_older_checkpoint_with_another_value_is_damaged(here, value):
    checkpoint = latest_checkpoint(Path("run"))
    older(checkpoint)
    path = checkpoint / "config.json"
    text = path.read_text()
    path.write_text(text.replace('recompute": true', f'recompute": {json.dumps(value)}'))
    with pytest.raises(ValueError, match="config.json: run: recompute=.*must be True or False"):
        read_checkpoint(checkpoint)


def test_a_run_that_was_stopped_needs_no_option(fresh, capsys):
    whole = losses("fresh")
    shutil.rmtree("fresh/step-00000002")
    capsys.readouterr()
    me("train --resume fresh/step-00000001")
    assert losses("fresh") == whole and " -> " not in capsys.readouterr().out
    me("train --out fresh --resume auto")
    assert "2 of 2 steps are done; to go on, give more --steps" in capsys.readouterr().out


def touch(here):
    os.utime("texts/a.txt", ns=(1, 1))


def move(here):
    shutil.move("texts", "moved")
    Path("texts").mkdir()
    for path in Path("moved").iterdir():
        shutil.copyfile(path, Path("texts") / path.name)


@pytest.mark.parametrize("happens", [lambda here: None, touch, move])
@pytest.mark.parametrize("named", ["", "--data texts other.txt"])
def test_text_that_is_the_same_is_not_tokenized_again(fresh, monkeypatch, capsys, happens, named):
    happens(fresh)
    kept = Path("fresh/tokens.bin").read_bytes()
    tokenize = "megatron_edu.cli.train.prepare_text"
    monkeypatch.setattr(tokenize, lambda *a: pytest.fail("tokenized"))
    me(f"train --out fresh --resume auto --steps 3 {named}")
    assert Path("fresh/tokens.bin").read_bytes() == kept and len(losses("fresh")) == 3


@pytest.mark.parametrize(
    "gone", [["texts"], ["other.txt"], ["texts/b.jsonl"], ["texts", "other.txt"]]
)
@pytest.mark.parametrize("named", ["", "--data texts other.txt"])
def test_text_that_is_gone_costs_a_line(fresh, capsys, gone, named):
    for name in gone:
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()
    capsys.readouterr()
    me(f"train --out fresh --resume auto --steps 3 {named}")
    said = [line for line in capsys.readouterr().out.splitlines() if "the run's own tokens" in line]
    assert len(said) == 1 and gone[0] in said[0] and len(losses("fresh")) == 3


def edit(here):
    Path("texts/a.txt").write_text(TEXT * 600 + "more")


def same_size(here):
    Path("other.txt").write_text(REMEDY.replace("fox", "fly") * 600)


def one_more(here):
    Path("texts/c.txt").write_text(TEXT)


OTHERS = {
    "edited": (edit, "texts other.txt"),
    "of the same size": (same_size, "texts other.txt"),
    "a file more": (one_more, "texts other.txt"),
    "one less": (lambda h: None, "texts"),
    "another": (lambda h: None, "fresh/../texts/b.jsonl other.txt"),
    "another order": (lambda h: None, "other.txt texts"),
    "absent": (lambda h: None, "no.txt"),
    "one absent": (lambda h: None, "texts no.txt"),
    "tokens": (lambda h: None, "ready"),
    "a field": (lambda h: None, "texts other.txt --text-field body"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_data_is_refused_with_the_remedy(fresh, capsys, kind):
    happens, data = OTHERS[kind]
    happens(fresh)
    kept = content(fresh)
    text = refusal(capsys, f"train --out fresh --resume auto --steps 3 --data {data}")
    assert "--init-from fresh and another --out" in text or "another tokenizer" in text
    assert content(fresh) == kept
    me("train --out fresh --resume auto --steps 3")  # the one remedy
    assert len(losses("fresh")) == 3
    if kind == "one less":  # the other
        me("train --preset tiny --data texts --init-from fresh --out new --steps 1 --batch-size 4")
        assert len(losses("new")) == 1


def test_text_for_a_run_on_tokens(here, capsys):
    text = refusal(capsys, "train --out tokens-run --resume auto --steps 3 --data texts")
    assert "was trained on the token file" in text and "not tokenized again" in text
    me("train --out tokens-run --resume auto --steps 3 --data ready")
    assert config_of("tokens-run", 3)["data"]["prefix"] == str(here / "ready" / "tokens")


def test_tokens_that_are_gone_may_lie_elsewhere(here, capsys):
    me(f"train {SHORT} --data ready --out new --steps 2")
    shutil.move("ready", "moved")
    text = refusal(capsys, "train --out new --resume auto --steps 3")
    assert "it is gone; give a copy of it with --data PATH" in text
    text = refusal(capsys, "train --out new --resume auto --steps 3 --data ready")
    assert "it is gone; give a copy of it with --data PATH" in text
    me("train --out new --resume auto --steps 3 --data moved")
    assert len(losses("new")) == 3


def test_the_runs_own_tokens_are_checked(fresh, capsys):
    raw = bytearray(Path("fresh/tokens.bin").read_bytes())
    raw[100], raw[102] = raw[102], raw[100]
    Path("fresh/tokens.bin").write_bytes(raw)
    text = refusal(capsys, "train --out fresh --resume auto --steps 3")
    assert "not those that fresh/step-00000002 was trained on" in text


@pytest.mark.parametrize(
    ("name", "option", "words"),
    [
        ("run", "--seed 4", "--seed 3, or choose another --out"),
        ("run", "--validation 0.2", "--validation 0.03,"),
        ("run", "--split-seed 2", "split_seed is 0, and 2 here; go on with --split-seed 0"),
        ("run", "--test 0.2", "test is 0.0, and 0.2 here; go on with --test 0.0"),
        ("run", "--num-layers 2 --gelu exact", "go on with --num-layers 1 --gelu tanh"),
        ("run", "--max-seq-len 8", "--max-seq-len 16"),
        ("run", "--vocab-size 280", "--vocab-size 290"),
        ("run", "--preset laptop", "began with preset tiny"),
        ("run", "--model bert", "cannot go on as a bert; go on with --model gpt2"),
        ("run", "--preset bert-tiny", "cannot go on as a bert"),
        ("run", "--tokenizer ready", "was trained with another tokenizer"),
        ("run", "--init-from bert-run", "began with weights of its own; leave it out"),
        ("bert-run", "--layer-norm post", "--layer-norm pre"),
        ("bert-run", "--num-token-types 3", "--num-token-types 2"),
        ("bert-run", "--resume bert-run", "a run, not a checkpoint; go on with --out bert-run"),
        ("run", "--resume tokens-run/step-00000002", "not a checkpoint of run; name a folder"),
    ],
)
def test_what_a_run_is_cannot_be_changed(here, capsys, name, option, words):
    kept = content(here)
    text = refusal(capsys, f"train --out {name} --resume auto --steps 3 {option}")
    assert words in text and content(here) == kept


def test_what_may_change_is_printed(here, capsys):
    line = "--batch-size 6 --micro-batch 3 --precision bf16 --save-every 1 --dropout 0 --tp 2"
    text = refusal(capsys, f"train --out run --resume auto --steps 4 {line} --tp 3")
    assert "use --tp 1 or 2 or 4" in text
    line = line.replace(" --tp 2", " --recompute")
    me(f"train --out run --resume auto --steps 4 {line}")
    said = capsys.readouterr().out
    for change in ("batch_size 4 -> 6", "precision fp32 -> bf16", "recompute False -> True"):
        assert f"{change}: " in said
    assert load_state("run/step-00000004") == {"step": 4, "consumed": 8 + 12}
    assert load_state("run/step-00000003") == {"step": 3, "consumed": 8 + 6}


@pytest.mark.parametrize("name", ["run", "bert-run"])
def test_the_runs_own_tokenizer_is_checked(here, capsys, name):
    path = Path(name) / "tokenizer.json"
    found = json.loads(path.read_text())
    words = found["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(found))
    text = refusal(capsys, f"train --out {name} --resume auto --steps 3")
    assert "tokenizer" in text


def test_nothing_to_go_on_with_begins(here, capsys):
    me(f"train {SHORT} --data ready --out new --steps 1 --resume auto")
    assert "new holds no run to go on with: a new one begins" in capsys.readouterr().out
    assert len(losses("new")) == 1
    text = refusal(capsys, f"train {SHORT} --data ready --out new --steps 1")
    assert "go on with --resume auto, or choose another --out" in text


def test_a_damaged_checkpoint_stops_no_command(fresh, capsys):
    whole = losses("fresh")
    DAMAGE["weights are cut"][0](Path("fresh/step-00000002"))
    me("train --out fresh --resume auto")
    assert losses("fresh") == whole and "passed over" in capsys.readouterr().out
    for folder in Path("fresh").glob("step-*"):
        change("state.json", step=None)(folder)
    assert "checkpoints is whole" in refusal(capsys, "train --out fresh --resume auto")
    for folder in Path("fresh").glob("step-*"):
        (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(capsys, "train --out fresh --resume auto")


@pytest.mark.parametrize(
    ("options", "warmup"),
    [
        ("--steps 50", 5),
        ("--steps=50", 5),
        ("--steps 9 --steps 60", 6),
        ("--steps 3", 0),
        ("", 40),
        ("--steps 50 --warmup-steps 7", 7),
        ("--preset gpt2-124m --steps 50", 3000),
        ("--model bert --steps 50", 5),
    ],
)
def test_the_warm_up_of_a_small_preset_follows_the_steps(options, warmup):
    asked = parse("train", ["--data", "x", "--out", "y", *options.split()])
    assert asked.config.optimizer.warmup_steps == warmup


@pytest.mark.parametrize(
    "line",
    [
        "--out bert-run --resume auto --steps 3",
        "--out bert-run --resume auto",     # all is done
        f"{SHORT} --data ready --out new --resume auto --clip inf --steps 3 --quiet",
    ],
)
def test_a_plan_is_whole_again_after_json(here, line):
    "All but the lines, which the first rank has said, and whether the run is new."
    plan = train_verb.make_plan(parse("train", line.split()))
    told = train_verb.plan_from(json.loads(json.dumps(train_verb.plan_as_json(plan))))
    plans = [each._replace(lines=[], begins=False, tokens=None) for each in (plan, told)]
    assert plans[0] == plans[1] and plan.tokens.prefix == told.tokens.prefix
    assert told.tokens.known_vocab == plan.tokens.known_vocab is not None


# Hugging Face


def theirs(folder, kind="gpt2", vocab=280, tokenizer=None, spoil=False):
    "What transformers saves."
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
        config = transformers.GPT2Config(vocab_size=vocab, **shape)
        model = transformers.GPT2LMHeadModel(config)
    else:
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        more = {"intermediate_size": 64, "max_position_embeddings": 16}
        config = transformers.MegatronBertConfig(vocab_size=vocab, **shape, **more)
        model = transformers.MegatronBertForPreTraining(config)
    if spoil:
        model.state_dict()[next(iter(model.state_dict()))].view(-1)[0] = float("nan")
    model.save_pretrained(folder)
    if tokenizer is not None:
        shutil.copy(tokenizer, Path(folder) / "tokenizer.json")
    return model


@pytest.mark.parametrize("data", ["texts", "ready"])
def test_a_model_of_transformers_is_trained_on(here, capsys, data):
    model = theirs("theirs", tokenizer="ready/tokenizer.json")
    me(f"train --preset tiny --init-from theirs --data {data} --out new --steps 1 --batch-size 4")
    found = read_checkpoint(Path("new/step-00000001"))
    assert (found.model.hidden_size, found.model.num_heads, found.model.vocab_size) == (32, 2, 280)
    assert found.described["init_from"] == str(here / "theirs")
    assert Path("new/tokenizer.json").is_file()
    weights = load_model(Path("new/step-00000001")).wpe.weight
    torch.testing.assert_close(weights, model.transformer.wpe.weight, rtol=0, atol=0.01)
    capsys.readouterr()
    me("train --out new --resume auto --steps 2 --init-from theirs")
    assert "has no effect: the run goes on" in capsys.readouterr().out
    me("train --out new --resume auto --steps 3")
    assert len(losses("new")) == 3


def test_a_bert_of_transformers_is_trained_on(here):
    theirs("theirs", "bert", 60, "pieces/tokenizer.json")
    me("train --init-from theirs --data pieces --out new --steps 1 --batch-size 4")
    assert config_of("new", 1)["architecture"] == "bert"
    me("train --out new --resume auto --steps 2")
    assert len(losses("new")) == 2


def test_a_converted_model_is_trained_on(here, capsys):
    theirs("theirs", tokenizer="ready/tokenizer.json")
    me("convert --from theirs --to ours --format megatron_edu")
    text = refusal(capsys, "train --out ours --resume auto --data texts --steps 1")
    assert "--init-from ours and another --out" in text
    me("train --init-from ours --data texts --out new --steps 1 --batch-size 4")
    me("train --init-from new --data texts --out newer --steps 1 --batch-size 4")
    assert config_of("newer", 1)["model"] == config_of("new", 1)["model"]


def test_ids_without_a_token_are_trained_with(here):
    theirs("theirs", vocab=300, tokenizer="ready/tokenizer.json")
    me("train --init-from theirs --data texts --out new --steps 1 --batch-size 4")
    me("train --out new --resume auto --steps 2 --data texts")
    assert config_of("new", 2)["model"]["vocab_size"] == 300 and len(losses("new")) == 2


def test_weights_without_a_tokenizer_need_one(here, capsys):
    theirs("theirs")
    for data in ("texts", "ready"):
        line = f"train --init-from theirs --data {data} --out new-{data} --steps 1 --batch-size 4"
        assert "--tokenizer PATH" in refusal(capsys, line)
        assert not Path(f"new-{data}").exists()
        me(f"{line} --tokenizer ready")
        assert len(losses(f"new-{data}")) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--hidden-size 64", "--hidden-size 32"),
        ("--num-heads 4", "--num-heads 2"),
        ("--max-seq-len 8", "--max-seq-len 16"),
        ("--vocab-size 400", "--vocab-size 280"),
        ("--gelu exact", "--gelu tanh"),
        ("--model bert", "leave --model and --preset out"),
        ("--preset bert-tiny", "leave --model and --preset out"),
        ("--tokenizer fresh.json", "was trained with another tokenizer"),
        ("--data pieces", "pieces"),
        ("--init-from none", "none: no such folder; name a run"),
        ("--init-from texts", "texts: a folder without a model"),
        ("--init-from spoiled", "not finite"),
    ],
)
def test_what_weights_cannot_be_begun_with(here, capsys, options, words):
    theirs("theirs", tokenizer="ready/tokenizer.json")
    theirs("spoiled", tokenizer="ready/tokenizer.json", spoil=True)
    shutil.copy("run/tokenizer.json", "fresh.json")
    line = f"train --init-from theirs --data texts --out new --steps 1 --batch-size 4 {options}"
    assert words in refusal(capsys, line)
    assert not list(Path().glob("new/step-*"))
    assert Path("new").exists() == ("spoiled" in options)   # the rest is refused before any rank


def test_heads_that_the_weights_lack_are_said(here, capsys):
    import transformers

    theirs("theirs", "bert", 60, "pieces/tokenizer.json")
    transformers.MegatronBertForMaskedLM.from_pretrained("theirs").save_pretrained("theirs")
    me("train --init-from theirs --data pieces --out new --steps 1 --batch-size 4")
    assert "has no " in capsys.readouterr().out


def test_weights_for_a_number_of_ranks_are_padded_anew(here, capsys):
    line = "train --init-from tokens-run --data ready --out new --steps 1 --batch-size 4 --tp 4"
    text = refusal(capsys, f"{line} --vocab-multiple 101")
    assert "give --vocab-multiple a multiple of 4" in text
    me(f"{line} --vocab-multiple 140 --tp 1")
    assert config_of("new", 1)["model"]["vocab_multiple"] == 140
    text = refusal(capsys, "train --out new --resume auto --steps 2 --tp 3")
    assert "use --tp 1 or 2 or 4" in text and "vocab-multiple" not in text


def test_dropout_and_recomputation_are_not_of_the_weights(here):
    theirs("theirs", tokenizer="ready/tokenizer.json")
    more = "--dropout 0.3 --recompute --vocab-multiple 64 --steps 1 --batch-size 4"
    me(f"train --init-from theirs --data ready --out new {more}")
    told = config_of("new", 1)
    model, recompute = told["model"], told["run"]["recompute"]
    assert (model["dropout"], recompute, model["vocab_multiple"]) == (0.3, True, 64)
