"Byte-level BPE: any text comes back, GPT-2's ids are GPT-2's, and cutting a text changes none."

import os
import re
import subprocess
import sys
from itertools import islice

import pytest
from text_cases import any_unicode, word_soup
from tokenizers import models, trainers

from megatron_edu.data.corpus import embedded_corpus, read_documents
from megatron_edu.data.tokenizer import (
    EOD,
    Tokenizer,
    byte_level,
    load_tokenizer,
    pieces,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(islice(embedded_corpus(), 40))


@pytest.fixture(scope="module")
def tokenizer(documents) -> Tokenizer:
    return train_tokenizer(documents, 1000)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("make", [any_unicode, word_soup])
def test_any_text_comes_back(tokenizer, make, seed):
    text = make(seed)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("make", [any_unicode, word_soup])
def test_cuts_change_no_token(tokenizer, make, seed):
    text = make(seed)
    parts = list(pieces(text, size=7))
    assert "".join(parts) == text
    ids = [i for part in parts for i in tokenizer.core.encode(part).ids]
    assert ids == tokenizer.core.encode(text).ids


def test_long_texts_are_cut(tokenizer, documents):
    text = " ".join(documents)
    parts = list(pieces(text))
    assert len(parts) == pytest.approx(len(text) / 100_000, abs=1)
    assert tokenizer.encode(text) == tokenizer.core.encode(text).ids


def test_memory_of_a_long_text_is_bounded():
    program = (
        "import resource; from megatron_edu.data.tokenizer import train_tokenizer;"
        "t = train_tokenizer(['some words here'], 300); peak = lambda: "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
        "n = len(t.encode('some words here ' * 300_000)); print(n, peak() - before)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    count, grown = map(int, result.stdout.split())
    assert count > 300_000
    unit = 1 if sys.platform == "darwin" else 1024
    assert grown * unit < 250_000_000      # 4.8 million characters; in one piece they take 700 MB


def test_training_is_deterministic(tokenizer, documents):
    program = (
        "import hashlib; from itertools import islice;"
        "from megatron_edu.data.corpus import embedded_corpus;"
        "from megatron_edu.data.tokenizer import train_tokenizer;"
        "t = train_tokenizer(islice(embedded_corpus(), 40), 1000);"
        "print(hashlib.sha256(t.core.to_str().encode()).hexdigest())"
    )
    digests = set()
    for seed, threads in (("0", "1"), ("1", "2"), ("2", "4")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment
        )
        digests.add(result.stdout)
    assert len(digests) == 1 and len(digests.pop()) == 65, result.stderr
    assert train_tokenizer(documents[::-1], 1000).core.to_str() == tokenizer.core.to_str()


def test_sizes_and_the_end_of_a_document(tokenizer):
    assert tokenizer.vocab_size == 1000
    assert tokenizer.encode(f"a{EOD}b")[1] == tokenizer.eod_id
    assert tokenizer.decode([tokenizer.eod_id]) == EOD
    assert tokenizer.encode("") == []
    small = train_tokenizer(["ab"], 1000)
    assert small.vocab_size == 258      # 256 bytes, the end, one merge: the text has no more


def test_every_form_is_loaded(tokenizer, tmp_path):
    text = word_soup(1)
    tokenizer.save(tmp_path / "tokenizer.json")
    bare, prefixed = tmp_path / "bare", tmp_path / "prefixed"
    for folder in (bare, prefixed):
        folder.mkdir()
    tokenizer.core.model.save(str(bare))
    for name in ("vocab.json", "merges.txt"):
        (prefixed / f"gpt2-{name}").write_bytes((bare / name).read_bytes())
    for path in (tmp_path / "tokenizer.json", str(tmp_path), bare, prefixed):
        loaded = load_tokenizer(path)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert (loaded.vocab_size, loaded.eod_id) == (1000, tokenizer.eod_id)


def test_bad_sources_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer there.*merges\.txt.*correct the path"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "good.json")
    with pytest.raises(ValueError, match=r"no token '</s>'.*eod_token="):
        load_tokenizer(tmp_path / "good.json", eod_token="</s>")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("a b c d\n")
    with pytest.raises(ValueError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


def test_another_token_may_end_documents(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path, eod_token="e").eod_id == tokenizer.core.token_to_id("e")


@pytest.mark.parametrize("name", ["<|end_of_text|>", "</s>", "<eos>"])
def test_other_names_for_the_end_of_a_document_are_known(tmp_path, name):
    core = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", name])
    core.train_from_iterator(["some text, some more text"], trainer)
    core.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eod_id == 1 and loaded.encode(f"text{name}")[-1] == 1
    assert loaded.decode([1]) == name


def test_a_tokenizer_that_cannot_end_a_document_is_refused(tmp_path):
    core = byte_level(models.BPE())
    core.train_from_iterator(["some text"], trainers.BpeTrainer(special_tokens=["<pad>"]))
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"no token '<\|endoftext\|>' or .*'</s>'.*add one"):
        load_tokenizer(tmp_path)


def test_training_refuses_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size 256 is too small.*257"):
        train_tokenizer(["text"], 256)
    with pytest.raises(ValueError, match="no documents"):
        train_tokenizer([], 300)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nspoiled\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        train_tokenizer(read_documents(tmp_path), 300)


@pytest.mark.parametrize("bad", [-1, 1000])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, bad):
    with pytest.raises(ValueError, match=rf"token id {bad} is outside.*0 to 999"):
        tokenizer.decode([5, bad])


def test_gpt2_is_reproduced(data_folder):
    from transformers import GPT2TokenizerFast

    folder = data_folder / "tokenizers"
    ours = load_tokenizer(folder)
    theirs = GPT2TokenizerFast(
        vocab=str(folder / "gpt2-vocab.json"), merges=str(folder / "gpt2-merges.txt")
    )
    assert (ours.vocab_size, ours.eod_id) == (50_257, 50_256)
    novel = (data_folder / "novels" / "kipling_kim_1901.txt").read_text(encoding="utf-8")
    assert ours.encode(novel) == theirs(novel).input_ids
    assert re.search(r"\d", novel) and ours.decode(ours.encode(novel)) == novel
    for seed in range(60):
        for text in (any_unicode(seed), word_soup(seed)):
            assert ours.encode(text) == theirs(text).input_ids
            assert ours.decode(ours.encode(text)) == text
