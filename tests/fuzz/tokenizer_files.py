"Tokenizers of others: damaged, of another kind, or with a state that must not be obeyed."

import json
from functools import partial

from fuzz.cases import (
    NOT_JSON,
    TRAIN,
    Accepted,
    add,
    cut,
    damage,
    edit,
    refused,
    replace_by,
)

KIND = "tokenizers"
PREPARE = "prepare text.jsonl --out out --tokenizer"
BPE = f"{PREPARE} gpt2/tokenizer.json"
PIECES = f"{PREPARE} bert/tokenizer.json --model bert"
NAMED = refused(r"gpt2/tokenizer\.json")
NAMED_BERT = refused(r"bert/tokenizer\.json")


def gpt2(folder):
    return folder / "gpt2/tokenizer.json"


def bert(folder):
    return folder / "bert/tokenizer.json"


def truncation(chance) -> dict:
    return {
        "direction": chance.choice(["Left", "Right"]),
        "max_length": chance.choice([1, 2, 6, 16, 512]),
        "strategy": chance.choice(["LongestFirst", "OnlyFirst", "OnlySecond"]),
        "stride": 0,
    }


def padding(chance, token: str, number: int) -> dict:
    return {
        "strategy": chance.choice(["BatchLongest", {"Fixed": chance.choice([1, 64, 4096])}]),
        "direction": chance.choice(["Left", "Right"]),
        "pad_to_multiple_of": chance.choice([None, 8]),
        "pad_id": number,
        "pad_type_id": 0,
        "pad_token": token,
    }


# State that is dropped


@damage(KIND, BPE, Accepted("prepare"), times=4)
def a_bpe_that_truncates(folder, chance):
    edit(gpt2(folder), lambda core: core.update(truncation=truncation(chance)))


@damage(KIND, BPE, Accepted("prepare"), times=4)
def a_bpe_that_pads(folder, chance):
    edit(gpt2(folder), lambda core: core.update(padding=padding(chance, "<|endoftext|>", 0)))


@damage(KIND, PIECES, Accepted("prepare bert"), times=3)
def a_wordpiece_that_truncates(folder, chance):
    edit(bert(folder), lambda core: core.update(truncation=truncation(chance)))


@damage(KIND, PIECES, Accepted("prepare bert"), times=3)
def a_wordpiece_that_pads(folder, chance):
    edit(bert(folder), lambda core: core.update(padding=padding(chance, "[PAD]", 0)))


@damage(KIND, BPE, Accepted("prepare"), times=2)
def a_bpe_that_does_both(folder, chance):
    both = {"truncation": truncation(chance), "padding": padding(chance, "<|endoftext|>", 0)}
    edit(gpt2(folder), lambda core: core.update(both))


@damage(KIND, f"{PREPARE} gpt2", Accepted("prepare"))
def a_folder_whose_tokenizer_truncates(folder, chance):
    edit(gpt2(folder), lambda core: core.update(truncation=truncation(chance)))


@damage(KIND, BPE, Accepted("prepare"), times=2)
def a_bpe_that_drops_merges_at_random(folder, chance):
    edit(gpt2(folder), lambda core: core["model"].update(dropout=chance.choice([0.1, 0.9])))


@damage(KIND, BPE, Accepted("prepare"))
def a_frame_of_special_tokens(folder, chance):
    end = {"id": "<|endoftext|>", "type_id": 0}
    frame = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": end}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            end["id"]: {"id": end["id"], "ids": [0], "tokens": [end["id"]]},
        },
    }
    edit(gpt2(folder), lambda core: core.update(post_processor=frame))


LOWER = "prepare lower.jsonl --out out --tokenizer gpt2/tokenizer.json"


@damage(KIND, LOWER, Accepted("prepare lower"), times=4)
def a_normalizer_that_changes_nothing_of_this_text(folder, chance):
    kind = chance.choice(["NFC", "NFKC", "NFD", "Lowercase", "StripAccents"])
    edit(gpt2(folder), lambda core: core.update(normalizer={"type": kind}))


@damage(KIND, LOWER.replace("lower.jsonl", "text.jsonl"), Accepted("prepare lower", "40 documents"))
def a_normalizer_that_makes_small_letters(folder, chance):
    edit(gpt2(folder), lambda core: core.update(normalizer={"type": "Lowercase"}))


