"Initial values by seed, name and block of rows: any slice alone, and memory for no more than it."

import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_edu.boxes import LARGEST
from megatron_edu.config import PRESETS, GPT2Config
from megatron_edu.mesh import ParallelDims
from megatron_edu.models import GPT2, Bert, build_model
from megatron_edu.tensor_parallel.shard import Placement, Shard, fill, fill_slice, placements
from megatron_edu.training.checkpoint import (
    Background,
    kept_tensors,
    load_model,
    save_checkpoint,
)
from megatron_edu.weights import BLOCK, initial_rows, with_padding

CONFIG = GPT2Config(2, 32, 4, vocab_size=300, max_seq_len=16, vocab_multiple=128)


def rows(name, shape, first, last, config=CONFIG, seed=1):
    return initial_rows(name, shape, range(first, last), config, seed)


ROWS = [(0, 1), (63, 65), (64, 128), (5, 5), (190, 300), (299, 384)]


@pytest.mark.parametrize("first, last", ROWS)
def test_rows_are_those_of_the_whole(first, last):
    whole = rows("wte.weight", (384, 32), 0, 384)
    assert torch.equal(rows("wte.weight", (384, 32), first, last), whole[first:last])


def test_a_block_knows_seed_name_and_number_and_no_more():
    shape = (4 * BLOCK, 8)
    blocks = rows("blocks.0.mlp.up.weight", shape, 0, 4 * BLOCK).split(BLOCK)
    others = [
        rows("blocks.1.mlp.up.weight", shape, 0, BLOCK),
        rows("blocks.0.mlp.up.weight", shape, 0, BLOCK, seed=2),
    ]
    found = [*blocks, *others]
    for i, block in enumerate(found):
        assert abs(block.std() / 0.02 - 1) < 0.2
        assert not any(torch.equal(block, other) for other in found[:i])
    wider = replace(CONFIG, vocab_multiple=512, num_layers=3, max_seq_len=64)
    again = rows("blocks.0.mlp.up.weight", shape, 0, 4 * BLOCK, wider)
    assert torch.equal(again, torch.cat(blocks))


@pytest.mark.parametrize("name", ["wte.weight", "mlm.bias", "output.weight"])
def test_padding_rows_are_zeros_wherever_they_begin(name):
    shape = (384, 32) if name.endswith("weight") else (384,)
    for first, last in ((0, 384), (290, 310), (300, 384), (350, 384)):
        tail = rows(name, shape, first, last)[max(0, 300 - first) :]
        assert len(tail) == last - max(first, 300) and not tail.any()


def test_another_padding_of_the_vocabulary():
    stored = torch.arange(1.0, 301)[:, None].expand(300, 4)

    def read(name, shape, asked):
        assert asked.stop <= 300
        return stored[asked.start : asked.stop]

    padded = with_padding(read, CONFIG)
    for first, last in ((0, 384), (298, 303), (300, 384), (10, 20)):
        found = padded("wte.weight", (384, 4), range(first, last))
        assert found[:, 0].tolist() == [i + 1.0 if i < 300 else 0.0 for i in range(first, last)]


@pytest.mark.parametrize("rule", [None, Shard(0), Shard(0, 3), Shard(1)])
@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_a_slice_is_read_in_pieces(cpu_ranks, rule, piece):
    full = torch.randn(24, 8)
    for own, want in cpu_ranks(2)(slice_of, full, rule, piece):
        assert torch.equal(own, want)


def slice_of(full, rule, piece):
    group = ParallelDims(tp=2).build().tp_group
    place = Placement(rule, group if rule else None)
    own, asked = torch.empty_like(place.cut(full)), []

    def read(name, shape, wanted):
        asked.append(len(wanted) * 8)
        assert shape == (24, 8)
        return full[wanted.start : wanted.stop]

    with mock.patch("megatron_edu.tensor_parallel.shard.PIECE", piece):
        fill_slice(own, "any", place, read)
    assert max(asked) <= max(8, piece)
    return own, place.cut(full)


# ------------------------------------------------------------------------ memory


class Allocations(TorchDispatchMode):
    "The largest sum of the storages that are alive, counted as they come and go."

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def gone(self, place, size):
        self.alive.discard(place)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()      # a file that is mapped cannot be resized
            if storage.resizable() and storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return results


MODELS = {
    "gpt2": replace(PRESETS["gpt2-124m"], num_layers=2),
    "bert": replace(PRESETS["bert-336m"], num_layers=2),
}


def peaks_of(kind, folder):
    "Peak of a start over this rank's slices: drawn, and loaded."
    group, found = ParallelDims(tp=4).build().tp_group, []
    for make in (
        lambda: build_model(MODELS[kind], group),
        lambda: load_model(folder, group),
    ):
        with Allocations() as seen:
            model = make()
        own = sum(parameter.nbytes for parameter in model.parameters())
        found.append(seen.peak / own)
        assert next(model.parameters()).device.type == "cpu"
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_a_start_needs_at_most_two_slices(cpu_ranks, tmp_path, kind):
    folder = save_checkpoint(tmp_path / "run", 0, build_model(MODELS[kind]))
    for drawn, loaded in cpu_ranks(4)(peaks_of, kind, folder):
        assert 1 <= drawn < 2 and 1 <= loaded < 2


def peak_of_a_save(run, beside):
    "Bytes that a save takes at most, of this rank's slices, and of what it writes."
    groups = ParallelDims(tp=2, dp=2).build()
    model = build_model(MODELS["gpt2"], groups.tp_group).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        moments = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    kept = [t for parts in kept_tensors(model, optimizer).values() for t, _ in parts.values()]
    with Allocations() as seen:
        seen.alive |= {tensor.untyped_storage()._cdata for tensor in kept}     # was there before
        saves = Background() if beside else None
        save_checkpoint(run, 1, model, optimizer, groups=groups, background=saves)
        if beside:
            saves.result()
    files = run.glob(f"step-00000001/*-{dist.get_rank():05d}.safetensors")
    return seen.peak, sum(t.nbytes for t in kept), sum(path.stat().st_size for path in files)


def test_a_save_needs_one_piece_beside_the_slices(cpu_ranks, tmp_path):
    for peak, slices, own in cpu_ranks(4)(peak_of_a_save, tmp_path / "run", False):
        assert peak <= LARGEST + 1e6 < slices / 4 < own


def test_a_save_in_the_background_needs_a_copy_of_what_the_rank_writes(cpu_ranks, tmp_path):
    for peak, slices, own in cpu_ranks(4)(peak_of_a_save, tmp_path / "run", True):
        assert own < 0.6 * slices and peak <= own + LARGEST + 1e6


@pytest.mark.parametrize("kind", [GPT2, Bert])
def test_without_a_seed_nothing_is_drawn(kind):
    name = "tiny" if kind is GPT2 else "bert-tiny"
    model = kind(PRESETS[name], seed=None)
    assert all(parameter.is_meta for parameter in model.parameters())
    want = kind(PRESETS[name]).state_dict()
    fill(model, lambda name, shape, asked: want[name][asked.start : asked.stop])
    assert all(torch.equal(p, want[name]) for name, p in model.named_parameters())
    assert [place.rule for place in placements(model).values()].count(None) > 0


def test_a_seed_that_is_none():
    for wrong in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            GPT2(CONFIG, seed=wrong)
