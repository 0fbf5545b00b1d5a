"What a tokenizer cannot express stops with its place or is counted; what it changes is counted."

import pytest
import tokenizers
from text_cases import any_unicode, word_soup
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megatron_edu.data.corpus import Document, read_documents
from megatron_edu.data.round_trip import Counts, RoundTrip, encode_prompt
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from megatron_edu.data.wordpiece import train_wordpiece
from megatron_edu.data.prepare import prepare, prepare_text

KNOWN = "the cat sat on the mat and the dog ran to the barn of the old man"
EOD = "</s>"


def made(model, trainer, pre=None, decoder=None, normalizer=None) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer, core.decoder, core.normalizer = pre, decoder, normalizer
    core.train_from_iterator([KNOWN] * 3, trainer)
    return core


def options(**more) -> dict:
    return {"special_tokens": [EOD], "show_progress": False, **more}


def bpe_of_letters(**parts) -> tokenizers.Tokenizer:
    parts = {"pre": pre_tokenizers.Whitespace(), **parts}
    return made(models.BPE(), trainers.BpeTrainer(vocab_size=60, **options()), **parts)


def bpe_with_unknown() -> tokenizers.Tokenizer:
    model, special = models.BPE(unk_token="<unk>"), {"special_tokens": [EOD, "<unk>"]}
    trainer = trainers.BpeTrainer(vocab_size=60, **options(**special))
    return made(model, trainer, pre_tokenizers.Whitespace())


def bpe_of_some_bytes() -> tokenizers.Tokenizer:
    "Byte-level, of a text that has few of the 256 bytes."
    pre, decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made(models.BPE(), trainers.BpeTrainer(vocab_size=60, **options()), pre, decoder)


def words() -> tokenizers.Tokenizer:
    trainer = trainers.WordLevelTrainer(vocab_size=60, **options())
    return made(models.WordLevel(), trainer, pre_tokenizers.Whitespace())


def words_with_unknown() -> tokenizers.Tokenizer:
    trainer = trainers.WordLevelTrainer(vocab_size=60, **options(special_tokens=[EOD, "[UNK]"]))
    return made(models.WordLevel(unk_token="[UNK]"), trainer, pre_tokenizers.WhitespaceSplit())


def unigram() -> tokenizers.Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=60, **options())
    lines = normalizers.Replace("\n", " ")
    return made(models.Unigram(), trainer, pre_tokenizers.Metaspace(), normalizer=lines)


def unigram_with_unknown() -> tokenizers.Tokenizer:
    special = {"special_tokens": [EOD, "<unk>"], "unk_token": "<unk>"}
    trainer = trainers.UnigramTrainer(vocab_size=60, **options(**special))
    return made(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())


def words_for_gpt2() -> tokenizers.Tokenizer:
    "A WordPiece, given to a GPT-2."
    special = {"special_tokens": [EOD, "[UNK]"]}
    trainer = trainers.WordPieceTrainer(vocab_size=80, **options(**special))
    model = models.WordPiece(unk_token="[UNK]")
    return made(model, trainer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())


def marks_removed() -> tokenizers.Tokenizer:
    "What is lost before the model: the pre-tokenizer takes marks away."
    pre = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("removed")]
    )
    trainer = trainers.BpeTrainer(vocab_size=60, **options(initial_alphabet=["!", "Z"]))
    return made(models.BPE(), trainer, pre)


LOSING = {
    bpe_of_letters: "'Z' of 'Zebra'",
    bpe_with_unknown: "'Z' of 'Zebra'",
    bpe_of_some_bytes: "'Z' of 'Zebra'",
    words: "'Zebra'",
    words_with_unknown: "'Zebra'",
    unigram: "'Z' of 'Zebra'",
    unigram_with_unknown: "'Z' of 'Zebra'",
    words_for_gpt2: "'Z' of 'Zebra'",
    marks_removed: "'!'",
}


