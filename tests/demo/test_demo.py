"The pieces of the demo on a tiny checkpoint."

import contextlib
from dataclasses import replace

import pytest
import torch
from gpt2_cases import config

import megatron_edu.demo.gpt2
from megatron_edu.cli import demo as verb
from megatron_edu.data.tokenizer import train_tokenizer
from megatron_edu.demo.gpt2 import (
    PROMPTS,
    DemoConfig,
    demo,
    demo_plan,
    emptied,
    first_tokens,
    sample,
)
from megatron_edu.files import note
from megatron_edu.generate import SamplingConfig
from megatron_edu.models.gpt2 import GPT2
from megatron_edu.course.mutants import Verdict
from megatron_edu.owner import own_run
from megatron_edu.data.prepare import prepare_documents
from megatron_edu.testing import Report
from megatron_edu.verify import Row, compare_split, compare_splits, equivalence_table
from megatron_edu.training.checkpoint import checkpoint_folder, load_model, save_checkpoint
from megatron_edu.training.journal import read_metrics, validation_losses

TEXT = ["the cat sat on the mat and the dog sat on the cat " * 10] * 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A checkpoint of the first step, its tokens and their tokenizer."
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(TEXT, 280)
    tokens = prepare_documents(TEXT, folder, tokenizer)
    model = GPT2(config(vocab_size=tokenizer.vocab_size, max_seq_len=64, dropout=0.1))
    with torch.no_grad():       # unlike any initial weights
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return save_checkpoint(folder / "run", 0, model), tokens, tokenizer


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_split_agrees_with_the_reference(cpu_ranks, made, tp):
    folder, tokens, _ = made
    rows = cpu_ranks(tp)(compare_split, tp, folder, first_tokens(tokens))
    wanted = load_model(folder).double().eval().loss(**first_tokens(tokens)).item()
    for row in rows:
        assert row.tp == tp and row.report.passed
        assert row.loss == pytest.approx(wanted, abs=1e-10)
        assert row.norm == pytest.approx(rows[0].norm, abs=1e-12) and row.norm > 0.1


def test_the_table_has_a_line_a_split(made):
    folder, tokens, _ = made
    rows = compare_splits(folder, first_tokens(tokens), (1, 2))
    assert [row.tp for row in rows] == [1, 2]
    wanted = load_model(folder).double().eval().loss(**first_tokens(tokens)).item()
    assert [row.loss for row in rows] == pytest.approx([wanted, wanted], abs=1e-10)
    lines = equivalence_table(rows).splitlines()
    assert len(lines) == 4 and [line.split()[0] for line in lines[2:]] == ["1", "2"]
    for line, row in zip(lines[2:], rows, strict=True):
        _, loss, norm, *differences = map(float, line.split())
        assert loss == pytest.approx(row.loss, abs=1e-11)
        assert norm == pytest.approx(row.norm, abs=1e-11)
        assert len(differences) == 3 and max(differences) < 1e-10
    assert all(line == line.rstrip() and len(line) < 80 for line in lines)


def test_the_table_shows_the_larger_of_two_differences():
    rows = [Row(2, 1.0, 1.0, Report(*each)) for each in ((0, 1e-3, 1e-9, 0), (0, 1e-9, 1e-3, 0))]
    assert [line.split()[4] for line in equivalence_table(rows).splitlines()[2:]] == ["1.0e-03"] * 2


def test_samples_begin_with_their_prompts_and_are_repeatable(made):
    folder, _, tokenizer = made
    prompts = "the cat", "on"
    texts = sample(folder, tokenizer, prompts, 12)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    assert texts == sample(folder, tokenizer, prompts, 12)
    cool = SamplingConfig(temperature=0.7, top_k=40)
    assert texts == sample(folder, tokenizer, prompts, 12, cool)
    other = sample(folder, tokenizer, prompts, 12, SamplingConfig(seed=9))
    assert texts != other
    assert all(len(text) > len(prompt) for text, prompt in zip(texts, prompts, strict=True))


def test_the_plan_follows_the_options(tmp_path):
    plan = demo_plan(DemoConfig(tmp_path, steps=40, tp=4, seed=7))
    assert (plan.run.steps, plan.parallel.tp, plan.run.seed) == (40, 4, 7)
    assert plan.run.out == tmp_path and plan.run.save_every == 40
    assert plan.run.eval_every == 10 and plan.optimizer.warmup_steps == 4
    assert demo_plan(DemoConfig(tmp_path, steps=3)).run.eval_every == 1


@pytest.fixture
def small(monkeypatch):
    "The demo on little text with a small model."
    model = config(vocab_size=270, max_seq_len=64, num_layers=1)
    plan = megatron_edu.demo.gpt2.demo_plan
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(megatron_edu.demo.gpt2, "embedded_corpus", lambda: iter(TEXT * 20))
    module = megatron_edu.demo.gpt2
    monkeypatch.setattr(module, "demo_plan", lambda asked: replace(plan(asked), model=model))


@pytest.mark.usefixtures("small")
def test_the_whole_of_it(tmp_path, capsys):
    rows = demo(DemoConfig(tmp_path, steps=8, tp=1))
    assert [row.tp for row in rows] == [1, 2, 4] and all(row.report.passed for row in rows)
    assert load_model(checkpoint_folder(tmp_path, 8)).config.num_layers == 1
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    losses = [loss for _, loss in validation_losses(lines)]
    assert losses[-1] < losses[0]
    printed = capsys.readouterr().out
    assert f"validation loss: {losses[0]:.2f} -> {losses[-1]:.2f}" in printed
    assert all(f"-\n{prompt}" in printed for prompt in PROMPTS)
    assert equivalence_table(rows) in printed


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("tp", [1, 2])
def test_a_quiet_demo_writes_its_run(tmp_path, capfd, monkeypatch, tp):
    good = [Row(1, 1.0, 1.0, Report(0, 0, 0, 0))]
    monkeypatch.setattr(megatron_edu.demo.gpt2, "compare_splits", lambda *args: good)
    assert demo(DemoConfig(tmp_path, steps=2, tp=tp, quiet=True)) == good
    assert capfd.readouterr() == ("", "") and len(read_metrics(tmp_path)) == 2