# Damage


@damage(KIND, BPE, NAMED, times=6)
def a_bpe_cut_short(folder, chance):
    cut(gpt2(folder), chance)


@damage(KIND, PIECES, NAMED_BERT, times=4)
def a_wordpiece_cut_short(folder, chance):
    cut(bert(folder), chance)


for name, content in NOT_JSON.items():
    make = replace_by(content, "gpt2/tokenizer.json")
    add(KIND, f"{name} for a BPE", BPE, NAMED, make)
    add(
        KIND,
        f"{name} for a WordPiece",
        PIECES,
        NAMED_BERT,
        replace_by(content, "bert/tokenizer.json"),
    )


def set_at(*path):
    "Put a value into the JSON of a tokenizer."
    *path, last, value = path

    def change(core):
        for name in path:
            core = core[name]
        core[last] = value

    return change


WRONG = {  # places of a tokenizer.json and what cannot stand there
    "version": ["2.0", 7, None],
    "model": [None, 3, "BPE", [], {}, {"type": "Nonsense"}],
    "model.vocab": [None, 3, {}, {"a": -1}, {"a": 2**40}, {"a": "b"}, {"a": 1.5}],
    "model.merges": [None, 3, ["one"], [["a", "b", "c"]], [["nonsense", "none"]], [[1, 2]]],
    "added_tokens": [3, {}, ["a"], [{"id": -1}], [{"id": 0}]],
    "pre_tokenizer": [3, {"type": "Nonsense"}, []],
    "decoder": [3, {"type": "Nonsense"}],
    "normalizer": [3, {"type": "Nonsense"}],
    "truncation": [3, {"max_length": -1}, {"max_length": "all"}],
    "padding": [3, {"strategy": "Nonsense"}],
}
for place, values in WRONG.items():
    for value in values:
        if place == "model.vocab" and value == {}:
            expected = refused(r"gpt2/tokenizer\.json", "endoftext|merge|not a tokenizer")
        else:
            expected = NAMED
        change = set_at(*place.split("."), value)
        add(
            KIND,
            f"{place} is {json.dumps(value)}",
            BPE,
            expected,
            lambda folder, chance, change=change: edit(gpt2(folder), change) and None,
        )


@damage(KIND, BPE, refused(r"gpt2/tokenizer\.json", "endoftext"))
def no_end_of_documents(folder, chance):
    def change(core):
        core["added_tokens"] = []
        core["model"]["vocab"]["nothing"] = core["model"]["vocab"].pop("<|endoftext|>")

    edit(gpt2(folder), change)


@damage(KIND, BPE, NAMED)
def no_model(folder, chance):
    edit(gpt2(folder), lambda core: core.pop("model") and None)


@damage(KIND, BPE, refused(r"gpt2/tokenizer\.json"), times=3)
def an_id_beyond_all_memory(folder, chance):
    number = chance.choice([2**31, 2**32 - 2, 2**32 - 1])
    edit(gpt2(folder), set_at("model", "vocab", "surplus", number))


@damage(KIND, PIECES, NAMED_BERT, times=2)
def an_id_beyond_all_memory_in_a_wordpiece(folder, chance):
    edit(bert(folder), set_at("model", "vocab", "surplus", chance.choice([2**31, 2**32 - 1])))


for mark in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):

    def without(folder, chance, mark=mark):
        def change(core):
            core["added_tokens"] = [t for t in core["added_tokens"] if t["content"] != mark]
            core["model"]["vocab"]["nothing"] = core["model"]["vocab"].pop(mark)

        edit(bert(folder), change)

    expected = refused(r"bert/tokenizer\.json", mark.replace("[", r"\["))
    add(KIND, f"a WordPiece without {mark}", PIECES, expected, without)


# Kinds that do not fit


