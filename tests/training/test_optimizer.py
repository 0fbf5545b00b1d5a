"""AdamW on slices: PyTorch's AdamW on the unsharded reference gives the same numbers."""

import math

import pytest
import torch
from gpt2_cases import batch, config, groups, pair

from megatron_edu import reference
from megatron_edu.comm import Ledger
from megatron_edu.models.gpt2 import GPT2
from megatron_edu.tensor_parallel.norm import clip_grad_norm
from megatron_edu.tensor_parallel.shard import gather_state_dict, gather_tensors
from megatron_edu.training.optimizer import OptimizerConfig, decay_groups, make_optimizer
from megatron_edu.training.schedule import learning_rate, set_learning_rate

widths = pytest.mark.parametrize("tp", [1, 2, 4])

STEPS = 5
UNUSUAL = OptimizerConfig(      # no number is a default, so that none can be lost on the way
    lr=3e-2,
    min_lr=1e-2,
    warmup_steps=2,
    weight_decay=0.3,
    beta1=0.8,
    beta2=0.9,
    eps=1e-4,
    clip=0.25,
)
# Written out, not asked of the library. Every other parameter decays.
STAYS = {"ln_f.weight", "ln_f.bias"} | {
    f"blocks.{i}.{name}"
    for i in range(2)
    for name in (
        "ln_1.weight",
        "ln_1.bias",
        "attn.qkv.bias",
        "attn.proj.bias",
        "ln_2.weight",
        "ln_2.bias",
        "mlp.up.bias",
        "mlp.down.bias",
    )
}


# ------------------------------------------------------------------------------- five steps


def reference_run(full, batches):
    "PyTorch's plain AdamW with groups made by name, PyTorch's clipping, the schedule by hand."
    decays = [p for name, p in full.named_parameters() if name not in STAYS]
    stays = [p for name, p in full.named_parameters() if name in STAYS]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.3}, {"params": stays, "weight_decay": 0.0}],
        betas=(0.8, 0.9),
        eps=1e-4,
        foreach=False,
    )
    halfway = 1e-2 + 2e-2 * (1 + math.cos(math.pi / 3)) / 2
    later = 1e-2 + 2e-2 * (1 + math.cos(math.pi * 2 / 3)) / 2
    for data, lr in zip(batches, [1.5e-2, 3e-2, halfway, later, 1e-2], strict=True):
        optimizer.zero_grad()
        full.loss(*data).backward()
        norm = torch.nn.utils.clip_grad_norm_(full.parameters(), 0.25)
        assert norm > 0.25, f"a norm of {norm} is not clipped: the test proves nothing"
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return moments(full, optimizer)


def moments(model, optimizer):
    "Both moments of every parameter, by parameter name and kind."
    return {
        kind: {name: optimizer.state[p][kind] for name, p in model.named_parameters()}
        for kind in ("exp_avg", "exp_avg_sq")
    }


def sharded_run(model, batches):
    "As a training loop does it. The optimizer itself makes no collective."
    optimizer = make_optimizer(model, UNUSUAL)
    for step, data in enumerate(batches, start=1):
        optimizer.zero_grad()
        model.loss(*data).backward()
        clip_grad_norm(model, UNUSUAL.clip)
        set_learning_rate(optimizer, learning_rate(step, STEPS, UNUSUAL))
        with Ledger() as ledger:
            optimizer.step()
        assert ledger.records == []
    return moments(model, optimizer)


def differences(tp, device):
    "Largest difference of each parameter and each moment, and how far the parameters went."
    model, full = pair(config(), groups(tp, 1, device).tp_group, device=device)
    start = {name: p.clone() for name, p in full.state_dict().items()}
    batches = [batch(config(), seed=seed, device=device) for seed in range(STEPS)]
    want = reference_run(full, batches)
    got = sharded_run(model, batches)
    errors = largest(gather_state_dict(model), full.state_dict())
    for kind, tensors in got.items():
        found = largest(gather_tensors(tensors, model), want[kind])
        errors |= {f"{kind} of {name}": error for name, error in found.items()}
    return errors, largest(start, full.state_dict())


def largest(got, want):
    assert got.keys() == want.keys()
    return {name: (got[name] - want[name]).abs().max().item() for name in want}


@widths
def test_five_steps_are_those_of_torch(ranks, device, tp):
    for errors, moved in ranks(tp)(differences, tp, device):
        assert len(errors) == 3 * len(moved)
        assert max(errors.values()) < 1e-10, errors
        assert min(moved.values()) > 1e-2, moved


