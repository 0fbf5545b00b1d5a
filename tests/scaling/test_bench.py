"The benchmark: what is computed from measured seconds, and that contenders do the same work."

import json
import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_edu.config import GPT2Config
from megatron_edu.ranks import Ranks
from megatron_edu.reference.gpt2 import GPT2 as ReferenceGPT2
from megatron_edu.scaling import bench
from megatron_edu.scaling.bench import CASES, OURS, PLAIN, SPLIT, BenchConfig, Case, Result
from megatron_edu.scaling.contenders import CONTENDERS, Work, run, set_up

TINY = GPT2Config(2, 32, 4, vocab_size=96, max_seq_len=16, dropout=0.0, vocab_multiple=32)
WORK = Work(TINY, 2)


def result(ours, plain, gemm=(1e9, 2e9, 4e9), goal=0.8, memory=None):
    "A result of three rounds with these seconds."
    case = Case("three rounds", WORK, (OURS, PLAIN), ((OURS, PLAIN, goal),), gemm_goal=0.5)
    if memory:
        case = Case("memory", WORK, (OURS, PLAIN), (), ((OURS, PLAIN, goal),))
    seconds = {OURS: list(ours), PLAIN: list(plain)}
    return Result(case, seconds, list(gemm), {}, memory or {OURS: 1, PLAIN: 1}, 0.25)


def test_a_ratio_is_formed_inside_a_round():
    "The second machine was ten times as slow in one round: medians of times would say 1.5."
    found = result([1.0, 30.0, 3.0], [2.0, 60.0, 2.0])
    assert found.ratio(OURS, PLAIN) == [0.5, 0.5, 1.5]
    assert bench.quartiles(found.ratio(OURS, PLAIN))[1] == 0.5


def test_the_share_of_the_matrix_product_is_of_the_same_round():
    found = result([2.0, 1.0, 0.5], [1.0] * 3)
    assert found.gemm_share(OURS) == pytest.approx([WORK.flops / 2e9] * 3)


def test_quartiles():
    assert bench.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    "goal, verdict",
    [
        (2.55, "reached"), (2.54, "undecided"), (0.6, "undecided"), (0.55, "undecided"),
        (0.54, "missed"),
    ],
)
def test_a_verdict_needs_three_quarters_of_the_rounds(goal, verdict):
    page = bench.report(result([1.0, 1.2, 9.0], [2.0] * 3, goal=goal))
    (row,) = re.findall(rf"\| time \| {OURS} .*", page)
    assert row.endswith(f"| 0.600 (0.550-2.550) | {goal:.2f} | {verdict} |")


@pytest.mark.parametrize("goal, verdict", [(0.25, "reached"), (0.24, "missed")])
def test_a_verdict_on_memory(goal, verdict):
    page = bench.report(result([1.0] * 3, [1.0] * 3, goal=goal, memory={OURS: 10, PLAIN: 40}))
    assert f"| peak memory | {OURS} | {PLAIN} | 0.250 | {goal:.2f} | {verdict} |" in page


def test_the_page_names_times_communication_and_matrix_product():
    page = bench.report(result([0.010, 0.020, 0.030], [0.1] * 3))
    assert f"| {OURS} | 20 (15-25) |" in page
    assert "GEMM, 2048 cubed: 2 GFLOP/s (2-3)" in page
    assert "Communication: 25 % of a step" in page
    assert "| share of GEMM rate |" in page


def test_operations_of_a_step_are_those_that_are_counted():
    "Forward and backward of the reference, whose attention is counted whole by PyTorch."
    c = TINY
    model = ReferenceGPT2(c)
    ids = torch.zeros(WORK.batch, c.max_seq_len, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.loss(ids, ids).backward()
    products = {
        name: count for name, count in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(name)
    }
    tokens = WORK.batch * c.max_seq_len
    attention = 6 * tokens * c.num_layers * c.max_seq_len * c.hidden_size
    assert WORK.flops - attention == sum(products.values())


class World:
    "Stands for ranks: notes who ran, and tells given seconds."

    def __init__(self, name, size, log):
        self.name, self.size, self.log = name, size, log

    def __call__(self, fn, *args):
        if fn is run:
            self.log.append((self.name, args[1]))
            return [0.25] * self.size
        return [1e9]


def test_everyone_runs_once_a_round_in_changing_order():
    log = []
    worlds = {name: World(name, size, log) for name, size in ((OURS, 1), (SPLIT, 2), (PLAIN, 1))}
    case = Case("turns", WORK, tuple(worlds), ())
    taken, gemm = bench._take_turns(worlds, World("clock", 1, log), case, rounds=6, seconds=1.0)
    assert gemm == [1e9] * 6 and all(len(each) == 6 for each in taken.values())
    turns = log[3:]     # after one step each, to see how many fill a second
    assert {steps for _, steps in turns} == {4}
    rounds = [tuple(name for name, _ in turns[i : i + 3]) for i in range(0, 18, 3)]
    assert all(set(names) == set(worlds) for names in rounds) and len(set(rounds)) > 1


def first_loss(name, size):
    return set_up(name, WORK, size)[0]


def test_all_contenders_begin_with_one_loss():
    "On the CPU, as the benchmark runs. transformers draws weights of its own: near log v."
    losses = {}
    for name, (_, size) in CONTENDERS.items():
        with Ranks(size, threads=1) as world:
            losses[name] = world(first_loss, name, size)
    want = losses[PLAIN][0]
    for name, found in losses.items():
        bound = 0.2 if "transformers" in name else 1e-5
        assert all(abs(loss - want) < bound for loss in found), (name, found, want)
    assert abs(want - math.log(TINY.vocab_size)) < 0.2


def test_every_case_names_contenders_that_there_are():
    for case in CASES.values():
        assert set(case.contenders) <= set(CONTENDERS)
        for a, b, goal in (*case.ratios, *case.memory):
            assert {a, b} <= set(case.contenders) and 0 < goal < 2


@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_written_can_be_read(tmp_path, monkeypatch, capsys, quiet):
    measured = result([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    monkeypatch.setattr(bench, "measure", lambda case, rounds, seconds: measured)
    bench.bench(BenchConfig(cases=("fp32-batch-8",), out=tmp_path / "new", quiet=quiet))
    numbers = json.loads((tmp_path / "new" / "results.json").read_text())
    assert numbers["fp32-batch-8"]["seconds"] == measured.seconds
    page = (tmp_path / "new" / "results.md").read_text()
    assert page.startswith(bench.machine()) and bench.report(measured) in page
    printed = capsys.readouterr().out
    assert printed == "" if quiet else bench.report(measured) in printed


def test_without_transformers_other_cases_can_be_measured(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install transformers"):
        bench.bench(BenchConfig())
    assert BenchConfig(cases=("fp32-batch-1",)).rounds == 8


@pytest.mark.parametrize("fields, rule", [
    ({"cases": ("fp64-batch-8",)}, "fp64-batch-8"),
    ({"rounds": 1}, "2 rounds or more"),
    ({"seconds": 0.0}, "more than 0 s"),
    ({"quiet": True}, "name a folder with --out, or leave --quiet out"),
])
def test_refused(fields, rule):
    with pytest.raises(ValueError, match=rule):
        BenchConfig(**fields)
