"""The course as a reader meets it: order, needs, titles, letters, links, routes, exports."""

import ast
import importlib
import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"
LIBRARY = ROOT / "megatron_edu"
LESSONS = sorted(NBS.glob("course/*/[0-9]*.ipynb"), key=lambda path: path.name)
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
HEADER = ["**Goal**: ", "**Look for**: ", "**Paper**: ", "**Needs**: ", "**Runs on**: "]
EXPORT = re.compile(r"^#\|\s*export[si]?\b", re.M)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")
BOX = re.compile(r"> \*\*In place of lesson (\d\d)\.\*\* (.*)", re.S)
EVENING_LESSONS, EVENING_WORDS = 9, 10_000

# What sends activations, gradients, parameters or losses: functions of `comm` and of
# torch.distributed, methods of a region that start one, and `_write`, the entry in the ledger.
COLLECTIVES = {
    "all_reduce", "all_reduce_start", "all_gather", "all_gather_start", "reduce_scatter",
    "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast_object_list",
    "copy_to_tp", "reduce_from_tp", "scatter_to_tp", "gather_from_tp", "enter_backward",
    "leave_forward", "isend", "irecv", "batch_isend_irecv", "_write",
}

# Definitions on pages that call a collective all the same, and why a lesson need not show them.
ON_PAGES = {
    "cli.doctor.two_sums": "tries out whether ranks can run at all, on two numbers",
    "cli.generate.generate_on_rank": "agrees that every rank has its weights",
    "first_rank.share_text": "hands over one rank's words",
    "generate.generate": "collects the next token",
    "generate.likeliest": "collects the likeliest tokens",
    "shared_memory._meet": "agrees on a piece of memory",
    "first_rank.any_text": "hands over one rank's words",
    "tensor_parallel.shard._gather": "collects a parameter for whoever wants it whole",
    "training.loop.Run": "agrees that the weights of every rank are finite before it saves",
    "training.validation.validate": "collects the losses of a validation",
    "tensor_parallel.cross_entropy.vocab_parallel_argmax": "collects the likeliest tokens",
    "course.puzzles._split_column": "tries a reader's answer",
    "course.puzzles._split_dropout": "tries a reader's answer",
    "course.puzzles._split_f": "tries a reader's answer",
    "course.puzzles._split_g": "tries a reader's answer",
    "course.puzzles._split_lstm": "tries a reader's answer",
    "course.puzzles._split_norm": "tries a reader's answer",
    "course.puzzles._split_pair": "tries a reader's answer",
    "course.referee._trial": "collects what a reader's answer gave on each rank",
}

# What a lesson's title names, and so must show itself; nothing where it names no code.
NAMED = {
    3: {"all_reduce", "all_gather", "reduce_scatter", "broadcast", "ring_bytes"},
    4: {"Shard"},
    5: {"copy_to_tp", "reduce_from_tp"},
    6: {"ColumnParallelLinear", "RowParallelLinear"},
    7: {"compare_with_reference"},
    8: {"GPT2"},
    9: {"sharded_randomness"},
    10: {"Attention"},
    11: {"Block"},
    12: {"VocabParallelEmbedding", "vocab_parallel_cross_entropy"},
    13: {"linear_cross_entropy"},
    14: {"GPT2"},
    15: {"examine"},
    16: {"Bert"},
    17: {"choose_masked", "mask_tokens", "following_segments", "BertSamples"},
    20: {"ParallelDims", "DataParallel"},
    21: {"make_optimizer", "decay_groups", "learning_rate"},
    22: {"GPT2Samples", "BatchSampler", "broadcast_batch"},
    23: {"train_step", "stop_requested"},
    24: {"save_checkpoint", "load_weights", "load_optimizer"},
    25: {"measure"},
}

# Functions and classes on pages that share a word with a title, and are not what it names.
NOT_MEANT = {
    "ranks.Ranks": "a tool of every lesson; titles speak of ranks",
    "cli.breaking.mistakes": "lists those that the lessons teach, for the command line",
    "course.plain_gpt2.GPT2": "what lesson 14 begins with and changes",
    "course.plain_gpt2.Attention": "the same",
    "course.plain_gpt2.Block": "the same",
    "course.referee.examine": "runs what a reader wrote",
    "resume.Checkpoint": "the name and step of a folder",
    "resume.checkpoints": "looks through folders",
    "training.run.Samples": "what a loop asks of any samples",
    "data.sentences.segments": "the sentences of a paragraph",
    "demo.gpt2.sample": "a text that a trained model writes",
}


