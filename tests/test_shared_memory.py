"""Tensors that ranks of one machine exchange through memory: the same as through sockets.

Where there is no such memory (another system, another processor) the results must be the same.
"""

import contextlib
import functools
import gc
import mmap
import os
import platform
import random
import time
import weakref
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_edu import shared_memory as module
from megatron_edu.comm import all_gather_start, all_reduce_start
from megatron_edu.ranks import RankError, Ranks
from megatron_edu.shared_memory import SharedMemory, shared_memory, wait_until

HERE = module._home() is not None   # this machine can have such memory
SIZES = [2, 3, 4, 8]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64]
SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (33, 5)]


@contextlib.contextmanager
def group_of(*members):
    "A new gloo group of these ranks (none: of all), which has no memory yet."
    group = dist.new_group(list(members) or None, backend="gloo")
    if group is not dist.GroupMember.NON_GROUP_MEMBER:
        dist.barrier(group)     # else a rank may end it while another is still joining
    yield group
    dist.destroy_process_group(group)


def numbers(rank: int, shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    "What a rank puts in. Sums of it are rounded in every step."
    generator = torch.Generator().manual_seed(rank)
    return (1000 * torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype)


def sums(x: torch.Tensor, group) -> torch.Tensor:
    return all_reduce_start(x, group).wait()


# Results


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["sum", "max"])
def test_all_ranks_find_the_result_in_order_of_ranks_to_the_last_bit(ranks, tp, dtype, op):
    def reduced():
        with group_of() as group:
            own = [numbers(dist.get_rank(), shape, dtype) for shape in SHAPES]
            results = [all_reduce_start(x, group, op).wait() for x in own]
            assert (shared_memory(group, own[0]) is not None) == HERE
            return results

    combine = torch.add if op == "sum" else torch.maximum
    found = ranks(tp)(reduced)
    for place, shape in enumerate(SHAPES):
        expected = functools.reduce(combine, [numbers(rank, shape, dtype) for rank in range(tp)])
        for results in found:
            assert torch.equal(results[place], found[0][place])
            if HERE or op == "max":
                assert torch.equal(results[place], expected)
            torch.testing.assert_close(results[place], expected)


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_gather_gives_the_pieces_in_order_of_ranks(ranks, tp, dtype):
    def gathered():
        with group_of() as group:
            return [
                all_gather_start(numbers(dist.get_rank(), shape, dtype), group).wait()
                for shape in SHAPES
            ]

    for results in ranks(tp)(gathered):
        for shape, result in zip(SHAPES, results, strict=True):
            pieces = [numbers(rank, shape, dtype) for rank in range(tp)]
            assert torch.equal(result, torch.stack(pieces))


@pytest.mark.world(3)
def test_what_is_not_in_one_piece_of_memory(ranks):
    def layouts():
        x = torch.arange(12.0).view(3, 4) + dist.get_rank()
        with group_of() as group:
            return sums(x.t(), group), all_gather_start(x[:, ::2], group).wait()

    x = torch.arange(12.0).view(3, 4)
    for total, pieces in ranks(3)(layouts):
        assert torch.equal(total, 3 * x.t() + 3)
        assert torch.equal(pieces, torch.stack([x[:, ::2] + rank for rank in range(3)]))


# Slots and notes


@pytest.mark.parametrize("tp", [2, 3])
def test_nothing_is_read_or_written_too_early_however_ranks_dawdle(ranks, tp):
    def dawdle(times):
        rank, chance, under_way = dist.get_rank(), random.Random(dist.get_rank()), []

        def nap():
            if chance.random() < 0.2:
                time.sleep(chance.random() / 500)

        def end(place):
            number, exchange = under_way.pop(place)
            expected = tp * number * 1000 + sum(range(tp))
            assert torch.equal(exchange.wait(), torch.full((500,), expected)), number

        with group_of() as group:
            for number in range(times):
                nap()
                x = torch.full((500,), number * 1000 + rank)
                under_way.append((number, all_reduce_start(x, group)))
                while under_way and chance.random() < 0.5:
                    nap()
                    end(chance.randrange(len(under_way)))
            while under_way:
                end(0)

    ranks(tp)(dawdle, 400)


@pytest.mark.world(2)
def test_a_late_writer_is_waited_for(ranks):
    def late():
        with group_of() as group:
            sums(torch.zeros(1000), group)
            time.sleep(0.1 * dist.get_rank())
            return sums(torch.ones(1000), group)

    for total in ranks(2)(late):
        assert torch.equal(total, torch.full((1000,), 2.0))


