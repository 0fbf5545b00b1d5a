"""A reader's own copy of the course: python tools/lab.py [--to FOLDER] [--no-open] [-- OPTION ...]

The notebooks, and what they link to, are copied into a folder that git does not track, and
JupyterLab is started there, for this machine alone. A later call, after a `git pull`, brings the
copy up to date. To run cells is not to write in a notebook: outputs do not count, nor empty cells.

  what you did not write in       gives way to the new edition
  what you wrote in               stays; if the course changed it, too, the new edition is laid
                                  beside it once, as NAME.new.ipynb
  what you removed                is copied again: so one starts a lesson over
  what the course no longer has   is removed, unless you wrote in it

Options after -- are those of JupyterLab, as in: -- --no-browser --port=9000
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import re
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path, PurePosixPath

from megatron_edu.files import REMEDY, beside, sync_folder

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ROOT / "lab"      # the one place in the repository where git overlooks a lab
COPIED = ["nbs/**/*.ipynb", "nbs/images/*", "benchmarks/*.*", "CONTRIBUTING.md", "LICENSE"]
FIRST = "nbs/index.ipynb"   # what JupyterLab shows first
MARK = ".megatron_edu_lab.json"     # in a lab: hashes of all editions that it has had of each file
FORMAT = 1                  # of the mark
OFFERED = re.compile(r"\.new\d*(\.\w+)?\Z")     # how the name of what was laid beside a file ends
WORDS = {"copy": "copied", "renew": "renewed", "offer": "laid beside yours", "remove": "removed"}
ANOTHER = f"{REMEDY}: make lab LAB=FOLDER"
RULE = f"a lab is a new folder, an empty one, or a lab of before; {ANOTHER}"


def course(root: Path = ROOT) -> dict[str, bytes]:      # path below root -> content
    "All that a lab holds."
    paths = {path for pattern in COPIED for path in root.glob(pattern) if path.is_file()}
    names = {path.relative_to(root).as_posix(): path for path in sorted(paths)}
    return {name: names[name].read_bytes() for name in names if ".ipynb_checkpoints" not in name}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def text(name: str, content: bytes) -> str:
    "Hash of what a person writes: in a notebook all cells that are not empty, without outputs."
    if name.endswith(".ipynb"):
        with suppress(ValueError, LookupError, TypeError, RecursionError):     # no whole notebook
            cells = [
                [cell["cell_type"], "".join(cell["source"]), cell.get("attachments") or None]
                for cell in json.loads(content)["cells"]
            ]
            content = json.dumps([cell for cell in cells if cell[1].strip()]).encode()
    return digest(content)


def hashes(name: str, content: bytes) -> set[str]:
    "Of an edition, as a mark notes them."
    return {digest(content), text(name, content)}


def read(path: Path) -> bytes | None:       # None: nothing is there
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def put(path: Path, content: bytes) -> None:
    "Write a file that gets its name when the disk has all of it."
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(path)
    try:
        with partial.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def is_inside(name: object) -> bool:
    "Whether a mark's key names a file in the lab."
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts


def read_mark(folder: Path) -> dict[str, set[str]]:     # file -> hashes of its editions
    "The mark of a lab. ValueError for one that is damaged, or that a newer version wrote."
    path = folder / MARK
    try:
        mark = json.loads(path.read_bytes())
        if mark["format"] == FORMAT and all(map(is_inside, mark["files"])):
            return {name: set(editions) for name, editions in mark["files"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(
        f"{path} is not as this version writes it, so nobody knows what in this lab is yours; "
        + ANOTHER
    )


def write_mark(folder: Path, known: dict[str, set[str]]) -> None:
    files = {name: sorted(known[name]) for name in sorted(known)}
    put(folder / MARK, json.dumps({"format": FORMAT, "files": files}, indent=1).encode())


def open_lab(folder: Path) -> dict[str, set[str]]:      # its mark
    "Make a lab, or read the mark of one. ValueError for a folder that is none."
    place = folder.resolve()
    if place.is_relative_to(ROOT) and not place.is_relative_to(DEFAULT):
        raise ValueError(
            f"{folder} is in the repository, where git overlooks {DEFAULT} alone; " + ANOTHER
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} is there and is no folder; {RULE}")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MARK).is_file():
        return read_mark(folder)
    begun = set(folder.glob(f".{MARK}.*.partial"))      # of a first mark, when the power went
    if set(folder.iterdir()) - begun:
        raise ValueError(f"{folder} holds files that are not ours; {RULE}")
    write_mark(folder, {})
    return {}


def decide(
    name: str,
    own: bytes | None,      # the reader's; None: nothing is there
    new: bytes,             # the course's
    known: set[str],        # hashes of the editions that this lab has had
) -> str:                   # "copy", "renew", "offer" or "leave"
    "What becomes of a file in a lab."
    if own is None:
        return "copy"
    if own == new:
        return "leave"
    own_text, new_text = text(name, own), text(name, new)
    if own_text == new_text:        # outputs differ: those of a run by the reader are newer
        return "renew" if digest(own) in known else "leave"
    if own_text in known:
        return "renew"
    return "leave" if new_text in known else "offer"


def name_beside(folder: Path, name: str, known: dict[str, set[str]]) -> str:
    "A name for a new edition that is free, or whose file the reader did not write in."
    path = PurePosixPath(name)
    for number in itertools.count(1):
        tag = ".new" if number == 1 else f".new{number}"
        other = str(path.with_name(path.stem + tag + path.suffix))
        own = read(folder / other)
        if own is None or text(other, own) in known.get(other, ()):
            return other


def remove(path: Path) -> None:
    "Remove a file, and its folder if nothing else is in it."
    path.unlink()
    with suppress(OSError):
        path.parent.rmdir()


def update(
    folder: Path,
    files: dict[str, bytes],    # the course: path in the lab -> content
) -> list[str]:                 # what was done, in lines
    "Bring a lab up to date, or make it. Broken off anywhere, the next call completes it."
    known = open_lab(folder)
    written, count, lines = {}, Counter(), []
    for name, new in files.items():
        what = decide(name, read(folder / name), new, known.get(name, set()))
        count[what] += 1
        if what == "offer":
            other = name_beside(folder, name, known)
            written[other] = new
            lines.append(f"{name}: you wrote in it, and it changed; the new edition is {other}")
        elif what != "leave":
            written[name] = new
    # What is about to be written is noted before: if this breaks off, it is known as ours. That a
    # new edition was offered is noted after: if this breaks off, it is offered again.
    for name, new in written.items():
        known[name] = known.get(name, set()) | hashes(name, new)
    write_mark(folder, known)
    for name, new in written.items():
        put(folder / name, new)
    for name in sorted(known.keys() - files.keys()):
        if OFFERED.search(name):
            continue
        own = read(folder / name)
        if own is not None and text(name, own) in known[name]:
            remove(folder / name)
            count["remove"] += 1
        elif own is not None:
            lines.append(f"{name}: the course no longer has it; you wrote in it, so it stays")
        del known[name]
    for name, new in files.items():
        known[name] = known.get(name, set()) | hashes(name, new)
    write_mark(folder, known)
    done = ", ".join(f"{count[what]} {WORDS[what]}" for what in WORDS if count[what])
    return [f"{folder}: {f'files {done}' if done else 'up to date'}", *lines]


def jupyter(
    folder: Path,
    options: list[str],     # further ones of JupyterLab
) -> tuple[list[str], dict[str, str]]:      # command and environment
    "What starts JupyterLab in a lab, for this machine alone, with this repository's library."
    command = [
        sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.root_dir={folder}", f"--LabApp.default_url=/lab/tree/{FIRST}", *options,
    ]
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    return command, os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--to", metavar="FOLDER", type=Path, default=DEFAULT, help=f"the lab (default: {DEFAULT})"
    )
    parser.add_argument("--no-open", action="store_true", help="copy, and start nothing")
    parser.add_argument("options", metavar="OPTION", nargs="*", help="of JupyterLab, after --")
    given = parser.parse_args(arguments)
    try:
        folder = given.to.expanduser().absolute()
        print("\n   ".join(update(folder, course())), flush=True)
    except (ValueError, RuntimeError) as error:     # RuntimeError: nobody's home is that ~name
        print(f"lab: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"lab: {error}; mend that and call again, or {ANOTHER}", file=sys.stderr)
        return 2
    if given.no_open:
        return 0
    if importlib.util.find_spec("jupyterlab") is None:
        print(
            f"lab: JupyterLab is not installed for {sys.executable}; run `make lab`, or open "
            f"{folder / FIRST} with what you have",
            file=sys.stderr,
        )
        return 2
    command, environment = jupyter(folder, given.options)
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    sys.exit(main())
