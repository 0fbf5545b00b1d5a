"""Every puzzle stands in one lesson, empty, and its solution nowhere; put in there, it is green."""

import ast
import json
from pathlib import Path

import pytest
from course.puzzle_files import DEFINITIONS, NAMES, run, signature, solution

from megatron_edu.course import referee

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def texts(path):
    "Of the code cells of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def cells_of(name):
    "Where a lesson calls the referee for a puzzle: notebook and text of the cell."
    call = f'judge("{name}", '
    lessons = [path for path in NOTEBOOKS if (ROOT / "nbs/course") in path.parents]
    return [(path, text) for path in lessons for text in texts(path) if call in text]


def the_cell(name):
    found = cells_of(name)
    assert len(found) == 1, f"{name} stands in {[str(path.relative_to(ROOT)) for path, _ in found]}"
    return found[0][1]


def filled(text, answer):
    "The cell with the definitions of an answer in place of its own, and the answer's imports."
    rest = [node for node in ast.parse(text).body if not isinstance(node, DEFINITIONS)]
    return answer + "\n" + "\n".join(map(ast.unparse, rest)) + "\n"


def bodies(source):
    "Every function's body as one text without comments, if it is long enough to be told apart."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
            found.append("\n".join(map(ast.unparse, node.body)))
    return found


def parsed(text):
    "A cell as Python writes it, without comments; nothing for what is no Python (magics)."
    try:
        return ast.unparse(ast.parse(text))
    except SyntaxError:
        return ""


@pytest.mark.parametrize("name", NAMES)
def test_it_stands_in_one_lesson_with_the_signature_of_its_solution(name):
    text = the_cell(name)
    assert signature(text) == signature(solution(name))
    assert len(text.rstrip().splitlines()[-1]) < 60     # the call of the referee comes last
    assert text.rstrip().splitlines()[-1].startswith(f'judge("{name}", ')


@pytest.mark.parametrize("name", NAMES)
def test_it_is_not_written_yet(name, capsys):
    run(the_cell(name))
    assert capsys.readouterr().out == f"{name}: not written yet\n"


@pytest.mark.parametrize("name", NAMES)
def test_the_cell_with_the_solution_is_green(cpu_ranks, monkeypatch, capsys, name):
    monkeypatch.setattr(referee, "own_world", cpu_ranks)
    run(filled(the_cell(name), solution(name)))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{name}: right, on 2 and on 4 ranks"
    assert all(line.startswith("green") for line in shown[1:])


def test_no_notebook_shows_a_solution():
    "But for what the puzzle itself gives: a constructor, say."
    given = {name: bodies(the_cell(name)) for name in NAMES}
    found = {
        name: [body for body in bodies(solution(name)) if body not in given[name]]
        for name in NAMES
    }
    assert all(found[name] for name in NAMES)
    dense = {name: [_dense(body) for body in found[name]] for name in NAMES}
    for path in NOTEBOOKS:
        for text in texts(path):
            code = _dense(parsed(text))
            for name in NAMES:
                assert not any(body in code for body in dense[name]), f"{path}: {name}"


def _dense(text):
    "Without white space: how far a body is indented tells nothing."
    return "".join(text.split())
