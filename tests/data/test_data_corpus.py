"Text sources: nothing lost, nothing held, and a bad line or byte stops the stream with its place."

import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import subprocess
import sys
import tracemalloc
from itertools import islice

import pytest

from megatron_edu.data.corpus import cut_text, docstrings, embedded_corpus, read_documents


def first_cut(text: str, max_chars: int) -> int:
    "Where the rules of `cut_text` end the first document, said anew."
    window = text[:max_chars]
    if len(window) < max_chars:
        return len(window)
    for mark in ("\n\n", "\n", " "):
        if mark in window:
            return window.rindex(mark) + len(mark)
    return max_chars


def random_text(chance: random.Random, length: int) -> str:
    return "".join(chance.choice("ab \n\n\né漢") for _ in range(length))


@pytest.mark.parametrize("seed", range(60))
def test_cuts_follow_the_rules_and_lose_nothing(seed):
    chance = random.Random(seed)
    text = random_text(chance, chance.randrange(300))
    max_chars = chance.randrange(1, 40)
    documents = list(cut_text(io.StringIO(text, newline=""), max_chars))
    assert "".join(documents) == text
    rest = text
    for document in documents:
        assert len(document) == first_cut(rest, max_chars)
        rest = rest[len(document) :]


@pytest.mark.parametrize("line", ["word " * 20 + "\n\n", "x" * 100], ids=["prose", "no space"])
def test_a_huge_file_is_streamed(tmp_path, line):
    path = tmp_path / "huge.txt"
    with path.open("w") as stream:
        for _ in range(32):
            stream.write(line * 10_000)
    size = path.stat().st_size
    assert size > 30_000_000
    tracemalloc.start()
    total = sum(len(document) for document in read_documents(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == size
    assert peak < 500_000


def test_the_embedded_corpus_is_the_same_in_each_process_and_imports_nothing_that_it_reads():
    documents = list(embedded_corpus())
    assert len(documents) > 500 and sum(map(len, documents)) > 1_500_000
    assert any("Command-line parsing library" in text for text in documents)
    assert all(text.strip() for text in documents)
    program = (
        "import hashlib, sys; from megatron_edu.data.corpus import embedded_corpus;"
        "before = set(sys.modules); text = '|'.join(embedded_corpus());"
        "print(hashlib.sha256(text.encode()).hexdigest(), *set(sys.modules) - before)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    digest, *imported = result.stdout.split()
    assert digest == hashlib.sha256("|".join(documents).encode()).hexdigest(), result.stderr
    assert len(imported) < 30           # `ast.get_docstring` itself imports `inspect`
    assert not {"this", "antigravity", "argparse", "turtle", "xml", "asyncio"} & set(imported)


def test_docstrings_are_found_at_every_level_without_running_the_module():
    source = b'"top"\nraise SystemExit\nclass A:\n "in"\n async def f(self):\n  "deep"\nx = "no"'
    assert docstrings(source) == ["top", "in", "deep"]


def test_files_and_folders_in_sorted_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("two")
    (tmp_path / "b" / "1.jsonl").write_text('{"text": "one"}\n\n{"text": "one more"}\n')
    (tmp_path / "b" / "notes.md").write_text("not read")
    (tmp_path / "a.txt").write_text("zero")
    assert list(read_documents(tmp_path)) == ["zero", "one", "one more", "two"]
    assert list(read_documents(str(tmp_path / "a.txt"))) == ["zero"]
    assert list(read_documents([tmp_path / "b" / "2.txt", tmp_path / "a.txt"])) == ["two", "zero"]


def test_line_ends_and_the_byte_order_mark_are_taken_off(tmp_path):
    (tmp_path / "w.txt").write_bytes("\ufeffone\r\n\r\ntwo é".encode())
    assert list(read_documents(tmp_path)) == ["one\n\ntwo é"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": "cut', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["text"]', "no string in field 'text' (found: list)"),
        ('{"body": "x", "id": 1}', "no string in field 'text' (found: ['body', 'id'])"),
        ('{"body": "x"}', "name the right field with text_field= (--text-field)"),
        ('{"text": 3}', "no string in field 'text'"),
        (r'{"text": "\ud83d"}', "half a surrogate pair"),
        ('{"text": "x", "n": ' + "9" * 5000 + "}", "is not JSON (Exceeds the limit"),
        ('{"text": "x"' + ', "n": [' * 50_000, "is not JSON"),
        ('{"text": "x", "text": "y"}', "is not JSON (field 'text' stands there twice)"),
        ('{"text": "x"} {"text": "y"}', "is not JSON (Extra data"),
        ('{"a": 1, ' + ", ".join(f'"k{k}": 1' for k in range(9999)) + "}", "no string in field"),
        ('{"text": null}', "no string in field 'text'"),
        (f'{{"{"k" * 9999}": 1}}', "no string in field 'text' (found: ['kkk"),
        ("{}", "no string in field 'text' (found: dict)"),
        ("NaN", "no string in field 'text' (found: float)"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, found):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    stream = read_documents(path)
    assert next(stream) == "fine"
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3")) as error:
        next(stream)
    assert found in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "more", ['"n": 1e999', '"n": -Infinity', '"n": {"x": 1, "x": 2}', '"n": 7e-9']
)
def test_other_fields_may_hold_anything(tmp_path, more):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one", {more}}}')
    assert list(read_documents(tmp_path)) == ["one"]


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"words": "🙂"}))
    assert list(read_documents(tmp_path, text_field="words")) == ["🙂"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_no_text_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=rf"{name}, line 1: byte 0xe9 is not UTF-8.*convert"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"ab\ncd\n\nne\xff", "line 4: byte 0xff is not UTF-8"),
        ("é\n".encode() * 600_000 + b"\xc3", "line 600001: byte 0xc3 is not UTF-8 (unexpected end"),
        (
            "one two\n".encode("utf-16"),
            "line 1: byte 0xff is not UTF-8 .* it is UTF-16; convert it",
        ),
        ("one two".encode("utf-16-be"), "line 1: a byte of zero.* is it UTF-16"),
        (b"one\n\n" + b"two\n" * 9000 + b"a\0b", "line 9003: a byte of zero"),
        (
            gzip.compress(b"one two", mtime=0),
            "line 1: byte 0x8b is not UTF-8 .* compressed; unpack it with gun",
        ),
        (b"PK\x03\x04\x14\0\0\0", "line 1: a byte of zero.* a zip archive; unpack it"),
        (lzma.compress(b"one two"), "line 1: byte 0xfd is not UTF-8 .* unpack it with unxz"),
    ],
)
def test_a_file_that_is_no_text_is_named_with_line_and_remedy(tmp_path, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace("a.txt", r"a\.txt")):
        list(read_documents(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", "no such path"),
        ("empty", "folder without text"),
        ("table.csv", "file that is not read"),
        ("pipe.txt", "a pipe or a device, not a file"),
        ("pipes", r"inside\.jsonl: a pipe or a device"),
        ("nowhere.txt", "a link to nothing"),
        ("itself.txt", "a link to nothing"),
        ("links", r"dead\.txt: a link to nothing"),
    ],
)
def test_a_path_without_text_is_refused_at_the_call(tmp_path, name, message):
    for folder in ("empty", "pipes", "links"):
        (tmp_path / folder).mkdir()
    (tmp_path / "table.csv").write_text("1,2")
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / "pipes" / "inside.jsonl")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "absent.txt")
    (tmp_path / "itself.txt").symlink_to(tmp_path / "itself.txt")
    (tmp_path / "links" / "dead.txt").symlink_to(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_links_are_followed_and_loops_are_not(tmp_path):
    (tmp_path / "a" / "b.txt").mkdir(parents=True)
    (tmp_path / "a" / "b.txt" / "1.TXT").write_text("one")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "2.txt").write_text("two")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "z").symlink_to(tmp_path / "other")
    assert list(read_documents(tmp_path / "a")) == ["one", "two"]


def test_documents_know_their_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n" * 9000)
    (tmp_path / "b.jsonl").write_text('\n{"text": "x"}\n\n{"text": "y"}\n')
    places = [(document.path[-7:], document.line) for document in read_documents(tmp_path)]
    assert [line for path, line in places if path.endswith("a.txt")] == [1, 4097, 8193]
    assert [line for path, line in places if path.endswith("b.jsonl")] == [2, 4]


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n\t\n")
    (tmp_path / "b.jsonl").write_text('\n{"text": " "}\n')
    with pytest.raises(ValueError, match=r"a\.txt.*b\.jsonl.*empty corpus.*other files"):
        list(read_documents(tmp_path))
    with pytest.raises(ValueError, match="empty corpus"):
        list(read_documents([]))


def test_novels_come_back_whole(data_folder):
    for path in sorted((data_folder / "novels").iterdir()):
        documents = list(read_documents(path))
        assert "".join(documents) == path.read_text(encoding="utf-8")
        assert all(document.endswith("\n") for document in documents[:-1])


def test_a_stream_is_lazy(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nspoiled\n')
    assert list(islice(read_documents(tmp_path), 2)) == ["one", "two"]
