"""Two random streams: what agrees in a group, what differs, and that both are replayed."""

from itertools import combinations, product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt2_cases import batch, config, groups, pair

from megatron_edu.tensor_parallel.random import mix_seed, seed_replica, sharded_randomness

DROPOUT = config(dropout=0.4)
KEYS = [(tp, dp) for tp in (2, 4) for dp in (1, 2)]


# ------------------------------------------------------------------------------- seeds


def test_seeds_of_neighbours_differ():
    places = list(product(range(20), range(20), range(5)))
    assert len({mix_seed(*place) for place in places}) == len(places)


@pytest.mark.parametrize(
    "one, other",
    [
        ((5,), (5, 0)),
        ((0, 1), (1, 0)),
        ((2**32,), (0, 1)),
        ((2**32, 0), (0, 1)),
        ((1, 2**32), (1, 0, 1)),
    ],
)
def test_seeds_of_other_numbers_differ(one, other):
    assert mix_seed(*one) != mix_seed(*other)


def test_a_seed_is_pinned():
    "Checkpoints replay their masks: the seeds of a release may not change."
    assert mix_seed(1, 2, 3) == 1147671286981233739
    assert all(0 <= mix_seed(seed) < 2**63 for seed in range(100))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed={seed}: must be at least 0 and below"):
        seed_replica(seed)


def test_largest_seed():
    seed_replica(2**64 - 1)


@pytest.mark.parametrize("place", [dict(dp_rank=1), dict(pp_rank=1)])
def test_every_replica_and_stage_has_its_own_numbers(place):
    seed_replica(1)
    first = torch.rand(100)
    seed_replica(1, **place)
    assert not torch.equal(torch.rand(100), first)
    seed_replica(1)
    assert torch.equal(torch.rand(100), first)


# ------------------------------------------------------------------------- the two streams


def masks(tp, dp, device, seed=1, elements=10_000):
    "Dropout masks before, inside and after a sharded region."
    mine = groups(tp, dp, device)
    seed_replica(seed, mine.dp_rank)
    ones = torch.ones(elements, device=device)
    before = F.dropout(ones, 0.3)
    with sharded_randomness(mine.tp_group):
        inside = F.dropout(ones, 0.3)
        again = F.dropout(ones, 0.3)
    after = F.dropout(ones, 0.3)
    return [mask.cpu() for mask in (before, inside, again, after)]


@pytest.mark.parametrize("tp, dp", KEYS)
def test_replicated_masks_agree_and_sharded_ones_differ(ranks, device, tp, dp):
    by_rank = ranks(tp * dp)(masks, tp, dp, device)
    for one, other in combinations(range(tp * dp), 2):
        same_group = one // tp == other // tp
        for i, sharded in enumerate((False, True, True, False)):
            agree = torch.equal(by_rank[one][i], by_rank[other][i])
            assert agree == (same_group and not sharded), (one, other, i)


@pytest.mark.parametrize("tp, dp", [(2, 2)])
def test_masks_are_independent(ranks, device, tp, dp):
    "Every correlation of two masks, and every rate, within four and a half standard errors."
    by_rank = ranks(tp * dp)(masks, tp, dp, device)
    different = [by_rank[0][0], by_rank[0][3], by_rank[2][0], by_rank[2][3]]
    different += [by_rank[rank][i] for rank in range(4) for i in (1, 2)]
    kept = torch.stack(different).double() > 0
    elements = kept.shape[1]
    correlation = torch.corrcoef(kept.double()) - torch.eye(len(kept), dtype=torch.float64)
    assert correlation.abs().max() < 4.5 / elements**0.5
    assert (kept.double().mean(1) - 0.7).abs().max() < 4.5 * (0.3 * 0.7 / elements) ** 0.5


@pytest.mark.parametrize("tp, dp", [(2, 2)])
def test_a_seed_reproduces(ranks, device, tp, dp):
    first = ranks(tp * dp)(masks, tp, dp, device, seed=3)
    again = ranks(tp * dp)(masks, tp, dp, device, seed=3)
    other = ranks(tp * dp)(masks, tp, dp, device, seed=4)
    for a, b, c in zip(first, again, other):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
        assert not any(torch.equal(x, y) for x, y in zip(a, c))


def states(device):
    "Of the CPU, and of the GPU in use."
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if device == "cuda" else [])


def continues(device, draws, fails):
    "Whether the shared stream goes on after a region as if one number had been drawn."
    torch.manual_seed(5)
    try:
        with sharded_randomness(dist.group.WORLD):
            torch.rand(draws, device=device)
            if fails:
                raise KeyError
    except KeyError:
        pass
    after = states(device)
    torch.manual_seed(5)
    torch.randint(2**62, ())
    return all(torch.equal(a, b) for a, b in zip(after, states(device), strict=True))


