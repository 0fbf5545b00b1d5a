"WordPiece: BERT's ids are BERT's, training gives the same vocabulary every time, words are known."

import hashlib
import os
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import tokenizers
from text_cases import any_unicode, word_soup
from tokenizers import models

from megatron_edu.data.corpus import embedded_corpus, read_documents
from megatron_edu.data.tokenizer import load_tokenizer, pieces, train_tokenizer
from megatron_edu.data.wordpiece import (
    SPECIAL,
    WordPiece,
    load_wordpiece,
    train_wordpiece,
    uncased,
)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(islice(embedded_corpus(), 79))


@pytest.fixture(scope="module")
def wordpiece(documents) -> WordPiece:
    return train_wordpiece(documents, 1000)


def longest_first(word: str, vocab: dict[str, int]) -> list[str]:
    "WordPiece by hand: the longest piece of the vocabulary, again and again; [UNK] if none fits."
    found, start = [], 0
    while start < len(word):
        mark = "##" if start else ""
        ends = (e for e in range(len(word), start, -1) if mark + word[start:e] in vocab)
        end = next(ends, None)
        if end is None:
            return ["[UNK]"]
        found.append(mark + word[start:end])
        start = end
    return found


def test_words_become_the_longest_pieces(wordpiece, documents):
    vocab, core = wordpiece.core.get_vocab(), wordpiece.core
    for text in [*documents[:10], "Ωmega naïve 漢字 zzyzx \u0416 x\u0416x"]:
        plain = core.normalizer.normalize_str(text)
        words = [word for word, _ in core.pre_tokenizer.pre_tokenize_str(plain)]
        expected = [vocab[piece] for word in words for piece in longest_first(word, vocab)]
        assert wordpiece.encode(text) == expected


def test_capitals_accents_and_marks(wordpiece):
    assert wordpiece.encode("The VALUE, naïve!") == wordpiece.encode("the value , naive !")
    assert wordpiece.decode(wordpiece.encode("Unparseable Values")) == "unparseable values"


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("make", [any_unicode, word_soup])
def test_cuts_change_no_token(wordpiece, make, seed):
    text = make(seed)
    whole = wordpiece.core.encode(text, add_special_tokens=False).ids
    parts = [wordpiece.core.encode(p, add_special_tokens=False).ids for p in pieces(text, size=7)]
    assert sum(parts, []) == whole == wordpiece.encode(text)


def test_special_tokens_come_from_their_spelling_alone(wordpiece):
    assert wordpiece.special_ids == (0, 1, 2, 3, 4)
    ids = (wordpiece.pad_id, wordpiece.unk_id, wordpiece.cls_id, wordpiece.sep_id)
    assert (*ids, wordpiece.mask_id) == wordpiece.special_ids
    assert [wordpiece.decode([i]) for i in wordpiece.special_ids] == list(SPECIAL)
    assert not set(wordpiece.encode("a value of the mask")) & set(wordpiece.special_ids)
    assert wordpiece.encode("a [MASK] of")[1] == wordpiece.mask_id
    assert wordpiece.encode("\u0416") == [wordpiece.unk_id]
    assert wordpiece.encode(" \n\u200f\x00") == []


def test_pieces_that_go_on_with_a_word_are_known(wordpiece):
    assert wordpiece.continues.shape == (1000,) and wordpiece.continues.dtype == bool
    for token, i in wordpiece.core.get_vocab().items():
        assert wordpiece.continues[i] == token.startswith("##")
    ids = np.array(wordpiece.encode("unparseable things, certainly"))
    assert (~wordpiece.continues[ids]).sum() == 4 < len(ids)


def test_only_what_begins_with_the_mark_goes_on():
    vocab = {token: i for i, token in enumerate([*SPECIAL, "a##", "##b", "a##b", "#", "###"])}
    found = WordPiece(uncased(models.WordPiece(vocab, unk_token="[UNK]")))
    assert found.continues.tolist() == [False] * 5 + [False, True, False, False, True]


