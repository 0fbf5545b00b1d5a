"Where the command is told to write: what is not ours is never changed."

import os

from fuzz.cases import TRAIN, Accepted, add, refused

KIND = "targets"
LINES = {  # verb -> its line without the target, the option, and the clean line
    "prepare": ("prepare text.jsonl --vocab-size 300", "--out", "prepare"),
    "train": (TRAIN.replace(" --out out", "") + " --data gpt2", "--out", "train"),
    "convert": ("convert --from run", "--to", "write"),
    "read": ("convert --format megatron_edu --from huggingface", "--to", "read"),
}


def a_file(folder, chance):
    (folder / "target").write_text("the only copy")


def a_link_to_a_file(folder, chance):
    (folder / "precious").write_text("the only copy")
    (folder / "target").symlink_to("precious")


def a_link_to_nothing(folder, chance):
    (folder / "target").symlink_to("nowhere")


def a_pipe(folder, chance):
    os.mkfifo(folder / "target")


def a_folder_of_mine(folder, chance):
    (folder / "target").mkdir()
    (folder / "target/notes.txt").write_text("the only copy")


def a_folder_with_a_hidden_file(folder, chance):
    (folder / "target").mkdir()
    (folder / "target/.hidden").write_text("the only copy")


def a_folder_of_folders(folder, chance):
    (folder / "target/deeper/still").mkdir(parents=True)


def a_link_to_a_folder_of_mine(folder, chance):
    a_folder_of_mine(folder, chance)
    (folder / "target").rename(folder / "mine")
    (folder / "target").symlink_to("mine")


def a_file_like_ours(folder, chance):
    "A folder with one file that has a name of ours, and is not."
    (folder / "target").mkdir()
    name = chance.choice(["tokens.bin", "config.json", "metrics.jsonl", "tokenizer.json"])
    (folder / "target" / name).write_text("the only copy")


OCCUPIED = [
    a_file,
    a_link_to_a_file,
    a_link_to_nothing,
    a_pipe,
    a_folder_of_mine,
    a_folder_with_a_hidden_file,
    a_folder_of_folders,
    a_link_to_a_folder_of_mine,
    a_file_like_ours,
]
for verb, (line, option, clean) in LINES.items():
    for make in OCCUPIED:
        name = f"{verb}: {make.__name__.replace('_', ' ')}"
        add(KIND, name, f"{line} {option} target", refused("target"), make)
        if verb != "train":
            add(
                KIND,
                f"{name}, to overwrite",
                f"{line} {option} target --overwrite",
                refused("target"),
                make,
            )

    for name, target in {
        "here": ".",
        "above": "..",
        "a file for a folder": "text.jsonl/out",
        "too long": "x" * 300,
        "below a file": "text.jsonl/a/b",
        "the text": "text.jsonl",
        "nothing": "",
    }.items():
        naming = refused(option.strip("-") + "|[.]|text|xxx")
        words = [*line.split(), option, target]
        add(KIND, f"{verb}: {name}", words, naming, needs=["text.jsonl"])

    for name, target in {
        "new": "out",
        "deep": "a/b/c",
        "with a slash": "out/",
        "from here": "./out",
        "spaces": "a b c",
        "letters": "\u0444\u0430\u0439\u043b \u4e2d",
        "a dot": ".hidden",
        "a dash in it": "a-b",
        "roundabout": "out/../out2",
        "quotes": 'it\'s "out"',
        "a percent sign": "100%d{x}",
    }.items():
        words = [*line.split(), option, target]
        add(KIND, f"{verb}: {name}", words, Accepted(clean))

    def empty(folder, chance):
        (folder / "target").mkdir()

    add(KIND, f"{verb}: an empty folder", f"{line} {option} target", Accepted(clean), empty)

# Folders of ours, of another verb

for verb, target in [
    ("prepare", "run"),
    ("prepare", "huggingface"),
    ("train", "gpt2"),
    ("train", "huggingface"),
    ("convert", "run"),
    ("convert", "gpt2"),
    ("read", "run"),
    ("read", "gpt2"),
    ("read", "huggingface"),
    ("prepare", "gpt2"),
    ("train", "run"),
    ("convert", "huggingface"),
    ("convert", "run/step-00000002"),
    ("prepare", "run/step-00000002"),
    ("train", "run/step-00000002"),
]:
    line, option, _ = LINES[verb]
    add(KIND, f"{verb} into {target}", f"{line} {option} {target}", refused(target))
    if verb != "train" and target in ("run", "run/step-00000002"):
        add(KIND, f"{verb} over {target}", f"{line} {option} {target} --overwrite", refused(target))

add(
    KIND,
    "prepare over what it wrote",
    "prepare text.jsonl --vocab-size 300 --out gpt2 --overwrite",
    Accepted("prepare"),
)
add(
    KIND,
    "convert over what it wrote",
    "convert --from run --to huggingface --overwrite",
    Accepted("write"),
)


def added(folder, chance):
    (folder / "gpt2/notes.txt").write_text("the only copy")
    (folder / "huggingface/notes.txt").write_text("the only copy")


def changed(folder, chance):
    with (folder / "gpt2/tokenizer.json").open("a") as stream:
        stream.write(" ")
    with (folder / "huggingface/config.json").open("a") as stream:
        stream.write(" ")


for name, make in {"added": added, "changed": changed}.items():
    add(
        KIND,
        f"prepare over what was {name}",
        "prepare text.jsonl --vocab-size 300 --out gpt2 --overwrite",
        refused("gpt2"),
        make,
        ["huggingface"],
    )
    add(
        KIND,
        f"convert over what was {name}",
        "convert --from run --to huggingface --overwrite",
        refused("huggingface"),
        make,
        ["gpt2"],
    )