add(KIND, "a BERT's for a GPT-2", f"{PREPARE} bert/tokenizer.json", refused("bert/tokenizer"))
add(
    KIND, "a GPT-2's for a BERT", f"{PREPARE} gpt2/tokenizer.json --model bert", refused("gpt2/tok")
)
add(KIND, "text", f"{PREPARE} text.txt", refused(r"text\.txt"))
add(KIND, "no such path", f"{PREPARE} nowhere", refused("nowhere"))
add(
    KIND,
    "a folder without one",
    f"{PREPARE} huggingface/",
    refused("huggingface"),
    lambda folder, chance: [p.unlink() for p in (folder / "huggingface").glob("tok*")],
)
add(KIND, "a token file", f"{PREPARE} gpt2/tokens.bin", refused(r"gpt2/tokens\.bin"))


# Vocabularies in several files


add(KIND, "a pair of files", f"{PREPARE} pair", Accepted("prepare"))
add(KIND, "a vocabulary beside its merges", f"{PREPARE} pair/vocab.json", Accepted("prepare"))
add(KIND, "a vocab.txt", f"{PREPARE} vocab.txt --model bert", Accepted("prepare bert"))
PAIR = f"{PREPARE} pair"


def named_gpt2(folder, chance):
    for name in ("vocab.json", "merges.txt"):
        (folder / "pair" / name).rename(folder / "pair" / f"gpt2-{name}")


add(
    KIND,
    "a pair by other names",
    f"{PREPARE} pair/gpt2-vocab.json",
    Accepted("prepare"),
    named_gpt2,
)


@damage(KIND, f"{PREPARE} pair/vocab.json", refused("pair", "merges"))
def no_merges(folder, chance):
    (folder / "pair/merges.txt").unlink()


@damage(KIND, PAIR, refused("pair"), times=3)
def a_vocabulary_cut_short(folder, chance):
    cut(folder / "pair/vocab.json", chance)


@damage(KIND, PAIR, refused("pair"), times=3)
def a_line_of_merges_that_is_none(folder, chance):
    path = folder / "pair/merges.txt"
    lines = path.read_text().splitlines()
    lines[chance.randrange(1, len(lines))] = chance.choice(["alone", "a b c d", "zzz qqq"])
    path.write_text("\n".join(lines) + "\n")


for name in ("zeros", "latin-1", "utf-16", "many digits", "deep"):
    add(
        KIND,
        f"{name} for vocab.json",
        PAIR,
        refused("pair"),
        replace_by(NOT_JSON[name], "pair/vocab.json"),
    )
    if name in ("latin-1", "utf-16", "zeros"):
        add(
            KIND,
            f"{name} for vocab.txt",
            f"{PREPARE} vocab.txt --model bert",
            refused(r"vocab\.txt"),
            replace_by(NOT_JSON[name], "vocab.txt"),
        )


# Tokenizers that lose characters


def odd(folder, chance):
    "One line of several holds what the tokenizer has never seen."
    path = folder / "words.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(
        {"text": chance.choice(["The cat \u0416.", "\u4e2d\u6587 the cat", "na\u00efve cat"])}
    )
    path.write_text("\n".join(lines) + "\n")


for name in ("no_bytes", "word_level", "unigram"):
    line = f"prepare words.jsonl --out out --tokenizer {name}.json"
    add(KIND, f"characters that {name} does not know", line, refused(r"words\.jsonl", "3"), odd)


def surplus(folder, chance):
    "Characters that no token holds, each a word: without them the text is the clean one."
    path = folder / "words.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[:5]:
        line["text"] = line["text"].replace(" ", " \u0416 ")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


add(
    KIND,
    "characters that are lost knowingly",
    "prepare words.jsonl --lossy --out out --tokenizer no_bytes.json",
    Accepted("prepare words", "lost|lossy"),
    surplus,
)


@damage(KIND, f"{TRAIN} --data gpt2 --tokenizer other.json", refused(r"other\.json"))
def another_tokenizer_than_that_of_the_tokens(folder, chance):
    core = json.loads(gpt2(folder).read_text())
    vocab = core["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "other.json").write_text(json.dumps(core))


@damage(KIND, f"{TRAIN} --data gpt2", NAMED, times=2)
def beside_tokens_and_cut_short(folder, chance):
    cut(gpt2(folder), chance)


@damage(KIND, f"{TRAIN} --data gpt2", Accepted("train"))
def beside_tokens_and_truncating(folder, chance):
    edit(gpt2(folder), partial(dict.update, truncation=truncation(chance)))
