"`megatron-edu generate`: text as it comes is the text at the end; a prompt from standard input."

import io
import sys

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from megatron_edu.cli.generate import Speech, read_prompt
from megatron_edu.data.tokenizer import EOD, Tokenizer, train_tokenizer

BYTES = train_tokenizer(["a"], 257)  # a token a byte
PAIRS = train_tokenizer(["the cat sat, \N{SNOWMAN} said the cat " * 20], 300)


def spoken(tokenizer, prompt, ids, capsys):
    "What stands on standard output after the prompt, after each token, and at the end."
    speech, parts = Speech(tokenizer, prompt), []
    parts.append(capsys.readouterr().out)
    for token in ids:
        speech(torch.tensor([token]))
        parts.append(parts[-1] + capsys.readouterr().out)
    speech.end()
    return [*parts, parts[-1] + capsys.readouterr().out]


TEXTS = (
    "plain",
    "café",
    "\N{SNOWMAN}\N{GRINNING FACE}",
    "mixed \N{GRINNING FACE}, and then",
    "\ttab \n\n",
    EOD + "x",
)


@pytest.mark.parametrize("tokenizer", [BYTES, PAIRS])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_whole_letters_come_as_soon_as_they_are_whole(capsys, tokenizer, text, cut):
    ids = tokenizer.encode(text)
    parts = spoken(tokenizer, ids[:cut], ids[cut:], capsys)
    assert parts[-1] == text + "\n"
    for n, part in enumerate(parts[:-1]):
        assert part == tokenizer.decode(ids[: cut + n]).rstrip("\ufffd")


@pytest.mark.parametrize(
    "ids",
    [
        [256, 0xE2, 0x82],
        [0xF0, 0x9F, 0x98],
        [65, 0xFF, 0xFE, 66],
        [0xE2, 65],
        [0xC3],
        [0xC3, 0xC3, 0xA9],
    ],
)
def test_bytes_that_never_become_a_letter(capsys, ids):
    order = {b: BYTES.core.token_to_id(c) for b, c in byte_letters().items()} | {256: BYTES.eod_id}
    ids = [order[i] for i in ids]
    parts = spoken(BYTES, ids[:1], ids[1:], capsys)
    assert parts[-1] == BYTES.decode(ids) + "\n"
    assert all(parts[-1].startswith(part) and not part.endswith("\ufffd") for part in parts[:-1])


def byte_letters():
    "The letter that stands for each byte in a byte-level vocabulary."
    frame = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    assert set(frame.alphabet()) == {chr(b) for b in plain} | {
        chr(256 + n) for n in range(len(others))
    }
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(others)}


def of_words(decoder):
    core = tokenizers.Tokenizer(
        models.WordLevel({"a": 0, "b": 1, "##c": 2, ".": 3, EOD: 4, "▁d": 5}, "a")
    )
    core.decoder = decoder
    return Tokenizer(core)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Metaspace(),
        decoders.BPEDecoder("b"),
        decoders.Strip(" ", 1, 0),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("b.", "!")]),
    ],
    ids=lambda decoder: type(decoder).__name__,
)
def test_any_decoder_says_the_same_at_the_end(capsys, decoder):
    tokenizer, ids = of_words(decoder), [0, 1, 3, 2, 5, 0, 1]
    said = spoken(tokenizer, ids[:1], ids[1:], capsys)[-1]
    assert said.endswith(tokenizer.decode(ids) + "\n")


class Input:
    def __init__(self, data):
        self.buffer = io.BytesIO(data)


@pytest.mark.parametrize(
    "data, text",
    [
        (b"Once", "Once"),
        (b"Once\n", "Once"),
        (b"Once\n\n", "Once\n"),
        (b"a\r\nb\r\n", "a\nb"),
        (b"", ""),
        ("\ufeffé\n".encode(), "é"),
    ],
)
def test_standard_input_is_the_prompt(monkeypatch, data, text):
    monkeypatch.setattr(sys, "stdin", Input(data))
    assert read_prompt("-") == text and read_prompt("- ") == "- " and read_prompt("") == ""


@pytest.mark.parametrize(
    "stdin, variables, words",
    [
        (Input(b"a\xffb"), {}, "byte 0xff at 1 of standard input is not UTF-8"),
        (Input("é".encode("utf-16")), {}, "is not UTF-8"),
        (None, {}, "standard input is closed"),
        (Input(b"a"), {"RANK": "0", "WORLD_SIZE": "2"}, "ranks of torchrun have no input"),
    ],
)
def test_standard_input_that_is_no_prompt(monkeypatch, stdin, variables, words):
    monkeypatch.setattr(sys, "stdin", stdin)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        read_prompt("-")