def test_training_is_deterministic(wordpiece, documents):
    program = (
        "import hashlib; from itertools import islice;"
        "from megatron_edu.data.corpus import embedded_corpus;"
        "from megatron_edu.data.wordpiece import train_wordpiece;"
        "t = train_wordpiece(islice(embedded_corpus(), 79), 1000);"
        "print(hashlib.sha256(t.core.to_str().encode()).hexdigest())"
    )
    here = hashlib.sha256(wordpiece.core.to_str().encode()).hexdigest()
    for seed, threads in (("0", "1"), ("1", "2"), ("2", "4")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment
        )
        assert result.stdout.strip() == here, result.stderr
    assert train_wordpiece(documents[::-1], 1000).core.to_str() == wordpiece.core.to_str()


def test_sizes_of_a_trained_vocabulary(wordpiece):
    assert wordpiece.vocab_size == 1000
    small = train_wordpiece(["ab ab ba"], 1000)
    assert set(small.core.get_vocab()) == {*SPECIAL, "a", "b", "##a", "##b", "ab", "ba"}
    first_alone = train_wordpiece(["ab"], 1000)     # no word goes on with its a
    assert set(first_alone.core.get_vocab()) == {*SPECIAL, "a", "b", "##b", "ab"}
    least = train_wordpiece(["ab ab ba"], 9)
    assert set(least.core.get_vocab()) == {*SPECIAL, "a", "b", "##a", "##b"}
    with pytest.raises(ValueError, match=r"vocab_size 8 is too small.*need 9; give that or more"):
        train_wordpiece(["ab ab ba"], 8)


def test_frequent_words_are_learned_first(wordpiece, documents):
    larger = train_wordpiece(documents, 1200)
    vocab = wordpiece.core.get_vocab()
    assert {k: i for k, i in larger.core.get_vocab().items() if i < 1000} == vocab
    assert {"the", "is", "of", "value"} <= set(vocab)


def vocab_text(wordpiece: WordPiece) -> str:
    vocab = wordpiece.core.get_vocab()
    return "".join(token + "\n" for token in sorted(vocab, key=vocab.get))


def test_the_saved_file_tells_other_programs_how_a_row_is_framed(wordpiece, tmp_path):
    wordpiece.save(tmp_path / "tokenizer.json")
    read = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    (a,), (b, c) = wordpiece.encode("the"), wordpiece.encode("value of")
    cls, sep = wordpiece.cls_id, wordpiece.sep_id
    assert read.encode("the").ids == [cls, a, sep]
    both = read.encode("the", "value of")
    assert both.ids == [cls, a, sep, b, c, sep]
    assert both.type_ids == [0, 0, 0, 1, 1, 1]
    assert load_wordpiece(tmp_path).encode("the") == [a]


def test_every_form_is_loaded(wordpiece, tmp_path):
    text = word_soup(1) + " certainly [MASK] \u0416"
    forms = {}
    for name in ("tokenizer.json", "vocab.txt", "bert-uncased-vocab.txt"):
        (tmp_path / name[:3]).mkdir()
        forms[name] = tmp_path / name[:3] / name
    wordpiece.save(forms["tokenizer.json"])
    for name in ("vocab.txt", "bert-uncased-vocab.txt"):
        forms[name].write_text(vocab_text(wordpiece), encoding="utf-8")
    for file in forms.values():
        for path in (file, str(file), file.parent):
            loaded = load_wordpiece(path)
            assert loaded.encode(text) == wordpiece.encode(text)
            assert loaded.special_ids == wordpiece.special_ids
            assert np.array_equal(loaded.continues, wordpiece.continues)


def test_of_a_folder_with_both_the_tokenizer_is_read(wordpiece, tmp_path):
    wordpiece.save(tmp_path / "tokenizer.json")
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "x"]))
    assert load_wordpiece(tmp_path).vocab_size == wordpiece.vocab_size > 6
    (tmp_path / "bert-uncased-vocab.txt").write_text("\n".join([*SPECIAL, "x", "y"]))
    (tmp_path / "tokenizer.json").unlink()
    assert load_wordpiece(tmp_path).vocab_size == 6


