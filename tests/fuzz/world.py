"The clean input of all cases: text, tokens, tokenizers, runs and folders of transformers."

import json
import random
import shutil
from pathlib import Path

from fuzz.cases import TRAIN, TRAIN_BERT
from plain import make_plain

WORDS = "the a cat dog sat ran on under mat tree house river stone green blue old new".split()
DOCUMENTS = 40


def sentence(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=8)).capitalize() + "."


def documents() -> list[str]:
    chance = random.Random(1)
    return [" ".join(sentence(chance) for _ in range(6)) for _ in range(DOCUMENTS)]


def write_lines(path: str, texts: list[str]) -> None:
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def other_tokenizers(texts: list[str]) -> None:
    "Tokenizers that cannot express all text."
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    def made(model, trainer, before, path):
        core = Tokenizer(model)
        core.pre_tokenizer = before
        core.train_from_iterator(texts, trainer)
        core.save(path)

    end, quiet = ["<|endoftext|>"], {"show_progress": False}
    words = pre_tokenizers.Whitespace()
    made(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=200, special_tokens=end, **quiet),
        words,
        "no_bytes.json",
    )
    made(
        models.WordLevel(),
        trainers.WordLevelTrainer(special_tokens=end, **quiet),
        words,
        "word_level.json",
    )
    made(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=80, special_tokens=end, **quiet),
        pre_tokenizers.Metaspace(),
        "unigram.json",
    )


def pairs() -> None:
    "The tokenizer of `gpt2` as vocab.json and merges.txt, that of `bert` as vocab.txt."
    core = json.loads(Path("gpt2/tokenizer.json").read_text())
    Path("pair").mkdir()
    Path("pair/vocab.json").write_text(json.dumps(core["model"]["vocab"]))
    merges = [
        " ".join(pair) if isinstance(pair, list) else pair for pair in core["model"]["merges"]
    ]
    Path("pair/merges.txt").write_text("#version: 0.2\n" + "".join(f"{m}\n" for m in merges))
    vocab = json.loads(Path("bert/tokenizer.json").read_text())["model"]["vocab"]
    Path("vocab.txt").write_text("".join(f"{token}\n" for token in sorted(vocab, key=vocab.get)))


def make() -> None:
    "Fill the current folder."
    from megatron_edu.cli import main

    texts = documents()
    write_lines("text.jsonl", texts)
    write_lines("lower.jsonl", [text.lower() for text in texts])
    write_lines("words.jsonl", [text.replace("green", "") for text in texts])
    Path("text.txt").write_text("\n\n".join(texts))
    main("prepare text.jsonl --vocab-size 300 --out gpt2".split())
    main("prepare text.jsonl --model bert --vocab-size 200 --out bert".split())
    other_tokenizers(texts)
    pairs()
    main(f"{TRAIN} --data gpt2 --out run".split())
    for folder in Path("run").glob("step-*"):       # of this version: tests/training/test_damage.py
        make_plain(folder)
    shutil.copytree("run", "earlier")
    shutil.rmtree("earlier/step-00000002")
    main(f"{TRAIN_BERT} --data bert --out run_bert".split())
    main("convert --from run --to huggingface".split())
    main("convert --from run_bert --to huggingface_bert".split())
