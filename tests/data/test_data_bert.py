"""BERT samples: where they lie against a walk in plain Python, what they hold against the text, and
their statistics.

Statistics are asserted within 5 standard errors of the value that the rule gives: a right
implementation fails one such comparison in 1.7 million. The seeds are fixed, so none fails by luck.
"""

import math
import pickle
import subprocess
import sys
import tracemalloc
from typing import NamedTuple

import numpy as np
import pytest
import torch
from bert_data_cases import numbered_file, numbered_wordpiece, random_file
from tokenizers import models

from megatron_edu.data import bert
from megatron_edu.data.bert import BertSamples, draws, shorten_segments, random_stretch
from megatron_edu.data.corpus import embedded_corpus, read_documents
from megatron_edu.data.gpt2 import split_documents
from megatron_edu.data.masking import choose_masked, mask_tokens, ngrams
from megatron_edu.data.sampler import IGNORED
from megatron_edu.data.sentences import sentences_to_file
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.token_writer import TokenFileWriter
from megatron_edu.data.wordpiece import SPECIAL, WordPiece, load_wordpiece, train_wordpiece, uncased

SIGMAS = 5


def expect_share(found: int, of: int, p: float) -> None:
    "A share of independent draws."
    assert abs(found - p * of) < SIGMAS * math.sqrt(of * p * (1 - p)), (found / of, p)


def expect_mean(values: np.ndarray, mean: float = 0.0) -> None:
    "The mean of independent values."
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - mean) < SIGMAS * error, (values.mean(), mean, error)


def expect_even(counts: np.ndarray) -> None:
    "Counts of classes that are equally likely: chi-square, whose variance is twice its mean."
    square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    freedom = len(counts) - 1
    assert square < freedom + SIGMAS * math.sqrt(2 * freedom), counts


def places_of(samples: BertSamples) -> np.ndarray:
    "(num_samples, 3): where each sample lies."
    return np.stack([samples.places[i] for i in range(len(samples))])


# Where samples lie


def walk(file: TokenFile, targets: dict[int, int]) -> list[tuple[int, int]]:
    "Windows of one epoch, a document after the other, for a target by first sentence."
    found, offsets, sizes = [], file.document_offsets.tolist(), file.sizes.tolist()
    for start, stop in zip(offsets, offsets[1:]):
        while stop - start >= 2:
            end, tokens = start, 0
            while end < stop and (tokens < targets[start] or end - start < 2 or stop - end == 1):
                tokens += sizes[end]
                end += 1
            found.append((start, end))
            start = end
    return found


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("seq_len", [5, 16, 40, 400])
def test_windows_are_what_a_walk_through_the_documents_gives(tmp_path, seed, seq_len):
    file = random_file(tmp_path / "x", seed)
    places = BertSamples(file, numbered_wordpiece(6000), seq_len, None, seed).places.epoch(0)
    targets = {first: target for first, _, target in places.tolist()}
    expected = walk(file, targets)
    assert sorted(map(tuple, places[:, :2].tolist())) == expected
    assert places[:, :2].tolist() != [list(pair) for pair in expected]      # shuffled


def test_epochs_differ_and_each_reads_everything_once(tmp_path):
    file = random_file(tmp_path / "x", 3, documents=200)
    once = BertSamples(file, numbered_wordpiece(30_000), 24)
    long = BertSamples(file, numbered_wordpiece(30_000), 24, 3 * len(once))
    assert np.array_equal(places_of(long)[: len(once)], once.places.epoch(0))
    sizes, sentences = np.diff(file.document_offsets), np.arange(len(file))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    usable = set(sentences[sizes[owner] >= 2].tolist())
    epochs, rows = [], places_of(long).tolist()
    while rows:
        seen, taken = set(), []
        while rows and seen != usable:
            taken.append(rows.pop(0))
            fresh = set(range(*taken[-1][:2]))
            assert not fresh & seen
            seen |= fresh
        epochs.append(taken)
    assert len(epochs) in (3, 4) and len(epochs[0]) == len(once)
    assert sorted(epochs[0]) != sorted(epochs[1])
    assert [row[0] for row in epochs[0]] != [row[0] for row in epochs[1]]


