"Tokenizers of other programs: what they store is dropped, what is none is refused in words."

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import models

from megatron_edu.data.bert import BertSamples
from megatron_edu.data.corpus import read_documents
from megatron_edu.data.gpt2 import GPT2Samples, split_documents
from megatron_edu.data.sampler import BatchSampler
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.token_writer import tokenize_to_file
from megatron_edu.data.tokenizer import (
    Codec,
    NoToken,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from megatron_edu.data.wordpiece import SPECIAL, WordPiece, load_wordpiece, train_wordpiece
from megatron_edu.data.prepare import prepare, read_tokenizer

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


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
@pytest.mark.parametrize("state", ["both", "padding"])
def test_prepared_tokens_are_those_of_the_clean_tokenizer(kind, state, request, tmp_path):
    clean = request.getfixturevalue(kind)
    clean.save(tmp_path / "clean.json")
    path = stored(clean, tmp_path / "tok.json", STATE[state][0])
    (tmp_path / "a.txt").write_text(TEXT)
    prepare((tmp_path / "a.txt",), tmp_path / "a", tmp_path / "clean.json", kind=kind)
    with pytest.warns(UserWarning, match="dropped"):
        prepare((tmp_path / "a.txt",), tmp_path / "b", path, kind=kind)
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


# ----------------------------------------------------------------------------- what is no tokenizer


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
    "a value of many letters": (lambda d: d.update(version="a" * 9000), "not a tokenizer"),
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
    with pytest.raises(ValueError, match=words) as error:
        read_tokenizer(tmp_path / "tok.json", "bpe")
    assert capfd.readouterr().err == "" and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "3", '"x"', "{}", "[" * 100_000, '{"a":' * 5000, '{"a": "\\ud800"}', "\x00"],
)
@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_json_that_is_no_tokenizer_is_named(text, kind, tmp_path):
    (tmp_path / "tok.json").write_text(text)
    with pytest.raises(ValueError, match=r"tok\.json: not a tokenizer") as error:
        read_tokenizer(tmp_path / "tok.json", kind)
    assert len(str(error.value)) < 700


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "tok.json")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    for name in ("tok.json", "link", "absent", "absent\0.json"):
        for kind in ("bpe", "wordpiece"):
            with pytest.raises(ValueError, match="no tokenizer there"):
                read_tokenizer(tmp_path / name, kind)


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


def test_a_long_text_is_shortened_in_the_message(bpe):
    def encode(text, add_special_tokens):
        raise ValueError(f"no token in {text}")

    codec = Codec(bpe.core)
    codec.core = SimpleNamespace(encode=encode)
    with pytest.raises(NoToken, match="cannot be encoded .no token in x") as caught:
        codec.encode("x" * 10**5)
    assert len(str(caught.value)) < 600


def test_gaps_are_allowed(bpe, tmp_path):
    size = bpe.vocab_size
    changed(bpe, tmp_path / "tok.json", lambda d: d["model"]["vocab"].update(zz=size + 2))
    loaded = load_tokenizer(tmp_path / "tok.json")
    assert loaded.vocab_size == size + 3 and len(loaded.core.get_vocab()) == size + 1


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
    train_tokenizer(["other"], 258).core.model.save(str(pair), "a")
    assert load_tokenizer(pair).vocab_size == bpe.vocab_size
    for name in ("vocab.json", "merges.txt"):
        (pair / f"a-{name}").unlink()
        (pair / f"my-{name}").write_bytes((pair / f"gpt2-{name}").read_bytes())
    for name in ("vocab.json", "merges.txt"):
        (pair / f"gpt2-{name}").rename(pair / f"your-{name}")
    with pytest.raises(ValueError, match=r"several tokenizers; name .*my-vocab.json, your-vocab"):
        load_tokenizer(pair)
    assert load_tokenizer(pair / "my-merges.txt").vocab_size == bpe.vocab_size


@pytest.mark.parametrize("name", ["vocab.json", "gpt2-vocab.json", "encoder.json", "merges.txt"])
def test_a_whole_tokenizer_is_known_by_its_content(bpe, tmp_path, name):
    bpe.save(tmp_path / name)
    assert load_tokenizer(tmp_path / name).encode(TEXT) == bpe.encode(TEXT)
    if name != "merges.txt":    # found by name in a folder, with merges or without
        assert load_tokenizer(tmp_path).encode(TEXT) == bpe.encode(TEXT)
        merges = name.replace("encoder.json", "vocab.bpe").replace("vocab.json", "merges.txt")
        (tmp_path / merges).write_text("#version: 0.2\n")
        assert load_tokenizer(tmp_path).encode(TEXT) == bpe.encode(TEXT)