@cache
def cells(path):
    "Kind and source of each cell."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def markdown(path):
    return "\n\n".join(source for kind, source in cells(path) if kind == "markdown")


def code(path):
    "Source of each code cell, magics left out."
    sources = [source for kind, source in cells(path) if kind == "code"]
    return [re.sub(r"^[%!].*$", "", source, flags=re.M) for source in sources]


def title(path):
    return re.search(r"^# (.+)$", markdown(path), re.M)[1]


def number(path):
    return int(path.name[:2])


def words(path):
    return len(markdown(path).split())


@cache
def exported():
    "Id of each exported cell -> the notebooks that hold it."
    found = {}
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code" and EXPORT.search("".join(cell["source"])):
                found.setdefault(cell["id"], []).append(path)
    return found


@cache
def modules():
    "Name within the package -> path."
    paths = [path for path in LIBRARY.rglob("*.py") if path.name != "_modidx.py"]
    names = [path.relative_to(LIBRARY).with_suffix("").parts for path in paths]
    return {".".join(name).removesuffix(".__init__"): p for name, p in zip(names, paths)}


def marks(path):
    "Line and id of each cell's mark in a module."
    mark = re.compile(r"^# %% (?:\.\./)+(nbs/\S+) #(\w+)$")
    lines = path.read_text(encoding="utf-8").splitlines()
    hits = [(n, mark.match(line)) for n, line in enumerate(lines, start=1)]
    return [(n, hit[1], hit[2]) for n, hit in hits if hit]


@cache
def home():
    "module.name of each definition of the library -> its node, the notebook that exports it."
    found = {}
    for module, path in modules().items():
        places = marks(path)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            before = [notebook for line, notebook, _ in places if line < node.lineno]
            for name in bound(node) if before else []:
                found[f"{module}.{name}"] = (node, ROOT / before[-1])
    return found


