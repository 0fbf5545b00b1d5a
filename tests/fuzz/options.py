"What is typed: values, names, repetitions and contradictions of options."

import random

from fuzz.cases import GENERATE, SEED, TRAIN, TRAIN_BERT, Accepted, add, refused

KIND = "options"
LINE = f"{TRAIN} --data gpt2"
PREPARE = "prepare text.jsonl --out out"
HUGE = [2**63, 10**30]
DIGITS = "9" * 5000


def each(line, option, values, *naming):
    "One case for each value of an option that cannot be."
    name = option.strip("-").replace("-", "[-_]")
    for value in values:
        shown = ascii(value) if len(str(value)) < 40 else f"{len(str(value))} characters"
        words = [*line.split(), f"{option}={value}"]
        bert = " of a BERT" if "bert" in line else ""
        add(KIND, f"{words[0]}{bert} {option}={shown}", words, refused(*(naming or (name,))))


NO_COUNTS = [
    0,
    -1,
    1.5,
    "nan",
    "inf",
    "1e3",
    "",
    " ",
    "x",
    "0x10",
    "1,000",
    "--",
    "None",
    "true",
    DIGITS,
]
for option in ("steps", "batch-size", "eval-every", "eval-batches", "log-every", "save-every"):
    each(LINE, f"--{option}", random.Random(f"{SEED} {option}").sample(NO_COUNTS, 7))
for option in (
    "num-layers",
    "hidden-size",
    "num-heads",
    "max-seq-len",
    "vocab-multiple",
    "tp",
    "dp",
):
    each(LINE, f"--{option}", [0, -1, 1.5, "nan", "x", "", DIGITS])
each(LINE, "--micro-batch", [0, -1, 1.5, "x", 3])
for option in ("steps", "batch-size", "eval-batches"):
    each(LINE, f"--{option}", HUGE)
for option in ("num-layers", "hidden-size", "max-seq-len", "vocab-multiple", "ffn-hidden-size"):
    each(
        LINE, f"--{option}", [2**40, *HUGE], "memory|must|divide|long|text|documents|tokens|at most"
    )
each(LINE, "--num-heads", [3, 5, 2**63], "heads")
each(LINE, "--tp", [3, 4, 2**40, 10**30], "tp")
each(LINE, "--dp", [3, 2**40, 10**30], "dp|replica|batch|rank|memory")
each(LINE, "--warmup-steps", [-1, 1.5, "x", "nan"])

NO_NUMBERS = ["nan", "-1", "x", "", "1e999", "1e", "0,1", "one", "-inf", "++1"]
for option in ("lr", "weight-decay", "eps", "init-std", "layer-norm-eps", "min-lr"):
    each(LINE, f"--{option}", NO_NUMBERS)
for option in ("beta1", "beta2", "dropout"):
    each(LINE, f"--{option}", ["nan", "-0.1", "1", "x", "", "inf"])
each(LINE, "--validation", ["nan", "0", "1", "-0.1", "1.5", "x"], "validation")
each(LINE, "--clip", ["nan", "0", "-1", "x"])
each(LINE, "--lr", ["0", "1e-5"], "lr")

for option in ("precision", "decay", "gelu", "resume"):
    each(LINE, f"--{option}", ["", "x", "FP32", "None", "never ", "fp32,bf16"])
each(LINE, "--preset", ["", "Tiny", "gpt3", "../tiny", "tiny "])
each(LINE, "--model", ["", "GPT2", "bert ", "llama"])
each(LINE, "--compile", ["x", "1"], "Unrecognized|compile")
each(LINE, "--seed", [-1, 2**63, 2**64, 10**30, "x", "1.5", "nan", DIGITS])
each(LINE, "--text-field", ["\udce9"], "UTF-8")
each(LINE, "--vocab-size", [0, -1, 299, 301, "x", 10**30], "vocab[-_]size")
each(
    LINE,
    "--data",
    ["", "nowhere", "gpt2/nowhere", "\u0000", "x" * 300, "~", "*"],
    "data|gpt2|nowhere|path|file|xxx|~|\\*",
)
each(TRAIN_BERT + " --data bert", "--num-token-types", [0, -1, "x"])
each(TRAIN_BERT + " --data bert", "--layer-norm", ["", "mid"])

each(GENERATE, "--tokens", [0, -1, 1.5, "nan", "x", "", DIGITS])
each(GENERATE, "--temperature", ["-1", "nan", "inf", "x", "", "-1e-300"])
each(GENERATE, "--top-k", [0, -1, 1.5, "x"])
each(GENERATE, "--top-p", [0, -1, 1.5, "nan", "x"])
each(GENERATE, "--seed", [-1, 2**63, 10**30, "x"])
each(GENERATE, "--tp", [0, -1, 3, "x", 2**40])
each(GENERATE, "--prompt", ["caf\udce9", "\udc80"], "UTF-8")
add(
    KIND,
    "generate: all of the smallest temperatures",
    f"{GENERATE} --temperature 1e-310",
    Accepted("generate"),
)
add(
    KIND,
    "generate: choices of all tokens",
    "generate run --tokens 8 --prompt the --seed 3 --top-k 999",
    Accepted("generate at random"),
)
add(
    KIND,
    "generate: all probability",
    "generate run --tokens 8 --prompt the --seed 3 --top-p 1.0",
    Accepted("generate at random"),
)
add(KIND, "generate: one choice", f"{GENERATE} --temperature 2 --top-k 1", Accepted("generate"))

