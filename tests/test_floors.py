"The house: who may import whom, read from the source of the library."

import ast
from functools import cache
from pathlib import Path

import pytest

import megatron_edu

ROOT = Path(megatron_edu.__file__).parent
FLOORS = [      # of the modules, lowest first; a package's name stands for all of its modules
    "boxes checks compiler errors slices streams mesh machine files owner failures watch "
    "shared_memory config ranks",
    "comm first_rank definitions weights memory",
    "reference tensor_parallel data",
    "models testing",
    "settings training resume generate interop scaling",
    "verify course demo",
    "cli",
]
# Within its own floor a module may import another one, as long as no circle comes of it.
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names.split()}
ORACLE = {"testing", "verify", "scaling.contenders", "course", "reference"}     # know the oracle
MUTANTS = {"course", "cli.breaking"}                                            # may know `course`


def modules():
    "Every module of the library: its name without the package's, and its file."
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__")
        if name not in ("", "_modidx") and not name.endswith("__main__"):
            yield name.rstrip("."), path


@cache
def imports():
    "Of each module what it imports of the library, within functions too, and as import paths."
    names, found = dict(modules()), {}
    for name, path in names.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            parts = ["megatron_edu", *package.split(".")] if package else ["megatron_edu"]
            base = parts[: len(parts) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            if not source.startswith("megatron_edu"):
                continue
            source = source.removeprefix("megatron_edu").lstrip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}".lstrip(".")
                found[name].add(inner if inner in names else source)
        found[name] -= {"", name}
    return found


def level(name):
    return LEVEL[name.partition(".")[0]]


def within(name, rooms):
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def test_every_room_has_a_floor():
    assert {name.partition(".")[0] for name, _ in modules()} == LEVEL.keys()
    assert sum(len(found) for found in imports().values()) > 200


@pytest.mark.parametrize("name", [name for name, _ in modules()])
def test_a_module_imports_only_from_its_floor_and_below(name):
    above = sorted(other for other in imports()[name] if level(other) > level(name))
    assert not above, f"{name} imports from above: {', '.join(above)}"


def test_no_circle_of_modules():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(imports()[name]):
                visit(other)
            done.add(path.pop())

    for name in imports():
        visit(name)


@pytest.mark.parametrize("room, friends", [("reference", ORACLE), ("course", MUTANTS)])
def test_who_may_know(room, friends):
    for name, found in imports().items():
        if not within(name, friends):
            assert not any(within(other, {room}) for other in found), name
