"Text in, token file and tokenizer out; what is there survives a failure."

import json

import pytest

from megatron_edu.config import GPT2Config
from megatron_edu.data.bert import BertSamples
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_edu.data.wordpiece import load_wordpiece, train_wordpiece
from megatron_edu.files import MARK, written_folder
from megatron_edu.models.gpt2 import GPT2
from megatron_edu.data.prepare import find_token_file, prepare, prepare_documents, prepare_text
from megatron_edu.training.checkpoint import save_checkpoint

TEXTS = ["The cat sat on the mat.", "A dog barks at the cat.", "Grüße und Küsse."]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return path


def texts_of(folder):
    "What the token file and the tokenizer beside it say."
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    file = TokenFile(folder / "tokens")
    assert all(ids[-1] == tokenizer.eod_id for ids in file)
    return [tokenizer.decode(ids[:-1].tolist()) for ids in file]


def test_the_text_comes_back(lines, tmp_path):
    file = prepare((lines,), tmp_path / "out", vocab_size=300, text_field="body")
    assert texts_of(tmp_path / "out") == TEXTS and len(file) == 3
    names = [MARK, "source.json", "tokenizer.json", "tokens.bin", "tokens.idx"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_a_given_tokenizer_is_used_and_kept(lines, tmp_path):
    tokenizer = train_tokenizer(["hello world, hello"], 270)
    tokenizer.save(tmp_path / "mine.json")
    prepare((lines,), tmp_path / "out", tmp_path / "mine.json", 9999, "body")
    assert texts_of(tmp_path / "out") == TEXTS
    kept = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert kept.core.get_vocab() == tokenizer.core.get_vocab()


def test_the_trained_vocabulary_is_as_large_as_asked(lines, tmp_path):
    prepare((lines,), tmp_path / "out", vocab_size=262, text_field="body")
    assert load_tokenizer(tmp_path / "out").vocab_size == 262


def test_all_inputs_are_read_in_their_order(lines, tmp_path):
    (tmp_path / "more.txt").write_text("And a fourth text.")
    prepare((lines, tmp_path / "more.txt"), tmp_path / "out", vocab_size=300, text_field="body")
    assert texts_of(tmp_path / "out") == [*TEXTS, "And a fourth text."]


def test_four_names_of_a_token_file(lines, tmp_path):
    out = tmp_path / "out"
    prepare((lines,), out, vocab_size=300, text_field="body")
    for name in (out, out / "tokens", out / "tokens.bin", out / "tokens.idx"):
        assert find_token_file(name) == out / "tokens"


def test_a_prefix_may_hold_a_point(tmp_path):
    prepare_documents(TEXTS, tmp_path / "out", train_tokenizer(TEXTS, 300))
    for kind in ("bin", "idx"):
        (tmp_path / "out" / f"tokens.{kind}").rename(tmp_path / f"v1.2.{kind}")
    assert find_token_file(tmp_path / "v1.2") == tmp_path / "v1.2"
    assert find_token_file(tmp_path / "v1.2.bin") == tmp_path / "v1.2"


def test_text_and_nothing_are_no_token_file(lines, tmp_path):
    for path in (lines, tmp_path, tmp_path / "absent"):
        assert find_token_file(path) is None


@pytest.mark.parametrize("half", ["bin", "idx"])
def test_half_a_token_file_is_named(lines, tmp_path, half):
    prepare((lines,), tmp_path / "out", vocab_size=300, text_field="body")
    (tmp_path / "out" / f"tokens.{half}").unlink()
    with pytest.raises(ValueError, match=rf"tokens.{half}: no such file"):
        TokenFile(find_token_file(tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"text_field": "text"}, "line 1: no string in field 'text'"),
        ({"vocab_size": 256, "text_field": "body"}, "vocab_size 256 is too small"),
        ({"tokenizer": "absent", "text_field": "body"}, "no tokenizer there"),
        ({"kind": "t5", "text_field": "body"}, "kind 't5'; known are wordpiece, bpe"),
        ({"kind": "wordpiece", "vocab_size": 20, "text_field": "body"}, "size 20 is too small"),
        ({"kind": "wordpiece", "tokenizer": "absent", "text_field": "body"}, "vocab.txt"),
    ],
)
def test_bad_input_leaves_nothing(lines, tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        prepare((lines,), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="an empty corpus"):
        prepare((tmp_path / "blank.txt",), tmp_path / "out")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_failure_leaves_the_old_folder(lines, tmp_path, kind):
    out = tmp_path / "out"
    prepare((lines,), out, vocab_size=300, text_field="body", kind=kind)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "bad.jsonl").write_text('{"body": "fine"}\n{"body": 1}\n')
    for overwrite in (False, True):
        words = "bad.jsonl.*body" if overwrite else "holds a prepared"
        options = {"text_field": "body", "kind": kind, "overwrite": overwrite}
        with pytest.raises(ValueError, match=words):
            prepare((tmp_path / "bad.jsonl",), out, **options)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob("*.partial"))


