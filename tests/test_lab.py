"""tools/lab.py: what a reader wrote stays, all else follows the course."""

import json
import os
import posixpath
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import lab  # noqa: E402
from readme import FENCE, LINK  # noqa: E402

F, G, PICTURE = "nbs/course/1/05_f.ipynb", "nbs/course/1/06_g.ipynb", "nbs/images/loss.png"
NEW, NEW2 = "nbs/course/1/05_f.new.ipynb", "nbs/course/1/05_f.new2.ipynb"


def notebook(*sources, output=None):
    "The bytes of a notebook of code cells, run if there is an output."
    stream = {"output_type": "stream", "name": "stdout", "text": output}
    cells = [
        {
            "cell_type": "code", "id": f"cell{n}", "metadata": {}, "source": [source],
            "execution_count": None if output is None else n,
            "outputs": [] if output is None else [stream],
        }
        for n, source in enumerate(sources)
    ]
    whole = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1).encode()


FIRST = {F: notebook("f = ...", "judge(f)"), G: notebook("g = ..."), PICTURE: b"1"}
SECOND = FIRST | {F: notebook("f = ...  # (b, s, h)", "judge(f)")}
ANSWER = notebook("f = all_reduce", "judge(f)")


@pytest.fixture
def folder(tmp_path):
    "A lab with the first edition."
    lab.update(tmp_path / "lab", FIRST)
    return tmp_path / "lab"


def write(folder, name, content):
    (folder / name).write_bytes(content)


def held(folder):
    "All files of a lab but its mark."
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != lab.MARK]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# ------------------------------------------------------------------- what becomes of a lesson


def test_the_first_call_copies_all(tmp_path):
    assert lab.update(tmp_path / "deep/lab", FIRST) == [f"{tmp_path}/deep/lab: files 3 copied"]
    assert held(tmp_path / "deep/lab") == FIRST


def test_an_empty_folder_becomes_a_lab(tmp_path):
    lab.update(tmp_path, FIRST)
    assert held(tmp_path) == FIRST


def test_the_same_edition_changes_nothing(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}
    assert lab.update(folder, FIRST) == [f"{folder}: up to date"]
    del before[folder / lab.MARK]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_what_nobody_wrote_in_is_renewed(folder):
    assert lab.update(folder, SECOND) == [f"{folder}: files 1 renewed"]
    assert held(folder) == SECOND


def test_an_edition_that_was_passed_over_does_not_matter(folder):
    lab.update(folder, SECOND)
    lab.update(folder, FIRST)       # an older one is checked out
    lab.update(folder, SECOND | {F: notebook("f: third")})
    assert held(folder) == SECOND | {F: notebook("f: third")}


def test_what_the_reader_wrote_in_stays_and_the_new_edition_is_laid_beside_it(folder):
    write(folder, F, ANSWER)
    first, second = lab.update(folder, SECOND)
    assert first == f"{folder}: files 1 laid beside yours"
    assert second == f"{F}: you wrote in it, and it changed; the new edition is {NEW}"
    assert held(folder) == FIRST | {F: ANSWER, NEW: SECOND[F]}


def test_it_is_offered_once(folder):
    write(folder, F, ANSWER)
    lab.update(folder, SECOND)
    (folder / NEW).unlink()
    assert lab.update(folder, SECOND) == [f"{folder}: up to date"]
    assert held(folder) == FIRST | {F: ANSWER}


def test_what_the_reader_wrote_in_stays_alone_while_the_course_keeps_its_edition(folder):
    write(folder, F, ANSWER)
    others = SECOND | {F: FIRST[F], G: notebook("g: second")}
    assert lab.update(folder, others) == [f"{folder}: files 1 renewed"]
    assert held(folder) == others | {F: ANSWER}


def test_a_newer_edition_takes_the_place_of_the_one_laid_beside(folder):
    write(folder, F, ANSWER)
    lab.update(folder, SECOND)
    lab.update(folder, FIRST | {F: notebook("f: third")})
    assert held(folder) == FIRST | {F: ANSWER, NEW: notebook("f: third")}


def test_the_reader_may_go_on_in_the_edition_laid_beside(folder):
    write(folder, F, ANSWER)
    lab.update(folder, SECOND)
    write(folder, NEW, notebook("f = mine"))
    lab.update(folder, FIRST | {F: notebook("f: third")})
    assert held(folder) == FIRST | {
        F: ANSWER, NEW: notebook("f = mine"), NEW2: notebook("f: third")
    }


def test_the_reader_may_put_the_new_edition_in_the_place_of_the_old(folder):
    write(folder, F, ANSWER)
    lab.update(folder, SECOND)
    (folder / NEW).replace(folder / F)
    assert lab.update(folder, SECOND) == [f"{folder}: up to date"]
    lab.update(folder, FIRST | {F: notebook("f: third")})
    assert held(folder) == FIRST | {F: notebook("f: third")}


