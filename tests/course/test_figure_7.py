"""The experiment of figure 7: what a run says, which cases have which, and its files."""

import pytest

from megatron_edu.course.figure_7 import (
    CASES,
    ExperimentConfig,
    Case,
    Run,
    draw_runs,
    load_runs,
    main,
    save_runs,
)
from megatron_edu.course.layer_norm import block_norms, byte_ids, make_bert, training

ORDERS = ("post", "pre")


def test_the_command_writes_what_is_read_again(tmp_path, monkeypatch):
    documents = ["some text of sixteen words " * 9]
    monkeypatch.setattr("megatron_edu.course.figure_7.embedded_corpus", lambda: documents)
    monkeypatch.setitem(CASES, "12 layers", Case(3, warmup=4, peak=2e-3, scaled=False))
    main(["--out", str(tmp_path), "--steps", "12", "--seeds", "4", "5", "--cases", "12 layers"])
    facts, runs = load_runs(tmp_path / "figure_7.json")
    assert facts["steps"] == 12 and facts["seeds"] == [4, 5]
    assert [(run.order, run.seed) for run in runs] == [(o, s) for o in ORDERS for s in (4, 5)]
    for run in runs:
        assert len(run.loss) == len(run.norm) == len(run.layers) == 2
        assert all(len(norms) == 3 for norms in run.layers)
    model, steps, layers = make_bert("pre", 3, 5, scaled=False), [], []
    for step in training(model, byte_ids(documents), 5, 12, warmup=4, peak=2e-3):
        steps.append(step)
        layers.append(block_norms(model))
    for kept, norms in zip(runs[-1].layers, (layers[0], layers[10])):
        assert kept == pytest.approx(norms, rel=0.01)
    means = [sum(loss for loss, _ in part) / len(part) for part in (steps[:10], steps[10:])]
    assert runs[-1].loss == [round(mean, 4) for mean in means]
    assert runs[-1].norm[1] == pytest.approx(max(norm for _, norm in steps[10:]), rel=0.01)
    assert (tmp_path / "figure_7.png").read_bytes().startswith(b"\x89PNG")


def test_cases_beside_the_experiment_take_the_first_seed(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_edu.course.figure_7.embedded_corpus", lambda: ["word " * 9])
    case = "24 layers, warm-up of 200"
    out = tmp_path / "new" / "folder"
    main(["--out", str(out), "--steps", "1", "--seeds", "4", "5", "--cases", case])
    _, runs = load_runs(out / "figure_7.json")
    assert [(run.case, run.order, run.seed) for run in runs] == [(case, "post", 4)]


def test_what_is_done_is_kept_when_the_rest_is_cut_off(tmp_path, monkeypatch):
    def cut_off(order, depth, seed, scaled):
        if seed == 5:
            raise KeyboardInterrupt
        return make_bert(order, 2, seed, scaled)

    monkeypatch.setattr("megatron_edu.course.figure_7.embedded_corpus", lambda: ["word " * 9])
    monkeypatch.setattr("megatron_edu.course.figure_7.make_bert", cut_off)
    with pytest.raises(KeyboardInterrupt):
        main(["--out", str(tmp_path), "--steps", "1", "--seeds", "4", "5"])
    _, runs = load_runs(tmp_path / "figure_7.json")
    assert [(run.case, run.order, run.seed) for run in runs] == [("12 layers", "post", 4)]


def made_up(case, order, seed, looks):
    "A run of 20 steps or more whose numbers can be told apart."
    loss = [6 - k / 4 - seed / 8 for k in range(looks)]
    layers = [[seed * (k + 1.0), 2.0 * seed] for k in range(looks)]
    return Run(case, order, seed, loss, [1.0] * looks, layers, seconds=1.5)


def test_the_seconds_of_all_runs_are_counted(tmp_path):
    runs = [made_up("12 layers", "pre", seed, 2) for seed in (1, 2, 3, 4)]
    save_runs(ExperimentConfig(tmp_path), runs)
    facts, found = load_runs(tmp_path / "figure_7.json")
    assert facts["seconds"] == 6 and found == runs


def test_the_picture_shows_losses_and_geometric_means():
    runs = [made_up("12 layers", order, seed, 7) for order in ORDERS for seed in (1, 4)]
    runs.append(made_up("24 layers", "post", 9, 2))
    twelve, other, gradients, others = draw_runs(runs).axes
    assert (twelve.get_title(), other.get_title()) == ("12 layers", "24 layers")
    assert [line.get_ydata().tolist() for line in twelve.lines] == [run.loss for run in runs[:4]]
    assert all(line.get_xdata().tolist() == [*range(10, 71, 10)] for line in twelve.lines)
    assert len(twelve.get_legend_handles_labels()[1]) == 2
    steps = [f"post-LN, step {step}" for step in (1, 21, 51, 61)]
    assert [line.get_label() for line in gradients.lines[:4]] == steps
    for line, look in zip(gradients.lines, (1, 3, 6, 7)):       # geometric mean of 1 and 4
        assert line.get_ydata().tolist() == pytest.approx([2 * look, 4])
    assert [line.get_xdata().tolist() for line in others.lines] == [[1, 2]] * 2
    assert others.lines[1].get_ydata().tolist() == pytest.approx([18, 18])


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "file" / "new")])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("figure_7: ")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--steps", "0"], "at least 1"),
        (["--seeds"], "name at least one"),
        (["--cases", "5 layers"], "choose from '12 layers'"),
        (["--cases"], "choose from '12 layers'"),
    ],
)
def test_bad_options(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "new"), *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