def same_gradients(tp, device):
    "One gradient, cut by hand along the first dim: the step of a slice against the full step."
    generator = torch.Generator().manual_seed(0)
    weight, gradients = (
        torch.randn(4, 6, dtype=torch.float64, generator=generator),
        torch.randn(3, 4, 6, dtype=torch.float64, generator=generator),
    )
    rank = 0 if tp == 1 else groups(tp, 1, device).tp_rank
    rows = slice(rank * 4 // tp, (rank + 1) * 4 // tp)
    results = []
    for cut in (slice(None), rows):
        layer = torch.nn.Linear(6, len(weight[cut]), bias=False, dtype=torch.float64)
        layer.weight.data = weight[cut].clone()
        optimizer = make_optimizer(layer, UNUSUAL)
        for gradient in gradients:
            layer.weight.grad = gradient[cut].clone()
            optimizer.step()
        results.append(layer.weight.data)
    return (results[0][rows] - results[1]).abs().max().item()


@widths
def test_the_step_of_a_slice_is_the_slice_of_the_step(ranks, device, tp):
    assert max(ranks(tp)(same_gradients, tp, device)) < 1e-15


# ------------------------------------------------------------------------------ who decays


def names_by_decay(tp, device):
    "Decay of every parameter in the optimizer, by name, and how often each is in it."
    model = GPT2(config(), groups(tp, 1, device).tp_group).to(device)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, UNUSUAL)
    pairs = [(names[id(p)], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    return pairs, sorted(names.values())


@widths
def test_biases_and_layer_norms_do_not_decay(ranks, device, tp):
    for pairs, names in ranks(tp)(names_by_decay, tp, device):
        assert sorted(name for name, _ in pairs) == names
        assert {name for name, decay in pairs if decay == 0.0} == STAYS
        assert {decay for name, decay in pairs if name not in STAYS} == {0.3}


def test_the_reference_has_the_same_groups():
    model = reference.GPT2(config())
    names = {id(p): name for name, p in model.named_parameters()}
    decays, stays = decay_groups(model, 0.5)
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.5, 0.0)
    assert {names[id(p)] for p in stays["params"]} == STAYS
    assert {names[id(p)] for p in decays["params"]} == set(names.values()) - STAYS


def test_a_model_of_matrices_alone():
    layer = torch.nn.Linear(3, 3, bias=False)
    optimizer = make_optimizer(layer, OptimizerConfig())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]


def test_decay_alone_shrinks_matrices_by_lr_times_decay():
    model = reference.GPT2(config()).double()
    for p in model.parameters():
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    make_optimizer(model, UNUSUAL).step()
    for name, p in model.named_parameters():
        want = 1.0 if name in STAYS else 1 - 3e-2 * 0.3
        torch.testing.assert_close(p, torch.full_like(p, want), rtol=0, atol=1e-15)


def test_a_step_without_learning_rate_moves_nothing_but_the_moments():
    model = reference.GPT2(config()).double()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    optimizer = make_optimizer(model, UNUSUAL)
    model.loss(*batch(config())).backward()
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(optimizer.state[p]["exp_avg"].any() for p in model.parameters())


# ------------------------------------------------------------------------------ the numbers


def test_the_defaults_are_the_papers():
    found = OptimizerConfig()
    assert (found.lr, found.min_lr, found.warmup_steps) == (1.5e-4, 1e-5, 3000)
    assert (found.weight_decay, found.clip) == (0.01, 1.0)
    assert (found.beta1, found.beta2, found.eps) == (0.9, 0.999, 1e-8)


def test_the_optimizer_is_told_every_number():
    optimizer = make_optimizer(torch.nn.Linear(2, 2), UNUSUAL)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-2, (0.8, 0.9), 1e-4)
        assert group["fused"] and not group["amsgrad"] and not group["maximize"]


@pytest.mark.parametrize(
    "changes",
    [
        {"min_lr": 0.0},
        {"lr": 1e-5, "min_lr": 1e-5},
        {"warmup_steps": 0},
        {"weight_decay": 0.0},
        {"beta1": 0.0, "beta2": 0.0},
        {"clip": math.inf},
    ],
)
def test_numbers_at_the_edge_are_good(changes):
    OptimizerConfig(**changes)


@pytest.mark.parametrize(
    "name, value, rule",
    [
        ("lr", 0.0, "above 0"),
        ("lr", -1e-4, "above 0"),
        ("lr", math.nan, "above 0"),
        ("lr", math.inf, "above 0"),
        ("min_lr", -1e-9, "from 0 to lr=0.00015"),
        ("min_lr", 2e-4, "from 0 to lr=0.00015"),
        ("min_lr", math.nan, "from 0 to lr=0.00015"),
        ("warmup_steps", -1, "0 or more"),
        ("decay", "cosin", "'cosine' or 'linear'"),
        ("weight_decay", -0.01, "0 or more"),
        ("weight_decay", math.nan, "0 or more"),
        ("weight_decay", math.inf, "0 or more"),
        ("beta1", 1.0, "below 1"),
        ("beta1", -0.1, "below 1"),
        ("beta2", 1.0, "below 1"),
        ("beta2", math.nan, "below 1"),
        ("eps", 0.0, "above 0"),
        ("eps", math.nan, "above 0"),
        ("clip", 0.0, "above 0"),
        ("clip", -1.0, "above 0"),
        ("clip", math.nan, "above 0"),
    ],
)
def test_bad_numbers(name, value, rule):
    with pytest.raises(ValueError) as error:
        OptimizerConfig(**{name: value})
    assert f"{name}={value!r}: must be" in str(error.value) and rule in str(error.value)


def test_clip_inf_never_clips():
    model = GPT2(config()).double()
    model.loss(*batch(config())).backward()
    before = [p.grad.clone() for p in model.parameters()]
    assert clip_grad_norm(model, OptimizerConfig(clip=math.inf).clip) > 0
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before))