@pytest.mark.usefixtures("small")
def test_a_split_that_differs_is_an_error(tmp_path, monkeypatch):
    good, bad = Report(0, 0, 0, 0), Report(0, 0, 1e-3, 0)
    rows = [Row(1, 1.0, 1.0, good), Row(2, 1.0, 1.0, bad)]
    monkeypatch.setattr(megatron_edu.demo.gpt2, "compare_splits", lambda *args: rows)
    with pytest.raises(AssertionError, match="tp=2 differs from the reference"):
        demo(DemoConfig(tmp_path, steps=1, tp=1))


@pytest.mark.usefixtures("small")
def test_a_second_demo_takes_the_place_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(megatron_edu.demo.gpt2, "compare_splits", lambda *args: [])
    out = tmp_path / "run"
    for steps in (2, 1):
        demo(DemoConfig(out, steps=steps, tp=1))
        assert len(read_metrics(out)) == steps
    assert not checkpoint_folder(out, 2).exists() and load_model(checkpoint_folder(out, 1))
    for name in ("mine.txt", "metrics.jsonl"):
        kept = (out / name).read_bytes() if (out / name).exists() else b""
        (out / name).write_bytes(kept + b"mine")
        with pytest.raises(ValueError, match=f"not as it was written: {name}"):
            demo(DemoConfig(out, steps=1, tp=1))
        assert (out / name).read_bytes() == kept + b"mine" and load_model(checkpoint_folder(out, 1))
        (out / name).write_bytes(kept) if kept else (out / name).unlink()
    demo(DemoConfig(out, steps=1, tp=1))


# ------------------------------------------------------------------------------------- the lights


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_four_green_lights_and_a_mistake(cpu_ranks, monkeypatch, capsys, kind):
    monkeypatch.setattr(verb, "Ranks", lambda size: contextlib.nullcontext(cpu_ranks(size)))
    told = []
    assert verb.show_lights(kind, told.append)
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.endswith(("green", "red"))]
    assert len(rows) == 8 and len(told) == 2
    assert all(row[-1] == "green" and "red" not in row for row in rows[:4])
    assert [row[-1] for row in rows[4:]] == ["green", "red", "red", "red"]
    assert all(row.count("green") >= 1 for row in rows) and "loss bit-identical" in text


GREEN, RED = Report(0, 0, 0, 0), Report(0, 1, 1, 1)


@pytest.mark.parametrize(
    "right, wrong, status", [(GREEN, RED, 0), (RED, RED, 3), (GREEN, GREEN, 3)]
)
def test_lights_that_are_wrong_end_the_demo(monkeypatch, capsys, tmp_path, right, wrong, status):
    def ranks(size):
        def say(fn, kind, dp=1, mutant=None):
            return [Verdict(wrong if mutant else right, 1.0, ())]

        return contextlib.nullcontext(say)

    begun = []
    monkeypatch.setattr(verb, "Ranks", ranks)
    monkeypatch.setattr("megatron_edu.demo.gpt2.demo", lambda asked, say: begun.append(asked))
    assert verb.run(DemoConfig(tmp_path / "run")) == status
    assert len(begun) == (status == 0)
    assert ("do not tell right from wrong" in capsys.readouterr().err) == (status == 3)


def test_a_folder_that_is_none_for_a_demo_is_refused_before_any_light(monkeypatch, tmp_path):
    monkeypatch.setattr(verb, "Ranks", lambda size: pytest.fail("ranks start"))
    changed = tmp_path / "changed"
    with emptied(changed):
        pass
    for folder in (changed, tmp_path):
        (folder / "mine.txt").write_text("mine")
    for out in (changed, tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ValueError, match=str(out)):
            verb.run(DemoConfig(out))


def test_ranks_that_do_not_divide_are_refused_before_any_light(monkeypatch, tmp_path):
    monkeypatch.setattr(verb, "Ranks", lambda size: pytest.fail("ranks start"))
    with pytest.raises(ValueError, match="tp=5: it must divide num_heads"):
        verb.run(DemoConfig(tmp_path / "run", tp=5))
    assert not (tmp_path / "run").exists()


def test_a_demo_takes_at_least_one_step():
    with pytest.raises(ValueError, match="steps=0: must be at least 1"):
        DemoConfig(steps=0)


def test_a_run_that_no_demo_wrote_is_kept(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    with own_run(theirs):
        (theirs / "metrics.jsonl").write_text("{}\n")
        note(theirs, "metrics.jsonl")
    with pytest.raises(ValueError, match="holds a run that no demo wrote"), emptied(theirs):
        pass
    assert (theirs / "metrics.jsonl").exists()
    for _ in range(2):      # its own it replaces
        with emptied(ours):
            pass


def test_a_demo_at_work_is_not_taken_for_a_changed_folder(tmp_path):
    out = tmp_path / "demo"
    with emptied(out):
        (out / "metrics.jsonl").write_text("a line of the demo at work\n")
        with pytest.raises(ValueError, match="folder of a run at work"), emptied(out):
            pass
        assert (out / "metrics.jsonl").exists()
