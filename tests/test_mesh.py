"""The grid of ranks against arithmetic, and its groups on real ranks."""

import dataclasses
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_edu.comm import Ledger, all_reduce
from megatron_edu.mesh import ParallelDims

SHAPES = [
    # (tp, dp, pp)
    (2, 1, 1),
    (1, 2, 1),
    (1, 1, 2),
    (4, 1, 1),
    (2, 2, 1),
    (2, 1, 2),
    (1, 2, 2),
    (3, 2, 1),
    (1, 3, 2),
    (2, 2, 2),
]

AXES = ("tp", "dp", "pp")


def places(rank: int, tp: int, dp: int) -> dict[str, int]:
    "Where a rank sits, by arithmetic."
    return {"tp": rank % tp, "dp": rank // tp % dp, "pp": rank // (tp * dp)}


def members(rank: int, axis: str, tp: int, dp: int, pp: int) -> list[int]:
    "Ranks that agree with `rank` in all places but the one on `axis`."
    here = places(rank, tp, dp)
    others = [(other, places(other, tp, dp)) for other in range(tp * dp * pp)]
    return [o for o, there in others if all(there[a] == here[a] for a in AXES if a != axis)]


@pytest.mark.parametrize(("tp", "dp", "pp"), SHAPES + [(1, 1, 1), (8, 64, 1), (4, 3, 5)])
def test_the_grid_by_arithmetic(tp, dp, pp):
    dims = ParallelDims(tp, dp, pp)
    grid = dims.grid()
    assert dims.world_size == tp * dp * pp == grid.numel()
    assert grid.shape == (pp, dp, tp)
    for rank in range(dims.world_size):
        place = places(rank, tp, dp)
        assert grid[place["pp"], place["dp"], place["tp"]] == rank


def test_the_grid_of_the_paper():
    grid = ParallelDims(tp=8, dp=64).grid()[0]
    assert grid[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert grid[:, 1].tolist() == list(range(1, 506, 8))
    assert grid.numel() == 512


def report(dims: ParallelDims, device: str) -> dict:
    "All that a rank can tell about its groups, with a sum of rank numbers over each."
    groups = dims.build(device)
    found = {"places": {axis: getattr(groups, f"{axis}_rank") for axis in AXES}}
    assert groups.dims == dims
    for axis in AXES:
        group = getattr(groups, f"{axis}_group")
        found[axis] = None if group is None else dist.get_process_group_ranks(group)
        with Ledger() as ledger:
            total = all_reduce(torch.tensor(dist.get_rank(), device=device), group)
        found[f"sum over {axis}"] = total.item()
        found[f"{axis} in ledger"] = [record.axis for record in ledger.records]
    return found


@pytest.mark.parametrize(("tp", "dp", "pp"), SHAPES)
def test_groups_on_ranks(ranks, device, tp, dp, pp):
    results = ranks(tp * dp * pp)(report, ParallelDims(tp, dp, pp), device)
    for rank, found in enumerate(results):
        assert found["places"] == places(rank, tp, dp)
        for axis, size in {"tp": tp, "dp": dp, "pp": pp}.items():
            group = members(rank, axis, tp, dp, pp)
            assert len(group) == size
            assert found[axis] == (group if size > 1 else None)
            assert found[f"sum over {axis}"] == sum(group)
            assert found[f"{axis} in ledger"] == ([axis] if size > 1 else [])


def report_beside_a_gpu(dims: ParallelDims) -> tuple[dict, list[str]]:
    "On gloo with a GPU in the machine, a mesh makes a group of its own instead of lending one."
    made = []
    new_group = dist.device_mesh.new_group

    def watched(*args, **options):
        made.append(options["group_desc"])
        return new_group(*args, **options)

    with (
        mock.patch("torch.cuda.is_available", lambda: True),
        mock.patch.object(dist.device_mesh, "new_group", watched),
    ):
        return report(dims, "cpu"), made


@pytest.mark.parametrize(("tp", "dp", "pp"), SHAPES[:3])
def test_the_only_axis_has_its_name_and_backend_beside_a_gpu(cpu_ranks, tp, dp, pp):
    axis = next(axis for axis, size in {"tp": tp, "dp": dp, "pp": pp}.items() if size > 1)
    for found, made in cpu_ranks(2)(report_beside_a_gpu, ParallelDims(tp, dp, pp)):
        assert made == ["mesh_default"]
        assert found[f"{axis} in ledger"] == [axis]
        assert found[f"sum over {axis}"] == 1


@pytest.mark.parametrize(("tp", "dp"), [(2, 2)])
def test_groups_can_be_made_again(ranks, device, tp, dp):
    world = ranks(tp * dp)
    first = world(report, ParallelDims(tp, dp), device)
    assert world(report, ParallelDims(tp * dp), device) != first
    assert world(report, ParallelDims(tp, dp), device) == first


def test_one_rank_makes_no_group_and_needs_no_world():
    groups = ParallelDims().build()
    assert groups.tp_group is groups.dp_group is groups.pp_group is None
    assert (groups.tp_rank, groups.dp_rank, groups.pp_rank) == (0, 0, 0)
    assert not dist.is_initialized()


MISMATCH = (
    "tp=4 x dp=2 x pp=1 = 8 ranks, but the world has {}: "
    "start 8 ranks, or choose sizes whose product is {}"
)


def build_message(dims: ParallelDims, device: str) -> str:
    with pytest.raises(ValueError) as caught:
        dims.build(device)
    return str(caught.value)


def test_a_missing_world_is_refused():
    assert build_message(ParallelDims(tp=4, dp=2), "cpu") == MISMATCH.format(1, 1)


@pytest.mark.parametrize("tp", [2, 3])
def test_a_world_of_another_size_is_refused(ranks, device, tp):
    messages = ranks(tp)(build_message, ParallelDims(tp=4, dp=2), device)
    assert messages == [MISMATCH.format(tp, tp)] * tp
    assert "world has" in ranks(tp)(build_message, ParallelDims(), device)[0]


@pytest.mark.parametrize("axis", [*AXES, "cp"])
@pytest.mark.parametrize("size", [0, -1])
def test_an_axis_has_at_least_one_rank(axis, size):
    with pytest.raises(ValueError, match=rf"{axis}={size}: .* at least 1 rank; pass {axis}>=1"):
        ParallelDims(**{axis: size})


def test_a_sequence_is_not_shared_yet():
    assert [each.name for each in dataclasses.fields(ParallelDims)] == [*AXES, "cp"]
    assert ParallelDims(cp=1) == ParallelDims()
    with pytest.raises(ValueError, match="cp=2: no layer shares a sequence .*; pass cp=1"):
        ParallelDims(tp=2, cp=2)


def test_sizes_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ParallelDims().tp = 2
