"Megatron's .bin/.idx: the same bytes, whole files or none, and no token that was not written."

import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from megatron_edu.data import token_file
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.token_writer import TokenFileWriter, tokenize_to_file
from megatron_edu.data.tokenizer import train_tokenizer

MEGATRON_FILES = ["fim_text_document", "test_text_document"]


def write(prefix, documents, *options, **named):
    with TokenFileWriter(prefix, *options, **named) as writer:
        for document in documents:
            writer.append(document)
            writer.end_document()
    return TokenFile(prefix)


def files_in(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small(tmp_path):
    "A good file of three documents, and its prefix."
    write(tmp_path / "small", [[1, 2, 3], [4], [5, 6]], 100)
    return tmp_path / "small"


def spoil(prefix, ending, change):
    path = prefix.with_name(f"{prefix.name}.{ending}")
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("name", MEGATRON_FILES)
def test_what_megatron_wrote_is_written_again_byte_for_byte(data_folder, tmp_path, name):
    source = data_folder / "megatron_index" / name
    file = TokenFile(source)
    assert len(file) == 1000 and file.dtype == np.int32
    write(tmp_path / name, file, dtype=file.dtype)
    for ending in ("bin", "idx"):
        original = source.with_name(f"{name}.{ending}").read_bytes()
        assert (tmp_path / f"{name}.{ending}").read_bytes() == original


def test_what_megatron_wrote_is_read_as_numpy_reads_it(data_folder):
    prefix = data_folder / "megatron_index" / MEGATRON_FILES[0]
    file = TokenFile(prefix)
    tokens = np.fromfile(f"{prefix}.bin", dtype="<i4")
    assert np.array_equal(file.read(0, file.num_tokens), tokens)
    assert np.array_equal(np.concatenate(list(file)), tokens)
    assert np.array_equal(np.diff(file.document_starts), file.sizes)
    with pytest.raises(ValueError, match=r"token id 128000 .*vocabulary of 50257"):
        file.check_vocab(50_257)
    file.check_vocab(128_256)


def test_every_byte_of_a_small_file(tmp_path):
    write(tmp_path / "x", [[258, 1], [], [7]], 50_257)
    assert (tmp_path / "x.bin").read_bytes() == bytes([2, 1, 1, 0, 7, 0])
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    expected += struct.pack("<3i", 2, 0, 1) + struct.pack("<3q", 0, 4, 4)
    expected += struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "x.idx").read_bytes() == expected
    assert sorted(files_in(tmp_path)) == ["x.bin", "x.idx"]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, np.uint16), (65_499, np.uint16), (65_500, np.int32)]
)
def test_the_vocabulary_sets_the_type(tmp_path, vocab_size, dtype):
    file = write(tmp_path / "x", [[0, vocab_size - 1]], vocab_size)
    assert file.dtype == dtype
    assert file[0].tolist() == [0, vocab_size - 1]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
@pytest.mark.parametrize("seed", range(4))
def test_sequences_and_documents_come_back(tmp_path, seed, dtype):
    chance = np.random.default_rng(seed)
    documents = [
        [chance.integers(0, 127, size=chance.integers(0, 6)) for _ in range(chance.integers(0, 4))]
        for _ in range(20)
    ]
    with TokenFileWriter(tmp_path / "x", dtype=dtype) as writer:
        for document in documents:
            for sequence in document:
                for token in sequence:
                    writer.append([token])
                writer.end_sequence()
            writer.end_document()
    file = TokenFile(tmp_path / "x")
    sequences = [sequence for document in documents for sequence in document]
    assert [sequence.tolist() for sequence in file] == [each.tolist() for each in sequences]
    assert file.sizes.tolist() == [len(each) for each in sequences]
    assert file.num_tokens == sum(len(each) for each in sequences)
    counts = [len(document) for document in documents]
    assert np.diff(file.document_offsets).tolist() == counts
    lengths = [sum(map(len, document)) for document in documents]
    assert np.diff(file.document_starts).tolist() == lengths
    assert file[-1].tolist() == sequences[-1].tolist()


def test_an_open_document_is_ended_with_the_block(tmp_path):
    with TokenFileWriter(tmp_path / "x", 100) as writer:
        writer.append([1, 2])
        writer.append([3])
    assert [each.tolist() for each in TokenFile(tmp_path / "x")] == [[1, 2, 3]]


