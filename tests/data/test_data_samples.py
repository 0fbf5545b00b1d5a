"GPT samples against a walk through the stream in plain Python, and what the order must promise."

import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from megatron_edu.data.gpt2 import GPT2Samples, SampleIndex, document_hashes, split_documents
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.token_writer import TokenFileWriter


def numbered_file(prefix, sizes) -> TokenFile:
    "Documents of these sizes; the tokens are 0, 1, 2, ... so that each says where it stands."
    start = 0
    with TokenFileWriter(prefix, 60_000) as writer:
        for size in sizes:
            writer.append(range(start, start + size))
            writer.end_document()
            start += size
    return TokenFile(prefix)


def random_file(prefix, seed: int) -> TokenFile:
    chance = np.random.default_rng(seed)
    return numbered_file(prefix, chance.integers(0, 9, size=40))


def rows_of(samples: GPT2Samples) -> np.ndarray:
    "All samples, (num_samples, s + 1), from inputs and labels."
    batch = samples.batch(range(len(samples)))
    return torch.cat([batch["input_ids"], batch["labels"][:, -1:]], dim=1).numpy()


def whole_index(samples: GPT2Samples, documents: int) -> SampleIndex:
    "The three arrays of all epochs that a run reads of, each as one. Places count in that order."
    epochs = samples.epochs
    parts = [epochs[e] for e in range(epochs.epoch_of(len(samples) - 1) + 1)]
    order = [part.documents[-documents:] for part in parts]
    starts = [part.starts + [max(e - 1, 0) * documents, 0] for e, part in enumerate(parts)]
    shuffle = [epochs.complete(e) + part.shuffle for e, part in enumerate(parts)]
    return SampleIndex(*map(np.concatenate, (order, starts, shuffle)))


def epochs_of(samples: GPT2Samples, file: TokenFile, per_epoch: int) -> list[list[int]]:
    order = whole_index(samples, per_epoch).documents.reshape(-1, per_epoch)
    return [[token for d in row for token in file[int(d)].tolist()] for row in order]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("seq_len", [1, 3, 16])
def test_samples_are_what_a_walk_through_the_stream_gives(tmp_path, seed, seq_len):
    file = random_file(tmp_path / "x", seed)
    epoch = (file.num_tokens - 1) // seq_len
    samples = GPT2Samples(file, seq_len, num_samples=2 * epoch + epoch // 2 + 1, seed=seed)
    epochs = epochs_of(samples, file, len(file))
    assert all(sorted(tokens) == list(range(file.num_tokens)) for tokens in epochs)
    stream = [token for tokens in epochs for token in tokens]
    cut = [stream[k : k + seq_len + 1] for k in range(0, len(stream) - seq_len, seq_len)]
    rows = rows_of(samples).tolist()
    shuffle = whole_index(samples, len(file)).shuffle[: len(samples)]
    assert [cut[k] for k in shuffle] == rows
    done = 0
    for e in range(len(epochs)):
        ready = ((e + 1) * file.num_tokens - 1) // seq_len      # samples that epochs 0..e complete
        block = shuffle[done:ready]
        assert len(set(block)) == len(block)
        if len(samples) >= ready:
            assert sorted(block) == list(range(done, ready))
        done = ready


def test_neighbours_share_one_token_and_every_label_comes_once(tmp_path):
    file = random_file(tmp_path / "x", 1)
    samples = GPT2Samples(file, seq_len=5)
    rows = rows_of(samples)
    in_order = rows[np.argsort(samples.epochs[0].shuffle)]
    assert np.array_equal(in_order[:-1, -1], in_order[1:, 0])
    labels = in_order[:, 1:].reshape(-1)
    assert len(set(labels)) == len(labels) == (file.num_tokens - 1) // 5 * 5


def test_labels_are_inputs_one_token_on(tmp_path):
    samples = GPT2Samples(random_file(tmp_path / "x", 2), seq_len=7)
    batch = samples.batch([0, 3])
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 7)
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    for name, rows in samples[3].items():
        assert torch.equal(rows, batch[name][1])


