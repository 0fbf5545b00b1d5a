"The likeliest words of a split vocabulary, hidden words, and BERT's demo on little text."

from dataclasses import replace

import pytest
import torch
from bert_cases import config

import megatron_edu.demo.gpt2
from megatron_edu.comm import Ledger, group_rank
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.wordpiece import train_wordpiece
from megatron_edu.demo.gpt2 import DemoConfig, quick_recipe
from megatron_edu.demo.bert import (
    BERT_DEMO,
    demo_bert,
    filled,
    first_samples,
    riddles,
)
from megatron_edu.generate import fill_mask, likeliest
from megatron_edu.mesh import ParallelDims
from megatron_edu.models.bert import Bert
from megatron_edu.data.gpt2 import split_documents
from megatron_edu.data.prepare import prepare_documents
from megatron_edu.training.checkpoint import checkpoint_folder, load_model, save_checkpoint
from megatron_edu.training.journal import read_metrics
from megatron_edu.verify import compare_split, equivalence_table

PLAIN = "the small cat sat on the mat and looked at the moon. "
TEXT = [PLAIN * 4 + "a dog barks! the cat runs. what a long elephant that is! " * 4] * 3
HOLES = "the [MASK] sat on the [MASK]."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A checkpoint of the first step, its sentences and their tokenizer."
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_wordpiece(TEXT, 90)
    tokens = prepare_documents(TEXT, folder, tokenizer)
    model = Bert(config(vocab_size=tokenizer.vocab_size, max_seq_len=64, dropout=0.1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():       # unlike any initial weights
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return save_checkpoint(folder / "run", 0, model), tokens, tokenizer


# ------------------------------------------------------------------------------------- likeliest


def ask(tp, logits, count, vocab_size, device):
    "This rank's answer, whether its logits are as before, and what was gathered."
    group = ParallelDims(tp=tp).build(device).tp_group
    local = logits.chunk(tp, dim=1)[group_rank(group)].to(device)
    before = local.clone()
    with Ledger() as ledger:
        p, ids = likeliest(local, count, group=group, vocab_size=vocab_size)
    return p.cpu(), ids.cpu(), torch.equal(local, before), ledger.elements("all_gather")


@pytest.mark.parametrize("vocab_size", [16, 13, 11, 3])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_likeliest_are_those_of_the_whole_vocabulary(ranks, device, tp, vocab_size):
    logits = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    count = min(5, vocab_size)
    p, ids = logits[:, :vocab_size].softmax(-1).topk(count)
    for found, which, kept, _ in ranks(tp)(ask, tp, logits, count, vocab_size, device):
        torch.testing.assert_close(found, p, rtol=0, atol=1e-10)
        assert torch.equal(which, ids) and kept


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_of_equally_likely_ids_the_lower_comes_first(ranks, device, tp):
    logits = torch.zeros(2, 16)
    logits[1, [3, 9, 14]] = 1.0
    for _, ids, *_ in ranks(tp)(ask, tp, logits, 4, 16, device):
        assert ids.tolist() == [[0, 1, 2, 3], [3, 9, 14, 0]]


@pytest.mark.parametrize("tp", [2, 4])
def test_what_is_gathered_does_not_grow_with_the_vocabulary(ranks, device, tp):
    for size in (16, 1600):
        answers = ranks(tp)(ask, tp, torch.randn(6, size), 3, size, device)
        assert {answer[-1] for answer in answers} == {tp * 6 * (2 * 3 + 1)}


# ------------------------------------------------------------------------------------- fill_mask


def fill_on_ranks(tp, folder, tokenizer, count, device):
    model = load_model(folder, ParallelDims(tp=tp).build(device).tp_group).to(device).double()
    return fill_mask(model, tokenizer, HOLES, count)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_holes_are_filled_from_all_logits(ranks, device, made, tp):
    folder, _, tokenizer = made
    model = load_model(folder).double().eval()
    ids = [tokenizer.cls_id, *tokenizer.encode(HOLES), tokenizer.sep_id]
    logits = model(torch.tensor([ids]))[0][0, [k for k, i in enumerate(ids) if i == 4]]
    p, best = logits[:, : tokenizer.vocab_size].softmax(-1).topk(4)
    for holes in ranks(tp)(fill_on_ranks, tp, folder, tokenizer, 4, device):
        assert [[token for token, _ in hole] for hole in holes] == [
            [tokenizer.core.id_to_token(i) for i in row] for row in best.tolist()
        ]
        found = torch.tensor([[q for _, q in hole] for hole in holes], dtype=torch.float64)
        torch.testing.assert_close(found, p.detach(), rtol=0, atol=1e-10)


def test_the_model_keeps_its_mode_and_drops_nothing(made):
    folder, _, tokenizer = made
    model = load_model(folder)
    for training in (True, False):
        model.train(training)
        assert fill_mask(model, tokenizer, HOLES) == fill_mask(model, tokenizer, HOLES)
        assert model.training == training


@pytest.mark.parametrize(
    ("text", "count", "words"),
    [
        ("the cat sat", 5, r"'the cat sat' has no \[MASK\]; write one"),
        ("", 5, r"has no \[MASK\]"),
        (HOLES, 0, "count=0: from 1 to the"),
        (HOLES, 1000, "count=1000: from 1 to the"),
        ("[MASK] " * 80, 5, "82 tokens is longer than max_seq_len=64"),
    ],
)
def test_texts_that_cannot_be_filled(made, text, count, words):
    folder, _, tokenizer = made
    with pytest.raises(ValueError, match=words):
        fill_mask(load_model(folder), tokenizer, text, count)


def test_padding_fills_no_hole(made):
    folder, _, tokenizer = made
    model, size = load_model(folder), tokenizer.vocab_size
    assert model.config.padded_vocab_size > size
    assert len(fill_mask(model, tokenizer, HOLES, size)[0]) == size
    with pytest.raises(ValueError, match=f"count={size + 1}: from 1 to the {size} tokens"):
        fill_mask(model, tokenizer, HOLES, size + 1)


# --------------------------------------------------------------------------------------- riddles


def test_a_riddle_hides_the_middle_of_a_plain_sentence(made):
    _, tokens, tokenizer = made
    found = riddles(tokens, tokenizer, range(3))
    assert found == [("the small cat sat on the [MASK] and looked at the moon .", "mat")]
    assert tokenizer.encode(found[0][0]).count(tokenizer.mask_id) == 1


def test_riddles_come_from_the_given_documents_alone(tmp_path):
    texts = [f"all of the {name} {name} went up there. " * 3 for name in ("cats", "dogs", "owls")]
    tokenizer = train_wordpiece(texts * 9, 120)
    tokens = prepare_documents(texts, tmp_path, tokenizer)
    for k, name in enumerate(("cats", "dogs", "owls")):
        answers = riddles(tokens, tokenizer, range(k, k + 1), 2)
        assert [truth for _, truth in answers] == [name]
    spread = [truth for _, truth in riddles(tokens, tokenizer, range(3), 3)]
    assert spread == ["cats", "dogs", "owls"]
    assert [truth for _, truth in riddles(tokens, tokenizer, range(1, 3), 2)] == ["dogs", "owls"]


def test_riddles_are_the_middles_of_equal_parts(tmp_path):
    "Of six plain sentences, one of them twice: each once, and no more riddles than sentences."
    hidden = ("cat", "dog", "owl", "fox", "hen", "pig")
    text = " ".join(f"one old and quiet {name} went up there." for name in (*hidden, "pig"))
    tokenizer = train_wordpiece([text] * 9, 120)
    tokens = prepare_documents([text], tmp_path, tokenizer)
    cases = (1, "fox"), (2, "dog hen"), (3, "dog fox pig"), (9, " ".join(hidden))
    for count, wanted in cases:
        found = riddles(tokens, tokenizer, range(1), count)
        assert [truth for _, truth in found] == wanted.split()


@pytest.mark.parametrize("words", range(5, 20))
def test_a_riddle_has_8_to_16_tokens(tmp_path, words):
    "The full stop counts."
    text = " ".join(["no"] * words) + "."
    tokenizer = train_wordpiece([text] * 9, 60)
    tokens = prepare_documents([text], tmp_path, tokenizer)
    assert len(riddles(tokens, tokenizer, range(1))) == (8 <= words + 1 <= 16)


def test_without_a_plain_sentence_there_is_no_riddle(tmp_path):
    tokenizer = train_wordpiece(["no no. 1 + 1 = 2, is it not so? so it is!"], 60)
    tokens = prepare_documents(["no no. 1 + 1 = 2, is it not so? so it is!"], tmp_path, tokenizer)
    assert riddles(tokens, tokenizer, range(1)) == []


def test_a_riddle_as_text():
    text = filled("the [MASK].", "cat", [("dog", 0.5), ("##s", 0.123)])
    assert text == "the [MASK].\n    hidden: cat\n    guessed: dog 50%  ##s 12%"


# --------------------------------------------------------------------------------- the whole demo


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_split_agrees_with_the_reference(cpu_ranks, made, tp):
    folder, tokens, tokenizer = made
    batch = first_samples(tokens, tokenizer)
    assert (batch["attention_mask"] == 0).any() and batch["sentence_order"].shape == (8,)
    rows = cpu_ranks(tp)(compare_split, tp, folder, batch)
    wanted = load_model(folder).double().eval().loss(**batch).item()
    for row in rows:
        assert row.tp == tp and row.report.passed
        assert row.loss == pytest.approx(wanted, abs=1e-10)
        assert row.norm == pytest.approx(rows[0].norm, abs=1e-12) and row.norm > 0.1


def test_the_plan_is_berts(tmp_path):
    plan = megatron_edu.demo.gpt2.demo_plan(replace(BERT_DEMO, out=tmp_path))
    assert plan.optimizer.decay == "linear" and plan.optimizer.min_lr == 0
    assert plan.optimizer.warmup_steps == plan.run.steps // 10 and plan.parallel.tp == 2
    assert plan.model.layer_norm == "pre" and plan.run.save_every == plan.run.steps
    assert plan == replace(
        quick_recipe(plan.model, tmp_path, plan.run.steps), run=plan.run, parallel=plan.parallel
    )


def test_the_whole_of_it(tmp_path, capsys, monkeypatch):
    model = config(vocab_size=90, max_seq_len=64, num_layers=1)
    plan = megatron_edu.demo.gpt2.demo_plan
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    held_out = TEXT[0].replace("moon", "mat").replace("on the mat", "on the moon")
    corpus = [*TEXT * 7]
    corpus[split_documents(len(corpus), (0.97, 0.03))[1][0]] = held_out
    monkeypatch.setattr(megatron_edu.demo.gpt2, "embedded_corpus", lambda: iter(corpus))
    monkeypatch.setattr(
        "megatron_edu.demo.bert.demo_plan", lambda c: replace(plan(c), model=model)
    )
    rows = demo_bert(DemoConfig(tmp_path, steps=8, tp=1, model="bert"))
    assert [row.tp for row in rows] == [1, 2, 4] and all(row.report.passed for row in rows)
    assert isinstance(load_model(checkpoint_folder(tmp_path, 8)), Bert)
    assert len(TokenFile(tmp_path / "tokens").document_offsets) == 22
    lines, printed = read_metrics(tmp_path), capsys.readouterr().out
    for name, task in (("mlm", "masked words"), ("sop", "sentence order")):
        before, after = lines[0][f"val_{name}_loss_before"], lines[-1][f"val_{name}_loss"]
        share = [lines[0][f"val_{name}_accuracy_before"], lines[-1][f"val_{name}_accuracy"]]
        told = f"{task}: validation loss {before:.2f} -> {after:.2f}, right "
        assert told + " -> ".join(f"{x:.1%}" for x in share) + "\n" in printed
    hole = "the small cat sat on the [MASK] and looked at the mat ."
    assert f"{hole}\n    hidden: moon\n    guessed: " in printed and printed.count("hidden: ") == 1
    assert equivalence_table(rows) in printed