def test_a_huge_document_is_streamed(tmp_path):
    piece = np.arange(100_000) % 50_000
    tracemalloc.start()
    with TokenFileWriter(tmp_path / "x", 50_257) as writer:
        for _ in range(200):
            writer.append(piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    file = TokenFile(tmp_path / "x")
    assert file.num_tokens == 20_000_000 and len(file) == 1
    assert file.read(10_000_000, 3).tolist() == [0, 1, 2]
    assert peak < 4_000_000


def test_opening_reads_no_tokens(tmp_path):
    write(tmp_path / "x", [np.zeros(5_000_000, dtype=int)] * 4, 50_257)
    tracemalloc.start()
    file = TokenFile(tmp_path / "x")
    view = file.read(10_000_000, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert np.shares_memory(view, file[2]) and not view.flags.writeable
    assert len(pickle.dumps(file)) < 1000


def test_a_copy_in_another_process_finds_the_file(small, monkeypatch):
    monkeypatch.chdir(small.parent)
    sent = pickle.dumps(TokenFile("small"))
    monkeypatch.chdir("/")
    assert [each.tolist() for each in pickle.loads(sent)] == [[1, 2, 3], [4], [5, 6]]


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_file_cut_short_anywhere_is_refused(small, ending):
    path = small.with_name(f"small.{ending}")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        message = "begins with" if ending == "idx" and length < 9 else "cut short"
        with pytest.raises(ValueError, match=rf"small\.{ending}: {message}"):
            TokenFile(small)
    path.write_bytes(whole + b"\x00")
    with pytest.raises(ValueError, match=rf"small\.{ending}: too long"):
        TokenFile(small)


@pytest.mark.parametrize("at", range(34 + 3 * 12))
def test_a_changed_byte_of_the_index_is_noticed(small, at):
    spoil(small, "idx", lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(ValueError, match=r"small\.(idx|bin)"):
        TokenFile(small)


@pytest.mark.parametrize("offsets", [[1, 1, 2, 3], [0, 1, 2, 2], [0, 2, 1, 3], [0, 1, 2, 4]])
def test_document_offsets_that_do_not_rise_to_the_end_are_refused(small, offsets):
    spoil(small, "idx", lambda content: content[:-32] + struct.pack("<4q", *offsets))
    with pytest.raises(ValueError, match="contradict each other.*write the token file anew"):
        TokenFile(small)


def test_a_negative_size_is_refused_where_all_sums_agree(small):
    arrays = struct.pack("<3i", 3, -1, 4) + struct.pack("<3q", 0, 6, 4)
    spoil(small, "idx", lambda content: content[:34] + arrays + content[-32:])
    with pytest.raises(ValueError, match="contradict each other"):
        TokenFile(small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: b"XMIDIDX" + c[7:], "begins with b'XMIDIDX"),
        (lambda c: c[:9] + b"\x02" + c[10:], "version 2 .* known are version 1"),
        (lambda c: c[:17] + b"\x06" + c[18:], r"token type 6 \(numbers with a fraction.*uint16;"),
        (lambda c: c[:18] + b"\x04" + c[19:], "cut short: it has 102 bytes, where 4 sequences"),
    ],
)
def test_messages_name_value_and_rule(small, change, message):
    spoil(small, "idx", change)
    with pytest.raises(ValueError, match=message):
        TokenFile(small)


def test_sequence_modes_of_text_are_read(small):
    spoil(small, "idx", lambda content: content + bytes(3))
    assert [each.tolist() for each in TokenFile(small)] == [[1, 2, 3], [4], [5, 6]]
    assert TokenFile(small).document_starts.tolist() == [0, 3, 4, 6]


@pytest.mark.parametrize(
    ("modes", "words"),
    [
        ([0, 1, 0], r"sequence modes, and 1 of 3 are not 0 \(sequence 1: mode 1\): a multimodal"),
        ([-1, 2, 2], r"3 of 3 are not 0 \(sequence 0: mode -1\)"),
        ([0, 0], "too long: it has 104 bytes"),
        ([0, 0, 0, 0], "too long: it has 106 bytes"),
    ],
)
def test_other_modes_and_other_lengths_are_refused_by_name(small, modes, words):
    spoil(small, "idx", lambda content: content + np.array(modes, "i1").tobytes())
    with pytest.raises(ValueError, match=rf"small\.idx: .*{words}"):
        TokenFile(small)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c[:18] + struct.pack("<Q", 2**60) + c[26:], f"where {2**60} sequences and 4"),
        (lambda c: c[:18] + struct.pack("<QQ", 2**64 - 1, 2**64 - 1) + c[34:], "cut short"),
        (lambda c: c[:26] + struct.pack("<Q", 2**61) + c[34:], f"and {2**61} document offsets"),
        (lambda c: c[:26] + struct.pack("<Q", 0) + c[34:], "too long"),
        (lambda c: c[:26] + struct.pack("<Q", 0) + c[34:70], "contradict each other"),
        (lambda c: c[:34] + struct.pack("<3i", *[2**31 - 1] * 3) + c[46:], "contradict"),
        (lambda c: c[:46] + struct.pack("<3q", 0, -(2**62), 8) + c[70:], "contradict"),
        (lambda c: c[:70] + struct.pack("<4q", 0, 2**40, 2**41, 3) + c[102:], "contradict"),
        (lambda c: c[:17] + bytes([7]) + c[18:], r"token type 7 \(numbers with a fraction"),
        (lambda c: c[:17] + bytes([255]) + c[18:], "token type 255; known"),
        (lambda c: b"TNTIDX\0\0" + c[8:], "as an index of fairseq's older format does"),
        (lambda c: c[::-1], "begins with"),
        (lambda c: bytes(len(c)), "begins with"),
        (lambda c: b"", "begins with b''"),
    ],
)
def test_an_index_of_any_numbers_is_refused_in_little_memory(small, change, words):
    spoil(small, "idx", change)
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"small\.idx: .*{words}"):
        TokenFile(small)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: os.mkfifo(path)])
