"Older checkpoints go, the run's own alone, and only after a newer one is whole."

import json
import shutil
from pathlib import Path

import pytest

from megatron_edu import files
from megatron_edu.config import PRESETS
from megatron_edu.files import MARK, changed, note, remove_folder
from megatron_edu.models import build_model
from megatron_edu.resume import CONFIG, checkpoint_folder, checkpoints, step_of
from megatron_edu.training.checkpoint import save_checkpoint
from megatron_edu.training.keep import best_step, may_go, remove_older

MODEL = build_model(PRESETS["tiny"])


def save(run, step, keep_last=2):
    settings = {} if keep_last == "absent" else {"keep_last": keep_last}
    return save_checkpoint(run, step, MODEL, config={"run": settings})


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> Path:
    "A run with a checkpoint after each of five steps."
    run = tmp_path_factory.mktemp("keep") / "run"
    for step in range(1, 6):
        save(run, step)
    return run


@pytest.fixture
def run(five, tmp_path) -> Path:
    return shutil.copytree(five, tmp_path / "run")


def validated(run, **losses):
    found = [(int(step[1:]), loss) for step, loss in losses.items()]
    lines = [{"step": step, "loss": 1.0, "val_loss": loss} for step, loss in found]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    note(run, "metrics.jsonl")


def steps(run):
    return sorted(map(step_of, checkpoints(run)))


def newest(run):
    return checkpoint_folder(run, 5)


@pytest.mark.parametrize(
    "last, every, losses, stay",
    [
        (1, None, {}, [5]), (2, None, {}, [4, 5]), (9, None, {}, [1, 2, 3, 4, 5]),
        (2, 3, {}, [3, 4, 5]), (1, 2, {}, [2, 4, 5]), (1, 1, {}, [1, 2, 3, 4, 5]),
        (1, None, {"s1": 3.0, "s2": 2.0, "s3": 2.5, "s5": 2.2}, [2, 5]),
        (1, None, {"s1": 3.0, "s4": 2.5, "s5": 2.2}, [5]),
        (2, 3, {"s1": 1.0}, [1, 3, 4, 5]),
    ],
)
def test_which_stay(run, last, every, losses, stay):
    validated(run, **losses)
    removed = remove_older(newest(run), last, every)
    assert steps(run) == stay and len(removed) == 5 - len(stay)
    assert changed(run) == []       # the run's mark knows of it
    assert not [path for path in run.iterdir() if path.name.endswith(".partial")]


def test_the_best_is_among_those_that_are_there(run):
    validated(run, s2=3.0, s3=1.0)
    shutil.rmtree(checkpoint_folder(run, 3))
    assert best_step(run) == 2
    (run / "metrics.jsonl").unlink()
    assert best_step(run) is None


def edit_config(run, change):
    path = checkpoint_folder(run, 2) / CONFIG
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    note(path.parent, CONFIG)
    note(run, f"{path.parent.name}/{MARK}")


def copied_in(run):
    shutil.rmtree(checkpoint_folder(run, 2))
    mark = files.read_mark(run)
    rest = {n: e for n, e in mark["files"].items() if not n.startswith("step-00000002")}
    files._write_mark(run, "run", rest)
    shutil.copytree(save(run.parent / "other", 2), checkpoint_folder(run, 2))


def as_if(change):
    return lambda run: edit_config(run, change)


OTHERS = {      # what is not the run's own to remove
    "a file was added": lambda run: (checkpoint_folder(run, 2) / "note.txt").write_text("mine"),
    "a file is missing": lambda run: (checkpoint_folder(run, 2) / "state.json").unlink(),
    "a file is longer": lambda run: (checkpoint_folder(run, 2) / "state.json").open("a").write(" "),
    "it has no mark": lambda run: (checkpoint_folder(run, 2) / MARK).unlink(),
    "it was copied in": copied_in,
    "from before the option": as_if(lambda config: config["run"].clear()),
    "all were to stay then": as_if(lambda config: config["run"].update(keep_last=None)),
    "of weights alone": as_if(lambda config: config.pop("run")),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_the_runs_own_stays(run, kind):
    assert may_go(checkpoint_folder(run, 2))
    OTHERS[kind](run)
    remove_older(newest(run), 1, None)
    assert steps(run) == [2, 5] and checkpoint_folder(run, 2).is_dir()


def flip_the_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit": flip_the_last_bit,
    "its end": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "all of it": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_nothing_goes_while_the_newest_is_not_whole(run, kind):
    DAMAGE[kind](newest(run) / "model-00000.safetensors")
    assert remove_older(newest(run), 1, None) == [] and steps(run) == [1, 2, 3, 4, 5]


def test_later_checkpoints_of_a_step_back_are_none_of_the_older(run):
    remove_older(checkpoint_folder(run, 3), 1, None)
    assert steps(run) == [3, 4, 5]


def test_who_is_ended_meanwhile_leaves_no_half_of_a_checkpoint(run, monkeypatch):
    def killed(folder):
        raise KeyboardInterrupt

    folder = checkpoint_folder(run, 1)
    with monkeypatch.context() as patched:
        patched.setattr(files, "_remove_noted", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(folder)
    assert steps(run) == [2, 3, 4, 5] and not folder.exists()
