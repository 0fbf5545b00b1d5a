"Sentences: found in any layout, none of the text lost, and kept in the token file."

import random
import subprocess
import sys
import textwrap
import tracemalloc
from itertools import islice

import numpy as np
import pytest
from bert_data_cases import numbered_wordpiece
from text_cases import any_unicode, word_soup

import megatron_edu.data.sentences as sentences_module
from megatron_edu.data.corpus import MAX_CHARS, embedded_corpus, read_documents
from megatron_edu.data.sentences import sentences, sentences_to_file
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.wordpiece import WordPiece, load_wordpiece, train_wordpiece


@pytest.fixture(scope="module")
def wordpiece() -> WordPiece:
    return train_wordpiece(islice(embedded_corpus(), 79), 1000)


def visible(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. Smith paid 3.50 to Dr. Jones. He left.",
         ["Mr. Smith paid 3.50 to Dr. Jones.", "He left."]),
        ('"Go on. Now." She went.', ['"Go on. Now."', "She went."]),
        ("A heading\n\nA paragraph of\ntwo lines. And more.",
         ["A heading", "A paragraph of\ntwo lines.", "And more."]),
        ("One paragraph.\nAnother one.\n", ["One paragraph.", "Another one."]),
        ("It was kind of Mr.\nSmith to come. He left.",
         ["It was kind of Mr.\nSmith to come.", "He left."]),
        ("He cried.\r\nYes.\r\n\r\nNo.", ["He cried.", "Yes.", "No."]),
        ("He said, 'I go.\"\nShe stayed. We ate.\nThey said, 'No.' We slept.",
         ["He said, 'I go.\"", "She stayed.", "We ate.", "They said, 'No.'", "We slept."]),
        ("He said, 'I go.\"\r\nShe stayed.\r\nThey said, 'No.' We slept.",
         ["He said, 'I go.\"", "She stayed.", "They said, 'No.'", "We slept."]),
        ('go on."\n"No," he said. They left.', ['go on."', '"No," he said.', "They left."]),
        ("(She left. They stayed.)\nIt rained. (We ate.)\nWe slept.",
         ["(She left. They stayed.)", "It rained.", "(We ate.)", "We slept."]),
        ("A heading\n \nA paragraph. And", ["A heading", "A paragraph.", "And"]),
        ("So did Capt. Fox, Messrs. Ox and Mr. Smith. Yes.",
         ["So did Capt. Fox, Messrs. Ox and Mr. Smith.", "Yes."]),
        (" \n\n \t\n", []),
        ("", []),
    ],
)
def test_sentences_are_found(text, expected):
    assert list(sentences(text)) == expected


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("make", [any_unicode, word_soup])
def test_nothing_but_spaces_is_lost(make, seed):
    text = make(seed) + '. "A quotation'.join(make(seed + 1000).split("word"))
    found = list(sentences(text))
    assert visible("".join(found)) == visible(text)
    assert all(sentence and sentence == sentence.strip() for sentence in found)


def story(seed: int, count: int) -> list[str]:
    "Sentences that no rule could mistake."
    chance = random.Random(seed)
    words = ["river", "stone", "of", "and", "the", "light", "went", "slowly", "home", "again"]
    lengths = [chance.randrange(3, 40) for _ in range(count)]
    return [" ".join(chance.choices(words, k=n)).capitalize() + "." for n in lengths]


@pytest.mark.parametrize("width", [30, 72, 10**9])
@pytest.mark.parametrize("per_paragraph", [1, 5, 10**9])
def test_the_layout_changes_no_sentence(width, per_paragraph):
    known = story(1, 80)
    for between in ("\n", "\n\n"):
        blocks = [known[k : k + per_paragraph] for k in range(0, len(known), per_paragraph)]
        text = between.join(textwrap.fill(" ".join(block), width) for block in blocks)
        assert [" ".join(found.split()) for found in sentences(text)] == known


OFFLINE = """
import os, resource, socket

class Refused(socket.socket):
    def __init__(self, *args, **kwargs):
        raise OSError("no network here")

socket.socket = Refused
from megatron_edu.data.sentences import sentences

# The library is compiled and would not ask Python for a socket: from here on nobody opens anything.
resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    os.pipe()
except OSError:
    print(list(sentences("Mr. Smith paid 3.50 to Dr. Jones.\\nHe left. We ate.")))
"""


