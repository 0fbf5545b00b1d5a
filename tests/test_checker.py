"""The checker: red for a single error in any of its four quantities, on any one rank."""

import math
import re

import bert_cases
import pytest
import torch
import torch.distributed as dist
from gpt2_cases import batch, config, groups, pair

from megatron_edu import testing
from megatron_edu.tensor_parallel.norm import grad_norm
from megatron_edu.testing import ATOL, CHECKS, Report, check_equivalence, compare_with_reference
from megatron_edu.training.data_parallel import DataParallel

GRIDS = [(2, 1), (4, 1), (2, 2), (1, 2)]
on_grids = pytest.mark.parametrize("tp, dp", GRIDS)
QUANTITIES = ["loss", "sharded", "replicated", "norm"]


# ------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("check", QUANTITIES)
@pytest.mark.parametrize(
    "error, red", [(0.0, 0), (ATOL, 0), (2e-10, 1), (math.inf, 1), (math.nan, 1)]
)
def test_report(check, error, red):
    report = Report(**{name: error if name == check else 0.0 for name in CHECKS})
    assert report.red == [check] * red
    assert report.passed == (not red)
    lines = str(report).splitlines()
    assert [line.split()[1] for line in lines] == QUANTITIES
    colors = ["red" if red and name == check else "green" for name in QUANTITIES]
    assert [line.split()[0] for line in lines] == colors


def test_report_with_another_bound():
    assert Report(1e-3, 1e-3, 1e-3, 1e-3, atol=1e-2).passed
    assert Report(1e-3, 1e-3, 1e-1, 1e-3, atol=1e-2).red == ["replicated"]


@pytest.mark.parametrize(
    "x",
    [None, [1.0, math.nan], [1.0, math.inf], [1.0], [[1.0, 2.0]], [1.0, 2.0, 3.0]],
)
def test_no_number_is_an_infinite_error(x):
    x = None if x is None else torch.tensor(x)
    assert testing._error(x, torch.tensor([1.0, 2.0])) == math.inf


@pytest.mark.parametrize(
    "y, error", [([0.0, -0.0], 0.0), ([0.0, 1e-300], math.inf), ([math.nan], math.inf)]
)
def test_a_missing_gradient_is_right_where_the_references_is_0(y, error):
    assert testing._error(None, torch.tensor(y, dtype=torch.float64)) == error


def test_infinity_on_both_sides_is_no_agreement():
    infinite = torch.tensor([math.inf])
    assert testing._error(infinite, infinite) == math.inf


def test_error_is_the_largest():
    assert testing._error(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([1.0, 2.5, -2.0])) == 1.0


# ---------------------------------------------------------------- one error in one quantity


class Faulty:
    "A replica with one thing wrong on one rank, by `amount`; all else is exactly right."

    def __init__(self, replica, quantity, amount):
        self.replica, self.module = replica, replica.module
        self.quantity, self.amount = quantity, amount

    def loss(self, *args, **kwargs):
        loss = self.replica.loss(*args, **kwargs)
        return loss + self.amount if self.quantity == "loss" else loss


def spoil(parameter, amount):
    "Move one element of a gradient after the backward pass, and the norm by nothing to speak of."

    def move(parameter):
        grad = parameter.grad.view(-1)
        smallest = grad.abs().argmin()
        assert grad[smallest].abs() < 1e-4
        grad[smallest] += amount

    parameter.register_post_accumulate_grad_hook(move)


NAMES = {"sharded": "blocks.1.mlp.up.weight", "replicated": "wpe.weight"}


def one_error(tp, dp, device, quantity, amount, guilty):
    "The report when rank `guilty` errs in one quantity."
    mine = groups(tp, dp, device)
    model, full = pair(config(), mine.tp_group, device=device)
    replica = DataParallel(model, mine.dp_group)
    real_norm = testing.grad_norm
    if dist.get_rank() == guilty:
        replica = Faulty(replica, quantity, amount)
        if quantity in NAMES:
            spoil(model.get_parameter(NAMES[quantity]), amount)
        if quantity == "norm":
            testing.grad_norm = lambda model: grad_norm(model) + amount
    try:
        data = batch(config(), device=device)
        return compare_with_reference(replica, full, *data, dp_group=mine.dp_group)
    finally:
        testing.grad_norm = real_norm