@pytest.mark.parametrize("make", LOSING)
def test_a_text_that_cannot_be_expressed_stops_with_file_line_and_letter(make, tmp_path):
    make().save(str(tmp_path / "tok.json"))
    (tmp_path / "text.txt").write_text("the cat sat\non the mat\n\nthe old Zebra ran !\nthe Quiz")
    with pytest.raises(ValueError) as error:
        prepare((tmp_path / "text.txt",), tmp_path / "out", tmp_path / "tok.json")
    words = f"text.txt, line 4: the tokenizer has no token for {LOSING[make]}, and"
    assert words in str(error.value) and "--lossy" in str(error.value)
    assert not (tmp_path / "out" / "tokens.bin").exists()


@pytest.mark.parametrize("make", LOSING)
def test_what_can_be_expressed_is_taken(make, tmp_path):
    make().save(str(tmp_path / "tok.json"))
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    file = prepare((tmp_path / "text.txt",), tmp_path / "out", tmp_path / "tok.json")
    tokenizer = load_tokenizer(tmp_path / "tok.json")
    assert file[0].tolist() == [*tokenizer.encode("the cat sat on the mat"), tokenizer.eod_id]


@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (bpe_of_letters, 2),
        (bpe_with_unknown, 2),
        (bpe_of_some_bytes, 2),
        (words, 6),
        (words_with_unknown, 6),
        (unigram, 6),
        (unigram_with_unknown, 2),
        (marks_removed, 1),
    ],
)
def test_lossy_counts_what_is_lost(make, lost, tmp_path):
    "Z and the mark; or the whole word and the mark, where the tokenizer gives up at a word."
    make().save(str(tmp_path / "tok.json"))
    (tmp_path / "text.txt").write_text("the Zebra ran !")
    made = prepare_text(
        (tmp_path / "text.txt",), tmp_path / "out", tmp_path / "tok.json", lossy=True
    )
    assert made.lines() == [f"{lost} characters of 1 documents have no token and are lost"]
    assert (made.counts.lost, made.counts.holed) == (lost, 1)
    assert TokenFile(tmp_path / "out" / "tokens").num_tokens == made.file.num_tokens > 1


def test_the_line_of_a_json_document_is_that_of_the_file(tmp_path):
    bpe_of_letters().save(str(tmp_path / "tok.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "the cat"}\n\n{"text": "the\\n\\n\\nZebra"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: the tokenizer has no token for 'Z'"):
        prepare((tmp_path / "a.jsonl",), tmp_path / "out", tmp_path / "tok.json")


def test_the_line_of_a_text_that_is_cut_is_that_of_the_file(tmp_path):
    bpe_of_letters().save(str(tmp_path / "tok.json"))
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 3000 + "the Zebra\n")
    assert len(list(read_documents(tmp_path / "a.txt"))) == 5
    with pytest.raises(ValueError, match=r"a\.txt, line 3001: .* 'Z' of 'Zebra'"):
        prepare((tmp_path / "a.txt",), tmp_path / "out", tmp_path / "tok.json")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("text", [any_unicode, word_soup])
def test_a_byte_level_tokenizer_loses_nothing(seed, text):
    check = RoundTrip(train_tokenizer([KNOWN], 300))
    assert check.encode(text(seed)) == check.tokenizer.encode(text(seed))
    assert check.counts == Counts()


NORMALIZERS = {
    "small letters": (normalizers.Lowercase(), "The cat", True),
    "one form": (normalizers.NFC(), "cafe\u0301", True),
    "no accents": (
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        "café",
        True,
    ),
    "of other text": (normalizers.Lowercase(), "the cat", False),
    "spaces to a mark": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        "the cat",
        False,
    ),
}


@pytest.mark.parametrize("name", NORMALIZERS)
def test_what_a_normalizer_changes_is_counted_and_no_loss(name):
    normalizer, text, changed = NORMALIZERS[name]
    core = train_tokenizer([KNOWN], 300).core
    core.normalizer = normalizer
    if "mark" in name:
        core.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("▁", 1, 0)])
    check = RoundTrip(Tokenizer(core))
    check.encode(text)
    assert check.counts.changed == changed and check.counts.lost == 0


def test_a_special_token_is_no_loss_where_other_text_is_made_small():
    core = train_tokenizer([KNOWN], 300).core
    core.normalizer = normalizers.Lowercase()
    core.add_special_tokens(["[MASK]"])
    check = RoundTrip(Tokenizer(core))
    assert core.token_to_id("[MASK]") in check.encode("The [MASK]")
    assert check.counts.lost == 0


