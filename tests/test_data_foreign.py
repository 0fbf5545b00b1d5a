"Tokenizers of other programs: what they store is dropped, what is no tokenizer is refused in words."

import json
import os
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import models

from megatron_edu.data.tokenizer import Codec, Tokenizer, load_tokenizer, train_tokenizer
from megatron_edu.data.wordpiece import SPECIAL, WordPiece, load_wordpiece, train_wordpiece
from megatron_edu.prepare import prepare, read_tokenizer

TEXT = "the cat sat on the mat and the dog ran to the barn of the old man. " * 4


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer([TEXT], 300)


@pytest.fixture(scope="module")
def wordpiece() -> WordPiece:
    return train_wordpiece([TEXT], 60)


LOADERS = {"bpe": load_tokenizer, "wordpiece": load_wordpiece}


def stored(tokenizer, path, change):
    "A tokenizer.json with more in it than a tokenizer."
    core = tokenizers.Tokenizer.from_str(tokenizer.core.to_str())
    change(core)
    core.save(str(path))
    return path


STATE = {
    "truncation": (lambda core: core.enable_truncation(6), "truncation to 6 tokens;"),
    "truncation to nothing": (lambda core: core.enable_truncation(0), "truncation to 0 tokens;"),
    "padding": (lambda core: core.enable_padding(length=90), "padding to 90 tokens;"),
    "padding to the longest": (
        lambda core: core.enable_padding(pad_to_multiple_of=64),
        "padding to the longest text;",
    ),
    "both": (
        lambda core: (core.enable_truncation(6, direction="left"), core.enable_padding(length=90)),
        "truncation to 6 tokens and padding to 90 tokens;",
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("state", STATE)
def test_stored_lengths_are_dropped_in_one_line(kind, state, request, tmp_path):
    clean = request.getfixturevalue(kind)
    change, words = STATE[state]
    path = stored(clean, tmp_path / "tok.json", change)
    with pytest.warns(UserWarning) as notes:
        loaded = LOADERS[kind](path)
    assert len(notes) == 1 and f"tok.json: stores {words} dropped" in str(notes[0].message)
    for text in (TEXT, "the cat", TEXT * 40):
        assert loaded.encode(text) == clean.encode(text)


def test_a_stored_dropout_is_dropped(bpe, tmp_path):
    path = stored(bpe, tmp_path / "tok.json", lambda core: setattr(core.model, "dropout", 0.5))
    with pytest.warns(UserWarning, match=r"stores a dropout of 0.5 of its merges; dropped"):
        loaded = load_tokenizer(path)
    assert all(loaded.encode(TEXT) == bpe.encode(TEXT) for _ in range(5))


@pytest.mark.parametrize(("kind", "model"), [("bpe", "gpt2"), ("wordpiece", "bert")])
@pytest.mark.parametrize("state", ["both", "padding"])
def test_prepared_tokens_are_those_of_the_clean_tokenizer(kind, model, state, request, tmp_path):
    clean = request.getfixturevalue(kind)
    clean.save(tmp_path / "clean.json")
    path = stored(clean, tmp_path / "tok.json", STATE[state][0])
    (tmp_path / "a.txt").write_text(TEXT)
    prepare((tmp_path / "a.txt",), tmp_path / "a", tmp_path / "clean.json", model=model)
    with pytest.warns(UserWarning, match="dropped"):
        prepare((tmp_path / "a.txt",), tmp_path / "b", path, model=model)
    for name in ("tokens.bin", "tokens.idx", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", LOADERS)
def test_a_clean_tokenizer_is_read_without_a_word(kind, request, tmp_path):
    request.getfixturevalue(kind).save(tmp_path / "tok.json")
    LOADERS[kind](tmp_path / "tok.json")


def test_a_post_processor_adds_nothing(bpe, tmp_path):
    def framed(core):
        special = [("<|endoftext|>", 0)]
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|endoftext|> $A <|endoftext|>", special_tokens=special
        )

    loaded = load_tokenizer(stored(bpe, tmp_path / "tok.json", framed))
    assert loaded.encode(TEXT) == bpe.encode(TEXT)


# ------------------------------------------------------------------------------ what is no tokenizer


def changed(tokenizer, path, change) -> None:
    record = json.loads(tokenizer.core.to_str())
    change(record)
    path.write_text(json.dumps(record))


BAD = {
    "an id of 2^31": (lambda d: d["model"]["vocab"].update(zz=2**31), "ids up to 2147483648"),
    "an id of 2^32": (lambda d: d["model"]["vocab"].update(zz=2**32), "not a tokenizer"),
    "an id of 200,000": (lambda d: d["model"]["vocab"].update(zz=200_000), "up to 200000; a model"),
    "a negative id": (lambda d: d["model"]["vocab"].update(zz=-1), "not a tokenizer"),
    "an id that is text": (lambda d: d["model"]["vocab"].update(zz="1"), "not a tokenizer"),
    "no vocabulary": (
        lambda d: (d["model"].update(vocab={}, merges=[]), d.update(added_tokens=[])),
        "a vocabulary of 0 tokens",
    ),
    "a merge of nothing": (lambda d: d["model"].update(merges=[["q", "zz"]]), "not a tokenizer"),
    "a dropout of 2": (lambda d: d["model"].update(dropout=2.0), "not a tokenizer"),
    "a normalizer that panics when read": (
        lambda d: d.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "not a tokenizer",
    ),
    "a pre-tokenizer that panics when used": (
        lambda d: d.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
        "the library breaks off on a line of text",
    ),
    "a normalizer that panics when used": (
        lambda d: d.update(
            normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}
        ),
        "the library breaks off on a line of text",
    ),
    "a pattern that is none": (
        lambda d: d.update(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(("},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        "not a tokenizer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_part_is_refused_in_words_and_without_noise(name, bpe, tmp_path, capfd):
    change, words = BAD[name]
    changed(bpe, tmp_path / "tok.json", change)
    with pytest.raises(ValueError, match=words):
        read_tokenizer(tmp_path / "tok.json", "gpt2")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "3", '"x"', "{}", "[" * 100_000, '{"a":' * 5000, '{"a": "\\ud800"}', "\x00"],
)
@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_json_that_is_no_tokenizer_is_named(text, model, tmp_path):
    (tmp_path / "tok.json").write_text(text)
    with pytest.raises(ValueError, match=r"tok\.json: not a tokenizer") as error:
        read_tokenizer(tmp_path / "tok.json", model)
    assert len(str(error.value)) < 700


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "tok.json")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    for name in ("tok.json", "link", "absent", "absent\0.json"):
        for model in ("gpt2", "bert"):
            with pytest.raises(ValueError, match="no tokenizer there"):
                read_tokenizer(tmp_path / name, model)


def test_a_wordpiece_that_cannot_say_unknown_is_refused(wordpiece, tmp_path):
    changed(wordpiece, tmp_path / "tok.json", lambda d: d["model"].update(unk_token="<unk>"))
    with pytest.raises(ValueError, match="writes '<unk>' for an unknown word"):
        load_wordpiece(tmp_path / "tok.json")


def test_a_panic_on_a_text_is_a_refusal(bpe):
    core = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "é": 2}, []))
    codec = Codec(core)
    record = json.loads(core.to_str())
    record["model"].update(continuing_subword_prefix="##")
    codec.core = tokenizers.Tokenizer.from_str(json.dumps(record))
    assert codec.encode("ab") == [0]
    codec.core.pre_tokenizer = tokenizers.pre_tokenizers.FixedLength(0)
    with pytest.raises(ValueError, match="'ab' cannot be encoded .*non-zero"):
        codec.encode("ab")