def test_who_takes_back_what_he_wrote_gets_the_new_edition(folder):
    write(folder, F, ANSWER)
    lab.update(folder, SECOND)
    write(folder, F, FIRST[F])
    assert lab.update(folder, SECOND) == [f"{folder}: files 1 renewed"]
    assert (folder / F).read_bytes() == SECOND[F]


def test_a_file_of_the_readers_own_stays_when_the_course_gets_one_of_that_name(folder):
    mine = "nbs/course/1/07_mine.ipynb"
    write(folder, mine, notebook("mine"))
    lab.update(folder, FIRST | {mine: notebook("theirs")})
    assert held(folder) == FIRST | {
        mine: notebook("mine"), "nbs/course/1/07_mine.new.ipynb": notebook("theirs")
    }


def test_a_lesson_that_the_reader_removed_comes_again(folder):
    write(folder, F, ANSWER)
    lab.update(folder, FIRST)
    (folder / F).unlink()
    assert lab.update(folder, FIRST) == [f"{folder}: files 1 copied"]
    assert held(folder) == FIRST


def test_what_is_no_notebook_follows_the_same_rules(folder):
    lab.update(folder, FIRST | {PICTURE: b"2"})
    assert (folder / PICTURE).read_bytes() == b"2"
    write(folder, PICTURE, b"mine")
    lab.update(folder, FIRST | {PICTURE: b"3"})
    assert held(folder) == FIRST | {PICTURE: b"mine", "nbs/images/loss.new.png": b"3"}


# ------------------------------------------------------------------------- what is no writing

RUN = notebook("f = ...", "judge(f)", output="not written yet")
RUN_TO_THE_END = notebook("f = ...", "judge(f)", " \n", output="not written yet")


@pytest.mark.parametrize("own", [RUN, RUN_TO_THE_END], ids=["run", "and a last empty cell"])
def test_a_lesson_merely_run_keeps_its_outputs_until_the_text_changes(folder, own):
    write(folder, F, own)
    assert lab.update(folder, FIRST) == [f"{folder}: up to date"]
    other_outputs = notebook("f = ...", "judge(f)", output="other outputs")
    lab.update(folder, FIRST | {F: other_outputs})
    assert (folder / F).read_bytes() == own
    lab.update(folder, SECOND)
    assert held(folder) == SECOND


def test_a_lesson_not_even_run_gets_the_new_outputs(folder):
    other_outputs = notebook("f = ...", "judge(f)", output="other outputs")
    lab.update(folder, FIRST | {F: other_outputs})
    assert (folder / F).read_bytes() == other_outputs


def test_an_answer_that_was_run_is_writing(folder):
    own = notebook("f = all_reduce", "judge(f)", output="right")
    write(folder, F, own)
    lab.update(folder, SECOND)
    assert held(folder) == FIRST | {F: own, NEW: SECOND[F]}


def other(change):
    "The first edition of F after a change to its first cell."
    whole = json.loads(FIRST[F])
    change(whole["cells"])
    return json.dumps(whole).encode()


@pytest.mark.parametrize(
    "own",
    [
        other(lambda cells: cells.reverse()),
        other(lambda cells: cells.pop()),
        other(lambda cells: cells[0].update(source=[])),
        other(lambda cells: cells[0].update(cell_type="markdown")),
        other(lambda cells: cells[0].update(attachments={"a.png": {"image/png": "AAAA"}})),
        b"",
        FIRST[F][:-20],
        b"[]",
        b'{"cells": [3]}',
        b'{"cells": [{"cell_type": "code", "source": null}]}',
    ],
    ids=["order", "a cell less", "emptied", "kind", "picture", "empty file", "cut off",
         "list", "no cells", "no text"],
)
def test_any_other_change_is_writing(folder, own):
    write(folder, F, own)
    lab.update(folder, SECOND)
    assert held(folder) == FIRST | {F: own, NEW: SECOND[F]}


# --------------------------------------------------------------- what the course no longer has


def without(name):
    return {each: FIRST[each] for each in FIRST if each != name}


@pytest.mark.parametrize("own", [None, RUN], ids=["untouched", "run"])
def test_what_the_course_no_longer_has_is_removed(folder, own):
    if own is not None:
        write(folder, F, own)
    assert lab.update(folder, without(F)) == [f"{folder}: files 1 removed"]
    assert held(folder) == without(F)


def test_its_empty_folder_goes_too(folder):
    lab.update(folder, without(PICTURE))
    assert not (folder / PICTURE).parent.exists()


