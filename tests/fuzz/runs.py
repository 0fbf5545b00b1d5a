"Runs and their checkpoints, damaged: of the newest one, of its JSON, its tensors, its metrics."

import json
import struct

from fuzz.cases import (
    GENERATE,
    NOT_JSON,
    RESUME,
    Accepted,
    add,
    cut,
    damage,
    edit,
    flip,
    read_tensors,
    refused,
    replace_by,
    save_tensors,
    tensors,
    write_tensors,
)

KIND = "runs"
NEWEST = "run/step-00000002"
SAID = "step-00000002"  # a resumed run names the checkpoint that it passes over
WRITE = "convert --from run --to out"


def model(folder):
    return folder / NEWEST / "model.safetensors"


def both(name, make, file, resumed=None):
    "A damage of the newest checkpoint: `generate` refuses it, `--resume auto` passes it over."
    file = file.replace(".", r"\.")
    add(KIND, f"{name}: generate", GENERATE, refused(f"{NEWEST}/{file}"), make)
    add(
        KIND, f"{name}: resume", RESUME, resumed or Accepted("resume earlier", SAID), make, ["gpt2"]
    )


for name, content in NOT_JSON.items():
    both(f"{name} for config.json", replace_by(content, NEWEST, "config.json"), "config.json")
    make = replace_by(content, NEWEST, "state.json")
    add(
        KIND,
        f"{name} for state.json: resume",
        RESUME,
        Accepted("resume earlier", SAID),
        make,
        ["gpt2"],
    )

WRONG_SIZES = {
    "num_layers": [0, -1, 2, "1", None, 1.0, True, [1], 10**9, 10**30],
    "hidden_size": [0, 17, 32, "16", None, 2**40],
    "num_heads": [0, 3, "2", None],
    "vocab_size": [0, "300", None, 10**12],
    "max_seq_len": [0, 17, None, "16", 10**15],
    "dropout": [-1, 1, "0", None],
    "layer_norm_eps": [0, -1, "1", None],
    "gelu": [None, "relu", 3],
    "ffn_hidden_size": [0, "64", 65, 10**15],
    "vocab_multiple": [0, None, "4"],
}
for field, values in WRONG_SIZES.items():
    for value in values:
        if value is None and field == "ffn_hidden_size":
            continue

        def make(folder, chance, field=field, value=value):
            edit(folder / NEWEST / "config.json", lambda c: c["model"].update({field: value}))

        name = f"{field} is {json.dumps(value)}: generate"
        add(KIND, name, GENERATE, refused(NEWEST, f"{field}|tensor|weight|shape|memory"), make)

for field in ("num_layers", "hidden_size", "vocab_size"):

    def make(folder, chance, field=field):
        edit(folder / NEWEST / "config.json", lambda c: c["model"].pop(field) and None)

    both(f"config.json without {field}", make, "config.json")


@damage(KIND, GENERATE, refused(f"{NEWEST}/config.json"), times=3)
def of_an_unknown_architecture(folder, chance):
    kind = chance.choice(["llama", None, 3, [], {}])
    edit(folder / NEWEST / "config.json", lambda c: c.update(architecture=kind))


@damage(KIND, RESUME, Accepted("resume earlier", SAID), times=6, needs=["gpt2"])
def a_step_that_is_none(folder, chance):
    step = chance.choice([None, "2", -1, 2.5, [], True, 10**30, 3])
    edit(folder / NEWEST / "state.json", lambda c: c.update(step=step))


@damage(KIND, RESUME, Accepted("resume earlier", SAID), times=4, needs=["gpt2"])
def samples_that_were_not_consumed(folder, chance):
    consumed = chance.choice([None, "4", -4, 2.5, 10**30, {}])
    edit(folder / NEWEST / "state.json", lambda c: c.update(consumed=consumed))


@damage(KIND, RESUME, Accepted("resume earlier", SAID), needs=["gpt2"])
def no_samples_consumed(folder, chance):
    edit(folder / NEWEST / "state.json", lambda c: c.pop("consumed") and None)


# Tensors


def header_edited(name, change, file="model.safetensors"):
    def make(folder, chance):
        header, data = read_tensors(folder / NEWEST / file)
        change(header, chance)
        write_tensors(folder / NEWEST / file, header, data)

    both(f"{name} in {file}", make, file) if file == "model.safetensors" else add(
        KIND, f"{name} in {file}: resume", RESUME, Accepted("resume earlier", SAID), make, ["gpt2"]
    )


def some(header, chance) -> str:
    return chance.choice(sorted(name for name in header if name != "__metadata__"))


for file in ("model.safetensors", "optimizer.safetensors"):
    header_edited("a tensor is missing", lambda h, c: h.pop(some(h, c)), file)
    header_edited("a shape is wrong", lambda h, c: h[some(h, c)].update(shape=[3, 5, 7]), file)
    header_edited("a type is none", lambda h, c: h[some(h, c)].update(dtype="F33"), file)
    header_edited(
        "offsets are negative", lambda h, c: h[some(h, c)].update(data_offsets=[-4, 0]), file
    )
    header_edited(
        "offsets are huge", lambda h, c: h[some(h, c)].update(data_offsets=[0, 2**60]), file
    )
    header_edited("a header field is no object", lambda h, c: h.update({some(h, c): 3}), file)