def bound(node):
    "Names that a statement of a module defines."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        parts = [part for target in node.targets for part in ast.walk(target)]
        return [part.id for part in parts if isinstance(part, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def calls(node):
    "Names of the functions and methods that are called in a definition."
    found = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in found}


def definition_of(module, name):
    "module.name where `name`, as imported from `module`, is defined; None: not in the library."
    value = getattr(importlib.import_module(f"megatron_edu.{module}"), name)
    owners = [full.rsplit(".", 1)[0] for full in home() if full.endswith(f".{name}")]
    for owner in owners:
        if getattr(importlib.import_module(f"megatron_edu.{owner}"), name) is value:
            return f"{owner}.{name}"
    return None


def used(path):
    "Definitions of the library that the code of a notebook names: module.name of each."
    tree = ast.parse("\n\n".join(code(path)))
    found, aliases = set(), {}       # aliases: name in the notebook -> module of the library
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_edu"):
            package = node.module.removeprefix("megatron_edu").lstrip(".")
            for alias in node.names:
                inner = f"{package}.{alias.name}".lstrip(".")
                if inner in modules():
                    aliases[alias.asname or alias.name] = inner
                elif package:
                    found.add(definition_of(package, alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in aliases:
                found.add(definition_of(aliases[node.value.id], node.attr))
    return found - {None}


def needs(path):
    "Numbers of the lessons that a lesson says it needs."
    part = re.search(r"^\*\*Needs\*\*: (.*?)\n\n", markdown(path), re.M | re.S)[1]
    return {int(n) for n in re.findall(r"\[(\d\d)[^\]]*\]\(", part)}


def route(name):
    "Lessons of a route of the front page, in its order."
    text = markdown(NBS / "index.ipynb")
    part = re.search(rf"^(- \*\*|## ){name}.*?(?=^- \*\*|^## |\Z)", text, re.M | re.S)[0]
    return [(NBS / link).resolve() for link in LINK.findall(part) if re.match(r"course/\d_", link)]


def test_lessons_are_numbered_in_reading_order():
    assert [number(path) for path in LESSONS] == list(range(1, len(LESSONS) + 1))
    parts = [path.parent.name for path in LESSONS]
    assert parts == sorted(parts)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_opens_with_what_a_reader_asks(path):
    text = markdown(path)
    places = [text.find(f"\n{part}") for part in HEADER]
    assert -1 not in places and places == sorted(places)
    assert text.startswith("# ") and re.search(r"^> \S.{,94}$", text, re.M)
    assert "## Summary" in text and not re.search(r"\bchapters?\b", text, re.I)


def test_each_exported_cell_stands_once_in_the_library():
    found = [(cell, notebook) for path in modules().values() for _, notebook, cell in marks(path)]
    assert sorted(cell for cell, _ in found) == sorted(exported())
    assert all(exported()[cell] == [ROOT / notebook] for cell, notebook in found)


def test_pages_come_before_lessons():
    "nbdev exports by file name, and a later page would overwrite what a lesson exported."
    pages = {path for path in NOTEBOOKS if "library" in path.parts}
    assert pages and all(path.name.startswith("00_") for path in pages)


def test_what_calls_a_collective_is_in_a_lesson():
    found = {
        name
        for name, (node, path) in home().items()
        if path not in LESSONS and isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and calls(node) & COLLECTIVES
    }
    assert found == set(ON_PAGES)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_uses_what_a_reader_has_met(path):
    sources = {home()[name][1]: name for name in used(path)}
    lessons = {number(source): name for source, name in sources.items() if source in LESSONS}
    later = {n: name for n, name in lessons.items() if n > number(path)}
    assert not later, "taught later"
    assert set(lessons) - {number(path)} <= needs(path), "not in Needs"
    assert all(n < number(path) for n in needs(path))


def squashed(text):
    return re.sub(r"[^a-z0-9]", "", text.lower())


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_what_a_title_names_is_in_the_lesson(path):
    said = title(path).split()
    spans = {squashed("".join(said[i:j])) for i in range(len(said)) for j in range(i + 1, i + 5)}
    spans |= {span.removesuffix("s") for span in spans}
    own = {name.rsplit(".", 1)[1] for name, (_, source) in home().items() if source == path}
    elsewhere = {
        name
        for name, (node, source) in home().items()
        if source not in LESSONS and isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not re.search(r"\._|^cli\.\w+\.run$", name)     # a verb's function is called run
        and squashed(name.rsplit(".", 1)[1]) in spans
    }
    assert not elsewhere - set(NOT_MEANT)
    shown = NAMED.get(number(path), set())
    assert shown <= own
    pages = {name for name, (_, source) in home().items() if source not in LESSONS}
    assert not {n for n in pages - set(NOT_MEANT) if n.rsplit(".", 1)[1] in shown}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(NBS).as_posix())
def test_links_lead_somewhere(path):
    links = LINK.findall(markdown(path))
    assert [link for link in links if not (path.parent / link).exists()] == []


def letters():
    "Letters that the notation page explains, as formulas and code write them."
    text = markdown(NBS / "course/notation.ipynb")
    rows = re.findall(r"^\| ([^|]+)\|[^|]+\| ([^|]+)\|$", text, re.M)
    return {letter for row in rows for letter in re.findall(r"`(\w)`", " ".join(row))}


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_letters_are_those_of_the_notation(path):
    nodes = list(ast.walk(ast.parse("\n\n".join(code(path)))))
    names = {node.arg for node in nodes if isinstance(node, ast.arg)}
    names |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert {name for name in names if len(name) == 1 and name != "_"} <= letters()


@pytest.mark.parametrize("name", ["An evening", "The lessons"])
def test_a_route_is_closed_under_what_it_needs(name):
    met = set()
    for path in route(name):
        boxes = {int(n): text for n, text in boxes_of(path)}
        assert needs(path) <= met | set(boxes), path.name
        assert all(len(re.findall(r"[.!?](?=\s|$)", text)) == 3 for text in boxes.values())
        met.add(number(path))
    assert met


def boxes_of(path):
    "Number of the lesson, and the three sentences that stand in for it."
    return [BOX.fullmatch(s.strip()).groups() for kind, s in cells(path) if BOX.match(s.strip())]


def test_the_evening_is_short():
    evening = route("An evening")
    assert 1 < len(evening) <= EVENING_LESSONS
    assert sum(words(path) for path in evening) <= EVENING_WORDS


def test_the_table_holds_every_lesson():
    assert route("The lessons") == LESSONS
