"Checkpoints: any number of ranks goes on where any other stopped; nothing half-written is left."

import errno
import json
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from limits import HANG
from plain import full_tensors, make_plain
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_edu import reference
from megatron_edu.config import GPT2Config
from megatron_edu.files import MARK
from megatron_edu.mesh import ParallelDims
from megatron_edu.models.gpt2 import GPT2
from megatron_edu.tensor_parallel.norm import clip_grad_norm
from megatron_edu.tensor_parallel.shard import gather_state_dict
from megatron_edu.training import checkpoint
from megatron_edu.training.checkpoint import (
    MODEL,
    OPTIMIZER,
    Background,
    latest_checkpoint,
    load_model,
    load_optimizer,
    load_state,
    load_weights,
    save_checkpoint,
)
from megatron_edu.training.optimizer import OptimizerConfig, make_optimizer

TINY = GPT2Config(2, 32, 4, vocab_size=90, max_seq_len=12, dropout=0.0, vocab_multiple=24)
FILES = [
    "config.json", "index.json", "model-00000.safetensors", "optimizer-00000.safetensors",
    "state.json",
]


def batch(number, device="cpu"):
    "Input ids and labels, (4, 12)."
    ids = torch.randint(90, (4, 13), generator=torch.Generator().manual_seed(number)).to(device)
    return ids[:, :-1], ids[:, 1:]


def step(model, optimizer, number) -> float:
    "One step of training on batch `number`; its loss."
    optimizer.zero_grad()
    loss = model.loss(*batch(number, model.wpe.weight.device))
    loss.backward()
    clip_grad_norm(model, 0.1)
    optimizer.step()
    return loss.item()


def new(group=None, device="cpu"):
    "A float64 model and its optimizer."
    model = GPT2(TINY, group).to(device).double()
    return model, make_optimizer(model, OptimizerConfig(lr=1e-2))


def two_steps(model, optimizer):
    "Losses of the two steps after the third, and the full weights then."
    losses = [step(model, optimizer, number) for number in (3, 4)]
    return losses, {name: tensor.cpu() for name, tensor in gather_state_dict(model).items()}


def first_steps(run, tp, dp=1, device="cpu"):
    "Three steps, a checkpoint, and what the next two steps would have been."
    groups = ParallelDims(tp=tp, dp=dp).build(device)
    model, optimizer = new(groups.tp_group, device)
    for number in range(3):
        step(model, optimizer, number)
    save_checkpoint(run, 3, model, optimizer, state={"consumed": 12}, groups=groups)
    return two_steps(model, optimizer)


def next_steps(run, tp, device="cpu"):
    "The two steps after a checkpoint."
    group = ParallelDims(tp=tp).build(device).tp_group
    model, optimizer = new(group, device)
    load_weights(run / "step-00000003", model)
    load_optimizer(run / "step-00000003", model, optimizer)
    return two_steps(model, optimizer)


@pytest.mark.world(4)
@pytest.mark.parametrize("before", [2, 4])
def test_another_number_of_ranks_takes_the_same_next_steps(ranks, device, tmp_path, before):
    losses, weights = ranks(before)(first_steps, tmp_path, before, 1, device)[0]
    for after in (1, 2, 4):
        continued = ranks(after)(next_steps, tmp_path, after, device) if after > 1 else None
        for found, state in continued or [next_steps(tmp_path, 1)]:
            torch.testing.assert_close(found, losses, rtol=0, atol=1e-10)
            torch.testing.assert_close(state, weights, rtol=0, atol=1e-10)


@pytest.mark.world(4)
@pytest.mark.parametrize(("tp", "dp"), [(2, 2), (1, 4), (4, 1)])
def test_all_ranks_write_their_share_of_the_same_tensors(ranks, device, tmp_path, tp, dp):
    ranks(4)(first_steps, tmp_path / "grid", tp, dp, device)
    first_steps(tmp_path / "one", 1)
    folders = [tmp_path / run / "step-00000003" for run in ("grid", "one")]
    for part in (MODEL, OPTIMIZER):
        torch.testing.assert_close(*(full_tensors(f, part) for f in folders), rtol=0, atol=1e-10)
        pieces = {f: sorted(f.glob(f"{part}-*")) for f in folders}
        sizes = [path.stat().st_size for path in pieces[folders[0]]]
        assert len(sizes) == 4 and max(sizes) < 1.2 * min(sizes)
        keys = [[key for path in found for key in safe_open(path, "pt").keys()]
                for found in pieces.values()]
        assert sorted(keys[0]) == sorted(keys[1])       # the pieces do not depend on the grid
        assert len(set(keys[0])) == len(keys[0])
    assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == [MARK, "step-00000003"]