def test_gaps_are_allowed_and_known(bpe, tmp_path):
    size = bpe.vocab_size
    changed(bpe, tmp_path / "tok.json", lambda d: d["model"]["vocab"].update(zz=size + 2))
    loaded = load_tokenizer(tmp_path / "tok.json")
    assert loaded.vocab_size == size + 3 and loaded.ids_without_token() == [size, size + 1]
    assert bpe.ids_without_token() == []


@pytest.mark.parametrize("wrong", ["tok.json", None, 3, {}])
@pytest.mark.parametrize("kind", [Tokenizer, WordPiece])
def test_a_tokenizer_made_of_something_else_says_so(kind, wrong):
    with pytest.raises(TypeError, match=r"a tokenizer is made of a tokenizers\.Tokenizer"):
        kind(wrong)


# --------------------------------------------------------------------- a vocabulary and its merges


@pytest.fixture
def pair(bpe, tmp_path):
    bpe.core.model.save(str(tmp_path), "gpt2")
    assert {path.name for path in tmp_path.iterdir()} == {"gpt2-vocab.json", "gpt2-merges.txt"}
    return tmp_path


@pytest.mark.parametrize(
    ("vocab", "merges"),
    [
        ("vocab.json", "merges.txt"),
        ("gpt2-vocab.json", "gpt2-merges.txt"),
        ("gpt2-medium-vocab.json", "gpt2-medium-merges.txt"),
        ("encoder.json", "vocab.bpe"),
    ],
)
def test_either_file_of_a_pair_names_both(pair, bpe, vocab, merges):
    (pair / "gpt2-vocab.json").rename(pair / vocab)
    (pair / "gpt2-merges.txt").rename(pair / merges)
    for path in (pair, pair / vocab, pair / merges, str(pair / vocab)):
        assert load_tokenizer(path).encode(TEXT) == bpe.encode(TEXT)


