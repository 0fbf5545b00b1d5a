"Folders of transformers: fields, tensors, files."

import json
import random
import struct

from fuzz.cases import (
    NOT_JSON,
    READ,
    SEED,
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

KIND = "folders of transformers"
FOLDERS = {"gpt2": "huggingface", "bert": "huggingface_bert"}
CLEAN = {"gpt2": "read", "bert": "read bert"}
LINES = {kind: f"{READ} {folder}" for kind, folder in FOLDERS.items()}
CONFIG = r"config\.json"


def weights(folder, kind="gpt2"):
    return folder / FOLDERS[kind] / "model.safetensors"


def config(folder, kind="gpt2"):
    return folder / FOLDERS[kind] / "config.json"


def with_field(kind, name, value):
    return lambda folder, chance: edit(config(folder, kind), lambda c: c.update({name: value}))


# Fields


SIZES = {
    "gpt2": ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions"),
    "bert": (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        "intermediate_size",
        "type_vocab_size",
    ),
}
for kind, names in SIZES.items():
    for name in names:

        def without(folder, chance, kind=kind, name=name):
            edit(config(folder, kind), lambda c: c.pop(name) and None)

        add(KIND, f"{kind} without {name}", LINES[kind], refused(CONFIG, name), without)
        wrong = [0, -1, "16", None, 1.5, [], {}, True, 2**40, 10**30]
        for value in random.Random(f"{SEED} {name}").sample(wrong, 4):
            expected = refused(FOLDERS[kind])
            add(
                KIND,
                f"{kind}: {name} is {json.dumps(value)}",
                LINES[kind],
                expected,
                with_field(kind, name, value),
            )

VARIANTS = {
    "gpt2": {
        "model_type": ["llama", None, 3, [], "bert"],
        "activation_function": ["relu", None, 3, ["gelu"]],
        "scale_attn_weights": [False],
        "scale_attn_by_inverse_layer_idx": [True],
        "reorder_and_upcast_attn": [True],
        "add_cross_attention": [True],
        "layer_norm_epsilon": [0, -1, "1e-5", float("nan"), float("inf"), []],
        "resid_pdrop": [-1, 1, "0.1", [], float("nan")],
        "n_inner": [0, "64", 63, 2**40],
    },
    "bert": {
        "model_type": ["gpt2", "bert-generation"],
        "hidden_act": ["relu", None, {}],
        "position_embedding_type": ["relative_key"],
        "is_decoder": [True],
        "add_cross_attention": [True],
        "layer_norm_eps": [0, "x"],
        "hidden_dropout_prob": [2, "x"],
        "initializer_range": [0, "x", float("nan")],
    },
}
for kind, fields in VARIANTS.items():
    for name, values in fields.items():
        for value in values:
            add(
                KIND,
                f"{kind}: {name} is {json.dumps(value)}",
                LINES[kind],
                refused(FOLDERS[kind]),
                with_field(kind, name, value),
            )

for name, content in NOT_JSON.items():
    for kind in FOLDERS:
        expected = refused(FOLDERS[kind], CONFIG if content else "without a model")
        add(
            KIND,
            f"{kind}: {name} for config.json",
            LINES[kind],
            expected,
            replace_by(content, FOLDERS[kind], "config.json"),
        )

for name, value in {
    "architectures": ["GPT2Model"],
    "torch_dtype": "bfloat16",
    "dtype": "float16",
    "more": {"a": 1},
    "eos_token_id": 50256,
    "bos_token_id": None,
    "transformers_version": "9.9",
    "use_cache": False,
    "summary_type": "cls_index",
    "task_specific_params": {"text": {"max_length": 5}},
}.items():
    add(
        KIND,
        f"gpt2: {name} does not matter",
        LINES["gpt2"],
        Accepted("read"),
        with_field("gpt2", name, value),
    )


# Tensors


def edited(kind, name, expected, change, times=1):
    "Cases whose tensors are changed: `change(tensors, chance)`."

    def make(folder, chance):
        path = weights(folder, kind)
        content = tensors(path)
        change(content, chance)
        save_tensors(path, content)

    for number in range(times):
        more = f" {number + 1}" if times > 1 else ""
        add(KIND, f"{kind}: {name}{more}", LINES[kind], expected, make)


def one(content, chance) -> str:
    return chance.choice(sorted(content))


def poisoned(content, chance):
    name = one(content, chance)
    dtype, shape, raw = content[name]
    place = 4 * chance.randrange(len(raw) // 4)
    number = struct.pack("<f", chance.choice([float("nan"), float("inf"), -float("inf")]))
    content[name] = dtype, shape, raw[:place] + number + raw[place + 4 :]


def reshaped(content, chance):
    name = one(content, chance)
    dtype, shape, raw = content[name]
    content[name] = dtype, [len(raw) // 4, 1, 1], raw


def shortened(content, chance):
    name = chance.choice([n for n in sorted(content) if content[n][1][0] > 2])
    dtype, shape, raw = content[name]
    row = len(raw) // shape[0]
    content[name] = dtype, [shape[0] - 1, *shape[1:]], raw[:-row]


def of_whole_numbers(content, chance):
    name = one(content, chance)
    _, shape, raw = content[name]
    content[name] = "I32", shape, raw


def of_booleans(content, chance):
    name = one(content, chance)
    _, shape, raw = content[name]
    content[name] = "BOOL", shape, bytes(len(raw) // 4)


def doubled(content, chance):
    for name, (_, shape, raw) in list(content.items()):
        numbers = struct.unpack(f"<{len(raw) // 4}f", raw)
        content[name] = "F64", shape, struct.pack(f"<{len(numbers)}d", *numbers)


def huge(content, chance):
    "A double that no float32 can hold."
    name = one(content, chance)
    _, shape, raw = content[name]
    numbers = [0.0] * (len(raw) // 4)
    numbers[chance.randrange(len(numbers))] = 1e300
    content[name] = "F64", shape, struct.pack(f"<{len(numbers)}d", *numbers)


for kind in FOLDERS:
    named = refused(FOLDERS[kind])
    edited(
        kind,
        "a tensor is missing",
        named,
        lambda c, chance: c.pop(
            chance.choice(
                [
                    n
                    for n in sorted(c)
                    if "embeddings" in n or "wte" in n or "layer" in n or ".h." in n
                ]
            )
        ),
        4,
    )
    edited(kind, "a number that is none", named, poisoned, 5)
    edited(kind, "another shape", named, reshaped, 4)
    edited(kind, "a row less", named, shortened, 4)
    edited(kind, "a tensor of whole numbers", named, of_whole_numbers, 2)
    edited(kind, "a tensor of booleans", named, of_booleans)
    edited(kind, "doubles", Accepted(CLEAN[kind]), doubled)
    edited(kind, "too large a double", named, huge, 2)
    edited(kind, "no tensor at all", named, lambda c, chance: c.clear())


def renamed(old, new):
    def change(content, chance):
        for name in [name for name in content if old in name]:
            content[name.replace(old, new)] = content.pop(name)

    return change


def copied(old, new, change=lambda raw: raw):
    def make(content, chance):
        dtype, shape, raw = content[old]
        content[new] = dtype, shape, change(raw)

    return make


def other(raw: bytes) -> bytes:
    return raw[4:] + raw[:4]


WTE = "transformer.wte.weight"
edited("gpt2", "names without a prefix", Accepted("read"), renamed("transformer.", ""))
edited("gpt2", "a tied output layer", Accepted("read"), copied(WTE, "lm_head.weight"))
edited(
    "gpt2",
    "an untied output layer",
    refused("huggingface", "lm_head"),
    copied(WTE, "lm_head.weight", other),
    2,
)
edited(
    "gpt2",
    "an untied output layer without a prefix",
    refused("huggingface", "lm_head"),
    lambda c, chance: (
        copied(WTE, "lm_head.weight", other)(c, chance),
        renamed("transformer.", "")(c, chance),
    ),
)
edited(
    "gpt2",
    "buffers of masks",
    Accepted("read"),
    lambda c, chance: c.update(
        {
            "transformer.h.0.attn.bias": ("BOOL", [1, 1, 4, 4], bytes(16)),
            "transformer.h.0.attn.masked_bias": ("F32", [], struct.pack("<f", -1e4)),
        }
    ),
)


def another_layer(old, new):
    def change(content, chance):
        for name in [name for name in content if old in name]:
            content[name.replace(old, new)] = content[name]

    return change


edited(
    "gpt2", "a surplus layer", refused("huggingface", r"h\.[1-9]"), another_layer(".h.0.", ".h.1.")
)
edited(
    "gpt2",
    "a surplus layer far away",
    refused("huggingface", r"h\.\d"),
    another_layer(".h.0.", ".h.11."),
)
edited(
    "gpt2",
    "one tensor of a surplus layer",
    refused("huggingface", r"h\.[1-9]"),
    copied("transformer.h.0.ln_1.weight", "transformer.h.3.ln_1.weight"),
)
edited(
    "gpt2",
    "a surplus head",
    Accepted("read", "score|head"),
    lambda c, chance: c.update(
        {
            "score.weight": ("F32", [2, 16], bytes(128)),
        }
    ),
)
edited(
    "bert",
    "a surplus layer",
    refused("huggingface_bert", r"layer\.[1-9]"),
    another_layer("layer.0.", "layer.1."),
)
edited(
    "bert",
    "a surplus head",
    Accepted("read bert", "classifier|head"),
    lambda c, chance: c.update(
        {
            "classifier.weight": ("F32", [2, 16], bytes(128)),
            "classifier.bias": ("F32", [2], bytes(8)),
        }
    ),
)
edited("bert", "names without a prefix", Accepted("read bert"), renamed("bert.", ""))
edited(
    "bert",
    "old names",
    Accepted("read bert"),
    lambda c, chance: (
        renamed("LayerNorm.weight", "LayerNorm.gamma")(c, chance),
        renamed("LayerNorm.bias", "LayerNorm.beta")(c, chance),
    ),
)
edited(
    "bert",
    "buffers of positions",
    Accepted("read bert"),
    lambda c, chance: c.update(
        {
            "bert.embeddings.position_ids": ("I64", [1, 32], bytes(256)),
        }
    ),
)
TABLE, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
edited("bert", "a tied decoder", Accepted("read bert"), copied(TABLE, DECODER))
edited(
    "bert",
    "an untied decoder",
    refused("huggingface_bert", "decoder"),
    copied(TABLE, DECODER, other),
)


# Files


def in_two_files(folder, chance):
    "The tensors in two files, and an index."
    path = weights(folder)
    content = tensors(path)
    path.unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {name: chance.choice(names) for name in content}
    where.update(dict(zip(sorted(content), names)))  # none is empty
    for name in names:
        part = {key: each for key, each in content.items() if where[key] == name}
        save_tensors(path.with_name(name), part)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


add(KIND, "two files and an index", LINES["gpt2"], Accepted("read"), in_two_files)


def index_edited(name, change):
    def make(folder, chance):
        in_two_files(folder, chance)
        edit(folder / "huggingface/model.safetensors.index.json", lambda c: change(c, chance))

    add(KIND, f"an index in which {name}", LINES["gpt2"], refused("huggingface"), make)


def all_in(path):
    return lambda c, chance: c["weight_map"].update(dict.fromkeys(c["weight_map"], path))


index_edited("files are missing", all_in("nowhere.safetensors"))
index_edited("files lie elsewhere", all_in("../text.jsonl"))
index_edited("files are folders", all_in("."))
index_edited("a file has no name", all_in(""))
index_edited("a file is a number", all_in(3))
index_edited("a file is none", all_in(None))
index_edited("there is no map", lambda c, chance: c.pop("weight_map") and None)
index_edited("the map is a list", lambda c, chance: c.update(weight_map=[1, 2]))
index_edited("the map is empty", lambda c, chance: c.update(weight_map={}))
index_edited("the map is text", lambda c, chance: c.update(weight_map="model.safetensors"))
for name in ("deep", "latin-1", "null", "many digits"):

    def make(folder, chance, name=name):
        in_two_files(folder, chance)
        (folder / "huggingface/model.safetensors.index.json").write_bytes(NOT_JSON[name])

    add(KIND, f"{name} for the index", LINES["gpt2"], refused("huggingface"), make)

for kind in FOLDERS:
    named = refused(FOLDERS[kind])

    def header(change, kind=kind):
        def changed(folder, chance):
            described, data = read_tensors(weights(folder, kind))
            name = chance.choice(sorted(n for n in described if n != "__metadata__"))
            change(described, name)
            write_tensors(weights(folder, kind), described, data)

        return changed

    for name, make in {
        "weights cut short": lambda folder, chance, kind=kind: cut(weights(folder, kind), chance),
        "weights cut short once more": lambda folder, chance, kind=kind: cut(
            weights(folder, kind), chance
        ),
        "a first byte changed": lambda folder, chance, kind=kind: flip(
            weights(folder, kind), 8, 9, chance
        ),
        "a huge header": lambda folder, chance, kind=kind: weights(folder, kind).write_bytes(
            struct.pack("<Q", 2**62) + weights(folder, kind).read_bytes()[8:]
        ),
        "overlapping tensors": header(lambda h, name: h[name].update(data_offsets=[0, 64])),
        "a type that is none": header(lambda h, name: h[name].update(dtype="F7")),
        "a shape of text": header(lambda h, name: h[name].update(shape="16")),
        "a negative shape": header(lambda h, name: h[name].update(shape=[-4])),
        "pickled weights alone": lambda folder, chance, kind=kind: weights(folder, kind).rename(
            weights(folder, kind).with_name("pytorch_model.bin")
        ),
        "a folder for the weights": lambda folder, chance, kind=kind: (
            weights(folder, kind).unlink(),
            weights(folder, kind).mkdir(),
        ),
        "a link to nothing": lambda folder, chance, kind=kind: (
            weights(folder, kind).unlink(),
            weights(folder, kind).symlink_to("nowhere"),
        ),
        "no config": lambda folder, chance, kind=kind: config(folder, kind).unlink(),
    }.items():
        add(KIND, f"{kind}: {name}", LINES[kind], named, make)


@damage(KIND, LINES["gpt2"], Accepted("read"))
def no_tokenizer(folder, chance):
    for path in (folder / "huggingface").glob("tokenizer*"):
        path.unlink()


@damage(KIND, LINES["gpt2"], refused(r"huggingface/tokenizer\.json"))
def a_tokenizer_that_is_none(folder, chance):
    (folder / "huggingface/tokenizer.json").write_text("{")


add(KIND, "nothing there", f"{READ} nowhere", refused("nowhere"))
add(KIND, "a file", f"{READ} text.txt", refused(r"text\.txt"))
add(KIND, "a run", f"{READ} run", refused("run"))
add(KIND, "prepared tokens", f"{READ} gpt2", refused("gpt2"))