@pytest.mark.world(2)
def test_a_late_reader_is_waited_for(ranks):
    def late():
        with group_of() as group:
            first = all_reduce_start(torch.full((1000,), 1.0), group)
            second = all_reduce_start(torch.full((1000,), 10.0), group)
            time.sleep(0.1 * dist.get_rank())
            first, second = first.wait(), second.wait()
            third = sums(torch.full((1000,), 100.0), group)
            return [int(total.unique()) for total in (first, second, third)]

    assert ranks(2)(late) == [[2, 20, 200]] * 2


@pytest.mark.world(3)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_under_way_in_either_order(ranks, order):
    def two():
        with group_of() as group:
            under_way = [all_reduce_start(torch.full((9,), 10.0**i), group) for i in range(2)]
            results = {i: under_way[i].wait() for i in order}
            return [int(results[i].unique()) for i in range(2)]

    assert ranks(3)(two) == [[3, 30]] * 3


@pytest.mark.world(2)
def test_more_than_two_under_way(ranks):
    def five(order):
        with group_of() as group:
            under_way = [all_reduce_start(torch.full((9,), 10**i), group) for i in range(5)]
            results = {i: under_way[i].wait() for i in order}
            again = {i: under_way[i].wait() for i in order}
            assert all(torch.equal(results[i], again[i]) for i in order)
            return [int(results[i].unique()) for i in range(5)]

    for order in (range(5), range(4, -1, -1)):
        assert ranks(2)(five, list(order)) == [[2, 20, 200, 2000, 20000]] * 2


@pytest.mark.world(4)
def test_the_two_groups_of_a_rank_do_not_mix(ranks):
    def grid():
        rank = dist.get_rank()
        rows = [dist.new_group([0, 1], backend="gloo"), dist.new_group([2, 3], backend="gloo")]
        columns = [dist.new_group([0, 2], backend="gloo"), dist.new_group([1, 3], backend="gloo")]
        row, column, found = rows[rank // 2], columns[rank % 2], []
        for number in range(20):
            x = torch.full((50,), 1000 * number + 10**rank)
            a, b = all_reduce_start(x.clone(), row), all_reduce_start(x.clone(), column)
            found.append((int(b.wait().unique()), int(a.wait().unique())))
        dist.destroy_process_group(row)
        dist.destroy_process_group(column)
        return found

    for rank, found in enumerate(ranks(4)(grid)):
        beside, below = 10 ** (rank ^ 2) + 10**rank, 10 ** (rank ^ 1) + 10**rank
        assert found == [(2000 * number + beside, 2000 * number + below) for number in range(20)]


# Capacity


@pytest.mark.world(2)
def test_memory_grows_for_a_larger_tensor_and_stays(ranks):
    def growing():
        with group_of() as group:
            found = []
            for elements in (10, 1 << 17, (1 << 17) + 1, 10):
                x = torch.full((elements,), dist.get_rank() + 1.0, dtype=torch.float64)
                total = sums(x, group)
                assert total.shape == (elements,) and int(total.unique()) == 3
                shared = shared_memory(group, x)
                found.append(shared and shared.capacity)
            return found

    capacities = [1 << 20, 1 << 20, 1 << 21, 1 << 21] if HERE else [None] * 4
    assert ranks(2)(growing) == [capacities] * 2


@pytest.mark.world(3)
def test_memory_grows_while_an_exchange_is_under_way(ranks):
    def growing():
        with group_of() as group:
            small = all_reduce_start(torch.full((10,), 1.0), group)
            time.sleep(0.05 * dist.get_rank())
            large = all_reduce_start(torch.full((1 << 19,), 2.0), group)
            again = all_reduce_start(torch.full((10,), 3.0), group)
            return [int(each.wait().unique()) for each in (again, large, small)]

    assert ranks(3)(growing) == [[9, 6, 3]] * 3


@pytest.mark.world(3)
def test_tensors_above_the_limit_go_through_gloo(ranks):
    def limited():
        with patch.object(module, "_LARGEST_BYTES", 800), group_of() as group:
            kinds, results = [], []
            for elements in (100, 101, 100):
                exchange = all_reduce_start(torch.arange(elements, dtype=torch.float64), group)
                kinds.append(type(exchange).__name__)
                results.append(exchange.wait())
            pieces = all_gather_start(results[1], group).wait()
            return kinds, results, pieces

    for kinds, results, pieces in ranks(3)(limited):
        assert kinds == (["Exchange", "Pending", "Exchange"] if HERE else ["Pending"] * 3)
        for elements, result in zip((100, 101, 100), results, strict=True):
            assert torch.equal(result, 3 * torch.arange(elements, dtype=torch.float64))
        assert torch.equal(pieces, results[1].expand(3, -1))


# No memory


def no_room(*args):
    raise OSError(28, "No space left on device")


def copy_of_it(offer, size: int) -> mmap.mmap:
    "What a machine that was copied after the offer would find: the number, in other memory."
    memory = mmap.mmap(-1, size)
    memory[: module._PROOF] = offer[3]
    return memory


OFF = "MEGATRON_EDU_SHARED_MEMORY"
LACKS = {
    "another machine": (1, module, "_home", lambda: ("another boot", "pid:[1]")),
    "not told which machine": (1, module, "_home", lambda: None),
    "another processor": (1, platform, "machine", lambda: "aarch64"),
    "another processor on rank 0": (0, platform, "machine", lambda: "aarch64"),
    "no room": (0, os, "posix_fallocate", no_room),
    "not allowed to open it": (1, os, "open", no_room),
    "another random number there": (1, os, "pread", lambda *args: bytes(module._PROOF)),
    "a copy of the memory": (1, module, "_accept", copy_of_it),
    "turned off on rank 0": (0, os, "environ", {**os.environ, OFF: "0"}),
    "turned off on another rank": (1, os, "environ", {**os.environ, OFF: "0"}),
}


@pytest.mark.world(3)
@pytest.mark.parametrize("lack", LACKS)
def test_what_one_rank_lacks_no_rank_has(ranks, lack):
    def lacking():
        gc.collect()
        before = open_files()
        rank, where, name, instead = LACKS[lack]
        with contextlib.ExitStack() as stack:
            if dist.get_rank() == rank:
                stack.enter_context(patch.object(where, name, instead, create=True))
            group = stack.enter_context(group_of())
            x = numbers(dist.get_rank(), (33,), torch.float64)
            shared = shared_memory(group, x)
            exchange = all_reduce_start(x.clone(), group)
            return shared is None, type(exchange).__name__, exchange.wait(), open_files() - before

    expected = sum(numbers(rank, (33,), torch.float64) for rank in range(3))
    for none, kind, total, files in ranks(3)(lacking):
        assert none and kind == "Pending" and files == 0
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-10)