def test_it_stays_if_the_reader_wrote_in_it_which_is_said_once(folder):
    write(folder, F, ANSWER)
    said = lab.update(folder, without(F))
    assert said[1:] == [f"{F}: the course no longer has it; you wrote in it, so it stays"]
    assert lab.update(folder, without(F)) == [f"{folder}: up to date"]
    assert held(folder) == without(F) | {F: ANSWER}


def test_it_may_have_been_removed_by_the_reader(folder):
    (folder / F).unlink()
    assert lab.update(folder, without(F)) == [f"{folder}: up to date"]


def test_nothing_outside_the_lab_is_removed(folder):
    outside = folder.parent / "outside"
    outside.write_bytes(b"1")
    for name in ("../outside", str(outside)):
        mark = json.loads((folder / lab.MARK).read_text())
        mark["files"][name] = [lab.digest(b"1")]
        (folder / lab.MARK).write_text(json.dumps(mark))
        with pytest.raises(ValueError, match="not as this version writes it"):
            lab.update(folder, FIRST)
    assert outside.exists()


# ------------------------------------------------------------------------------- broken off


def in_use(folder):
    "A lab whose next update does all there is to do. What it does is the second value."
    gone, kept, run = "nbs/gone.ipynb", "nbs/kept.ipynb", "nbs/run.ipynb"
    before = FIRST | {name: notebook(name) for name in (gone, kept, run)}
    lab.update(folder, before)
    write(folder, F, ANSWER)
    write(folder, kept, ANSWER)
    write(folder, run, notebook(run, output="1"))
    after = SECOND | {G: notebook("g: 2"), run: notebook("run: 2"), "nbs/more.ipynb": notebook("3")}
    return after, after | {F: ANSWER, NEW: SECOND[F], kept: ANSWER}


class Broken(Exception):
    pass


@pytest.mark.parametrize("first", [True, False], ids=["the first call", "a later call"])
@pytest.mark.parametrize("done", [True, False], ids=["after a step", "before a step"])
def test_broken_off_anywhere_the_next_call_completes_it(tmp_path, monkeypatch, done, first):
    put, remove = lab.put, lab.remove

    def breaking(step):
        def instead(path, *content):
            left[0] -= 1
            if left[0] or done:
                step(path, *content)
            if not left[0]:
                raise Broken
        return instead

    for number in range(1, 100):
        folder = tmp_path / str(number)
        files, wanted = (FIRST, FIRST) if first else in_use(folder)
        left = [number]
        with monkeypatch.context() as patch:
            patch.setattr(lab, "put", breaking(put))
            patch.setattr(lab, "remove", breaking(remove))
            try:
                lab.update(folder, files)
            except Broken:
                pass
        lab.update(folder, files)
        assert held(folder) == wanted
        assert lab.update(folder, files) == [f"{folder}: up to date"]
        if left[0] > 0:
            break
    assert number == (7 if first else 8)    # one more than there are steps


