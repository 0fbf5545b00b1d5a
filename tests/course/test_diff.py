"""The plain GPT-2 becomes tensor-parallel by few lines, and computes the same."""

import ast
import inspect
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from megatron_edu.comm import all_gather
from megatron_edu.course import parallel_gpt2, plain_gpt2
from megatron_edu.course.diff import Diff, cells
from megatron_edu.tensor_parallel.shard import shard_state_dict
from megatron_edu.testing import ATOL, compare_with_reference

SIZES = dict(layers=2, hidden=32, heads=4, vocab=64, positions=16, dropout=0.0)
widths = pytest.mark.parametrize("tp", [1, 2, 4])


# ---------------------------------------------------------------------------- the lines


def test_the_plain_file_is_short_and_needs_pytorch_alone():
    assert len(cells(plain_gpt2)) <= 120
    imported = set()
    for node in ast.walk(ast.parse("\n".join(cells(plain_gpt2)))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"dataclasses", "torch", "torch.nn.functional"}


def test_few_lines_change():
    change = Diff(plain_gpt2, parallel_gpt2)
    assert 0 < change.added <= 25
    assert 0 < change.removed <= 25


def test_the_lines_that_are_counted_turn_one_file_into_the_other():
    change = Diff(plain_gpt2, parallel_gpt2)
    removed = Counter(line[1:] for line in change.lines if line.startswith("-"))
    added = Counter(line[1:] for line in change.lines if line.startswith("+"))
    assert (removed.total(), added.total()) == (change.removed, change.added)
    old, new = Counter(cells(plain_gpt2)), Counter(cells(parallel_gpt2))
    assert removed <= old
    assert old - removed + added == new


@pytest.mark.parametrize("module", [plain_gpt2, parallel_gpt2])
def test_cells_are_the_whole_module_but_what_nbdev_adds(module):
    def definitions(text):
        return [
            ast.dump(node) for node in ast.parse(text).body
            if not isinstance(node, ast.Expr) and "__all__" not in ast.unparse(node)
        ]

    assert definitions("\n".join(cells(module))) == definitions(inspect.getsource(module))


def test_both_ways_of_showing_it_have_the_same_lines():
    change = Diff(plain_gpt2, parallel_gpt2)
    assert change._repr_markdown_() == f"```diff\n{change!r}\n```"
    assert repr(change).splitlines() == change.lines


# ---------------------------------------------------------------------------- the numbers


def checked(model):
    "With the checker's signature; every token counts."
    loss = model.loss
    model.loss = lambda ids, labels, mask=None, num_tokens=None: loss(ids, labels)
    return model


def judge(device, old="", new=""):
    "The four checks of the parallel file, in which `old` is replaced."
    text = inspect.getsource(parallel_gpt2)
    assert old in text
    names = {"__name__": parallel_gpt2.__name__, "__package__": parallel_gpt2.__package__}
    exec(compile(text.replace(old, new), "changed", "exec"), names)
    torch.manual_seed(1)
    full = plain_gpt2.GPT2(plain_gpt2.Config(**SIZES)).double()
    for parameter in full.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    full = full.to(device)
    model = names["GPT2"](names["Config"](**SIZES), dist.group.WORLD).double().to(device)
    model.load_state_dict(shard_state_dict(full.state_dict(), model))
    text = torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(2)).to(device)
    return compare_with_reference(checked(model), checked(full), text[:, :-1], text[:, 1:])


@widths
def test_equals_the_plain_one_in_the_four_checks(ranks, device, tp):
    assert ATOL == 1e-10
    for report in ranks(tp)(judge, device):
        assert report.passed, str(report)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("old, new, red", [
    ("copy_to_tp(self.ln_f(x), self.wte.group)", "self.ln_f(x)", 3),
    (", blocks=3", "", 4),
    ("config.heads // group.size()", "config.heads", 4),
])
def test_a_forgotten_line_is_seen(ranks, device, tp, old, new, red):
    report = ranks(tp)(judge, device, old, new)[0]
    assert len(report.red) == red
    assert ("loss" in report.red) == (red == 4)


def attention_under_dropout(device, dropout):
    "What this rank's heads give the output layer, and what that gives; all heads are alike."
    config = parallel_gpt2.Config(**(SIZES | {"dropout": dropout}))
    layer = parallel_gpt2.Attention(config, dist.group.WORLD).to(device)
    torch.manual_seed(5)
    head = torch.randn(8, 32)
    layer.qkv.weight.data.copy_(head.repeat(3 * layer.heads, 1))
    layer.qkv.bias.data.zero_()
    seen = []
    layer.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    layer.proj.weight.data.fill_(1.0)
    layer.proj.bias.data.zero_()
    out = layer(torch.randn(2, 9, 32).to(device)).detach()
    return [all_gather(x[None], dist.group.WORLD, dim=0).cpu() for x in (seen[0], out)]


@pytest.mark.parametrize("tp", [2, 4])
def test_heads_draw_masks_of_their_own_and_ranks_agree_outside(ranks, device, tp):
    heads, out = ranks(tp)(attention_under_dropout, device, 0.5)[0]
    assert not torch.equal(heads[0], heads[1])
    assert all(torch.equal(each, out[0]) for each in out)
    assert (out[0] == 0).float().mean() > 0.2
    heads, _ = ranks(tp)(attention_under_dropout, device, 0.0)[0]
    torch.testing.assert_close(heads[0], heads[1])