@on_grids
@pytest.mark.parametrize("guilty", ["first", "last"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_single_error_on_one_rank_is_red(ranks, device, tp, dp, quantity, guilty):
    "Its own light only: a gradient element that is off by 1e-8 moves the norm by 1e-12."
    rank = 0 if guilty == "first" else tp * dp - 1
    reports = ranks(tp * dp)(one_error, tp, dp, device, quantity, 1e-8, rank)
    assert all(report == reports[0] for report in reports)
    assert reports[0].red == [quantity]
    share = 1 if quantity == "norm" else 1 / dp     # the replicas average the rest
    assert getattr(reports[0], quantity) == pytest.approx(1e-8 * share, rel=1e-4)


@pytest.mark.parametrize("tp, dp", [(2, 1)])
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("amount, red", [(0.0, 0), (5e-11, 0), (2e-10, 1), (-2e-10, 1)])
def test_the_bound(ranks, device, tp, dp, quantity, amount, red):
    for report in ranks(tp * dp)(one_error, tp, dp, device, quantity, amount, 1):
        assert report.red == [quantity] * red


@pytest.mark.parametrize("tp, dp", [(2, 1), (2, 2)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_no_number_on_one_rank_is_red_on_all(ranks, device, tp, dp, quantity, bad):
    reports = ranks(tp * dp)(one_error, tp, dp, device, quantity, bad, tp * dp - 1)
    assert all(report == reports[0] for report in reports)
    assert quantity in reports[0].red
    assert getattr(reports[0], quantity) == math.inf


def equal_errors(tp, device):
    "Every rank errs alike: the ranks agree with each other, and not with the reference."
    model, full = pair(config(), groups(tp, 1, device).tp_group, device=device)
    spoil(model.wpe.weight, 1e-8)
    return compare_with_reference(model, full, *batch(config(), device=device))


@pytest.mark.parametrize("tp", [2])
def test_replicated_gradients_that_agree_and_are_wrong(ranks, device, tp):
    for report in ranks(tp)(equal_errors, tp, device):
        assert report.red == ["replicated"]
        assert report.replicated == pytest.approx(1e-8, rel=1e-4)


def opposite_errors(tp, device):
    "Within the bound of the reference on each rank, and out of bounds among the ranks."
    model, full = pair(config(), groups(tp, 1, device).tp_group, device=device)
    spoil(model.wpe.weight, 0.7e-10 * (-1) ** dist.get_rank())
    return compare_with_reference(model, full, *batch(config(), device=device))


@pytest.mark.parametrize("tp", [2])
def test_replicated_gradients_are_compared_among_the_ranks(ranks, device, tp):
    for report in ranks(tp)(opposite_errors, tp, device):
        assert report.red == ["replicated"]
        assert report.replicated == pytest.approx(1.4e-10, rel=1e-3)


# ---------------------------------------------------------------------- missing gradients


def without_gradient(tp, device, name, guilty):
    model, full = pair(config(), groups(tp, 1, device).tp_group, device=device)
    if guilty in ("all", dist.get_rank() if dist.is_initialized() else 0):
        model.get_parameter(name).requires_grad_(False)
    return compare_with_reference(model, full, *batch(config(), device=device))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("guilty", ["all", 0])
@pytest.mark.parametrize("quantity, name", NAMES.items())
def test_a_missing_gradient_is_red(ranks, device, tp, quantity, name, guilty):
    reports = ranks(tp)(without_gradient, tp, device, name, guilty)
    assert all(report == reports[0] for report in reports)
    assert quantity in reports[0].red
    assert getattr(reports[0], quantity) == math.inf
    assert "loss" not in reports[0].red


# ------------------------------------------------------------------------------- the rest


def raised(tp, device, amount):
    model, full = pair(config(), groups(tp, 1, device).tp_group, device=device)
    if dist.get_rank() == 0:
        spoil(model.get_parameter(NAMES["sharded"]), amount)
    try:
        return check_equivalence(model, full, *batch(config(), device=device))
    except AssertionError as error:
        return str(error)


@pytest.mark.parametrize("tp", [1, 2])
def test_check_equivalence_raises_on_all_ranks(ranks, device, tp):
    messages = ranks(tp)(raised, tp, device, 1e-8)
    assert len(set(messages)) == 1
    assert "does not equal the reference within 1e-10" in messages[0]
    assert re.search(r"^red +sharded +1.0e-08$", messages[0], re.MULTILINE)
    assert len(re.findall("^green", messages[0], re.MULTILINE)) == 3


@pytest.mark.parametrize("tp", [1, 2])
def test_check_equivalence_returns_the_report(ranks, device, tp):
    assert all(report.passed for report in ranks(tp)(raised, tp, device, 0.0))


@pytest.mark.parametrize("atol, passes", [(1e-7, True), (1e-9, False)])
def test_the_bound_is_an_argument(atol, passes):
    model, full = pair(config())
    spoil(model.wpe.weight, 1e-8)
    if passes:
        assert check_equivalence(model, full, *batch(config()), atol=atol).atol == atol
    else:
        with pytest.raises(AssertionError, match="within 1e-09"):
            check_equivalence(model, full, *batch(config()), atol=atol)


def test_gradients_stay_in_the_model_and_not_in_the_reference():
    model, full = pair(config())
    data = batch(config())
    check_equivalence(model, full, *data)
    first = [p.grad.clone() for p in model.parameters()]
    check_equivalence(model, full, *data)
    assert all(torch.equal(a, p.grad) for a, p in zip(first, model.parameters()))
    assert all(p.grad is None for p in full.parameters())


def odd_rows(dp, device):
    mine = groups(1, dp, device)
    model, full = pair(config(), mine.tp_group, device=device)
    try:
        data = batch(config(), rows=3, device=device)
        compare_with_reference(model, full, *data, dp_group=mine.dp_group)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("dp", [2])
def test_rows_that_do_not_divide(ranks, device, dp):
    for message in ranks(dp)(odd_rows, dp, device):
        assert message == (
            "a batch of 3 rows does not divide among 2 replicas; pass a multiple of 2 rows"
        )


def further_rows(dp, device):
    "Whether BERT passes with its further tensors; what is said of one with too few rows."
    mine = groups(1, dp, device)
    model, full = bert_cases.pair(bert_cases.config(), mine.tp_group, device=device)
    replica = DataParallel(model, mine.dp_group)
    data = bert_cases.batch(bert_cases.config(), device=device)
    report = compare_with_reference(replica, full, **data, dp_group=mine.dp_group)
    short = data | {"sentence_order": data["sentence_order"][:3]}
    try:
        compare_with_reference(replica, full, **short, dp_group=mine.dp_group)
    except ValueError as error:
        return report.red, str(error)


@pytest.mark.parametrize("dp", [2])
def test_further_tensors_are_cut_and_passed_on(ranks, device, dp):
    for red, message in ranks(dp)(further_rows, dp, device):
        assert red == []
        assert "3 rows does not divide among 2 replicas" in message


def other_weights(tp, device):
    model, full = pair(config(), groups(tp, 1, device).tp_group, device=device)
    with torch.no_grad():
        full.ln_f.weight[0] += 1e-3
    return compare_with_reference(model, full, *batch(config(), device=device))


@pytest.mark.parametrize("tp", [1, 2])
def test_other_weights_are_red_throughout(ranks, device, tp):
    for report in ranks(tp)(other_weights, tp, device):
        assert report.red == QUANTITIES
