"The record of a text: the same is not read again, what differs is named, gone is no change."

import json
import os

import pytest

from megatron_edu.data import source
from megatron_edu.data.source import (
    describe_inputs,
    read_source,
    same_inputs,
    with_hashes,
    write_source,
)


@pytest.fixture
def book(tmp_path):
    "A folder of three files."
    (tmp_path / "book" / "part").mkdir(parents=True)
    for name, text in (("a.txt", "one"), ("b.jsonl", '{"text": "two"}'), ("part/c.txt", "three")):
        (tmp_path / "book" / name).write_text(text)
    return tmp_path / "book"


@pytest.fixture
def recorded(book):
    return with_hashes(describe_inputs(book))


def test_what_is_recorded(book, recorded):
    assert [entry["path"].split("book/")[1] for entry in recorded] == [
        "a.txt",
        "b.jsonl",
        "part/c.txt",
    ]
    assert [entry["size"] for entry in recorded] == [3, 15, 5]
    stat = (book / "a.txt").stat()
    assert recorded[0]["mtime_ns"] == stat.st_mtime_ns and len(recorded[0]["sha256"]) == 64


def test_an_untouched_text_is_not_read(book, recorded, monkeypatch):
    monkeypatch.setattr(source, "sha256", None)
    assert not same_inputs(recorded, book)
    monkeypatch.chdir(book)
    assert not same_inputs(recorded, ".") and not same_inputs(
        recorded, ["a.txt", "b.jsonl", "part"]
    )


def touched(book):
    os.utime(book / "a.txt")
    return book


def moved(book):
    return book.rename(book.with_name("elsewhere"))


def renamed(book):
    (book / "part" / "c.txt").rename(book / "z.txt")
    return book


def copied(book):
    (book.parent / "copy.txt").write_bytes((book / "a.txt").read_bytes())
    return [book.parent / "copy.txt", book / "b.jsonl", book / "part"]


@pytest.mark.parametrize("change", [touched, moved, renamed, copied])
def test_the_same_text_under_another_name_or_time_is_the_same(book, recorded, change):
    assert not same_inputs(recorded, change(book))


def rewritten(book):
    stat = (book / "a.txt").stat()
    (book / "a.txt").write_text("ONE")
    os.utime(book / "a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    return book, ["a.txt: not the text"]


def grown(book):
    stat = (book / "part" / "c.txt").stat()
    with (book / "part" / "c.txt").open("a") as stream:
        stream.write("!")
    os.utime(book / "part" / "c.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return book, ["c.txt: not the text"]


def one_more(book):
    (book / "z.txt").write_text("four")
    return book, ["z.txt: the tokens were not made of it"]


def one_less(book):
    return [book / "a.txt", book / "b.jsonl"], ["c.txt: the tokens were made of it, and it is not"]


def another_order(book):
    order = [book / "b.jsonl", book / "a.txt", book / "part"]
    return order, ["b.jsonl: not the text", "a.txt: not the text"]


def another_of_that_size_and_time(book):
    stat = (book / "a.txt").stat()
    (book / "z.txt").write_text("ONE")
    os.utime(book / "z.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return [book / "z.txt", book / "b.jsonl", book / "part"], ["z.txt: not the text"]


def no_such_path(book):
    paths = [book / "a.txt", book / "b.jsonl", book / "absent.txt"]
    return paths, ["absent.txt: no such path, and", "c.txt: the tokens were made of it"]


@pytest.mark.parametrize(
    "change",
    [
        rewritten,
        grown,
        one_more,
        one_less,
        another_order,
        another_of_that_size_and_time,
        no_such_path,
    ],
)
def test_another_text_is_named(book, recorded, change):
    paths, words = change(book)
    differences = same_inputs(recorded, paths)
    assert not differences.gone and len(differences.changed) == len(words)
    assert all(word in line for word, line in zip(words, differences.changed, strict=True))


def test_a_text_that_is_gone_is_no_other_text(book, recorded):
    (book / "b.jsonl").unlink()
    one = same_inputs(recorded, book)
    assert [line.split("/")[-1].split(":")[0] for line in one.gone] == ["b.jsonl"]
    assert not one.changed
    moved(book)
    every = same_inputs(recorded, [book / "a.txt", book / "b.jsonl", book / "part"])
    assert len(every.gone) == 3 and not every.changed
    assert every == same_inputs(recorded, book)


def test_a_text_may_be_gone_and_changed(book, recorded):
    (book / "a.txt").unlink()
    (book / "part" / "c.txt").write_text("other")
    differences = same_inputs(recorded, book)
    assert len(differences.gone) == 1 and len(differences.changed) == 1


def test_a_file_written_to_while_it_is_read_is_refused(book):
    described = describe_inputs(book)
    grown(book)
    with pytest.raises(ValueError, match=r"c\.txt: written to while it was read"):
        with_hashes(described)


def test_the_record_comes_back(book, recorded):
    assert read_source(book) is None
    write_source(book, {"inputs": recorded, "text_field": "body"})
    assert read_source(book) == {"inputs": recorded, "text_field": "body"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"inputs": 3}',
        '{"inputs": [{"path": "a"}]}',
        json.dumps({"inputs": [{"path": "a", "size": True, "mtime_ns": 1, "sha256": ""}]}),
        "[" * 100_000,
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
def test_a_damaged_record_is_named(book, text):
    (book / "source.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"source\.json: not a record"):
        read_source(book)
