"""The learning rate of every step, against the paper's numbers and against PyTorch's schedulers."""

import math
import warnings

import pytest
import torch

from megatron_edu.training.optimizer import OptimizerConfig, make_optimizer
from megatron_edu.training.schedule import learning_rate, set_learning_rate


decays = pytest.mark.parametrize("decay", ["cosine", "linear"])


def rates(steps, **numbers):
    config = OptimizerConfig(**({"lr": 1.0, "min_lr": 0.1} | numbers))
    return [learning_rate(step, steps, config) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    "step, lr", [(1, 5e-8), (1500, 7.5e-5), (3000, 1.5e-4), (151_500, 8e-5), (300_000, 1e-5)]
)
def test_the_papers_run(step, lr):
    assert math.isclose(learning_rate(step, 300_000, OptimizerConfig()), lr, rel_tol=1e-12)


BERT = OptimizerConfig(lr=1e-4, min_lr=0.0, warmup_steps=10_000, decay="linear")


@pytest.mark.parametrize(
    "step, lr", [(1, 1e-8), (10_000, 1e-4), (408_000, 8e-5), (1_005_000, 5e-5), (2_000_000, 0.0)]
)
def test_the_papers_run_of_bert(step, lr):
    assert math.isclose(learning_rate(step, 2_000_000, BERT), lr, rel_tol=1e-12)


def test_ten_steps_of_a_line_by_hand():
    falls = [0.85, 0.7, 0.55, 0.4, 0.25, 0.1]
    found = rates(10, warmup_steps=4, decay="linear")
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, *falls], abs=1e-15)


def test_ten_steps_by_hand():
    root = math.sqrt(3) / 2     # cosines of 30 and 150 degrees
    falls = [0.1 + 0.45 * (1 + c) for c in (root, 0.5, 0.0, -0.5, -root, -1.0)]
    assert rates(10, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, *falls], abs=1e-15)


def torch_rates(steps, warmup, lr, min_lr, decay):
    "PyTorch counts from 0: its warm-up has one step less, and the fall begins at the peak."
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=min_lr)
    line = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, min_lr / lr, steps - warmup)
    fall = {"cosine": cosine, "linear": line}[decay]
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup - 1])
    found = []
    for _ in range(steps):
        found += both.get_last_lr()
        optimizer.step()
        both.step()
    return found


@pytest.mark.parametrize("steps, warmup", [(10, 4), (100, 7), (57, 50), (20, 2)])
@pytest.mark.parametrize("min_lr", [0.0, 0.3])
@decays
def test_pytorchs_schedulers_agree(steps, warmup, min_lr, decay):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # SequentialLR calls its parts in a deprecated way
        want = torch_rates(steps, warmup, 2.0, min_lr, decay)
    got = rates(steps, lr=2.0, min_lr=min_lr, warmup_steps=warmup, decay=decay)
    assert got == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 99])
@pytest.mark.parametrize("warmup", [0, 1, 2, 49])
@decays
def test_rises_to_the_peak_and_falls_to_the_floor(steps, warmup, decay):
    found = rates(steps, warmup_steps=warmup, decay=decay)
    rise, fall = found[:warmup], found[warmup:]
    assert rise == sorted(rise) and fall == sorted(fall, reverse=True)
    assert 0 < min(found) and max(found) <= 1.0
    if steps > warmup:
        assert found[-1] == 0.1 and min(fall) == 0.1
    if steps >= warmup > 0:
        assert found[warmup - 1] == 1.0


def test_no_warmup_begins_with_the_cosine():
    assert rates(4, warmup_steps=0) == pytest.approx(
        [0.1 + 0.45 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3, 4)], abs=1e-15
    )


def test_a_run_shorter_than_its_warmup_ends_on_the_way_up():
    assert rates(3, warmup_steps=6) == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=1e-15)


@pytest.mark.parametrize("steps, warmup", [(10, 4), (10, 10), (3, 6)])
@decays
def test_steps_after_the_last_keep_the_floor(steps, warmup, decay):
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=warmup, decay=decay)
    after = max(steps, warmup)
    assert [learning_rate(after + i, steps, config) for i in (1, 2, 1000)] == [0.1] * 3


def test_no_fall_where_the_floor_is_the_peak():
    assert rates(9, min_lr=1.0, warmup_steps=3)[2:] == [1.0] * 7


def test_every_group_gets_the_rate_and_uses_it():
    layer = torch.nn.Linear(3, 2, dtype=torch.float64)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = make_optimizer(layer, OptimizerConfig(weight_decay=0.0))
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    optimizer.step()
    for p, old in zip(layer.parameters(), before):     # Adam's first step is one learning rate
        torch.testing.assert_close(p.detach(), old - 0.25, rtol=0, atol=1e-8)
