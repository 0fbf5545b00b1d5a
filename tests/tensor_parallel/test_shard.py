"""Shard rules against explicit index arithmetic, and states that go to ranks and come back."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_edu.comm import Ledger, group_size
from megatron_edu.tensor_parallel.shard import (
    Shard,
    check_divides,
    gather_state_dict,
    gather_tensors,
    placements,
    shard_rules,
    shard_state_dict,
)

SIZES = [1, 2, 3, 4, 8]


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


def owned(length: int, blocks: int, rank: int, size: int) -> list[int]:
    "Positions along the cut dim that a rank holds, by arithmetic alone."
    block, piece = length // blocks, length // blocks // size
    return [
        b * block + rank * piece + i
        for b in range(blocks)
        for i in range(piece)
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_split_takes_the_positions_of_its_rank_and_merge_puts_them_back(dim, blocks, size):
    shape = [3, 5, 7]
    shape[dim] = 2 * blocks * size
    full = numbers(*shape)
    rule = Shard(dim, blocks)
    parts = [rule.split(full, rank, size) for rank in range(size)]
    for rank, part in enumerate(parts):
        wanted = torch.tensor(owned(shape[dim], blocks, rank, size))
        assert torch.equal(part, full.index_select(dim, wanted))
    assert torch.equal(rule.merge(parts), full)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_split_and_merge_take_any_strides_and_type(blocks, size):
    full = numbers(5, 3 * size).to(torch.bfloat16).t()
    rule = Shard(0, blocks)
    parts = [rule.split(full, rank, size) for rank in range(size)]
    assert not full.is_contiguous() and parts[0].dtype == torch.bfloat16
    assert torch.equal(rule.merge(parts), full)


def test_the_rank_that_holds_whole_heads():
    qkv = numbers(12)       # h = 4: rows of Q, of K, of V
    assert Shard(0, blocks=3).split(qkv, 0, 2).tolist() == [0, 1, 4, 5, 8, 9]
    assert Shard(0).split(qkv, 0, 2).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("blocks", [1, 3])
def test_merging_by_another_rule_shows(blocks):
    full = numbers(12, 2)
    parts = [Shard(0, blocks).split(full, rank, 2) for rank in range(2)]
    assert not torch.equal(Shard(0, 4 - blocks).merge(parts), full)
    assert not torch.equal(Shard(0, blocks).merge(parts[::-1]), full)


def test_a_smaller_slice_lies_in_the_larger_one():
    full = numbers(24, 2)
    for rule in (Shard(0), Shard(0, 3)):
        for rank in range(4):
            of_two = rule.split(full, rank // 2, 2)
            assert torch.equal(rule.split(of_two, rank % 2, 2), rule.split(full, rank, 4))


@pytest.mark.parametrize(
    "value, size, blocks, nearest",
    [
        (50_257, 8, 1, 50_256),
        (7, 4, 1, 8),
        (5, 4, 1, 4),
        (1, 8, 1, 8),
        (7, 2, 3, 6),
        (28, 4, 3, 24),
    ],
)
def test_what_does_not_divide_is_named_with_the_nearest_that_does(value, size, blocks, nearest):
    with pytest.raises(ValueError) as caught:
        check_divides("width", value, size, blocks)
    message = str(caught.value)
    assert f"width={value} " in message and f" {size} tensor-parallel ranks" in message
    assert message.endswith(f"the nearest that does is {nearest}")
    assert nearest % (size * blocks) == 0
    check_divides("width", nearest, size, blocks)


@pytest.mark.parametrize(
    "length, blocks, size",
    [(7, 1, 2), (10, 3, 3), (7, 3, 2), (7, 3, 1), (12, 3, 8)],
)
def test_split_refuses_a_dim_that_does_not_divide(length, blocks, size):
    with pytest.raises(ValueError, match=rf"shape \({length}, 2\), dim 0: size={length} "):
        Shard(0, blocks).split(numbers(length, 2), 0, size)


@pytest.mark.parametrize("rule", [{"dim": -1}, {"dim": 0, "blocks": 0}])
def test_rules_that_mean_nothing(rule):
    with pytest.raises(ValueError, match="pass dim >= 0 and blocks >= 1"):
        Shard(**rule)


class Cut(nn.Module):
    "Parameters of the sizes a rank holds, with the rules they are cut by."

    def __init__(self, group, **full):
        super().__init__()
        self.group = group
        self.shard_rules = {name: rule for name, (_, rule) in full.items()}
        for name, (shape, rule) in full.items():
            shape = list(shape)
            shape[rule.dim] //= group_size(group)
            setattr(self, name, nn.Parameter(torch.zeros(shape)))


def build(group=None) -> nn.Module:
    "Every kind of cut, for up to 8 ranks; sizes that are not powers of two."
    return nn.ModuleDict({
        "wte": Cut(group, weight=((5 * 24, 6), Shard(0))),
        "block": nn.ModuleDict({
            "qkv": Cut(group, weight=((3 * 24, 6), Shard(0, 3)), bias=((3 * 24,), Shard(0, 3))),
            "proj": Cut(group, weight=((7, 48), Shard(1))),
            "ln": nn.LayerNorm(6),
        }),
    })


def full_state() -> dict[str, torch.Tensor]:
    return {name: torch.rand_like(p) for name, p in build().named_parameters()}


def test_rules_by_name_in_the_order_of_the_model():
    rules = shard_rules(build())
    assert list(rules) == [name for name, _ in build().named_parameters()]
    assert rules == {
        "wte.weight": Shard(0),
        "block.qkv.weight": Shard(0, 3),
        "block.qkv.bias": Shard(0, 3),
        "block.proj.weight": Shard(1),
        "block.ln.weight": None,
        "block.ln.bias": None,
    }


def test_a_rule_is_for_the_layers_own_parameters_only():
    "Not for a parameter of the same name further down, and the top module's names have no prefix."
    layer = Cut(None, weight=((4, 2), Shard(0)))
    layer.inner = nn.Linear(2, 2)
    assert shard_rules(layer) == {"weight": Shard(0), "inner.weight": None, "inner.bias": None}


def test_a_shared_parameter_has_one_rule_under_its_first_name():
    model = build()
    model["head"] = nn.Linear(6, 120, bias=False)
    model["head"].weight = model["wte"].weight
    assert [name for name in shard_rules(model) if "head" in name] == []
    assert shard_rules(model)["wte.weight"] == Shard(0)


def move_state(full, device):
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    model = build(group).to(device)
    local = shard_state_dict({name: tensor.to(device) for name, tensor in full.items()}, model)
    model.load_state_dict(local)
    with Ledger() as ledger:
        back = gather_state_dict(model)
    doubled = gather_tensors({"wte.weight": 2 * model["wte"].weight}, model)["wte.weight"]
    alone = all(
        tensor.data_ptr() != p.data_ptr() and not tensor.requires_grad
        for tensor, p in zip(back.values(), model.parameters())
    )
    moved = [{name: tensor.cpu() for name, tensor in state.items()} for state in (local, back)]
    return *moved, doubled.detach().cpu(), alone, ledger


@pytest.mark.parametrize("tp", SIZES)
def test_a_full_state_goes_to_ranks_and_comes_back(ranks, device, tp):
    full = full_state()
    answers = ranks(tp)(move_state, full, device)
    rules = shard_rules(build())
    for rank, (local, back, doubled, alone, ledger) in enumerate(answers):
        assert list(back) == list(full) and alone
        for name, rule in rules.items():
            assert torch.equal(back[name], full[name])
            wanted = full[name] if rule is None else rule.split(full[name], rank, tp)
            assert torch.equal(local[name], wanted)
        assert torch.equal(doubled, 2 * full["wte.weight"])
        sharded = [full[name].numel() for name, rule in rules.items() if rule is not None]
        assert ledger.count() == ledger.count("all_gather") == (len(sharded) if tp > 1 else 0)
        assert ledger.elements() == (sum(sharded) if tp > 1 else 0)


@pytest.mark.parametrize("tp, new", [(2, 4), (4, 2), (3, 8), (8, 1)])
def test_what_one_size_gathers_another_loads(ranks, device, tp, new):
    full = full_state()
    gathered = ranks(tp)(move_state, full, device)[-1][1]
    for local, back, *_ in ranks(new)(move_state, gathered, device):
        assert all(torch.equal(back[name], full[name]) for name in full)
        assert local["wte.weight"].shape == (120 // new, 6)


def test_a_layer_without_a_group_is_whole():
    model = build()
    assert all(place.group is None for place in placements(model).values())
    full = full_state()
    local = shard_state_dict(full, model)
    assert all(torch.equal(local[name], full[name]) for name in full)


def refuse(full):
    try:
        shard_state_dict(full, build(dist.group.WORLD))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"wte.weight": None}, ["missing ['wte.weight']", "surplus []"]),
        ({"wpe.weight": torch.zeros(2)}, ["missing []", "surplus ['wpe.weight']"]),
        ({"wte.weight": torch.zeros(60, 6)}, ["wte.weight", "(60, 6)", "(120, 6)"]),
        ({"wte.weight": torch.zeros(121, 6)}, ["wte.weight", "(121, 6)", "(120, 6)"]),
        ({"block.proj.weight": torch.zeros(48)}, ["block.proj.weight", "(48,)", "(7, 48)"]),
        ({"block.ln.bias": torch.zeros(3)}, ["block.ln.bias", "(3,)", "(6,)"]),
    ],
)
@pytest.mark.world(2)
def test_a_state_of_another_model_is_refused_by_name(ranks, change, words):
    full = {**full_state(), **change}
    full = {name: tensor for name, tensor in full.items() if tensor is not None}
    for message in ranks(2)(refuse, full):
        assert all(word in message for word in words), message
        assert "build the model with the configuration of the state" in message
