"A checkpoint that was damaged, or put together from two, is refused or is what was written."

import json
import random
import shutil
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from plain import full_tensors

from megatron_edu import files
from megatron_edu.boxes import INDEX
from megatron_edu.config import GPT2Config
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.token_writer import TokenFileWriter
from megatron_edu.files import MARK
from megatron_edu.mesh import ParallelDims
from megatron_edu.models import build_model
from megatron_edu.resume import (
    CONFIG,
    MODEL,
    OPTIMIZER,
    STATE,
    check_numbers,
    latest_checkpoint,
    load_config,
    load_state,
    read_checkpoint,
)
from megatron_edu.settings import OptimizerConfig, RunConfig, TrainConfig
from megatron_edu.slices import Slices, checksum
from megatron_edu.training.checkpoint import load_model, load_optimizer, load_weights
from megatron_edu.training.journal import read_metrics
from megatron_edu.training.loop import train
from megatron_edu.training.optimizer import make_optimizer

TINY = GPT2Config(2, 16, 4, vocab_size=96, max_seq_len=8, dropout=0.0, vocab_multiple=8)
CASES = 1000
LAST, BEFORE = "step-00000004", "step-00000002"


def plan(out, tp=1, dp=1, **settings) -> TrainConfig:
    given = {"steps": 4, "batch_size": 4, "save_every": 2, "eval_every": 9, "validation": 0.1}
    run = RunConfig(Path(out), **{**given, **settings})
    return TrainConfig(TINY, run, OptimizerConfig(), ParallelDims(tp=tp, dp=dp))


def train_on(config, prefix, device="cpu"):
    groups = config.parallel.build(device)
    train(config, TokenFile(prefix), groups, device, quiet=True)
    return True


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    chance, path = random.Random(0), tmp_path_factory.mktemp("data") / "tokens"
    with TokenFileWriter(path, vocab_size=96) as writer:
        for _ in range(12):
            writer.append([chance.randrange(96) for _ in range(40)])
            writer.end_document()
    return path


@pytest.fixture(scope="module")
def run(cpu_ranks, prefix, tmp_path_factory) -> Path:
    "Four steps on 2 x 2 ranks, with checkpoints after two and four of them."
    out = tmp_path_factory.mktemp("run") / "run"
    assert all(cpu_ranks(4)(train_on, plan(out, 2, 2), prefix))
    return out


def content_of(folder):
    "All that a run goes on with, read as one rank does."
    read_checkpoint(folder)
    model = build_model(load_config(folder), seed=None)
    load_weights(folder, model)
    optimizer = make_optimizer(model, OptimizerConfig())
    load_optimizer(folder, model, optimizer)
    moments = {
        (name, kind): value.clone()
        for name, p in model.named_parameters() for kind, value in optimizer.state[p].items()
    }
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return load_state(folder), load_config(folder), weights, moments


def same(a, b) -> bool:
    if a[:2] != b[:2] or any(x.keys() != y.keys() for x, y in zip(a[2:], b[2:])):
        return False
    return all(torch.equal(x[n], y[n]) for x, y in zip(a[2:], b[2:], strict=True) for n in x)


# ---------------------------------------------------------------------------- what happens to it


def some_file(folder, chance, *kinds) -> Path:
    names = sorted(path.name for path in folder.iterdir())
    return folder / chance.choice([n for n in names if not kinds or n.startswith(kinds)])


def rewritten(change):
    "Change the bytes of any file."

    def damage(last, before, chance):
        path = some_file(last, chance)
        path.write_bytes(change(bytearray(path.read_bytes()), chance))

    return damage


def flip(data, chance):
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def blank(data, chance):
    at = chance.randrange(len(data))
    data[at : at + 64] = bytes(len(data[at : at + 64]))
    return data


def remove(last, before, chance):
    some_file(last, chance).unlink()


def from_before(last, before, chance):
    "A whole valid file of the checkpoint before, under its own name."
    path = some_file(before, chance)
    shutil.copy(path, last / path.name)


def several_from_before(last, before, chance):
    names = sorted(path.name for path in before.iterdir() if path.name not in (CONFIG, STATE))
    for name in chance.sample(names, chance.randrange(2, len(names))):
        shutil.copy(before / name, last / name)