@pytest.mark.parametrize("draws", [0, 1, 100_001])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.world(2)
def test_the_shared_stream_continues_after_one_number(ranks, device, draws, fails):
    assert ranks(2)(continues, device, draws, fails) == [True, True]


def test_two_regions_differ(ranks, device):
    for _, inside, again, _ in ranks(2)(masks, 2, 1, device):
        assert not torch.equal(inside, again)
    first, second = ranks(2)(two_regions, device)
    assert not first and not second


def two_regions(device):
    torch.manual_seed(5)
    drawn = []
    for _ in range(2):
        with sharded_randomness(dist.group.WORLD):
            drawn.append(torch.rand(100, device=device))
    return torch.equal(*drawn)


def untouched(group):
    torch.manual_seed(5)
    with sharded_randomness(group):
        inside = torch.rand(100)
    torch.manual_seed(5)
    return torch.equal(inside, torch.rand(100))


def test_without_a_group_the_region_does_nothing():
    assert untouched(None)


def test_with_one_rank_the_region_does_nothing(ranks):
    assert ranks(1)(lambda: untouched(dist.group.WORLD)) == [True]


# ----------------------------------------------------------------------------- in the model


def activations(tp, dp, device, seed=1):
    """Inputs of each attention's last layer, and outputs of each block, on the same batch.

    All ranks hold the same heads, so that only their masks can tell their outputs apart.
    """
    mine = groups(tp, dp, device)
    model, _ = pair(DROPOUT, mine.tp_group, device=device)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)
    heads, outputs = [], []
    for block in model.blocks:
        block.attn.proj.register_forward_pre_hook(lambda layer, x: heads.append(x[0].detach()))
        block.register_forward_hook(lambda layer, x, y: outputs.append(y.detach()))
    seed_replica(seed, mine.dp_rank)
    ids = batch(DROPOUT, device=device)[0] % model.wte.weight.shape[0]
    model.hidden_states(ids)
    return [x.cpu() for x in heads], [x.cpu() for x in outputs]


@pytest.mark.parametrize("tp, dp", KEYS)
def test_dropout_of_the_model(ranks, device, tp, dp):
    by_rank = ranks(tp * dp)(activations, tp, dp, device)
    for one, other in combinations(range(tp * dp), 2):
        (heads, outputs), (other_heads, other_outputs) = by_rank[one], by_rank[other]
        assert not any(torch.equal(a, b) for a, b in zip(heads, other_heads))
        same_group = one // tp == other // tp
        assert all(torch.equal(a, b) == same_group for a, b in zip(outputs, other_outputs))


def gradients(tp, dp, device, dropout, recompute):
    "Of one batch, with the state of the generators after it."
    mine = groups(tp, dp, device)
    small = config(dropout=dropout)
    model, _ = pair(small, mine.tp_group, device=device, recompute=recompute)
    seed_replica(1, mine.dp_rank)
    loss = model.loss(*batch(model.config, device=device))
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}, states(device)


def recomputed_differs(tp, dp, device, dropout):
    "Names of what differs between activations kept and activations recomputed."
    (loss, kept, state), (loss_again, again, state_again) = (
        gradients(tp, dp, device, dropout, recompute) for recompute in (False, True)
    )
    wrong = [name for name in kept if not torch.equal(kept[name], again[name])]
    wrong += ["loss"] * (not torch.equal(loss, loss_again))
    wrong += ["state"] * (not all(map(torch.equal, state, state_again)))
    return wrong


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("tp, dp", [(1, 1), *KEYS])
def test_recomputation_replays_both_streams(ranks, device, tp, dp, dropout):
    assert ranks(tp * dp)(recomputed_differs, tp, dp, device, dropout) == [[]] * (tp * dp)


def replicated_gradients(tp, device):
    _, grads, _ = gradients(tp, 1, device, 0.4, False)
    return [grads[name].cpu() for name in ("wpe.weight", "ln_f.weight", "blocks.0.mlp.down.bias")]


@pytest.mark.parametrize("tp", [2, 4])
def test_replicated_gradients_agree_with_dropout(ranks, device, tp):
    by_rank = ranks(tp)(replicated_gradients, tp, device)
    for grads in by_rank[1:]:
        assert all(torch.equal(a, b) for a, b in zip(by_rank[0], grads))


def without_training(device):
    model, full = pair(DROPOUT, dist.group.WORLD, device=device)
    data = batch(DROPOUT, device=device)
    model.eval(), full.eval()
    before = states(device)
    error = (model.loss(*data) - full.loss(*data)).abs().item()
    return error, all(map(torch.equal, before, states(device)))


@pytest.mark.world(2)
def test_evaluation_draws_nothing(ranks, device):
    for error, same_state in ranks(2)(without_training, device):
        assert error < 1e-10 and same_state