def whole(name, change):
    "A damage of the bytes of either file of tensors."

    def make_model(folder, chance):
        change(model(folder), chance)

    def make_moments(folder, chance):
        change(folder / NEWEST / "optimizer.safetensors", chance)

    for number in range(2):
        both(f"{name} {number + 1}, model", make_model, "model.safetensors")
    add(
        KIND,
        f"{name}, moments: resume",
        RESUME,
        Accepted("resume earlier", SAID),
        make_moments,
        ["gpt2"],
    )
    add(KIND, f"{name}, moments: generate", GENERATE, Accepted("generate"), make_moments)


def lengthen(path, chance):
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", chance.choice([0, 1, 2**20, 2**40, 2**63])) + data[8:])


whole("cut short", cut)
whole("another length of the header", lengthen)
whole("a first byte changed", lambda path, chance: flip(path, 8, 9, chance))
whole("missing", lambda path, chance: path.unlink())
whole("a folder", lambda path, chance: (path.unlink(), path.mkdir()))
whole("nothing", lambda path, chance: path.write_bytes(b""))


def poisoned(path, chance):
    "One number of one tensor is none."
    content = tensors(path)
    name = chance.choice(sorted(content))
    dtype, shape, raw = content[name]
    place = 4 * chance.randrange(len(raw) // 4)
    number = struct.pack("<f", chance.choice([float("nan"), float("inf"), -float("inf")]))
    content[name] = dtype, shape, raw[:place] + number + raw[place + 4 :]
    save_tensors(path, content)


whole("a number that is none", poisoned)


@damage(KIND, WRITE, refused(r"model\.safetensors"), times=3)
def a_number_that_is_none_is_not_converted(folder, chance):
    poisoned(model(folder), chance)


# All checkpoints, and none


@damage(KIND, RESUME, refused("step-0000000[12]"), needs=["gpt2"])
def all_checkpoints_cut_short(folder, chance):
    for path in (folder / "run").glob("step-*/model.safetensors"):
        cut(path, chance)


@damage(KIND, GENERATE, refused("run"))
def no_checkpoint(folder, chance):
    import shutil

    for path in (folder / "run").glob("step-*"):
        shutil.rmtree(path)


# Metrics: they are a record, no state


def metrics_end_with(name, line: bytes):
    def make(folder, chance):
        with (folder / "run/metrics.jsonl").open("ab") as stream:
            stream.write(line)

    add(KIND, f"metrics that end with {name}", RESUME, Accepted("resume"), make, ["gpt2"])


metrics_end_with("zeros", bytes(6) + b"\n")
metrics_end_with("half a line", b'{"step": 3, "lo')
metrics_end_with("half a line and its end", b'{"step": 3, "lo\n')
metrics_end_with("bytes that are no text", b"\xff\xfe\xe9\n")
metrics_end_with("a list", b"[3]\n")
metrics_end_with("a number", b"3\n")
metrics_end_with("null", b"null\n")
metrics_end_with("a line without a step", b'{"loss": 3.0}\n')
metrics_end_with("a step that is text", b'{"step": "three"}\n')
metrics_end_with("a step that is null", b'{"step": null}\n')
metrics_end_with("a step that is NaN", b'{"step": NaN}\n')
metrics_end_with("a line that is deep", b"[" * 100_000 + b"\n")
metrics_end_with("a line of digits", b"9" * 5000 + b"\n")
metrics_end_with("later steps", b'{"step": 3, "loss": 1.0, "grad_norm": 1.0}\n')
metrics_end_with("blank lines", b"\n\n")


# The tokens and the tokenizer of a run


for name in ("null", "deep", "latin-1", "half"):
    make = replace_by(NOT_JSON[name], "run/tokenizer.json")
    add(KIND, f"{name} for the tokenizer", GENERATE, refused(r"run/tokenizer\.json"), make)


@damage(KIND, GENERATE, refused("token|vocab"))
def a_tokenizer_with_ids_that_the_model_does_not_have(folder, chance):
    def change(core):
        core["added_tokens"].append(core["added_tokens"][0] | {"content": "the", "id": 700})

    edit(folder / "run/tokenizer.json", change)


@damage(KIND, GENERATE, refused(r"tokenizer\.json"))
def no_tokenizer(folder, chance):
    (folder / "run/tokenizer.json").unlink()


@damage(KIND, RESUME, refused("token"), times=3, needs=["gpt2"])
def other_tokens(folder, chance):
    path = folder / "gpt2/tokens.bin"
    data = bytearray(path.read_bytes())
    place = 2 * chance.randrange(len(data) // 2)
    data[place : place + 2] = struct.pack(
        "<H", (struct.unpack_from("<H", data, place)[0] + 1) % 290
    )
    path.write_bytes(data)


add(KIND, "nothing there", "generate nowhere", refused("nowhere"))
add(KIND, "a text", "generate text.txt", refused(r"text\.txt"))
add(KIND, "prepared tokens", "generate gpt2", refused("gpt2"))
add(KIND, "a folder of transformers", "generate huggingface", refused("huggingface"))
add(KIND, "a BERT", "generate run_bert", refused("run_bert|BERT|bert"))
add(
    KIND, "a checkpoint by its name", GENERATE.replace(" run ", f" {NEWEST} "), Accepted("generate")
)