@contextlib.contextmanager
def offered(kind: str, folder: Path):
    "An offer of a machine of which this one is a copy, and the file that lies here in its place."
    name = module._NAME if kind.endswith("memory of ours") else "somebody_else"
    memory = "memory" in kind
    handle = os.memfd_create(name) if memory else os.open(folder / "file", os.O_RDWR | os.O_CREAT)
    os.write(handle, bytes(range(256)) * 16)
    if "shorter" in kind:
        os.truncate(handle, 100)
    ends = os.pipe() if kind == "a pipe" else ()
    known = kind in ("a file", "shorter memory of ours")    # the number, by which it is found
    number = bytes(range(module._PROOF)) if known else bytes(module._PROOF)
    try:
        yield (module._home(), os.getpid(), ends[0] if ends else handle, number), handle
    finally:
        for each in (handle, *ends):
            os.close(each)


if HERE:

    @pytest.mark.parametrize(
        "kind",
        [
            "a file",
            "a shorter file",
            "a pipe",
            "other memory of ours",
            "shorter memory of ours",
            "memory of others",
        ],
    )
    def test_what_lies_where_another_machine_made_an_offer_is_left_alone(tmp_path, kind):
        with offered(kind, tmp_path) as (offer, handle):
            before = os.pread(handle, 5000, 0)
            assert module._accept(offer, 4096) is None
            assert os.pread(handle, 5000, 0) == before

    def test_nobody_writes_before_the_number_is_found():
        offer = module._offer(4096)
        before = os.pread(offer[2], 4096, 0)
        assert before[: module._PROOF] == offer[3] != bytes(module._PROOF)
        memory = module._accept(offer, 4096)
        assert memory[:] == before == os.pread(offer[2], 4096, 0)
        os.close(offer[2])


@pytest.mark.world(2)
def test_a_tensor_that_is_not_on_the_cpu_has_no_use_for_it(ranks):
    def elsewhere():
        with group_of() as group:
            return shared_memory(group, torch.empty(3, device="meta")) is None

    assert ranks(2)(elsewhere) == [True, True]


# What stays


def open_files() -> int:
    "Descriptors of such memory that this process has open."
    if not Path("/proc/self/fd").exists():
        return 0
    links = []
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the folder itself
            links.append(os.readlink(entry.path))
    return sum("memfd:megatron_edu" in link for link in links)


def mappings() -> int:
    "Pieces of such memory that this process sees."
    maps = Path("/proc/self/maps")
    return maps.read_text().count("memfd:megatron_edu") if maps.exists() else 0