def exchange(last, before, chance):
    "Two files of the same kind take each other's names."
    kind = chance.choice([MODEL, OPTIMIZER])
    a, b = chance.sample(sorted(last.glob(f"{kind}-*")), 2)
    c = a.with_name("aside")
    a.rename(c), b.rename(a), c.rename(b)


def place_of(path, key) -> tuple[int, int]:
    "Where the bytes of a tensor lie in a safetensors file."
    with path.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        begin, end = json.loads(stream.read(length))[key]["data_offsets"]
    return 8 + length + begin, end - begin


def put(path, key, data):
    at, size = place_of(path, key)
    assert len(data) == size
    content = bytearray(path.read_bytes())
    content[at : at + size] = data
    path.write_bytes(content)


def taken(path, key) -> bytes:
    at, size = place_of(path, key)
    return path.read_bytes()[at : at + size]


def some_piece(folder, chance):
    "A tensor, one of its pieces, and the file and the name that it has there."
    with Slices(folder) as slices:
        name = chance.choice(sorted(slices.entries))
        piece = chance.choice(slices.entries[name].pieces)
    return name, piece, folder / piece.file, piece.key(name)


def piece_from_before(last, before, chance):
    "A whole valid slice of the checkpoint before."
    _, piece, path, key = some_piece(last, chance)
    put(path, key, taken(before / piece.file, key))


def pieces_exchanged(last, before, chance):
    "Two whole valid slices of one shape take each other's places."
    name, piece, path, key = some_piece(last, chance)
    with Slices(last) as slices:
        others = [
            (last / p.file, p.key(n))
            for n, entry in sorted(slices.entries.items()) for p in entry.pieces
            if p.box.shape == piece.box.shape and (n, p) != (name, piece)
        ]
    other, other_key = chance.choice(others)
    ours, theirs = taken(path, key), taken(other, other_key)
    put(path, key, theirs), put(other, other_key, ours)


