"What `train` says before it begins."

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_edu.cli import banner as module
from megatron_edu.cli.banner import banner
from megatron_edu.config import PRESETS
from megatron_edu.data.gpt2 import split_documents
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.token_writer import TokenFileWriter
from megatron_edu.mesh import ParallelDims
from megatron_edu.settings import quick_recipe


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    "Ten documents of 10, 20, ... 100 tokens."
    prefix = tmp_path_factory.mktemp("data") / "tokens"
    with TokenFileWriter(prefix, 256) as writer:
        for k in range(1, 11):
            writer.append(np.arange(10 * k))
            writer.end_document()
    return TokenFile(prefix)


def plan(model="tiny", **changes):
    made = quick_recipe(PRESETS[model], Path("runs/mine"), 30)
    run = {name: changes.pop(name) for name in list(changes) if hasattr(made.run, name)}
    model = {name: changes.pop(name) for name in list(changes) if hasattr(made.model, name)}
    dims = ParallelDims(**changes)
    return replace(
        made, run=replace(made.run, **run), model=replace(made.model, **model), parallel=dims
    )


def told(config, tokens, tokenizer=None, data=(Path("books"),), named=None):
    "Text by name; paragraphs are put in one line."
    lines = banner(config, tokens, tokenizer, data, named)
    assert all(len(row) <= 100 for line in lines for row in line.splitlines())
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def test_the_resolved_configuration_comes_first(tokens):
    lines = banner(plan(seed=7), tokens, None, (Path("books"),))
    assert [line.split()[0] for line in lines[:4]] == ["model", "run", "optimizer", "parallel"]
    assert "seed=7" in lines[1] and "num_layers=2" in lines[0]


@pytest.mark.parametrize("share, kept, documents", [(0.03, 100, 1), (0.2, 190, 2), (0.5, 400, 5)])
def test_what_is_held_out_by_the_order_of_the_file(tokens, share, kept, documents):
    found = told(plan(validation=share, split_seed=None), tokens)
    assert found["held"] == f"out {kept} tokens in {documents} documents, the last ones"
    assert "test" not in found
    assert found["data"] == "550 tokens in 10 documents, from books"
    epochs = 30 * 16 * plan().model.max_seq_len / (550 - kept)
    assert found["epochs"].startswith(f"about {epochs:.3g} of the text")


@pytest.mark.parametrize("seed", [0, 4])
def test_what_is_held_out_and_what_is_not_read(tokens, seed):
    train, held_out, test = split_documents(10, (0.6, 0.3, 0.1), seed)
    sizes = [sum(10 * (k + 1) for k in part) for part in (train, held_out, test)]
    found = told(plan(validation=0.3, test=0.1, split_seed=seed), tokens)
    assert found["held"] == f"out {sizes[1]} tokens in 3 documents, by split_seed={seed}"
    assert found["test"] == f"{sizes[2]} tokens in 1 documents, which this run does not read"
    epochs = 30 * 16 * plan().model.max_seq_len / sizes[0]
    assert found["epochs"].startswith(f"about {epochs:.3g} of the text")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, "in micro-batches of 16, 1 of them"),
        ({"micro_batch": 4}, "in micro-batches of 4, 4 of them"),
        ({"dp": 2}, "in micro-batches of 8, 1 of them on each of 2 replicas"),
        (
            {"dp": 2, "micro_batch": 2, "tp": 2},
            "in micro-batches of 2, 4 of them on each of 2 replicas",
        ),
    ],
)
def test_a_step(tokens, changes, said):
    step = told(plan(max_seq_len=32, **changes), tokens)["step"]
    assert step == f"512 tokens: 16 samples of 32, {said}"


@pytest.mark.parametrize(
    "tokenizer, named, said",
    [
        (None, None, "none; ids are taken as they are"),
        (Path("runs/mine/tokenizer.json"), None, "runs/mine/tokenizer.json, this run's own"),
        (Path("ready/tokenizer.json"), None, "ready/tokenizer.json"),
        (Path("runs/mine/tokenizer.json"), Path("given.json"), "given.json"),
    ],
)
def test_the_origin_of_a_tokenizer(tokens, tokenizer, named, said):
    assert (
        told(plan(), tokens, tokenizer, named=named)["tokenizer"]
        == f"{said}; the model knows 512 tokens"
    )


def test_all_sources_are_named(tokens):
    data = Path("a.txt"), Path("b.jsonl"), Path("x" * 150)
    assert told(plan(max_seq_len=5), tokens, data=data[:2])["data"].endswith("from a.txt, b.jsonl")
    assert "x" * 150 in "".join(banner(plan(), tokens, None, data))


@pytest.mark.parametrize("warmup, is_said", [(29, False), (30, True), (3000, True)])
def test_a_warm_up_that_is_not_shorter_than_the_run(tokens, warmup, is_said):
    config = plan()
    config = replace(config, optimizer=replace(config.optimizer, warmup_steps=warmup))
    found = told(config, tokens)
    assert ("warm-up" in found) == is_said
    assert (
        not is_said
        or "--warmup-steps 3" in found["warm-up"]
        and f"{warmup:,} steps" in found["warm-up"]
    )


@pytest.mark.parametrize(
    "room, said", [(None, "come on top"), (3 << 30, "top; 3.0 GiB are available")]
)
@pytest.mark.parametrize("dp", [1, 2])
def test_memory(tokens, monkeypatch, room, said, dp):
    monkeypatch.setattr(module, "available_memory", lambda: room)
    need = 16 * PRESETS["tiny"].num_parameters() * dp / 2**20
    found = told(plan(dp=dp), tokens)["memory"]
    assert found.startswith(f"at least {need:.1f} MiB on all ranks") and found.endswith(said)


@pytest.mark.parametrize("preset, kind", [("tiny", "gpt2"), ("bert-tiny", "bert")])
def test_size_and_kind(tokens, preset, kind):
    parameters = PRESETS[preset].num_parameters()
    assert told(plan(preset), tokens)["size"] == f"{kind} of {parameters:,} parameters"