@pytest.mark.world(2)
def test_nothing_stays_of_a_group_that_is_gone(ranks):
    def gone():
        gc.collect()
        before = mappings(), open_files()
        group = dist.new_group(backend="gloo")
        sums(torch.ones(10), group)
        sums(torch.ones(1 << 19), group)
        gc.collect()
        during = mappings() - before[0], open_files() - before[1]
        dist.barrier(group)
        dist.destroy_process_group(group)
        del group
        gc.collect()
        return during, (mappings(), open_files()) == before

    for (seen, opened), clean in ranks(2)(gone):
        assert seen == HERE and opened <= seen  # Python's mmap keeps one descriptor as long
        assert clean


@pytest.mark.world(2)
def test_a_result_belongs_to_the_caller_alone(ranks):
    def kept():
        with group_of() as group:
            result = weakref.ref(sums(torch.ones(10), group))
            return result() is None

    assert ranks(2)(kept) == [True, True]


# Errors and waiting. Memory in a file is to be had on every machine.


def in_file(path: Path, capacity: int = 1 << 12) -> SharedMemory:
    "Shared memory of a new group of all ranks, in a file that the test has made."
    group = dist.new_group(backend="gloo")
    size = group.size() * (8 * module._NOTES + 2 * capacity)
    with open(path, "r+b") as stream:
        return SharedMemory(group, mmap.mmap(stream.fileno(), size), capacity)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(bytes(1 << 16))
    return path


def total(pieces: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(pieces).sum(0)


@pytest.mark.world(3)
@pytest.mark.parametrize("odd", ["shape", "type", "call"])
def test_ranks_that_do_different_things_are_told(ranks, file, odd):
    def different():
        x, what = torch.ones(3), "sum"
        if dist.get_rank() == 2:
            x = {"shape": torch.ones(4), "type": torch.ones(3, dtype=torch.int32)}.get(odd, x)
            what = "max" if odd == "call" else what
        shared = in_file(file)
        try:
            shared.start(x, what, total).wait()
        except RuntimeError as error:
            return str(error)

    same = "rank {} of this group is in sum of (3,) torch.float32, ranks [2] in something else"
    name = {"shape": "sum of (4,) torch.float32", "type": "sum of (3,) torch.int32"}
    other = f"rank 2 of this group is in {name.get(odd, 'max of (3,) torch.float32')}, ranks [0, 1]"
    expected = [same.format(0), same.format(1), other]
    for message, begin in zip(ranks(3)(different), expected, strict=True):
        assert message.startswith(begin) and "the same calls, with equal shapes" in message


@pytest.mark.world(2)
def test_different_shapes_in_the_call_that_makes_the_memory(ranks):
    def different():
        group = dist.new_group(backend="gloo")
        sums(torch.ones(1 << 20 if dist.get_rank() else 4), group)

    with pytest.raises(RankError, match="rank 1 of this group wants memory of .* equal shapes"):
        ranks(2)(different)


def test_a_rank_that_stays_away_is_named_at_the_limit(file):
    def away():
        shared = in_file(file)
        assert shared.notes.limit == 2
        shared.start(torch.ones(3), "sum", total).wait()
        if dist.get_rank() == 0:
            with pytest.raises(RuntimeError) as caught:
                shared.start(torch.ones(3), "sum", total).wait()
            return str(caught.value)

    with Ranks(2, timeout=2) as world:
        message = world(away)[0]
    expected = "Timed out waiting 2 s for ranks [1] of this group's 2 in sum of (3,) torch.float32"
    assert message == expected


def test_a_call_that_one_rank_does_not_make_ends_with_an_error():
    def away():
        with group_of() as group:
            sums(torch.ones(3), group)
            if dist.get_rank() == 1:
                sums(torch.ones(3), group)

    with Ranks(2, timeout=2) as world, pytest.raises(RankError, match="Every rank") as caught:
        world(away)
    assert caught.value.rank == 1


def test_waiting_is_awake_first_then_sleeps_in_short_naps_and_ends(monkeypatch):
    "By a clock of its own: a look takes a millisecond, a nap as long as it says."
    clock, naps, looks_awake = [0.0], [], []

    def look():
        clock[0] += 0.001
        looks_awake.extend([True] * (not naps))
        return False

    def nap(seconds):
        naps.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(module.time, "sleep", nap)
    assert not wait_until(look, limit=1)
    assert len(looks_awake) == round(module.SPIN_SECONDS / 0.001) and 1 < clock[0] < 1.02
    assert 0 < min(naps) and max(naps) <= 0.01
    naps.clear()
    answers = iter([False, False, True])
    assert wait_until(lambda: next(answers), limit=1) and not naps