def test_pieces_spelled_in_a_text_are_not_read_as_pieces(wordpiece):
    "Only the five special tokens are."
    vocab = wordpiece.core.get_vocab()
    assert "##e" in vocab and vocab["##e"] not in wordpiece.encode("##e a##e")


def test_the_ids_of_a_vocabulary_are_its_lines(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[unused0]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nx\n##y\n")
    loaded = load_wordpiece(tmp_path)
    assert loaded.encode("x xy [unused0]")[:3] == [6, 6, 7]
    assert loaded.special_ids == (0, 2, 3, 4, 5) and loaded.vocab_size == 8
    assert loaded.continues.tolist() == [False] * 7 + [True]


def test_bad_sources_are_refused(wordpiece, documents, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer there.*vocab\.txt.*correct the path"):
        load_wordpiece(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        load_wordpiece(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"vocab\.txt: not a tokenizer"):
        load_wordpiece(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\nword\n")
    with pytest.raises(ValueError, match=r"4 without \[SEP\] \[MASK\].*train_wordpiece"):
        load_wordpiece(tmp_path / "vocab.txt")
    for capital in ("Berlin", "##Ing"):
        (tmp_path / "vocab.txt").write_text(vocab_text(wordpiece) + f"{capital}\n")
        with pytest.raises(ValueError, match=rf"holds '{capital}'.*uncased.*tokenizer\.json"):
            load_wordpiece(tmp_path / "vocab.txt")


def test_a_tokenizer_of_another_kind_is_refused(documents, tmp_path):
    gpt2 = train_tokenizer(documents[:5], 300)
    gpt2.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"without \[PAD\]"):
        load_wordpiece(tmp_path)
    gpt2.core.add_special_tokens(list(SPECIAL))
    with pytest.raises(ValueError, match=r"a BPE tokenizer.*is a WordPiece with '##'"):
        WordPiece(gpt2.core)
    pairs = models.BPE(gpt2.core.get_vocab(), [], continuing_subword_prefix="##")
    with pytest.raises(ValueError, match="a BPE tokenizer with '##'"):
        WordPiece(tokenizers.Tokenizer(pairs))
    vocab = {token: i for i, token in enumerate([*SPECIAL, "a", "@@b"])}
    other = models.WordPiece(vocab, unk_token="[UNK]", continuing_subword_prefix="@@")
    with pytest.raises(ValueError, match=r"WordPiece tokenizer with '@@'"):
        WordPiece(tokenizers.Tokenizer(other))
    uncased(models.WordPiece(vocab, unk_token="[UNK]")).save(str(tmp_path / "bert.json"))
    with pytest.raises(ValueError, match=r"no token '<\|endoftext\|>'"):
        load_tokenizer(tmp_path / "bert.json")


def test_training_refuses_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="no documents"):
        train_wordpiece([], 300)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nspoiled\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        train_wordpiece(read_documents(tmp_path), 300)


@pytest.mark.parametrize("bad", [-1, 1000])
def test_ids_outside_the_vocabulary_are_refused(wordpiece, bad):
    with pytest.raises(ValueError, match=rf"token id {bad} is outside.*0 to 999"):
        wordpiece.decode([5, bad])


def test_bert_is_reproduced(data_folder):
    from transformers import BertTokenizerFast

    folder = data_folder / "tokenizers"
    ours = load_wordpiece(folder)
    theirs = BertTokenizerFast(vocab=str(folder / "bert-uncased-vocab.txt"))
    assert ours.vocab_size == 30_522 and ours.special_ids == (0, 100, 101, 102, 103)
    assert ours.continues.sum() == 5828
    novel = (data_folder / "novels" / "kipling_kim_1901.txt").read_text(encoding="utf-8")
    texts = [novel, *map(any_unicode, range(60)), *map(word_soup, range(60)), "a [MASK] b [SEP]"]
    for text in texts:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