def test_what_is_no_file_is_named(small, ending, make):
    path = small.with_name(f"small.{ending}")
    path.unlink()
    make(path)
    with pytest.raises(ValueError, match=rf"small\.{ending}: not a file"):
        TokenFile(small)


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_missing_half_is_named(small, ending):
    small.with_name(f"small.{ending}").unlink()
    with pytest.raises(ValueError, match=rf"small\.{ending}: no such file.*PREFIX"):
        TokenFile(small)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([70_000], r"token id 70000 .*vocabulary of 50257"),
        ([50_257], "token id 50257 .*ids must be 0 to 50256"),
        ([3, -1], r"token id -1 \(number 1\)"),
        ([0.5], "type float64"),
        ([[1, 2]], r"shape \(1, 2\)"),
        (["a"], "whole numbers"),
    ],
)
def test_what_is_no_token_is_refused_and_leaves_nothing(tmp_path, tokens, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "x", [[1, 2], tokens], 50_257)
    assert files_in(tmp_path) == {}


def test_ids_that_the_type_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="token id 65536"):
        write(tmp_path / "x", [[65_535, 65_536]], dtype=np.uint16)
    with pytest.raises(ValueError, match="float32 is no token type"):
        TokenFileWriter(tmp_path / "x", dtype=np.float32)
    with pytest.raises(ValueError, match="no vocab_size and no dtype"):
        TokenFileWriter(tmp_path / "x")


def test_a_document_of_more_tokens_than_the_format_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_edu.data.token_writer.MAX_SIZE", 5)
    with pytest.raises(ValueError, match="over 5 tokens in one document"):
        write(tmp_path / "x", [[1, 2, 3], [1] * 6], 100)
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_what_was_there(small, failure):
    before = files_in(small.parent)
    with pytest.raises(failure):
        with TokenFileWriter(small.with_name("other"), 100) as writer:
            writer.append([9] * 1_000_000)
            writer.end_document()
            raise failure
    assert files_in(small.parent) == before


@pytest.mark.parametrize("ending", ["bin", "idx"])      # of the half that is gone
def test_a_name_that_is_taken_is_refused_before_a_document_is_read(small, ending):
    small.with_name(f"small.{ending}").unlink()
    before, read = files_in(small.parent), (pytest.fail("read") for _ in range(1))
    with pytest.raises(ValueError, match="is a file already, and nothing is written over"):
        tokenize_to_file(read, train_tokenizer(["text"], 260), small)
    assert files_in(small.parent) == before