def test_half_a_pair_names_the_other_half(pair):
    (pair / "gpt2-merges.txt").unlink()
    for path in (pair, pair / "gpt2-vocab.json"):
        with pytest.raises(ValueError, match=r"gpt2-merges\.txt must lie beside it"):
            load_tokenizer(path)


def test_of_several_pairs_the_usual_one_is_read_or_a_name_asked_for(pair, bpe):
    for name in ("vocab.json", "merges.txt"):
        (pair / f"my-{name}").write_bytes((pair / f"gpt2-{name}").read_bytes())
    assert load_tokenizer(pair).vocab_size == bpe.vocab_size
    for name in ("vocab.json", "merges.txt"):
        (pair / f"gpt2-{name}").rename(pair / f"your-{name}")
    with pytest.raises(ValueError, match=r"several tokenizers; name .*my-vocab.json, your-vocab"):
        load_tokenizer(pair)
    assert load_tokenizer(pair / "my-merges.txt").vocab_size == bpe.vocab_size


def test_gpt2_is_read_by_its_vocabulary_alone(data_folder):
    folder = data_folder / "tokenizers"
    by_file, by_folder = load_tokenizer(folder / "gpt2-vocab.json"), load_tokenizer(folder)
    assert by_file.encode(TEXT) == by_folder.encode(TEXT) and by_file.vocab_size == 50_257


# --------------------------------------------------------------------------------- a word without end

ONE_WORD = """
import random, resource
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from megatron_edu.data.tokenizer import train_tokenizer
from megatron_edu.data.wordpiece import train_wordpiece
text = MAKE
for train in (train_tokenizer, train_wordpiece):
    made = train([text, "the cat sat"], 300)
    print(len(made.encode(text)) > 0, made.vocab_size > 10)
"""
WORDS = {
    "letters": "''.join(random.Random(0).choices('ACGT', k=1_000_000))",
    "letters of two bytes": "''.join(random.Random(0).choices('äöüß', k=500_000))",
    "spaces": "'a' + ' ' * 1_000_000 + 'b'",
    "marks": "'.' * 1_000_000",
    "digits": "'1234567890' * 100_000",
}


@pytest.mark.parametrize("kind", WORDS)
def test_a_word_of_a_million_letters_ends(kind):
    "Within a minute of one processor, where the library alone takes a quarter of an hour."
    program = ONE_WORD.replace("MAKE", WORDS[kind])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "True True\n" * 2, result.stderr


def test_words_of_a_usual_length_are_trained_on_as_they_are():
    texts = ["word " * 300, "x" * 999, "the cat"]
    whole = tokenizers.Tokenizer(models.BPE())
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    whole.train_from_iterator(texts, trainer)
    assert train_tokenizer(texts, 300).core.get_vocab() == whole.get_vocab()


def test_special_tokens_of_a_wordpiece_stay(wordpiece):
    assert [wordpiece.core.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3, 4]