def test_a_file_that_cannot_be_written_keeps_what_it_was(folder, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lab.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        lab.put(folder / F, b"half")
    assert held(folder) == FIRST


def test_a_first_mark_that_lost_its_power_is_no_foreign_file(tmp_path):
    (tmp_path / f".{lab.MARK}.0123abcd.partial").write_bytes(b"{")
    lab.update(tmp_path, FIRST)
    assert FIRST.items() <= held(tmp_path).items()


# --------------------------------------------------------------------------- what is refused


def refused(capsys, folder):
    "The one line with which a folder is refused."
    assert lab.main(["--to", str(folder), "--no-open"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert "name another place: make lab LAB=FOLDER" in shown.err
    return shown.err


def test_a_foreign_folder(tmp_path, capsys):
    (tmp_path / "letter.txt").write_bytes(b"mine")
    assert f"{tmp_path} holds files that are not ours" in refused(capsys, tmp_path)
    assert held(tmp_path) == {"letter.txt": b"mine"}


def test_a_folder_with_the_course_but_without_a_mark(folder, capsys):
    (folder / lab.MARK).unlink()
    assert "holds files that are not ours" in refused(capsys, folder)
    assert held(folder) == FIRST


def test_a_file_in_place_of_the_folder(tmp_path, capsys):
    (tmp_path / "lab").write_bytes(b"mine")
    assert f"{tmp_path}/lab is there and is no folder" in refused(capsys, tmp_path / "lab")
    assert (tmp_path / "lab").read_bytes() == b"mine"


def test_a_link_to_nothing(tmp_path, capsys):
    (tmp_path / "lab").symlink_to(tmp_path / "nowhere")
    assert "is there and is no folder" in refused(capsys, tmp_path / "lab")


def test_a_folder_below_a_file(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"mine")
    assert "Not a directory" in refused(capsys, tmp_path / "file/lab")


def test_a_folder_in_place_of_a_lesson(folder, capsys):
    name = "nbs/index.ipynb"
    (folder / name).mkdir()
    assert f"Is a directory: '{folder / name}'" in refused(capsys, folder)


@pytest.mark.parametrize("name", ["", "nbs", "nbs/lab", "labs", "tests/.."])
def test_the_repository_but_for_its_lab(capsys, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "is in the repository" in refused(capsys, name)
    assert not (ROOT / "nbs/lab").exists() and not (ROOT / "labs").exists()


def test_a_link_into_the_repository(tmp_path, capsys):
    (tmp_path / "lab").symlink_to(ROOT / "nbs")
    assert "is in the repository" in refused(capsys, tmp_path / "lab")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2, "files": {}}', "\xff",
                                  '{"format": 1, "files": {"a": 1}}', '{"format": 1, "files": 3}'])
def test_a_mark_that_is_none_of_ours(folder, capsys, text):
    (folder / lab.MARK).write_bytes(text.encode("latin-1"))
    assert f"{folder / lab.MARK} is not as this version writes it" in refused(capsys, folder)
    assert held(folder) == FIRST


def test_no_home_for_a_name(capsys):
    assert lab.main(["--to", "~no_such_user_here/lab", "--no-open"]) == 2
    assert capsys.readouterr().err.startswith("lab: ")


# ----------------------------------------------------------------------------- the real course


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A lab with the real course."
    folder = tmp_path_factory.mktemp("whole") / "lab"
    assert lab.main(["--to", str(folder), "--no-open"]) == 0
    return folder


def test_it_holds_every_notebook_as_it_is(whole):
    names = [path.relative_to(ROOT) for path in ROOT.glob("nbs/**/*.ipynb")
             if ".ipynb_checkpoints" not in path.parts]
    assert len(names) > 100 and (whole / lab.FIRST).is_file()
    assert all((whole / name).read_bytes() == (ROOT / name).read_bytes() for name in names)


def links(path):
    "Relative links and pictures in a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for part in FENCE.split("".join(cell["source"]))[::2]:
                yield from (found[2].split("#")[0] for found in LINK.finditer(part))


def test_a_link_that_leads_somewhere_leads_there_in_the_lab_too(whole):
    count = 0
    for path in whole.rglob("*.ipynb"):
        name = path.relative_to(whole)
        for link in links(path):
            target = posixpath.normpath(posixpath.join(name.parent, link))
            if (ROOT / target).exists():
                count += 1
                assert (whole / target).exists(), f"{name} links to {target}; see COPIED"
    assert count > 100


def test_checkpoints_of_jupyter_are_no_part_of_the_course(tmp_path):
    (tmp_path / "nbs/.ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "nbs/.ipynb_checkpoints/a.ipynb").write_bytes(b"{}")
    (tmp_path / "nbs/a.ipynb").write_bytes(b"{}")
    assert lab.course(tmp_path) == {"nbs/a.ipynb": b"{}"}


def test_git_overlooks_the_default_lab():
    assert lab.DEFAULT == ROOT / "lab"
    assert "/lab/" in (ROOT / ".gitignore").read_text().splitlines()


# ---------------------------------------------------------------------------------- JupyterLab


@pytest.fixture
def started(monkeypatch):
    "What would have been started."
    commands = []
    monkeypatch.setattr(lab.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(lab.os, "execve", lambda *command: commands.append(command))
    return commands


def test_nothing_is_started_if_so_wished(started, tmp_path):
    assert lab.main(["--to", str(tmp_path / "lab"), "--no-open"]) == 0
    assert started == []


def test_nothing_is_started_in_a_refused_folder(started, tmp_path):
    (tmp_path / "letter.txt").write_bytes(b"mine")
    assert lab.main(["--to", str(tmp_path)]) == 2
    assert started == []


def test_it_is_started_in_the_lab_with_the_library_of_this_repository(started, tmp_path):
    lab.main(["--to", str(tmp_path / "lab"), "--", "--no-browser", "--port=9000"])
    [(program, command, environment)] = started
    assert program == command[0] == sys.executable
    assert command[-2:] == ["--no-browser", "--port=9000"]
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


def test_it_listens_on_this_machine_alone_and_asks_for_a_token(started, tmp_path):
    lab.main(["--to", str(tmp_path / "lab")])
    [(_, command, _)] = started
    assert command[1:] == [
        "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.root_dir={tmp_path / 'lab'}",
        "--LabApp.default_url=/lab/tree/nbs/index.ipynb",
    ]


def test_without_jupyterlab_it_says_what_to_do(started, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab.importlib.util, "find_spec", lambda name: None)
    assert lab.main(["--to", str(tmp_path / "lab")]) == 2
    assert "run `make lab`, or open" in capsys.readouterr().err
    assert started == []