def test_a_killed_writer_leaves_nothing_under_the_final_names(tmp_path):
    program = (
        "import sys, time; from megatron_edu.data.token_writer import TokenFileWriter\n"
        "with TokenFileWriter(sys.argv[1], 100) as writer:\n"
        "    writer.append([7] * 3_000_000); print('written', flush=True); time.sleep(10**5)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "x")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    names = sorted(files_in(tmp_path))
    assert len(names) == 1 and re.fullmatch(r"\.x\.bin\.[0-9a-f]{8}\.partial", names[0])


def test_a_full_disk_leaves_what_was_there(small):
    before = files_in(small.parent)
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from megatron_edu.data.token_writer import TokenFileWriter\n"
        "with TokenFileWriter(sys.argv[1], 100) as writer: writer.append([7] * 3_000_000)\n"
    )
    command = [sys.executable, "-c", program, str(small.with_name("other"))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "OSError" in result.stderr
    assert files_in(small.parent) == before


@pytest.mark.parametrize("stops", [False, True])
def test_no_index_is_ever_there_without_its_tokens(tmp_path, monkeypatch, stops):
    replace, moments = type(tmp_path).replace, []

    def watched(self, target):
        if stops and ".idx." in self.name:
            raise OSError("stopped between the two renames")
        replace(self, target)
        moments.append(sorted(path.name for path in tmp_path.glob("x.*")))

    monkeypatch.setattr(type(tmp_path), "replace", watched)
    if stops:
        with pytest.raises(OSError, match="between"):
            write(tmp_path / "x", [[7, 8, 9]], 100)
        assert files_in(tmp_path) == {}
    else:
        write(tmp_path / "x", [[7, 8, 9]], 100)
        assert moments[1] == ["x.bin", "x.idx"]
    assert moments[0] == ["x.bin"]


def test_reads_stay_inside_the_file(small):
    file = TokenFile(small)
    assert file.read(0, 6).tolist() == [1, 2, 3, 4, 5, 6] and file.read(6, 0).tolist() == []
    for start, length in ((-1, 2), (5, 2), (0, 7), (2, -1)):
        with pytest.raises(ValueError, match="of 6; a read must lie inside"):
            file.read(start, length)
    with pytest.raises(IndexError, match="sequence 3 of 3"):
        file[3]


def test_an_empty_file_is_a_file(tmp_path):
    file = write(tmp_path / "x", [], 100)
    assert (len(file), file.num_tokens, list(file)) == (0, 0, [])
    assert file.document_starts.tolist() == [0]


def test_ids_are_checked_over_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_edu.data.token_file.BLOCK", 4)
    file = write(tmp_path / "x", [[1] * 9, [99]], 100)
    file.check_vocab(100)
    with pytest.raises(ValueError, match=r"x\.bin, from token 8: token id 99 \(number 1\)"):
        file.check_vocab(99)


def test_ids_are_looked_at_once(tmp_path, monkeypatch):
    "What is known stays, in other processes too; a smaller vocabulary is another question."
    looked, real = [], token_file.check_token_ids
    spy = lambda *args: looked.append(1) or real(*args)  # noqa: E731
    monkeypatch.setattr(token_file, "check_token_ids", spy)
    write(tmp_path / "x", [[1] * 9, [99]], 100)
    file = TokenFile(tmp_path / "x")
    looked.clear()
    for size in (100, 100, 300):
        file.check_vocab(size)
    pickle.loads(pickle.dumps(file)).check_vocab(100)
    assert len(looked) == 1
    with pytest.raises(ValueError, match="token id 99"):
        file.check_vocab(99)
    file.check_vocab(100)
    TokenFile(tmp_path / "x").check_vocab(100)
    assert len(looked) == 3


def test_the_index_is_checked_block_by_block(small, monkeypatch):
    monkeypatch.setattr("megatron_edu.data.token_file.BLOCK", 2)
    assert TokenFile(small).num_tokens == 6
    spoil(small, "idx", lambda c: c[:42] + struct.pack("<i", 3) + c[46:])
    with pytest.raises(ValueError, match="cut short"):      # the last size: tokens are missing
        TokenFile(small)


def test_text_to_tokens_in_a_stream(tmp_path):
    tokenizer = train_tokenizer(["some words, some more words"], 280)
    text = "some words, " * 1000

    def documents():
        for _ in range(1000):
            yield text + "."

    tracemalloc.start()
    file = tokenize_to_file(documents(), tokenizer, tmp_path / "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(file) == 1000
    assert all(sequence[-1] == tokenizer.eod_id for sequence in file)
    assert tokenizer.decode(file[999][:-1].tolist()) == text + "."
    assert peak < 4_000_000


def test_no_documents_are_refused_and_leave_nothing(tmp_path):
    tokenizer = train_tokenizer(["text"], 260)
    with pytest.raises(ValueError, match="no documents to write"):
        tokenize_to_file([], tokenizer, tmp_path / "deep" / "x")
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_taken_name_is_refused_before_any_token(tmp_path, ending):
    (tmp_path / f"x.{ending}").write_text("mine")
    with pytest.raises(ValueError, match=f"x.{ending} is a file already"):
        TokenFileWriter(tmp_path / "x", 100)
