"Text files: bytes, encodings, lines."

import json

from fuzz.cases import TRAIN, Accepted, add, damage, refused

KIND = "text"
LINE = "prepare text.jsonl --vocab-size 300 --out out"
PLAIN = "prepare text.txt --vocab-size 300 --out out"
BERT = "prepare text.jsonl --model bert --vocab-size 200 --out out"


def lines_of(folder) -> list[str]:
    return (folder / "text.jsonl").read_text().splitlines()


def write(folder, lines, end="\n") -> None:
    (folder / "text.jsonl").write_bytes("".join(line + end for line in lines).encode())


def put_line(line: str | bytes):
    "Put one line somewhere between the others."

    def make(folder, chance):
        lines = [each.encode() for each in lines_of(folder)]
        lines.insert(
            chance.randrange(len(lines)), line if isinstance(line, bytes) else line.encode()
        )
        (folder / "text.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    return make


BAD_LINES = {
    "no JSON": "The cat sat.",
    "half an object": '{"text": "The ca',
    "a list": '["The cat sat."]',
    "a string": '"The cat sat."',
    "a number": "7",
    "null": "null",
    "no field": '{"body": "The cat sat."}',
    "null in the field": '{"text": null}',
    "a number in the field": '{"text": 3}',
    "a list in the field": '{"text": ["The cat sat."]}',
    "half a pair": '{"text": "The cat \\ud83d sat."}',
    "the other half": '{"text": "\\udc00"}',
    "many digits": '{"text": "a", "n": ' + "9" * 5000 + "}",
    "a deep list": '{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "two objects": '{"text": "a"} {"text": "b"}',
    "a comma": '{"text": "a",}',
    "single quotes": "{'text': 'a'}",
    "a zero": '{"text": "a\x00b"}',
}
for name, line in BAD_LINES.items():
    for verb, words in (("", LINE), (" for a BERT", BERT)):
        if verb and name not in ("half a pair", "many digits", "no field"):
            continue
        expected = refused(r"text\.jsonl", r"line \d+")
        add(KIND, f"a line with {name}{verb}", words, expected, put_line(line))
for name, line in {
    "a lone byte": b'{"text": "caf\xe9"}',
    "half a character": b'{"text": "\xe2\x82"}',
    "a byte that never occurs": b'{"text": "\xff"}',
    "a coded surrogate": b'{"text": "\xed\xa0\x80"}',
    "too long a code": b'{"text": "\xc0\xaf"}',
}.items():
    add(KIND, f"a line with {name}", LINE, refused(r"text\.jsonl", "UTF-8"), put_line(line))


@damage(KIND, PLAIN, refused(r"text\.txt", "UTF-8"), times=6)
def a_wrong_byte(folder, chance):
    path = folder / "text.txt"
    data = bytearray(path.read_bytes())
    data.insert(
        chance.randrange(len(data) + 1), chance.choice([0x80, 0xBF, 0xC0, 0xE9, 0xF8, 0xFF])
    )
    path.write_bytes(data)


@damage(KIND, PLAIN, refused(r"text\.txt", "UTF-8"), times=2)
def utf_16(folder, chance):
    path = folder / "text.txt"
    path.write_bytes(path.read_text().encode("utf-16"))


@damage(KIND, LINE, refused(r"text\.jsonl"), times=2)
def lines_in_utf_32(folder, chance):
    path = folder / "text.jsonl"
    path.write_bytes(path.read_text().encode(chance.choice(["utf-32", "utf-16-be"])))


# The same text in other clothes


@damage(KIND, LINE, Accepted("prepare"))
def blank_lines_between(folder, chance):
    write(
        folder,
        [more for line in lines_of(folder) for more in (line, chance.choice(["", "  ", "\t"]))],
    )


@damage(KIND, LINE, Accepted("prepare"))
def line_ends_of_windows(folder, chance):
    write(folder, lines_of(folder), "\r\n")


@damage(KIND, LINE, Accepted("prepare"))
def no_last_line_end(folder, chance):
    path = folder / "text.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))


@damage(KIND, LINE, Accepted("prepare"))
def a_mark_of_the_byte_order(folder, chance):
    path = folder / "text.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


@damage(KIND, LINE, Accepted("prepare"), times=3)
def more_fields(folder, chance):
    more = {"id": 7, "meta": {"text": [1, None]}, "n": 1e400, "deep": [[[[]]]]}
    texts = [json.loads(line)["text"] for line in lines_of(folder)]
    write(folder, [json.dumps(chance.choice([more, {}]) | {"text": text}) for text in texts])


@damage(KIND, f"{LINE} --text-field body", Accepted("prepare"))
def another_field(folder, chance):
    write(folder, [line.replace('"text"', '"body"') for line in lines_of(folder)])


@damage(KIND, LINE, Accepted("prepare"), times=2)
def lines_of_white_space_alone(folder, chance):
    put_line(json.dumps({"text": chance.choice(["", " ", "\n\n", "\u2003"])}))(folder, chance)


@damage(KIND, "prepare texts --vocab-size 300 --out out", Accepted("prepare"), needs=["text.jsonl"])
def a_folder_of_text(folder, chance):
    (folder / "texts/deeper").mkdir(parents=True)
    (folder / "text.jsonl").rename(folder / "texts/deeper/a.jsonl")
    (folder / "texts/readme.md").write_text("not read")


@damage(
    KIND,
    "prepare part1.jsonl part2.jsonl --vocab-size 300 --out out",
    Accepted("prepare"),
    needs=["text.jsonl"],
)
def two_files(folder, chance):
    lines, place = lines_of(folder), chance.randrange(1, 39)
    (folder / "part1.jsonl").write_text("\n".join(lines[:place]) + "\n")
    (folder / "part2.jsonl").write_text("\n".join(lines[place:]))


@damage(
    KIND, "prepare link.jsonl --vocab-size 300 --out out", Accepted("prepare"), needs=["text.jsonl"]
)
def a_link_to_it(folder, chance):
    (folder / "link.jsonl").symlink_to("text.jsonl")


# Nothing to read


for name, content in {"nothing": "", "spaces": "  \n \t\n", "a mark": "\ufeff"}.items():

    def make(folder, chance, content=content):
        (folder / "text.jsonl").write_text(content, encoding="utf-8")
        (folder / "text.txt").write_text(content, encoding="utf-8")

    add(KIND, f"{name} in lines", LINE, refused(r"text\.jsonl"), make)
    add(KIND, f"{name} in a file", PLAIN, refused(r"text\.txt"), make, ["text.jsonl"])
    add(KIND, f"{name} for a BERT", BERT, refused(r"text\.jsonl"), make)
add(KIND, "no such file", "prepare nowhere.txt --out out", refused(r"nowhere\.txt"))
add(
    KIND,
    "another ending",
    "prepare vocab.csv --out out",
    refused(r"vocab\.csv"),
    lambda folder, chance: (folder / "vocab.csv").write_text("a,b"),
)
add(
    KIND,
    "an empty folder",
    "prepare empty --out out",
    refused("empty"),
    lambda folder, chance: (folder / "empty").mkdir(),
)
add(
    KIND,
    "a link to nothing",
    "prepare link.txt --out out",
    refused(r"link\.txt"),
    lambda folder, chance: (folder / "link.txt").symlink_to("nowhere"),
)
add(
    KIND,
    "a folder named as a file",
    "prepare folder.txt --out out",
    refused(r"folder\.txt"),
    lambda folder, chance: (folder / "folder.txt").mkdir(),
)
add(
    KIND,
    "one document to train on",
    f"{TRAIN} --data one.txt",
    refused("one.txt|document"),
    lambda folder, chance: (folder / "one.txt").write_text("The cat sat on the mat. " * 50),
)
add(KIND, "text and a token file", f"{TRAIN} --data text.jsonl gpt2", refused("gpt2"))