def test_what_the_folder_holds_and_the_reference_reads_the_weights(tmp_path):
    model, optimizer = new()
    step(model, optimizer, 0)
    folder = save_checkpoint(tmp_path, 1, model, optimizer, state={"consumed": 4})
    assert sorted(path.name for path in folder.iterdir()) == [MARK, *FILES]
    assert json.loads((folder / "config.json").read_text())["model"]["hidden_size"] == 32
    assert load_state(folder) == {"step": 1, "consumed": 4}
    plain = reference.GPT2(TINY, seed=7).double()
    plain.load_state_dict(full_tensors(folder, MODEL))
    assert torch.equal(plain.loss(*batch(0)), reference_loss(model))


def reference_loss(model):
    twin = reference.GPT2(TINY).double()
    twin.load_state_dict(model.state_dict())
    return twin.loss(*batch(0))


def test_a_step_that_forgets_the_moments_is_another_step(tmp_path):
    losses, _ = first_steps(tmp_path, 1)
    model, optimizer = new()
    load_weights(tmp_path / "step-00000003", model)
    found = [step(model, optimizer, number) for number in (3, 4)]
    assert found[0] == pytest.approx(losses[0], abs=1e-10)
    assert abs(found[1] - losses[1]) > 1e-6


def test_before_the_first_step_there_are_no_moments(tmp_path):
    model, optimizer = new()
    folder = save_checkpoint(tmp_path, 0, model, optimizer)
    load_optimizer(folder, model, optimizer)
    assert not optimizer.state


def test_the_latest_is_the_highest_whole_one(tmp_path):
    assert latest_checkpoint(tmp_path / "nothing") is None
    for name in ("step-99999999", "step-100000000", ".step-200000000.partial", "step-3-copy"):
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-100000000"


def fail_after_half(path, pieces):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("number", [3, 4])
def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, number):
    first_steps(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "step-00000003").iterdir()}
    monkeypatch.setattr(checkpoint, "write_pieces", fail_after_half)
    with pytest.raises(OSError, match=f"step-0000000{number} could not be saved .*No space left"):
        save_checkpoint(tmp_path, number, *new())
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARK, "step-00000003"]
    after = {path.name: path.read_bytes() for path in (tmp_path / "step-00000003").iterdir()}
    assert after == before


WRITE_PIECES = checkpoint.write_pieces


def save_to_a_full_disk(run, tp, dp, device, full):
    "What this rank is told if one of them meets a full disk, and whether it can go on."
    if dist.get_rank() == full:
        checkpoint.write_pieces = fail_after_half
    groups = ParallelDims(tp=tp, dp=dp).build(device)
    try:
        save_checkpoint(run, 1, *new(groups.tp_group, device), groups=groups)
        told = None
    except OSError as error:
        told = str(error)
    finally:
        checkpoint.write_pieces = WRITE_PIECES
    total = torch.ones((), device=device)
    dist.all_reduce(total)
    return told, total.item()


@pytest.mark.parametrize("full", [0, 1])
@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2)])
def test_every_rank_is_told_why(ranks, device, tmp_path, tp, dp, full):
    answers = ranks(2)(save_to_a_full_disk, tmp_path, tp, dp, device, full)
    assert answers[0] == answers[1] and answers[0][1] == 2
    message = f"{tmp_path}/step-00000001 could not be saved ([Errno 28] No space left on device); "
    assert answers[0][0].startswith(message.replace("[Errno 28] ", "")) or message in answers[0][0]
    assert list(tmp_path.iterdir()) == []


def save_with_a_fault_on_one(run, device):
    "What this rank is told if the code of another fails in a way that nobody foresaw."
    def fault(path, pieces):
        raise KeyError("a fault")

    if dist.get_rank() == 1:
        checkpoint.write_pieces = fault
    try:
        save_checkpoint(run, 1, *new(None, device), groups=ParallelDims(dp=2).build(device))
    except OSError as error:
        return str(error)
    finally:
        checkpoint.write_pieces = WRITE_PIECES


def test_nobody_waits_for_a_rank_whose_code_fails(ranks, device, tmp_path):
    answers = ranks(2)(save_with_a_fault_on_one, tmp_path, device)
    assert answers[0] == answers[1] and "'a fault'" in answers[0]
    assert list(tmp_path.iterdir()) == []