def test_both_orders_are_shuffled(tmp_path):
    samples = GPT2Samples(numbered_file(tmp_path / "x", [9] * 50), 4, num_samples=300)
    index = whole_index(samples, 50)
    first, second = index.documents[:50], index.documents[50:100]
    assert not np.array_equal(first, np.sort(first))
    assert not np.array_equal(first, second)
    assert not np.array_equal(index.shuffle, np.sort(index.shuffle))


def test_the_seed_fixes_everything_in_any_process(tmp_path):
    file = random_file(tmp_path / "x", 3)
    rows = rows_of(GPT2Samples(file, 4, 100, seed=5))
    assert np.array_equal(rows, rows_of(GPT2Samples(TokenFile(file.prefix), 4, 100, seed=5)))
    assert not np.array_equal(rows, rows_of(GPT2Samples(file, 4, 100, seed=6)))
    program = (
        "import sys; from megatron_edu.data.gpt2 import GPT2Samples;"
        "from megatron_edu.data.token_file import TokenFile;"
        "samples = GPT2Samples(TokenFile(sys.argv[1]), 4, 100, seed=5);"
        "print(samples.batch(range(100))['labels'].tolist())"
    )
    command = [sys.executable, "-c", program, str(file.prefix)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.strip() == str(rows[:, 1:].tolist()), result.stderr


def test_the_order_of_old_checkpoints_stays(tmp_path):
    "A resumed run counts on these numbers: they must not change with the library or with numpy."
    samples = GPT2Samples(numbered_file(tmp_path / "x", [3, 4, 5]), 2, num_samples=8, seed=1)
    index = whole_index(samples, 3)
    assert index.documents.tolist() == [0, 1, 2, 2, 0, 1]
    assert index.shuffle[:8].tolist() == [1, 4, 0, 3, 2, 7, 6, 5]


@pytest.mark.parametrize("short", [1, 40, 71, 200])
def test_a_longer_run_begins_with_a_shorter_one(tmp_path, short):
    file = random_file(tmp_path / "x", 4)
    long = GPT2Samples(file, 4, num_samples=500, seed=2)
    assert np.array_equal(rows_of(GPT2Samples(file, 4, short, seed=2)), rows_of(long)[:short])


def test_nothing_comes_twice_before_all_came_once(tmp_path):
    file = numbered_file(tmp_path / "x", [8] * 30)
    samples = GPT2Samples(file, 8, num_samples=75)
    labels = rows_of(samples)[:, 1:]
    epoch = (file.num_tokens - 1) // 8
    assert len(np.unique(labels[:epoch])) == 8 * epoch
    counts = np.bincount(labels.reshape(-1), minlength=file.num_tokens)
    assert counts.max() <= 3 and counts.min() >= 1


def test_a_range_of_documents_is_a_corpus_of_its_own(tmp_path):
    file = numbered_file(tmp_path / "x", [5, 6, 7, 8, 9])
    part = GPT2Samples(file, 3, num_samples=30, documents=range(1, 4))
    assert set(rows_of(part).reshape(-1)) <= set(range(5, 26))
    alone = GPT2Samples(file, 3, documents=range(2, 3))
    assert sorted(rows_of(alone).tolist()) == [[11, 12, 13, 14], [14, 15, 16, 17]]


def test_any_documents_are_a_corpus_of_their_own(tmp_path):
    file = numbered_file(tmp_path / "x", [5, 6, 7, 8, 9])
    part = GPT2Samples(file, 3, num_samples=30, documents=np.array([0, 2, 4]))
    assert set(rows_of(part).reshape(-1)) == {*range(0, 5), *range(11, 18), *range(26, 35)}
    assert len(GPT2Samples(file, 3, documents=np.array([0, 2, 4]))) == (5 + 7 + 9 - 1) // 3
    same = [GPT2Samples(file, 3, documents=part) for part in (np.arange(1, 4), range(1, 4))]
    assert np.array_equal(*map(rows_of, same))


def test_documents_of_several_sequences(tmp_path):
    with TokenFileWriter(tmp_path / "x", 100) as writer:
        for document in ([[1, 2], [3]], [[4, 5], [6, 7, 8]]):
            for sequence in document:
                writer.append(sequence)
                writer.end_sequence()
            writer.end_document()
    samples = GPT2Samples(TokenFile(tmp_path / "x"), 2, documents=range(1, 2))
    assert sorted(rows_of(samples).tolist()) == [[4, 5, 6], [6, 7, 8]]


def test_the_arrays_of_a_large_corpus_are_built_in_a_moment(tmp_path):
    sizes = np.random.default_rng(0).integers(1, 200, size=1_000_000)
    ends = np.append(0, np.cumsum(sizes))

    class Large(TokenFile):
        prefix, document_starts = "large", ends

        def __init__(self):
            "No file: the starts alone are asked for."

    samples = GPT2Samples(Large(), 128, num_samples=1_500_000)
    index = whole_index(samples, len(sizes))
    places, offsets = index.starts.T
    read = sizes[index.documents]
    before = np.append(0, np.cumsum(read))[places]
    assert np.array_equal(before + offsets, 128 * np.arange(len(places)))
    assert ((0 <= offsets) & (offsets < read[places])).all()


def test_of_a_long_run_one_epoch_is_held(tmp_path):
    "The arrays of these thousand epochs would take 72 MB."
    file = numbered_file(tmp_path / "x", [50] * 1000)
    GPT2Samples(file, 16).batch([0])        # what is loaded at the first use is no part of it
    tracemalloc.start()
    samples = GPT2Samples(file, 16, num_samples=3_000_000)
    samples.batch(range(512))
    samples.batch(range(100_000, 100_512))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert samples.epochs[32] is samples.epochs[32]     # not drawn anew
    of_an_epoch = sum(array.nbytes for array in samples.epochs[32])
    assert peak < 5 * of_an_epoch < 1e6


@pytest.mark.parametrize("seq_len", [3, 16])
def test_samples_are_the_same_in_any_order(tmp_path, seq_len):
    "After a stop, and after a look at others, of epochs before and behind."
    file = random_file(tmp_path / "x", 7)
    count = 5 * file.num_tokens // seq_len
    rows = rows_of(GPT2Samples(file, seq_len, count))
    mixed, fresh = GPT2Samples(file, seq_len, count), GPT2Samples(file, seq_len, count)
    for i in np.random.default_rng(0).permutation(count).tolist():
        assert np.array_equal(mixed.tokens(i), rows[i])
    assert np.array_equal(fresh.tokens(count - 1), rows[-1])
    assert np.array_equal(pickle.loads(pickle.dumps(mixed)).tokens(count - 2), rows[-2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 20}, "3 documents hold 20 tokens; a sample of seq_len 20 takes 21.*1 to 19"),
        ({"seq_len": 0}, "a sample of seq_len 0 takes 2; use .* from 1 to 19"),
        ({"seq_len": 4, "num_samples": 0}, "num_samples 0; it must be 1 or more"),
        ({"seq_len": 4, "documents": range(2, 4)}, r"documents range\(2, 4\) of 3"),
        ({"seq_len": 4, "documents": np.array([1, 0])}, "documents .1 0. of 3; .*ascending"),
        ({"seq_len": 4, "documents": np.array([1, 1])}, "documents .1 1. of 3; .*each once"),
        ({"seq_len": 4, "documents": np.array([[1]])}, "documents ..1.. of 3; they must be num"),
        ({"seq_len": 4, "documents": np.array([0.5])}, "documents .0.5. of 3; they must be num"),
        ({"seq_len": 4, "documents": np.array([], int)}, "0 documents hold 0 tokens"),
        ({"seq_len": 4, "documents": range(1, 1)}, "0 documents hold 0 tokens.* from 1 to 1,"),
        ({"seq_len": 4, "documents": range(-1, 2)}, r"documents range\(-1, 2\) of 3"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, options, message):
    file = numbered_file(tmp_path / "x", [5, 6, 9])
    with pytest.raises(ValueError, match=message):
        GPT2Samples(file, **options)
    assert len(GPT2Samples(file, 19)) == 1


@pytest.mark.parametrize("i", [-1, 4])
def test_a_sample_that_is_not_there(tmp_path, i):
    samples = GPT2Samples(numbered_file(tmp_path / "x", [20]), 4)
    with pytest.raises(IndexError, match=f"sample {i} of 4"):
        samples[i]


@pytest.mark.parametrize("seed", [None, 0, 1, 2**63 - 1])
@pytest.mark.parametrize("count", [2, 3, 7, 100, 1001])
@pytest.mark.parametrize(
    "fractions", [(0.97, 0.03), (0.03, 0.97), (0.5, 0.5), (1.0, 0.0), (0.0, 0.97, 0.03)]
)
def test_a_split_has_every_document_once(count, fractions, seed):
    parts = split_documents(count, fractions, seed)
    assert np.sort(np.concatenate(parts)).tolist() == list(range(count))
    for part, fraction in zip(parts, fractions, strict=True):
        assert abs(len(part) - fraction * count) <= 1
        assert (len(part) > 0) == (fraction > 0)
        assert (np.diff(part) > 0).all()


def numbers(parts) -> list[list[int]]:
    return [part.tolist() for part in parts]


def test_a_split_is_the_same_everywhere_and_always():
    "By the numbers that Vigna's splitmix64.c prints, not by what this machine makes of a seed."
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert document_hashes(4, 0).tolist() == published
    assert numbers(split_documents(4, (0.5, 0.25, 0.25))) == [[1, 2], [0], [3]]
    kept = [0xBFEF8030DDC2D772, 0x5F552CE482F2AA47]     # of another seed, as runs have them
    assert document_hashes(2, 1).tolist() == kept
    by_seed = {str(split_documents(20, (0.8, 0.2), seed)[1]) for seed in range(10)}
    assert len(by_seed) == 10


def test_a_document_stays_on_its_side_where_other_shares_change():
    "A test is the same whatever is validated on, and a larger share holds the smaller one."
    for seed in range(5):
        small = split_documents(1000, (0.87, 0.03, 0.1), seed)
        large = split_documents(1000, (0.7, 0.2, 0.1), seed)
        assert np.array_equal(small[2], large[2])
        assert set(small[1]) < set(large[1])


def test_held_out_documents_come_from_everywhere():
    "A corpus that is sorted: each tenth of the file gives its tenth, as chance would have it."
    held_out = split_documents(100_000, (0.9, 0.1))[1]
    tenths = np.bincount(held_out * 10 // 100_000, minlength=10)
    assert abs(tenths - 1000).max() < 5 * np.sqrt(1000 * 0.9)
    assert abs(np.bincount(held_out % 7) - 10_000 / 7).max() < 5 * np.sqrt(10_000 / 7)


def test_without_a_seed_the_order_is_that_of_the_file():
    "As runs did that began before there was one: what they held out must not be trained on now."
    assert numbers(split_documents(10, (0.28, 0.72), None)) == [[0, 1, 2], [3, 4, 5, 6, 7, 8, 9]]
    assert numbers(split_documents(60, (0.9, 0.1), None))[1] == list(range(54, 60))


def test_a_split_of_many_documents_sorts_none(monkeypatch):
    for name in ("sort", "argsort", "lexsort"):
        monkeypatch.setattr(np, name, lambda *args, **options: pytest.fail("sorted"))
    parts = split_documents(1_000_000, (0.9, 0.05, 0.05), 3)
    assert [len(part) for part in parts] == [900_000, 50_000, 50_000]


def test_a_split_that_cannot_be_made():
    assert numbers(split_documents(3, (0.01, 0.01, 0.98), None)) == [[0], [1], [2]]
    with pytest.raises(ValueError, match="split in 2 parts; .* divide it among more files: a .txt"):
        split_documents(1, (0.97, 0.03))
    with pytest.raises(ValueError, match=r"sum to 0.9; .*the sum must be 1"):
        split_documents(10, (0.8, 0.1))
    with pytest.raises(ValueError, match="none may be negative"):
        split_documents(10, (1.1, -0.1))
