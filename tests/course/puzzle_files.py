"Answers to the puzzles of the course, right ones and wrong ones, each in a file of its own."

import ast
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in (HERE / "solutions").glob("*.py"))
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


def solution(name: str) -> str:
    "The text of the right answer."
    return (HERE / "solutions" / f"{name}.py").read_text(encoding="utf-8")


def wrong_file(name: str) -> dict:
    "What the file of wrong answers defines. `WRONG` names the kind of hint that each must get."
    return run((HERE / "wrong" / f"{name}.py").read_text(encoding="utf-8"))


def run(source: str) -> dict:
    "The names that a cell with this text defines."
    names = {"__name__": "__main__"}    # ranks get what it defines by value, as from a notebook
    exec(compile(source, "<cell>", "exec"), names)
    return names


def answers(source: str) -> list:
    "The functions and classes that a text defines, in order."
    names = run(source)
    return [names[node.name] for node in ast.parse(source).body if isinstance(node, DEFINITIONS)]


def signature(source: str) -> list[str]:
    "Every class and function with its arguments."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            found.append(f"{node.name}({ast.unparse(node.args)})")
        elif isinstance(node, ast.ClassDef):
            found.append(f"{node.name}({', '.join(map(ast.unparse, node.bases))})")
    return found


def emptied(source: str) -> str:
    "The text with every function's body, but that of a constructor, taken out."
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            node.body = [ast.Expr(ast.Constant(...))]
    return ast.unparse(tree)