def test_a_vocabulary_with_the_word_model_is_a_vocabulary(pair, bpe):
    path = pair / "gpt2-vocab.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": bpe.vocab_size}))
    assert load_tokenizer(path).vocab_size == bpe.vocab_size + 1


def test_a_whole_wordpiece_is_known_by_its_content(wordpiece, tmp_path):
    wordpiece.save(tmp_path / "vocab.txt")
    for path in (tmp_path, tmp_path / "vocab.txt"):
        assert load_wordpiece(path).encode(TEXT) == wordpiece.encode(TEXT)


def test_gpt2_is_read_by_its_vocabulary_alone(data_folder):
    folder = data_folder / "tokenizers"
    by_file, by_folder = load_tokenizer(folder / "gpt2-vocab.json"), load_tokenizer(folder)
    assert by_file.encode(TEXT) == by_folder.encode(TEXT) and by_file.vocab_size == 50_257


# ------------------------------------------------------------------------------- a word without end

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


# -------------------------------------------------------------------------- the wrong kind of thing


@pytest.fixture
def file(bpe, tmp_path) -> TokenFile:
    return tokenize_to_file([TEXT] * 3, bpe, tmp_path / "file")


WRONG = {
    "a token file of a number": (lambda f: TokenFile(3), "^prefix=3: must be a text or a path"),
    "texts of a number": (lambda f: read_documents(3), "^path=3: must be a text or a path"),
    "texts of bytes": (lambda f: read_documents([b"a.txt"]), "^path=b'a.txt': must be a text or"),
    "a field that is no text": (
        lambda f: read_documents([], None),
        "^text_field=None: must be a t",
    ),
    "a tokenizer of a number": (lambda f: load_tokenizer(3), "^path=3: must be a text or a path"),
    "a WordPiece of nothing": (lambda f: load_wordpiece(None), "^path=None: must be a text or"),
    "training on one text": (lambda f: train_tokenizer(TEXT * 99, 300), "^documents=.*several"),
    "training on one text, for BERT": (lambda f: train_wordpiece(TEXT, 90), "^documents='the"),
    "a vocabulary of 3e2": (
        lambda f: train_tokenizer([TEXT], 300.0),
        "^vocab_size=300.0: must be a",
    ),
    "a vocabulary of text": (
        lambda f: train_wordpiece([TEXT], "90"),
        "^vocab_size='90': must be a",
    ),
    "samples of a path": (
        lambda f: GPT2Samples(f.prefix, 8),
        "^token_file=.*: must be a TokenFile",
    ),
    "samples of 8.0 tokens": (
        lambda f: GPT2Samples(f, 8.0),
        "^seq_len=8.0: must be a whole number",
    ),
    "samples by a seed of text": (
        lambda f: GPT2Samples(f, 8, seed="1"),
        "^seed='1': must be a whole",
    ),
    "some of the samples": (
        lambda f: GPT2Samples(f, 8, "all"),
        "^num_samples='all': must be a whole",
    ),
    "samples of a list": (
        lambda f: GPT2Samples(f, 8, documents=[0]),
        r"^documents=\[0\]: must be a ndarray or a range or None",
    ),
    "pairs of a path": (
        lambda f: BertSamples("x", None, 8),
        "^token_file='x': must be a TokenFile",
    ),
    "pairs without a tokenizer": (
        lambda f: BertSamples(f, None, 8),
        "^tokenizer=None: must be a Wo",
    ),
    "a batch of 2.5": (lambda f: BatchSampler(10, 2.5, 1), "^global_batch=2.5: must be a whole"),
    "a rank of None": (lambda f: BatchSampler(10, 2, 1, None), "^dp_rank=None: must be a whole"),
    "consumed of text": (lambda f: BatchSampler(10, 2, 1, 0, 1, "3"), "^consumed='3': must be a w"),
    "documents of text": (lambda f: split_documents("3", (1,)), "^num_documents='3': must be a w"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_wrong_kind_of_thing_says_so_in_our_words(name, file):
    make, words = WRONG[name]
    with pytest.raises(TypeError, match=words) as caught:
        make(file)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("fractions", [(float("nan"), 1), (1, float("nan")), (float("inf"), 0)])
def test_fractions_that_are_no_numbers_are_refused(fractions):
    with pytest.raises(ValueError, match="none may be negative and the sum must be 1"):
        split_documents(9, fractions)


@pytest.mark.parametrize("size", [2**20 + 1, 10**12, 2**62])
@pytest.mark.parametrize("train", [train_tokenizer, train_wordpiece])
def test_a_vocabulary_that_no_memory_holds_is_refused_before_the_training(train, size):
    with pytest.raises(ValueError, match=f"vocab_size {size} is too large: at most 1048576"):
        train([TEXT], size)
    assert train([TEXT], 2**20).vocab_size < 400