def save_into_what_is_no_run(folder, device):
    try:
        save_checkpoint(folder, 1, *new(None, device), groups=ParallelDims(dp=2).build(device))
    except OSError as error:
        return str(error)


def test_every_rank_is_told_that_the_folder_is_none_of_a_run(ranks, device, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    answers = ranks(2)(save_into_what_is_no_run, tmp_path, device)
    assert answers[0] == answers[1] and "files that are not ours" in answers[0]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_disk_has_every_file_before_the_folder_has_its_name(tmp_path, monkeypatch):
    folder, synced = tmp_path / "step-00000001", []

    def fsync(number):
        synced.append((os.fstat(number).st_ino, folder.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    model, optimizer = new()
    step(model, optimizer, 0)
    save_checkpoint(tmp_path, 1, model, optimizer)
    before = {number for number, named in synced if not named}
    assert before >= {path.stat().st_ino for path in [folder, *folder.iterdir()]}
    assert (tmp_path.stat().st_ino, True) in synced         # then the name of the folder


def test_what_others_left_under_like_names_stays(tmp_path):
    save_checkpoint(tmp_path, 0, *new())
    for left in (".new.partial", ".step-00000001.old", ".step-00000001.01234567.partial"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half.json").write_text("{")
    folder = save_checkpoint(tmp_path, 1, GPT2(TINY))
    assert sorted(path.name for path in folder.iterdir()) == [MARK, *FILES[:3], FILES[4]]
    assert len(list(tmp_path.rglob("half.json"))) == 3


LIMITED = """
import resource, sys
from pathlib import Path
from megatron_edu.config import PRESETS
from megatron_edu.models.gpt2 import GPT2
from megatron_edu.training.checkpoint import save_checkpoint
model = GPT2(PRESETS["tiny"])
save_checkpoint(Path(sys.argv[1]), 1, model)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(Path(sys.argv[1]), 2, model)
except OSError as error:
    print(error)
"""


def test_a_real_limit_on_the_size_of_files(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert "step-00000002 could not be saved" in out.stdout, out
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARK, "step-00000001"]
    assert load_model(tmp_path / "step-00000001").config.num_layers == 2


def test_ctrl_c_while_saving_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupted(path, pieces):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 1, *new())
    assert list(tmp_path.iterdir()) == []


def test_the_same_step_again_replaces_the_folder(tmp_path):
    for number in (1, 2):
        folder = save_checkpoint(tmp_path, 1, GPT2(TINY), state={"consumed": number})
    assert load_state(folder) == {"step": 1, "consumed": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARK, "step-00000001"]


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_pickle(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a checkpoint was unpickled",)


DAMAGE = {
    "cut": (cut, "model.safetensors is not a whole safetensors file"),
    "missing": (lambda f: (f / "model.safetensors").unlink(), "is not a whole safetensors file"),
    "pickle": (replace_by_pickle, "model.safetensors is not a whole safetensors file"),
    "json": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "list": (lambda f: (f / "config.json").write_text("[1]"), "holds a list, not an object"),
    "no model": (lambda f: (f / "config.json").write_text("{}"), "describes no gpt2 and no bert"),
    "fields": (
        lambda f: (f / "config.json").write_text('{"model": {"layers": 2}}'),
        "describes no gpt2 and no bert .TypeError.*'layers'",
    ),
    "kind": (
        lambda f: (f / "config.json").write_text('{"architecture": "t5", "model": {}}'),
        "architecture 't5' is not known here, only gpt2, bert; import the module that registers",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "name a folder step-NNNNNNNN of a run"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_says_which_file_and_what_to_do(tmp_path, kind):
    folder = make_plain(save_checkpoint(tmp_path, 1, GPT2(TINY)))
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_state_and_moments_are_checked_too(tmp_path):
    first_steps(tmp_path, 1)
    folder = make_plain(tmp_path / "step-00000003")
    save_file({"exp_avg.surplus": torch.zeros(2)}, folder / "optimizer.safetensors")
    with pytest.raises(ValueError, match="no parameter surplus"):
        load_optimizer(folder, *new())
    save_file({"exp_avg.ln_f.bias": torch.zeros(2)}, folder / "optimizer.safetensors")
    with pytest.raises(ValueError, match="ln_f.bias has shape .2,. .* needs .32,."):
        load_optimizer(folder, *new())
    (folder / "optimizer.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="optimizer.safetensors is not a whole"):
        load_optimizer(folder, *new())
    for state in ('{"consumed": 3}', '{"step": "3"}'):
        (folder / "state.json").write_text(state)
        with pytest.raises(ValueError, match="state.json names no step"):
            load_state(folder)


@pytest.mark.parametrize("kept", [[], ["ln_f.bias", "wte.weight"]])
def test_parameters_without_moments_begin_without(tmp_path, kept):
    "As of a head that no loss reads. Their age is that of a first step, too."
    first_steps(tmp_path, 1)
    folder = make_plain(tmp_path / "step-00000003")
    with safe_open(folder / "optimizer.safetensors", "pt") as file:
        own = {key: file.get_tensor(key) for key in file.keys() if key.split(".", 1)[1] in kept}
    save_file(own, folder / "optimizer.safetensors")
    model, optimizer = new()
    load_optimizer(folder, model, optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)] for p in optimizer.state) == kept
    (folder / "optimizer.safetensors").unlink()
    model, optimizer = new()
    load_optimizer(folder, model, optimizer)
    assert not optimizer.state


def test_weights_of_another_model_are_refused(tmp_path):
    folder = save_checkpoint(tmp_path, 1, GPT2(TINY))
    other = GPT2(GPT2Config(2, 16, 4, vocab_size=90, max_seq_len=12, vocab_multiple=24))
    with pytest.raises(ValueError, match="wte.weight has shape .96, 32. .* needs .96, 16."):
        load_weights(folder, other)


# ------------------------------------------------------------------------- beside the training


def held(event):
    "Pieces are written when the event is set."

    def write(path, pieces):
        assert event.wait(HANG)
        return WRITE_PIECES(path, pieces)

    return write


def test_a_save_in_the_background_is_of_the_moment_when_it_began(tmp_path, monkeypatch):
    go, saves = threading.Event(), Background()
    monkeypatch.setattr(checkpoint, "write_pieces", held(go))
    model, optimizer = new()
    step(model, optimizer, 0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    folder = save_checkpoint(tmp_path, 1, model, optimizer, background=saves)
    assert not folder.exists() and not saves.has_ended()
    step(model, optimizer, 1)
    go.set()
    assert saves.result() == folder and saves.result() is None
    found = full_tensors(folder, OPTIMIZER)
    assert all(torch.equal(found[f"exp_avg.{name}"], value) for name, value in moments.items())
    torch.testing.assert_close(full_tensors(folder, MODEL), weights, rtol=0, atol=0)
    assert not torch.equal(model.ln_f.bias, weights["ln_f.bias"])


def test_a_save_in_the_background_that_fails_raises_when_it_is_asked_for(tmp_path, monkeypatch):
    saves = Background()
    save_checkpoint(tmp_path, 1, GPT2(TINY))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_pieces", fail_after_half)
        save_checkpoint(tmp_path, 2, GPT2(TINY), background=saves)
        with pytest.raises(OSError, match="step-00000002 could not be saved .*No space left"):
            saves.result()
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARK, "step-00000001"]
    folder = save_checkpoint(tmp_path, 2, GPT2(TINY), background=saves)
    assert saves.result() == folder and latest_checkpoint(tmp_path) == folder


def saves_on_a_grid(run, device, full):
    "One save in the background, as each rank sees it; one rank may meet a full disk."
    if dist.get_rank() == full:
        checkpoint.write_pieces = fail_after_half
    groups, saves = ParallelDims(tp=2, dp=2).build(device), Background()
    model, optimizer = new(groups.tp_group, device)
    try:
        save_checkpoint(run, 1, model, optimizer, groups=groups, background=saves)
        total = torch.ones((), device=device)
        dist.all_reduce(total)      # training goes on meanwhile
        return str(saves.result()), total.item()
    except OSError as error:
        return str(error), total.item()
    finally:
        checkpoint.write_pieces = WRITE_PIECES


@pytest.mark.world(4)
@pytest.mark.parametrize("full", [None, 0, 3])
def test_all_ranks_hear_how_a_save_in_the_background_went(ranks, device, tmp_path, full):
    answers = ranks(4)(saves_on_a_grid, tmp_path, device, full)
    assert len(set(answers)) == 1 and answers[0][1] == 4
    if full is None:
        assert answers[0][0] == str(latest_checkpoint(tmp_path))
    else:
        assert "No space left on device" in answers[0][0] and list(tmp_path.iterdir()) == []