def right_sums(last, before, chance):
    "A slice of the checkpoint before, and an index in which its checksum is right."
    name, piece, path, key = some_piece(last, chance)
    data = taken(before / piece.file, key)
    put(path, key, data)
    content = json.loads((last / INDEX).read_text())
    for entry in content["tensors"][name]["pieces"]:
        if entry[1:3] == [list(piece.box.start), list(piece.box.shape)]:
            entry[3] = checksum(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    (last / INDEX).write_text(json.dumps(content))


def index_edited(last, before, chance):
    "Two pieces of one tensor take each other's places in the index."
    content = json.loads((last / INDEX).read_text())
    several = sorted(n for n, said in content["tensors"].items() if len(said["pieces"]) > 1)
    a, b = chance.sample(content["tensors"][chance.choice(several)]["pieces"], 2)
    at = chance.choice([slice(1, 3), slice(3, 4), slice(0, 1)])
    a[at], b[at] = b[at], a[at]
    (last / INDEX).write_text(json.dumps(content))


def config_edited(last, before, chance):
    "A field that no shape depends on."
    content = json.loads((last / CONFIG).read_text())
    field, value = chance.choice([("num_heads", 2), ("gelu", "exact"), ("layer_norm_eps", 0.1)])
    content["model"][field] = value
    (last / CONFIG).write_text(json.dumps(content))


def state_edited(last, before, chance):
    content = json.loads((last / STATE).read_text())
    content["consumed"] += chance.choice([-4, 1, 4])
    (last / STATE).write_text(json.dumps(content))


WHOLE = {       # whole valid files and slices, and right sums: what no checksum of a part finds
    "a file from before": from_before, "files from before": several_from_before,
    "two files exchanged": exchange, "a piece from before": piece_from_before,
    "two pieces exchanged": pieces_exchanged, "an index with right sums": right_sums,
    "two places exchanged": index_edited,
}
PARTS = {
    "a bit flipped": rewritten(flip), "64 bytes of nothing": rewritten(blank),
    "cut short": rewritten(lambda data, chance: data[: chance.randrange(len(data))]),
    "longer": rewritten(lambda data, chance: data + bytes(chance.randrange(1, 99))),
    "a file removed": remove, "another configuration": config_edited,
    "another state": state_edited,
}


def test_a_thousand_damaged_checkpoints(run, tmp_path):
    want, wrong, kept, done = content_of(run / LAST), [], Counter(), Counter()
    for number in range(CASES):
        chance = random.Random(number)
        kinds = WHOLE if number % 2 else PARTS
        kind = chance.choice(sorted(kinds))
        copy = shutil.copytree(run, tmp_path / "run")
        kinds[kind](copy / LAST, copy / BEFORE, chance)
        done[kind] += 1
        try:
            found = content_of(copy / LAST)
        except ValueError as error:
            if LAST not in str(error) or "; " not in str(error):
                wrong.append(f"{number}, {kind}: {error}")      # no place, or no remedy
        else:
            kept[kind] += 1
            if not same(found, want):
                wrong.append(f"{number}, {kind}: loaded, and is not what was written")
        shutil.rmtree(copy)
    assert not wrong, wrong[:9]
    assert done.keys() == {*WHOLE, *PARTS} and sum(done[kind] for kind in WHOLE) >= CASES / 3
    # What is read all the same: padding and the metrics of a header, a file as it was before.
    assert all(kept[kind] <= done[kind] / 4 for kind in done), kept


# ------------------------------------------------------------------------------- ranks that vote


def last_part(folder, tp_rank, dp_rank=0):
    "Damage a piece that one rank of two alone reads."
    with Slices(folder) as slices:
        entry = slices.entries["blocks.1.mlp.up.weight"]
        piece = entry.pieces[-1 if tp_rank else 0]
    path, key = folder / piece.file, piece.key("blocks.1.mlp.up.weight")
    put(path, key, bytes(len(taken(path, key))))


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_one_bad_slice_sends_all_ranks_to_the_checkpoint_before(
    cpu_ranks, run, prefix, tmp_path, bad_rank
):
    copy = shutil.copytree(run, tmp_path / "run")
    last_part(copy / LAST, bad_rank)
    goes_on = plan(copy, tp=2, resume="auto")
    assert all(cpu_ranks(2)(train_on, goes_on, prefix))
    assert latest_checkpoint(copy).name == LAST and (copy / f"{LAST}.aside").is_dir()
    for a, b in zip(read_metrics(copy), read_metrics(run), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    parts = [full_tensors(folder / LAST, MODEL) for folder in (copy, run)]
    torch.testing.assert_close(*parts, rtol=1e-4, atol=1e-5)


def tried(config, prefix):
    "What this rank raises, and whether it can go on."
    try:
        train_on(config, prefix)
        told = None
    except ValueError as error:
        told = str(error)
    total = torch.ones(())
    dist.all_reduce(total)
    return told, total.item()


def test_where_no_checkpoint_is_whole_all_ranks_say_so_and_nothing_is_renamed(
    cpu_ranks, run, prefix, tmp_path
):
    copy = shutil.copytree(run, tmp_path / "run")
    last_part(copy / LAST, 1), last_part(copy / BEFORE, 0)
    names = sorted(path.name for path in copy.iterdir())
    told = cpu_ranks(2)(tried, plan(copy, tp=2, resume="auto"), prefix)
    assert told[0] == told[1] and told[0][1] == 2
    assert "none of its 2 checkpoints is whole; the last" in told[0][0] and LAST in told[0][0]
    assert sorted(path.name for path in copy.iterdir()) == names


def test_a_checkpoint_that_was_named_is_not_replaced_by_another(cpu_ranks, run, prefix, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    last_part(copy / LAST, 1)
    asked = plan(copy, tp=2, resume=copy / LAST, steps=6)
    told = cpu_ranks(2)(tried, asked, prefix)
    assert told[0] == told[1] and told[0][1] == 2
    assert "is not what was written; use another checkpoint" in told[0][0]
    assert latest_checkpoint(copy).name == LAST


def test_numbers_of_all_ranks_are_looked_at_by_one(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    check_numbers(copy / LAST)
    last_part(copy / LAST, 1)
    with pytest.raises(ValueError, match="is not what was written"):
        check_numbers(copy / LAST)


def test_a_folder_may_be_moved_with_its_mark(run, tmp_path):
    other = shutil.copytree(run / LAST, tmp_path / "elsewhere")
    assert same(content_of(other), content_of(run / LAST))
    assert files.changed(other) == [] and (other / MARK).is_file()
    assert torch.equal(load_model(other).wte.weight, load_model(run / LAST).wte.weight)