def test_one_in_ten_aims_at_fewer_tokens(tmp_path):
    file = numbered_file(tmp_path / "x", [[9] * 40] * 1000)
    samples = BertSamples(file, numbered_wordpiece(400_000), 128, 10_000)
    target = places_of(samples)[:, 2]
    assert len(target) == 10_000 and target.min() >= 2 and target.max() == 125
    expect_share((target < 125).sum(), 10_000, 0.1 * 123 / 124)
    expect_mean(target[target < 125], (2 + 124) / 2)
    expect_even(np.bincount((target[target < 125] - 2) * 12 // 123, minlength=12))


def test_a_range_of_documents_is_a_corpus_of_its_own(tmp_path):
    file = numbered_file(tmp_path / "x", [[4, 4], [3, 3, 3], [2], [5, 5], [6, 6]])
    wordpiece = numbered_wordpiece(100)
    part = BertSamples(file, wordpiece, 16, 40, documents=range(1, 4))
    tokens = originals(part.batch(range(40)))
    assert set(tokens[tokens >= 5]) == {*range(13, 22), *range(24, 34)}
    train, held_out = split_documents(5, (0.6, 0.4), None)
    assert set(BertSamples(file, wordpiece, 16, documents=held_out).places.epoch(0)[:, 0]) == {6, 8}


def test_any_documents_are_a_corpus_of_their_own(tmp_path):
    "Sentences of other documents lie between: no sample reaches into them, nor begins in one."
    file = numbered_file(tmp_path / "x", [[4, 4], [3, 3, 3], [2], [5, 5], [6, 6], [7], [8, 8]])
    wordpiece, documents = numbered_wordpiece(100), np.array([0, 2, 3, 6])
    part = BertSamples(file, wordpiece, 16, 80, documents=documents)
    tokens = originals(part.batch(range(80)))
    assert set(tokens[tokens >= 5]) == {*range(5, 13), *range(24, 34), *range(53, 69)}
    assert set(part.places.epoch(0)[:, 0]) == {0, 6, 11}


def test_an_empty_sentence_elsewhere_does_no_harm(tmp_path):
    wordpiece = numbered_wordpiece(100)
    file = numbered_file(tmp_path / "x", [[4, 3], [5, 0, 5], [], [4, 4]])
    assert len(BertSamples(file, wordpiece, 16, documents=np.array([0, 3]))) == 2
    with pytest.raises(ValueError, match="sentence 3 has no token"):
        BertSamples(file, wordpiece, 16, documents=np.array([1, 3]))


def test_the_places_of_a_large_corpus_are_found_in_few_calls(tmp_path):
    with TokenFileWriter(tmp_path / "x", 1000) as writer:
        writer.append(np.full(20_000_000, 7))
        writer.sizes.extend([20] * 1_000_000)
        writer.offsets.extend(range(40, 1_000_001, 40))
        writer.open = None
    file, wordpiece = TokenFile(tmp_path / "x"), numbered_wordpiece(10)
    calls = []
    sys.setprofile(lambda frame, event, arg: calls.append(event))
    try:
        samples = BertSamples(file, wordpiece, 128, 1_000_000)
        samples.places[999_999]
    finally:
        sys.setprofile(None)
    assert len(calls) < 10_000 and len(samples) == 1_000_000    # a loop over them has a million


def test_of_a_long_run_one_epoch_is_held(tmp_path):
    "All places of these two thousand epochs would take 48 MB."
    file, wordpiece = numbered_file(tmp_path / "x", [[8] * 40] * 100), numbered_wordpiece(10)
    file.known_vocab = 10       # places alone are looked at
    tracemalloc.start()
    samples = BertSamples(file, wordpiece, 32, 2_000_000)
    for i in range(50_000):
        samples.places[i]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(samples) == 2_000_000 and len(samples.places.bounds) > 40
    assert peak < 10 * samples.places.epoch(0).nbytes < 3e5


def test_places_are_the_same_in_any_order(tmp_path):
    "After a stop, and after a look at others, of epochs before and behind."
    file = random_file(tmp_path / "x", 3)
    wordpiece = numbered_wordpiece(6000)
    places = places_of(BertSamples(file, wordpiece, 24, 400))
    mixed, fresh = (BertSamples(file, wordpiece, 24, 400) for _ in range(2))
    assert len(mixed.places.epoch(0)) < 100
    for i in np.random.default_rng(0).permutation(400).tolist():
        assert np.array_equal(mixed.places[i], places[i])
    assert np.array_equal(fresh.places[399], places[399])


# What samples hold


def originals(batch: dict[str, torch.Tensor]) -> np.ndarray:    # (b, s)
    "The tokens before words were hidden."
    hidden = batch["labels"] != IGNORED
    return torch.where(hidden, batch["labels"], batch["input_ids"]).numpy()


def parts_of(row: np.ndarray, wordpiece) -> tuple[list[int], list[int]]:
    "The two segments of a row."
    row = row.tolist()
    first = row.index(wordpiece.sep_id)
    second = row.index(wordpiece.sep_id, first + 1)
    return row[1:first], row[first + 1 : second]


def test_a_row_is_two_segments_between_special_tokens(tmp_path):
    wordpiece = numbered_wordpiece(6000, every=3)
    samples = BertSamples(random_file(tmp_path / "x", 1), wordpiece, 32, 500)
    batch = samples.batch(range(500))
    names = ["attention_mask", "input_ids", "labels", "sentence_order", "token_types"]
    assert sorted(batch) == names and {each.dtype for each in batch.values()} == {torch.int64}
    assert {batch[name].shape for name in names if name != "sentence_order"} == {(500, 32)}
    assert batch["sentence_order"].shape == (500,)
    lengths = set()
    for k, row in enumerate(originals(batch)):
        a, b = parts_of(row, wordpiece)
        real = len(a) + len(b) + 3
        lengths.add(real)
        assert a and b
        pads = [wordpiece.pad_id] * (32 - real)
        ends = wordpiece.cls_id, wordpiece.sep_id
        assert row.tolist() == [ends[0], *a, ends[1], *b, ends[1], *pads]
        assert batch["attention_mask"][k].tolist() == [1] * real + [0] * (32 - real)
        types = [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * (32 - real)
        assert batch["token_types"][k].tolist() == types
        edges = [0, len(a) + 1, *range(real - 1, 32)]
        assert (batch["labels"][k][edges] == IGNORED).all()
        assert all(torch.equal(samples[k][name], batch[name][k]) for name in names)
    assert max(lengths) == 32 and min(lengths) < 10


@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_segments_follow_one_another_and_meet_between_sentences(tmp_path, seed, every):
    file, wordpiece = random_file(tmp_path / "x", seed), numbered_wordpiece(6000, every)
    samples = BertSamples(file, wordpiece, 32, 400, seed)
    batch, whole = samples.batch(range(400)), 0
    for k, row in enumerate(originals(batch)):
        parts = parts_of(row, wordpiece)
        early, late = parts[::-1] if batch["sentence_order"][k] else parts
        for part in parts:
            assert part == list(range(part[0], part[0] + len(part)))
        first, end, target = samples.places[k].tolist()
        cuts = (samples.starts[first : end + 1] + 5).tolist()       # token ids at sentence borders
        assert cuts[0] <= early[0] and late[-1] < cuts[-1]
        assert any(early[-1] < cut <= late[0] for cut in cuts[1:-1])
        assert len(early) + len(late) <= target
        if cuts[-1] - cuts[0] <= target:
            assert early + late == list(range(cuts[0], cuts[-1]))
            whole += 1
        elif not every:
            assert len(early) + len(late) == target
    assert whole > 20


def test_every_split_and_each_order_is_equally_likely(tmp_path):
    file = numbered_file(tmp_path / "x", [[5, 5, 5, 5]] * 50)
    samples = BertSamples(file, numbered_wordpiece(2000), 32, 10_000)
    batch = samples.batch(range(10_000))
    first, end, target = places_of(samples).T
    second = batch["token_types"].argmax(dim=1) - 2         # tokens of the first segment
    whole = second[torch.from_numpy((end - first == 4) & (target >= 20))]
    assert set(whole.tolist()) == {5, 10, 15} and len(whole) > 7000
    expect_even(torch.bincount(whole // 5)[1:].numpy())
    swapped = int(batch["sentence_order"].sum())
    expect_share(swapped, 10_000, 0.5)
    expect_share(int(batch["sentence_order"][second == 5].sum()), int((second == 5).sum()), 0.5)


@pytest.mark.parametrize(
    ("a", "b", "target", "lengths"),
    [
        (3, 4, 7, (3, 4)), (3, 4, 9, (3, 4)), (100, 10, 50, (40, 10)), (10, 100, 50, (10, 40)),
        (99, 98, 50, (25, 25)), (98, 99, 51, (26, 25)), (1, 1, 2, (1, 1)), (80, 90, 2, (1, 1)),
        (25, 400, 50, (25, 25)), (1, 500, 125, (1, 124)),
    ],
)
def test_the_longer_segment_gives_way(a, b, target, lengths):
    assert shorten_segments(a, b, target) == lengths


def stretches(continues: np.ndarray, length: int, draw: np.ndarray) -> tuple[list, list]:
    "First and last + 1 of stretches of the tokens 0, 1, ... 29."
    zeros = np.zeros(len(draw), int)
    found = random_stretch(lambda place: ~continues[place], zeros, zeros + 30, zeros + length, draw)
    return tuple(ends.tolist() for ends in found)


def test_a_stretch_is_of_whole_words_and_lies_anywhere():
    continues, chance = np.zeros(1000, bool), np.random.default_rng(1)
    starts, stops = stretches(continues, 10, chance.random(4200))
    assert all(stop == start + 10 for start, stop in zip(starts, stops))
    expect_even(np.bincount(starts, minlength=21))
    continues[[11, 12, 14, 17, 18, 19]] = True
    edges = set(np.flatnonzero(~continues[:30])) | {30}
    for length in range(5, 30):
        for start, stop in zip(*stretches(continues, length, chance.random(40))):
            assert start in edges and stop in edges and 0 < stop - start <= length
            assert stop - start > length - 6
    assert stretches(continues, 30, chance.random(1)) == ([0], [30])
    continues[1:30] = True      # one word that is longer than the target
    assert all(b - a == 10 for a, b in zip(*stretches(continues, 10, chance.random(40))))


def test_segments_of_any_lengths_are_cut_together_as_alone():
    "As many as the rows of a batch, each with a length of its own."
    chance = np.random.default_rng(3)
    continues, draw = chance.random(500) < 0.4, chance.random(600)
    begin, size = chance.integers(300, size=600), chance.integers(1, 80, 600)
    length = chance.integers(1, size, endpoint=True)
    low, high = random_stretch(lambda place: ~continues[place], begin, begin + size, length, draw)
    for k, (first, n) in enumerate(zip(begin.tolist(), length.tolist())):
        start = first + int(draw[k] * (size[k] - n + 1))
        inside = [i for i in range(start + 1, start + n) if not continues[i]]
        front = start if start == first or not continues[start] else None
        back = start + n if start + n == first + size[k] or not continues[start + n] else None
        cuts = [front] * (front is not None) + inside + [back] * (back is not None)
        expected = (cuts[0], cuts[-1]) if len(cuts) > 1 else (start, start + n)
        assert (low[k], high[k]) == expected


def test_the_least_lengths(tmp_path):
    file = numbered_file(tmp_path / "x", [[1, 1], [1, 200], [200, 1], [3, 1, 1]])
    samples = BertSamples(file, numbered_wordpiece(500), 5, 300)
    batch = samples.batch(range(300))
    assert (batch["attention_mask"] == 1).all()
    assert ((batch["labels"] != IGNORED).sum(dim=1) == 1).all()     # one word at least is hidden
    assert set(places_of(samples)[:, 2]) == {2}


def test_special_tokens_of_the_text_are_never_hidden(tmp_path):
    wordpiece = numbered_wordpiece(300)
    chance = np.random.default_rng(1)
    with TokenFileWriter(tmp_path / "x", 300) as writer:
        for _ in range(200):
            tokens = np.where(chance.random(20) < 0.3, chance.integers(0, 5, 20), 77)
            writer.append(tokens)
            writer.end_sequence()
    samples = BertSamples(TokenFile(tmp_path / "x"), wordpiece, 64, 500)
    assert set(samples.batch(range(500))["labels"].ravel().tolist()) == {IGNORED, 77}
    with TokenFileWriter(tmp_path / "y", 300) as writer:
        for _ in range(4):
            writer.append([wordpiece.unk_id, wordpiece.mask_id])
            writer.end_sequence()
    row = BertSamples(TokenFile(tmp_path / "y"), wordpiece, 64)[0]
    assert (row["labels"] == IGNORED).all() and row["attention_mask"].sum() > 5


def test_special_tokens_may_have_any_ids(tmp_path):
    "In BERT's own vocabulary they are 0 and 100 to 103."
    words = [f"w{i}" for i in range(55)]
    ids = {token: i for i, token in enumerate([*words[:9], *SPECIAL, *words[9:]])}
    wordpiece = WordPiece(uncased(models.WordPiece(ids, unk_token="[UNK]")))
    file = numbered_file(tmp_path / "x", [[3, 3]] * 7 + [[2, 2]], 14)
    samples = BertSamples(file, wordpiece, 16, 500)
    batch = samples.batch(range(500))
    shown, real = batch["input_ids"], batch["attention_mask"] == 1
    assert (shown[~real] == ids["[PAD]"]).all() and (shown[:, 0] == ids["[CLS]"]).all()
    assert ((shown == ids["[SEP]"]).sum(dim=1) == 2).all()
    assert set(batch["labels"][shown == ids["[MASK]"]].tolist()) == {*range(14, 60)}
    others = shown[(batch["labels"] != IGNORED) & (shown != ids["[MASK]"])].tolist()
    assert min(others) < 5 and not set(others) & set(wordpiece.special_ids)


def test_rows_of_a_batch_are_checked_and_in_range(tmp_path):
    samples = BertSamples(random_file(tmp_path / "x", 1), numbered_wordpiece(6000), 32, 20)
    assert len(samples) == 20
    for i in (-1, 20):
        with pytest.raises(IndexError, match=f"sample {i} of 20"):
            samples[i]


# Statistics


class Drawn(NamedTuple):
    "10,000 samples, and what was chosen in each."

    samples: BertSamples
    batch: dict[str, torch.Tensor]
    text: np.ndarray            # (b, s): the tokens before words were hidden
    bounds: list[np.ndarray]    # of each sample: n-grams of its row
    places: list[np.ndarray]    # of each sample: tokens to be predicted


COUNT = 10_000


@pytest.fixture(scope="module", params=["embedded", "novels"])
def drawn(request, tmp_path_factory) -> Drawn:
    if request.param == "novels":
        folder = request.getfixturevalue("data_folder")
        wordpiece = load_wordpiece(folder / "tokenizers")
        texts = sorted((folder / "novels").glob("[a-e]*.txt"))
        documents = read_documents(texts)
    else:
        documents = list(embedded_corpus())
        wordpiece = train_wordpiece(documents, 4096)
    file = sentences_to_file(documents, wordpiece, tmp_path_factory.mktemp("bert") / "x")
    samples = BertSamples(file, wordpiece, 128, COUNT)
    seen = []
    real = bert.choose_masked

    def spy(starts, *others):
        seen.append((starts, real(starts, *others)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bert, "choose_masked", spy)
        batch = samples.batch(range(COUNT))
    ((starts, masked),) = seen
    sizes = batch["attention_mask"].sum(dim=1).tolist()
    bounds = [np.append(row[:n].nonzero()[0], n) for row, n in zip(starts, sizes)]
    return Drawn(samples, batch, originals(batch), bounds, [row.nonzero()[0] for row in masked])


def content(drawn: Drawn) -> np.ndarray:        # (b, s)
    "Where a row has tokens of the text, special ones left out."
    specials = np.array(drawn.samples.tokenizer.special_ids)
    return ~np.isin(drawn.text, specials)


def hidden(drawn: Drawn) -> np.ndarray:         # (b, s)
    return (drawn.batch["labels"] != IGNORED).numpy()


def test_15_percent_are_to_be_predicted(drawn):
    words, masked = content(drawn).sum(axis=1), hidden(drawn).sum(axis=1)
    unknown = (drawn.text == drawn.samples.tokenizer.unk_id).any(axis=1)
    long = (words >= 40) & ~unknown         # in very short ones the least number is one
    assert long.sum() > 0.8 * COUNT
    expect_mean(masked[long] - 0.15 * words[long])
    assert abs(masked.sum() / words.sum() - 0.15) < 0.002
    assert masked[words > 0].min() >= 1


def test_masks_fall_evenly_on_a_row(drawn):
    place = np.cumsum(content(drawn), axis=1) / content(drawn).sum(axis=1, keepdims=True)
    early, late = content(drawn) & (place < 0.51), content(drawn) & (place > 0.49)
    second = content(drawn) & (drawn.batch["token_types"].numpy() == 1)
    for half, other in ((early, late), (second, content(drawn) & ~second)):
        a, b = ((hidden(drawn) & part).sum(axis=1) / part.sum(axis=1) for part in (half, other))
        expect_mean(a - b)


def test_another_token_is_any_ordinary_one():
    "The first, the last and those between, equally likely."
    ids, ordinary = np.zeros((60, 1000), int), np.array([5, 6, 9])
    draw = np.random.default_rng(0).random((2, *ids.shape))
    shown, _ = mask_tokens(ids, np.ones(ids.shape, bool), 4, ordinary, draw)
    found, counts = np.unique(shown[(shown != 0) & (shown != 4)], return_counts=True)
    assert found.tolist() == ordinary.tolist()
    expect_even(counts)


def test_80_10_10(drawn):
    masked = hidden(drawn)
    shown, label = drawn.batch["input_ids"].numpy()[masked], drawn.batch["labels"].numpy()[masked]
    wordpiece, ordinary = drawn.samples.tokenizer, len(drawn.samples.ordinary)
    assert ordinary == wordpiece.vocab_size - 5
    expect_share((shown == wordpiece.mask_id).sum(), len(shown), 0.8)
    expect_share((shown == label).sum(), len(shown), 0.1 + 0.1 / ordinary)
    changed = shown[(shown != wordpiece.mask_id) & (shown != label)]
    expect_share(len(changed), len(shown), 0.1 * (1 - 1 / ordinary))
    assert not np.isin(changed, wordpiece.special_ids).any()
    rank = np.searchsorted(drawn.samples.ordinary, changed)
    expect_even(np.bincount(rank * 20 // ordinary, minlength=20))


def test_what_is_not_to_be_predicted_is_left_as_it_was(drawn):
    assert not np.isin(drawn.batch["labels"].numpy(), drawn.samples.tokenizer.special_ids).any()
    assert not (hidden(drawn) & ~content(drawn)).any()
    windows = places_of(drawn.samples)[:300].tolist()
    file, starts = drawn.samples.token_file, drawn.samples.starts
    for k, (first, end, _) in enumerate(windows):
        text = file.read(int(starts[first]), int(starts[end] - starts[first])).tolist()
        for part in parts_of(drawn.text[k], drawn.samples.tokenizer):
            n = len(part)
            assert any(text[at : at + n] == part for at in range(len(text) - n + 1))


def words_of(drawn: Drawn, k: int) -> np.ndarray:       # (s,)
    "A number for each token of a row: that of its word. Special tokens and segments begin words."
    row = drawn.text[k]
    special = np.isin(row, drawn.samples.tokenizer.special_ids)
    begins = ~drawn.samples.tokenizer.continues[row] | special
    begins[1:] |= special[:-1]
    return np.cumsum(begins)


def test_whole_words_are_hidden(drawn):
    several = 0
    masked = hidden(drawn)
    for k in range(1000):
        words = words_of(drawn, k)
        total, covered = np.bincount(words), np.bincount(words, weights=masked[k])
        assert np.isin(covered / total.clip(1), (0, 1)).all()
        several += ((covered > 1) & (total > 1)).sum()
    assert several > 200


def test_segments_begin_and_end_with_whole_words(drawn):
    continues = drawn.samples.tokenizer.continues
    cut = 0
    for k in range(1000):
        first, end, target = drawn.samples.places[k].tolist()
        a, b = (int(drawn.samples.starts[each]) for each in (first, end))
        text = drawn.samples.token_file.read(a, b - a).tolist()
        for part in parts_of(drawn.text[k], drawn.samples.tokenizer):
            if target < 30:
                continue
            assert not continues[part[0]]
            n = len(part)
            spots = [at for at in range(len(text) - n + 1) if text[at : at + n] == part]
            assert any(at + n == len(text) or not continues[text[at + n]] for at in spots)
            cut += all(at + n < len(text) for at in spots)
    assert cut > 200


def lengths_of(drawn: Drawn) -> np.ndarray:
    "Words of each hidden n-gram that begins where three words could follow in its segment."
    found = []
    sep = drawn.samples.tokenizer.sep_id
    for k, (bounds, places) in enumerate(zip(drawn.bounds, drawn.places)):
        n = bounds[-1]
        row = drawn.text[k, :n]
        special = np.isin(row, drawn.samples.tokenizer.special_ids)
        begins = ~drawn.samples.tokenizer.continues[row] | special
        begins[1:] |= special[:-1]
        word = np.cumsum(begins)                    # number of the word that a token belongs to
        ends = np.flatnonzero(row == sep)           # of both segments
        if len(ends) != 2 or special.sum() != 3:
            continue                                # a special token in the text
        end = np.where(np.arange(n) < ends[0], ends[0], ends[1])
        starts = np.intersect1d(bounds[:-1], places)
        stops = bounds[np.searchsorted(bounds, starts) + 1]
        lengths = word[stops - 1] - word[starts] + 1
        room = word[end[starts]] - word[starts]     # words up to the end of the segment
        found.append(lengths[room >= 3])
    return np.concatenate(found)


def test_ngrams_of_1_to_3_words_with_p_of_1_over_n(drawn):
    lengths = lengths_of(drawn)
    assert len(lengths) > 50_000 and set(lengths) == {1, 2, 3}
    for n in (1, 2, 3):
        expect_share((lengths == n).sum(), len(lengths), (1 / n) / (1 + 1 / 2 + 1 / 3))


def test_ngrams_are_hidden_whole(drawn):
    for bounds, places in zip(drawn.bounds[:2000], drawn.places[:2000]):
        masked = np.zeros(bounds[-1], bool)
        masked[places] = True
        shares = np.add.reduceat(masked, bounds[:-1], dtype=int) / np.diff(bounds)
        assert np.isin(shares, (0, 1)).all()


def test_half_are_swapped(drawn):
    expect_share(int(drawn.batch["sentence_order"].sum()), COUNT, 0.5)


def test_one_in_ten_is_short(drawn):
    target = places_of(drawn.samples)[:, 2]
    expect_share((target < 125).sum(), COUNT, 0.1 * 123 / 124)
    used = drawn.batch["attention_mask"].sum(dim=1).numpy() - 3
    assert (used <= target).all()
    assert used[target == 125].mean() > 115


def test_ngrams_cut_a_segment_without_gaps():
    continues = np.zeros(50, bool)
    continues[[3, 4, 9]] = True
    chance = np.random.default_rng(2)
    for length in range(1, 50):
        whole = np.ones(length, bool)
        found = ngrams(whole, ~continues[:length], chance.random(length))
        bounds = np.append(found.nonzero()[0], length)
        assert bounds[0] == 0 and bounds[-1] == length and (np.diff(bounds) > 0).all()
        assert not set(bounds[:-1]) & {3, 4, 9}
        counts = np.add.reduceat(~continues[:length], bounds[:-1], dtype=int)
        assert counts.max() <= 3
    whole = np.ones(3, bool)
    assert ngrams(whole, ~continues[3:6], chance.random(3))[0]      # a part of a word at the front


def test_ngrams_of_a_batch_are_what_a_walk_over_the_words_gives():
    chance = np.random.default_rng(5)
    column, begin = np.arange(40), chance.integers(0, 20, (2, 30, 1))
    parts = (begin <= column) & (column < begin + chance.integers(1, 20, (2, 30, 1)))
    heads, draw = chance.random((2, 30, 40)) < 0.6, chance.random((2, 30, 40))
    found = ngrams(parts, heads, draw)
    for place in np.ndindex(2, 30):
        tokens = parts[place].nonzero()[0].tolist()
        words = [i for i in tokens if heads[place][i] or i == tokens[0]]
        expected, word, fractions = [], 0, draw[place].tolist()
        while word < len(words):
            expected.append(words[word])
            each = fractions.pop(0)
            word += 1 if each < 6 / 11 else 2 if each < 9 / 11 else 3
        assert found[place].nonzero()[0].tolist() == expected


def test_rows_of_a_batch_are_chosen_and_hidden_one_by_one():
    chance = np.random.default_rng(6)
    starts, special = chance.random((200, 50)) < 0.6, chance.random((200, 50)) < 0.1
    starts[:, 0], special[0] = True, True
    keys, rounding, draw = (chance.random(shape) for shape in ((200, 50), 200, (2, 200, 50)))
    masked = choose_masked(starts, special, keys, rounding)
    ids, ordinary = chance.integers(5, 99, (200, 50)), np.arange(5, 99)
    shown, labels = mask_tokens(ids, masked, 4, ordinary, draw)
    for k in range(200):
        bounds = [*starts[k].nonzero()[0].tolist(), 50]
        grams = [range(a, b) for a, b in zip(bounds, bounds[1:])]
        plain = [gram for gram in grams if not special[k, gram].any()]
        count = max(int(0.15 * len(plain) + rounding[k]), 1)
        plain.sort(key=lambda gram: keys[k, gram[0]])
        expected = {i for gram in plain[:count] for i in gram}
        assert set(masked[k].nonzero()[0].tolist()) == expected
        for i in range(50):
            fate = draw[0, k, i] if i in expected else 0.85
            other = ordinary[int(draw[1, k, i] * 94)]
            assert shown[k, i] == (4 if fate < 0.8 else ids[k, i] if fate < 0.9 else other)
            assert labels[k, i] == (ids[k, i] if i in expected else IGNORED)
    assert not masked[0].any()


# The same everywhere


def test_any_order_and_any_subset_give_the_same(tmp_path):
    file, wordpiece = random_file(tmp_path / "x", 5), numbered_wordpiece(6000, every=4)
    samples = BertSamples(file, wordpiece, 32, 300, seed=9)
    batch = samples.batch(range(300))
    order = np.random.default_rng(0).permutation(300)[:120].tolist()
    for name, rows in samples.batch(order).items():
        assert torch.equal(rows, batch[name][order])
    sent = pickle.loads(pickle.dumps(samples))
    for each in (sent, BertSamples(TokenFile(file.prefix), wordpiece, 32, 1000, seed=9)):
        for name, rows in each.batch(range(300)).items():
            assert torch.equal(rows, batch[name])
    loader = torch.utils.data.DataLoader(samples, batch_size=50, num_workers=2)
    for name, rows in batch.items():
        assert torch.equal(torch.cat([each[name] for each in loader]), rows)
    other = BertSamples(file, wordpiece, 32, 300, seed=10)
    assert not np.array_equal(places_of(other), places_of(samples))
    other.places = samples.places       # what they hold differs, too
    assert not torch.equal(other.batch(range(300))["input_ids"], batch["input_ids"])


def test_another_process_gives_the_same(tmp_path):
    file, wordpiece = random_file(tmp_path / "x", 6), numbered_wordpiece(6000, every=4)
    wordpiece.save(tmp_path / "tokenizer.json")
    batch = BertSamples(file, wordpiece, 32, 100, seed=5).batch(range(100))
    program = (
        "import sys; from megatron_edu.data.bert import BertSamples;"
        "from megatron_edu.data.token_file import TokenFile;"
        "from megatron_edu.data.wordpiece import load_wordpiece;"
        "samples = BertSamples(TokenFile(sys.argv[1]), load_wordpiece(sys.argv[2]), 32, 100, 5);"
        "print([samples[i]['input_ids'].tolist() for i in reversed(range(100))][::-1])"
    )
    command = [sys.executable, "-c", program, str(file.prefix), str(tmp_path / "tokenizer.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.strip() == str(batch["input_ids"].tolist()), result.stderr


def test_the_samples_of_old_checkpoints_stay(tmp_path):
    "A resumed run counts on these numbers: they must not change with the library or with numpy."
    file = numbered_file(tmp_path / "x", [[3, 4, 5, 3], [4, 4], [6, 2, 6]])
    samples = BertSamples(file, numbered_wordpiece(60, every=6), 12, num_samples=8, seed=1)
    assert places_of(samples)[:6].tolist() == [
        [4, 6, 9], [0, 4, 9], [6, 9, 9], [0, 4, 9], [6, 9, 9], [4, 6, 9],
    ]
    assert places_of(samples)[6:].tolist() == [[6, 9, 4], [0, 4, 9]]
    assert samples.batch([0, 1, 2])["input_ids"].tolist() == [
        [2, 24, 25, 4, 27, 3, 20, 21, 22, 23, 3, 0],
        [2, 4, 4, 10, 11, 12, 13, 3, 17, 18, 19, 3],
        [2, 37, 38, 39, 40, 3, 28, 29, 30, 31, 32, 3],
    ]


def test_epochs_and_samples_have_random_numbers_of_their_own():
    seen = {bert.generator(s, p, n).random() for s in (1, 2) for p in (0, 1) for n in range(50)}
    assert len(seen) == 200
    once, each = draws(1, range(50), 64)
    assert once.shape == (5, 50) and each.shape == (5, 50, 64)
    numbers = np.concatenate([once.ravel(), each.ravel()])
    assert len(set(numbers.tolist())) == 50 * (5 + 5 * 64)      # none is used for two things


# What is refused


def test_files_without_pairs_are_refused(tmp_path):
    wordpiece = numbered_wordpiece(100)
    alone = numbered_file(tmp_path / "x", [[4], [5], [], [6]])
    with pytest.raises(ValueError, match=r"x: none of 4 documents has two sentences.*add text"):
        BertSamples(alone, wordpiece, 16)
    pairs = numbered_file(tmp_path / "y", [[4], [5, 5]])
    with pytest.raises(ValueError, match="none of 1 documents has two"):
        BertSamples(pairs, wordpiece, 16, documents=range(0, 1))
    with pytest.raises(ValueError, match=r"documents range\(0, 3\) of 2"):
        BertSamples(pairs, wordpiece, 16, documents=range(0, 3))
    empty = numbered_file(tmp_path / "z", [[4, 3], [5, 0, 5]])
    for documents in (None, range(1, 2)):
        with pytest.raises(ValueError, match="sentence 3 has no token.*sentences_to_file"):
            BertSamples(empty, wordpiece, 16, documents=documents)
    assert len(BertSamples(empty, wordpiece, 16, documents=range(0, 1))) == 1


def test_bad_numbers_are_refused(tmp_path):
    file, wordpiece = numbered_file(tmp_path / "x", [[4, 5]]), numbered_wordpiece(100)
    with pytest.raises(ValueError, match="seq_len 4.*need 5"):
        BertSamples(file, wordpiece, 4)
    with pytest.raises(ValueError, match="num_samples 0.*1 or more"):
        BertSamples(file, wordpiece, 16, 0)
    with pytest.raises(ValueError, match=r"x\.bin, .*: token id 12 .* vocabulary of 12"):
        BertSamples(file, numbered_wordpiece(12), 16)