def test_sentences_need_no_network():
    "Neither when the library is imported, nor when it reads: no model is fetched, no file opened."
    command = [sys.executable, "-c", OFFLINE]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    expected = ["Mr. Smith paid 3.50 to Dr. Jones.", "He left.", "We ate."]
    assert done.stdout == f"{expected}\n"


def test_a_cut_document_spoils_one_sentence_a_cut(tmp_path):
    known = story(2, 2000)
    (tmp_path / "a.txt").write_text(textwrap.fill(" ".join(known), 72))
    documents = list(read_documents(tmp_path))
    assert len(documents) > 10
    found = [" ".join(each.split()) for text in documents for each in sentences(text)]
    assert len(set(known) - set(found)) <= len(documents) - 1
    assert len(found) <= len(known) + len(documents) - 1
    assert all(len(list(sentences(text))) > 50 for text in documents)


@pytest.mark.parametrize("unit", ["word ", "word\n", "x", 'He said "no. ', "Mr. ", "(a. B ", ".\n"])
def test_the_library_reads_pieces_of_bounded_length_and_each_character_a_few_times(
    unit, monkeypatch
):
    "What takes time is the library: on long texts it may be in proportion to the text alone."
    text = unit * (200_000 // len(unit))
    read = []

    def segments(piece: str) -> list[str]:
        read.append(len(piece))
        return library(piece)

    library = sentences_module.segments
    monkeypatch.setattr(sentences_module, "segments", segments)
    found = list(sentences(text))
    assert max(read) <= MAX_CHARS and sum(read) < 4 * len(text)
    assert max(map(len, found)) <= MAX_CHARS
    assert visible("".join(found)) == visible(text)


def test_the_file_holds_one_sequence_a_sentence(wordpiece, tmp_path):
    documents = ["One value. Two values.", "A function.\n\nIt returns. Nothing else.", "Alone"]
    file = sentences_to_file(iter(documents), wordpiece, tmp_path / "x")
    assert file.document_offsets.tolist() == [0, 2, 5, 6]
    expected = [wordpiece.encode(each) for text in documents for each in sentences(text)]
    assert [sequence.tolist() for sequence in file] == expected
    assert not np.isin(file.read(0, file.num_tokens), wordpiece.special_ids).any()
    assert file.dtype == np.uint16


def test_ids_of_a_large_vocabulary_are_kept(tmp_path):
    "Above 65,535, where two bytes end."
    file = sentences_to_file(["w6 w69999. "], numbered_wordpiece(70_000), tmp_path / "x")
    assert file[0].tolist()[:2] == [6, 69_999]


def test_what_has_no_token_is_left_out(wordpiece, tmp_path):
    documents = ["\u200f", "A value.", " \n ", "One. \x00\x01\n\n\u200f\n\nTwo."]
    file = sentences_to_file(documents, wordpiece, tmp_path / "x")
    assert file.document_offsets.tolist() == [0, 1, 3] and file.sizes.all()


def test_an_empty_corpus_leaves_nothing(wordpiece, tmp_path):
    with pytest.raises(ValueError, match="no sentences to write.*add text"):
        sentences_to_file(["", "\u200f"], wordpiece, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_documents_are_read_in_a_stream(wordpiece, tmp_path):
    def peak(count: int) -> int:
        tracemalloc.start()
        sentences_to_file((f"{i} {text}" for i in range(count)), wordpiece, tmp_path / f"{count}")
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return memory

    text = "A value is returned by the function. " * 100
    assert peak(100) < 1.3 * peak(10)


def test_sentences_of_novels(data_folder, tmp_path):
    wordpiece = load_wordpiece(data_folder / "tokenizers")
    names = [
        "kipling_kim_1901",
        "dickens_oliver_1839",
        "burnett_garden_1911",
        "conrad_nostromo_1904",
    ]
    folder = data_folder / "novels"
    documents = list(read_documents([folder / f"{name}.txt" for name in names]))
    found = [list(sentences(text)) for text in documents]
    assert all(visible("".join(each)) == visible(text) for each, text in zip(found, documents))
    assert min(map(len, found)) > 10
    file = sentences_to_file(documents, wordpiece, tmp_path / "x")
    assert len(TokenFile(tmp_path / "x")) == sum(map(len, found))
    assert 20 < file.sizes.mean() < 45
    assert file.sizes[file.sizes > 125].sum() < 0.1 * file.num_tokens
    flat = [each for some in found for each in some]
    assert sum(each.endswith(("Mr.", "Mrs.", "Dr.", "St.")) for each in flat) < 0.001 * len(flat)
    assert sum(each[0].islower() for each in flat) < 0.03 * len(flat)
