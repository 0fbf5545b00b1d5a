"What a case is, the clean inputs that all cases begin with, and tools to damage a file."

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SEED = 20261128  # of all cases: the same ones in every run

SIZES = "--num-layers 1 --hidden-size 16 --num-heads 2 --max-seq-len 16 --dropout 0"
FEW = "--vocab-multiple 4 --batch-size 2 --eval-batches 1 --save-every 1 --steps 2"
TRAIN = f"train --preset tiny {SIZES} {FEW} --out out"
TRAIN_BERT = TRAIN.replace("tiny", "bert-tiny").replace("-len 16", "-len 32")
RESUME = f"{TRAIN} --data gpt2 --steps 4 --resume auto --out run"
GENERATE = "generate run --tokens 8 --prompt the --temperature 0"
READ = "convert --format megatron_edu --to out --from"
WRITE = "convert --format huggingface --to out --from"

CLEAN = {  # lines that go well, whose results are those of accepted cases
    "prepare": "prepare text.jsonl --vocab-size 300 --out out",
    "prepare bert": "prepare text.jsonl --model bert --vocab-size 200 --out out",
    "prepare lower": "prepare lower.jsonl --tokenizer gpt2/tokenizer.json --out out",
    "prepare words": "prepare words.jsonl --tokenizer no_bytes.json --out out",
    "train": f"{TRAIN} --data gpt2",
    "train bert": f"{TRAIN_BERT} --data bert",
    "resume": RESUME,
    "resume earlier": RESUME.replace("--out run", "--out earlier"),
    "generate": GENERATE,
    "generate at random": "generate run --tokens 8 --prompt the --seed 3",
    "read": f"{READ} huggingface",
    "read bert": f"{READ} huggingface_bert",
    "write": f"{WRITE} run",
}


@dataclass(frozen=True)
class Refused:
    "Exit status 2, one line with all of these regular expressions in it, no file changed."

    naming: tuple[str, ...]


@dataclass(frozen=True)
class Accepted:
    "Exit status 0 with the result of a clean line."

    like: str
    saying: str = ""  # a regular expression: what is remarked beside it


@dataclass(frozen=True)
class Case:
    kind: str
    name: str
    line: tuple[str, ...]  # words of the command
    expected: Refused | Accepted
    make: Callable[[Path, random.Random], None]  # changes the clean input in a folder
    needs: tuple[str, ...]  # what else of the clean input is copied there

    @property
    def chance(self) -> random.Random:
        return random.Random(f"{SEED} {self.kind} {self.name}")


CASES: dict[str, Case] = {}


def refused(*naming: str) -> Refused:
    return Refused(naming)


def add(kind, name, line, expected, make=lambda folder, chance: None, needs=()) -> None:
    "Register a case."
    words = tuple(line.split()) if isinstance(line, str) else tuple(line)
    full = f"{kind}: {name}"
    assert full not in CASES, full
    CASES[full] = Case(kind, name, words, expected, make, tuple(needs))


def damage(kind: str, line, expected, times: int = 1, needs=()):
    "A decorator: cases made by one function of a folder and a chance."

    def register(make):
        for number in range(times):
            more = f" {number + 1}" if times > 1 else ""
            add(kind, make.__name__.replace("_", " ") + more, line, expected, make, needs)
        return make

    return register


# Tools


def flip(path: Path, start: int, stop: int, chance: random.Random) -> None:
    "Change one byte of a place in a file."
    data = bytearray(path.read_bytes())
    place = chance.randrange(start, stop)
    data[place] ^= chance.randrange(1, 256)
    path.write_bytes(data)


def put(path: Path, place: int, form: str, value: int) -> None:
    "Write one number into a file."
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, place, value)
    path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    "Cut a file short, anywhere."
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])


def extend(path: Path, chance: random.Random) -> None:
    "Some bytes more at the end."
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randrange(1, 40)))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    "Change what a JSON file holds; what `change` returns, if not None, takes its place."
    content = json.loads(path.read_text(encoding="utf-8"))
    other = change(content)
    path.write_text(json.dumps(content if other is None else other), encoding="utf-8")


def read_tensors(path: Path) -> tuple[dict, bytes]:
    "The header and the data of a safetensors file."
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_tensors(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    "Type, shape and bytes of each tensor of a safetensors file."
    header, data = read_tensors(path)
    found = {name: each for name, each in header.items() if name != "__metadata__"}
    return {
        name: (each["dtype"], each["shape"], data[slice(*each["data_offsets"])])
        for name, each in found.items()
    }


def save_tensors(path: Path, content: dict[str, tuple[str, list[int], bytes]]) -> None:
    "The other way round."
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, raw) in content.items():
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": place}
        data += raw
    write_tensors(path, header, data)


NOT_JSON = {  # contents that are no JSON object
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"123",
    "word": b"hello",
    "zeros": bytes(64),
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "many digits": b"9" * 5000,
    "latin-1": '{"caf\u00e9": 1}'.encode("latin-1"),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "half": b'{"a": 1,',
}


def replace_by(content: bytes, *path: str):
    "Give a file another content."

    def make(folder: Path, chance: random.Random) -> None:
        folder.joinpath(*path).write_bytes(content)

    return make