def test_spaces_that_are_not_kept_are_counted():
    check = RoundTrip(Tokenizer(bpe_of_letters()))
    check.encode("the cat\n\nsat")
    check.encode("the")
    assert check.counts == Counts(spaced=1)


def test_a_tokenizer_without_a_decoder_is_given_its_own():
    core = train_tokenizer([KNOWN], 300).core
    core.decoder = None
    check = RoundTrip(Tokenizer(core))
    check.encode("the café of 漢字")
    assert check.counts == Counts()


def test_a_changed_text_is_said_once(tmp_path):
    bpe_of_letters(normalizer=normalizers.Lowercase()).save(str(tmp_path / "tok.json"))
    (tmp_path / "a.jsonl").write_text(
        '{"text": "The cat"}\n{"text": "The Dog"}\n{"text": "a\\n man"}'
    )
    with pytest.warns(UserWarning) as notes:
        prepare((tmp_path / "a.jsonl",), tmp_path / "out", tmp_path / "tok.json")
    said = [str(note.message) for note in notes]
    assert said[0] == "the tokenizer's normalizer changed the letters of 2 documents"
    assert len(said) == 2 and "spaces or line ends of 1 documents" in said[1]


def test_for_bert_unknown_words_are_counted(tmp_path):
    train_wordpiece([KNOWN], 60).save(tmp_path / "tok.json")
    (tmp_path / "a.txt").write_text("The cat sat. The Zebra 漢 ran to the quiz.")
    made = prepare_text(
        (tmp_path / "a.txt",), tmp_path / "out", tmp_path / "tok.json", kind="wordpiece"
    )
    assert made.counts.unknown == 5 and made.counts.lost == 0
    said = f"5 of {(n := made.file.num_tokens)} tokens ({5 / n:.2%}) are [UNK], words that"
    assert len(made.lines()) == 1 and made.lines()[0].startswith(said)
    with pytest.warns(UserWarning, match=r"tokens \(.*%\) are \[UNK\]"):
        prepare((tmp_path / "a.txt",), tmp_path / "b", tmp_path / "tok.json", kind="wordpiece")


def test_a_prompt_that_cannot_be_expressed_is_refused():
    letters, bytes_ = Tokenizer(bpe_of_letters()), train_tokenizer([KNOWN], 300)
    assert encode_prompt(letters, "the cat") == letters.encode("the cat")
    assert encode_prompt(bytes_, "Ж \x00 漢") == bytes_.encode("Ж \x00 漢")
    assert encode_prompt(bytes_, "") == []
    with pytest.raises(ValueError, match="prompt 'the Ж': .* no token for 'Ж'; write the prompt"):
        encode_prompt(letters, "the Ж")
    with pytest.raises(ValueError, match="prompt '.*': .* no token for 'Zebra'"):
        encode_prompt(Tokenizer(words()), "the Zebra")
    with pytest.raises(ValueError, match="no token for 'KUN'"):  # letters of [UNK]
        encode_prompt(Tokenizer(words_with_unknown()), "the KUN")
    with pytest.raises(ValueError, match="'a.udcff' is not UTF-8; give it as UTF-8 text"):
        encode_prompt(bytes_, "a\udcff")
    for prompt in ("a " * 10**5 + "\udcff", "a " * 10**5 + "Ж" * 10**5):
        with pytest.raises(ValueError, match="^prompt 'a a a") as caught:
            encode_prompt(letters, prompt)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "word", ["Ж" * 10**5, "a" + "".join(map(chr, range(0x4E00, 0x5E00)))], ids=["one", "many"]
)
def test_a_long_word_is_shortened_in_the_message(word):
    said = RoundTrip(Tokenizer(bpe_of_letters())).message(f"the cat {word}")
    assert "the tokenizer has no token for '" in said and len(said) < 400


def test_a_document_knows_its_place():
    text = Document("one\ntwo", "a.txt", 5)
    assert [text.place(at) for at in (0, 3, 4)] == [f"a.txt, line {n}" for n in (5, 5, 6)]
    assert Document("one\ntwo", "a.jsonl", 5, lines=False).place(6) == "a.jsonl, line 5"