each(PREPARE, "--vocab-size", [0, 1, 256, -1, "x", "nan", 1.5, "", 2**64, 10**30])
each(PREPARE, "--text-field", ["", "body", "Text", "text "], r"text\.jsonl", "line 1")
each(PREPARE, "--model", ["", "t5", "BERT"])
each(f"{PREPARE} --model bert", "--vocab-size", [0, 5, -1, 2**64])

each("convert --from run --to out", "--format", ["", "onnx", "HuggingFace"])
each(
    "convert --to out",
    "--from",
    ["", "nowhere", "text.txt", "x" * 300],
    "from|nowhere|text|xxx|path|folder",
)
each("demo --out out", "--steps", [0, -1, "x"])
each("demo --out out", "--tp", [0, -1, "x", 3])
each("demo --out out", "--seed", [-1, 2**63, "x"])
each("bench", "--cases", ["x", "", "fp64-batch-8"])
each("bench", "--rounds", [0, 1, -1, "x"])
each("bench", "--seconds", [0, -1, "nan", "inf", "x"])

# Names

UNKNOWN = [
    "--stepz",
    "--step-s",
    "--Steps",
    "--no-such",
    "-x",
    "---steps",
    "--steps.count",
    "--run.steps",
]
for name in UNKNOWN:
    add(KIND, f"unknown {name}", f"{LINE} {name} 3", refused(name.lstrip("-")[:4]))
for verb in (
    "prepare text.jsonl --out out",
    "generate run",
    "convert --from run --to out",
    "demo",
    "bench",
    "presets",
    "doctor",
    "break",
):
    add(KIND, f"{verb.split()[0]} --no-such", f"{verb} --no-such 3", refused("no-such"))
for verb in (
    "Train",
    "trian",
    "prep",
    "",
    " ",
    "-x",
    "--verbose",
    "generate2",
    "\u0442rain",
    "caf\udce9",
):
    expected = refused("verb|no such|UTF-8|unknown")
    add(KIND, f"the verb {ascii(verb)}", [verb, "--data", "gpt2"], expected)
for line, name in {
    "prepare text.jsonl": "out",
    "prepare --out out": "input|path",
    "generate": "run",
    "convert --from run": "to",
    "convert --to out": "from",
    f"{TRAIN}": "data",
    "train --data gpt2": "out",
}.items():
    add(KIND, f"missing {name}: {' '.join(line.split()[:1])}", line, refused(f"(?i){name}"))
for option in ("--steps", "--lr", "--precision", "--data", "--seed"):
    words = [word for word in LINE.split()]
    if option == "--data":
        words = TRAIN.split()
    naming = "path|data" if option == "--data" else option.lstrip("-")
    add(KIND, f"no value for {option}", [*words, option], refused(naming))
add(KIND, "a word too many", f"{GENERATE} more", refused("more"))
add(KIND, "an option twice, the last one counts", f"{LINE} --steps 7 --steps 2", Accepted("train"))
add(
    KIND,
    "an option in both spellings",
    LINE.replace("--batch-size", "--batch_size"),
    Accepted("train"),
)
add(
    KIND, "an option with an equals sign", LINE.replace("--steps 2", "--steps=2"), Accepted("train")
)
add(
    KIND,
    "options in another order",
    "train --data gpt2 " + TRAIN.removeprefix("train "),
    Accepted("train"),
)
add(KIND, "a model that is the preset's", f"{LINE} --model gpt2", Accepted("train"))

# Contradictions

add(KIND, "a BERT by a preset of a GPT-2", f"{LINE} --model bert", refused("bert", "tiny"))
add(
    KIND,
    "a GPT-2 by a preset of a BERT",
    f"{TRAIN_BERT} --data bert --model gpt2",
    refused("gpt2", "bert-tiny"),
)
add(KIND, "a rate below the lowest", f"{LINE} --lr 1e-4 --min-lr 1e-3", refused("min[-_]lr"))
add(KIND, "heads that do not divide", f"{LINE} --hidden-size 15", refused("hidden[-_]size"))
add(KIND, "a batch that does not divide", f"{LINE} --dp 2 --batch-size 3", refused("batch"))
add(KIND, "a micro-batch over the batch", f"{LINE} --micro-batch 4", refused("batch"))
add(KIND, "pipelines", f"{LINE} --pp 2", refused("pp"))
add(
    KIND,
    "a sequence longer than the text",
    f"{LINE} --max-seq-len 9999",
    refused("text|token|document"),
)