def test_only_what_was_not_changed_is_replaced(lines, tmp_path):
    out, options = tmp_path / "out", {"vocab_size": 300, "text_field": "body", "overwrite": True}
    prepare((lines,), out, **options)
    (tmp_path / "more.txt").write_text("And a fourth text.")
    prepare((lines, tmp_path / "more.txt"), out, **options)
    assert texts_of(out) == [*TEXTS, "And a fourth text."]
    (out / "tokenizer.json").write_text("mine")
    with pytest.raises(ValueError, match="tokenizer.json was added, changed or removed since"):
        prepare((lines,), out, **options)
    assert (out / "tokenizer.json").read_text() == "mine"


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "tokenizer.json", "source.json"])
def test_names_that_are_taken_are_refused_before_the_text_is_read(lines, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is a file already"):
        prepare_text((tmp_path / "absent.txt",), tmp_path / "out")
    if name != "source.json":
        with pytest.raises(ValueError, match=f"{name} is a file already"):
            prepare_documents(iter([pytest]), tmp_path / "out", train_tokenizer(["a"], 258))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_a_run_is_no_place_for_another_text(lines, tmp_path):
    model = GPT2(GPT2Config(1, 16, 2, vocab_size=16, max_seq_len=8))
    save_checkpoint(tmp_path / "run", 1, model)
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="run is a run; a target is a new folder"):
            prepare((lines,), tmp_path / "run", text_field="body", overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_messages_name_the_folder_that_was_asked_for(tmp_path):
    (tmp_path / "blank.txt").write_text("x")
    with pytest.raises(ValueError) as caught:
        prepare((tmp_path / "blank.txt",), tmp_path / "out", tmp_path / "absent.json")
    assert ".partial" not in str(caught.value)
    with pytest.raises(ValueError, match=f"^{tmp_path}/out/tokens: no documents"):
        with written_folder(tmp_path / "out", "prepared") as partial:
            prepare_documents([], partial, train_tokenizer(["a"], 258))


# For BERT


@pytest.fixture
def stories(tmp_path):
    texts = ["The cat sat. A dog barks! The cat runs.", "One\nline. Grüße und Küsse. The end."]
    texts += ["Lone."]
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return path


SENTENCES = ["the cat sat.", "a dog barks!", "the cat runs.", "one line.", "gruße und kusse."]
SENTENCES += ["the end.", "lone."]


def sentences_of(folder):
    "What the sentence file and the tokenizer beside it say."
    tokenizer, file = load_wordpiece(folder), TokenFile(folder / "tokens")
    assert file.document_offsets.tolist() == [0, 3, 6, 7]
    return [tokenizer.decode(ids.tolist()) for ids in file]


def test_for_bert_the_sentences_come_back(stories, tmp_path):
    out = tmp_path / "out"
    file = prepare((stories,), out, vocab_size=90, text_field="body", kind="wordpiece")
    assert sentences_of(out) == SENTENCES and find_token_file(out) == out / "tokens"
    names = [MARK, "source.json", "tokenizer.json", "tokens.bin", "tokens.idx"]
    assert sorted(path.name for path in out.iterdir()) == names
    batch = BertSamples(file, load_wordpiece(out / "tokenizer.json"), 16, 4).batch(range(4))
    assert batch["input_ids"].shape == (4, 16)


def test_for_bert_a_given_vocabulary_is_used_and_kept(stories, tmp_path):
    given = train_wordpiece(["the cat runs and barks, gruße und kusse"] * 2, 60)
    vocab = sorted(given.core.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("".join(token + "\n" for token, _ in vocab))
    prepare((stories,), tmp_path / "out", tmp_path / "vocab.txt", 9, "body", "wordpiece")
    kept = load_wordpiece(tmp_path / "out")
    assert kept.core.get_vocab() == given.core.get_vocab()
    assert TokenFile(tmp_path / "out" / "tokens")[2].tolist() == given.encode("The cat runs.")
    prepare((stories,), tmp_path / "again", tmp_path / "out", text_field="body", kind="wordpiece")
    for name in ("tokens.bin", "tokens.idx", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_tokenizer_of_the_other_model_is_refused(lines, stories, tmp_path):
    prepare((lines,), tmp_path / "gpt2", vocab_size=300, text_field="body")
    prepare((stories,), tmp_path / "bert", vocab_size=90, text_field="body", kind="wordpiece")
    with pytest.raises(ValueError, match="BPE, and a WordPiece vocabulary is needed"):
        prepare((lines,), tmp_path / "out", tmp_path / "gpt2", text_field="body", kind="wordpiece")
    with pytest.raises(ValueError, match="WordPiece vocabulary, and a byte-level BPE is needed"):
        prepare((lines,), tmp_path / "out", tmp_path / "bert", text_field="body")
    assert not (tmp_path / "out").exists()


def test_whose_a_tokenizer_is_shows_in_any_spelling(stories, tmp_path):
    "Ġ as JSON may escape it; a vocabulary that its own model cannot read; bytes that are no text."
    (tmp_path / "vocab.json").write_text('{"\\u0120the": 0}')
    (tmp_path / "pieces.txt").write_text("[PAD]\n[MASK]\nthe\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name, words in {
        "vocab.json": "vocab.json: a byte-level BPE, and a WordPiece vocabulary is needed",
        "pieces.txt": r"pieces.txt, read as a WordPiece .* without \[UNK\]",
        "bytes.txt": "bytes.txt, read as a WordPiece",
    }.items():
        with pytest.raises(ValueError, match=words):
            prepare((stories,), tmp_path / "out", tmp_path / name, 90, "body", "wordpiece")
