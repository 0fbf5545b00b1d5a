"""MLP, attention and block alone: their results and every gradient, on up to eight ranks."""

import bert_cases
import pytest
import torch
from gpt2_cases import config, groups, shake

from megatron_edu.comm import all_gather
from megatron_edu.config import GPT2Config
from megatron_edu.models.attention import Attention
from megatron_edu.models.bert import PostNormBlock
from megatron_edu.models.block import Block
from megatron_edu.models.mlp import MLP
from megatron_edu.reference import bert as plain_bert
from megatron_edu.reference import gpt2 as plain
from megatron_edu.tensor_parallel.random import seed_replica
from megatron_edu.tensor_parallel.shard import gather_tensors, shard_state_dict

PAIRS = {
    "mlp": (MLP, plain.MLP),
    "attention": (Attention, plain.Attention),
    "block": (Block, plain.Block),
}


MASKED = {
    "attention": (Attention, plain.Attention),
    "block": (Block, plain.Block),
    "post-LN block": (PostNormBlock, plain_bert.PostNormBlock),
}


def modules(kind, config, group, device):
    "The sharded module and its twin, with the same shaken weights, in float64."
    sharded, unsharded = (PAIRS | MASKED)[kind]
    torch.manual_seed(0)
    twin = unsharded(config).to(device, torch.float64)
    shake(twin)
    module = sharded(config, group).to(device, torch.float64)
    module.load_state_dict(shard_state_dict(twin.state_dict(), module))
    return module, twin


def inputs(config, device, rows=3, length=5):
    "x, and the gradient that comes back to it; neither is contiguous."
    generator = torch.Generator().manual_seed(1)
    shape = (2, length, rows, config.hidden_size)
    x, grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    return x.transpose(0, 1).requires_grad_(), grad.transpose(0, 1)


def run(module, x, grad, *mask):
    "Result, gradient of x and gradients of the parameters."
    x = x.detach().requires_grad_()
    y = module(x, *mask)
    y.backward(grad)
    return y.detach(), x.grad, {name: p.grad for name, p in module.named_parameters()}


def largest_errors(kind, tp, config, device, *mask):
    "Of the result, of the gradient of x, and of each parameter's gradient."
    module, twin = modules(kind, config, groups(tp, 1, device).tp_group, device)
    x, grad = inputs(config, device)
    before = x.detach().clone()
    y, x_grad, gradients = run(module, x, grad, *mask)
    want_y, want_x_grad, want = run(twin, x, grad, *mask)
    assert torch.equal(x.detach(), before), "the caller's input was overwritten"
    full = gather_tensors(gradients, module)
    errors = {name: (full[name] - g).abs().max().item() for name, g in want.items()}
    errors["y"] = (y - want_y).abs().max().item()
    errors["x"] = (x_grad - want_x_grad).abs().max().item()
    return errors


SHAPES = {
    1: [config()],
    2: [config(), config(hidden_size=30, num_heads=10, ffn_hidden_size=14)],
    3: [config(hidden_size=33, num_heads=3), config(num_heads=6, ffn_hidden_size=51)],
    4: [config(), config(gelu="exact", ffn_hidden_size=20)],
    5: [config(hidden_size=35, num_heads=5)],
    8: [config(hidden_size=40, num_heads=8), config(hidden_size=48, num_heads=16)],
}
CASES = [(tp, changed) for tp, variants in SHAPES.items() for changed in variants]


def name_of(case):
    if isinstance(case, GPT2Config):
        return f"h{case.hidden_size}-n{case.num_heads}-f{case.ffn_size}"


@pytest.mark.parametrize("tp, changed", CASES, ids=name_of)
@pytest.mark.parametrize("kind", PAIRS)
def test_equals_its_twin(ranks, device, kind, tp, changed):
    for errors in ranks(tp)(largest_errors, kind, tp, changed, device):
        assert max(errors.values()) < 1e-10, errors
        assert len(errors) == {"mlp": 6, "attention": 6, "block": 14}[kind]


@pytest.mark.parametrize("kind", PAIRS)
def test_the_twins_agree_in_one_process(kind):
    "Without a group the module is its twin, bit for bit."
    module, twin = modules(kind, config(), None, "cpu")
    x, grad = inputs(config(), "cpu")
    for ours, theirs in zip(run(module, x, grad)[:2], run(twin, x, grad)[:2], strict=True):
        assert torch.equal(ours, theirs)


def test_exact_and_tanh_gelu_differ():
    "Otherwise the variants above would prove nothing."
    x, _ = inputs(config(), "cpu")
    tanh, _ = modules("mlp", config(), None, "cpu")
    exact, _ = modules("mlp", config(gelu="exact"), None, "cpu")
    assert 1e-6 < (tanh(x) - exact(x)).abs().max() < 1e-1


# ------------------------------------------------------------------------------- masks


def masked_errors(kind, tp, device):
    "As `largest_errors`, without causality, for rows of 5, 3 and no real positions."
    real = torch.arange(5) < torch.tensor([[5], [3], [0]])
    mask = plain_bert.visible(real.long().to(device))
    return largest_errors(kind, tp, bert_cases.config(), device, mask)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", MASKED)
def test_with_a_mask_it_equals_its_twin(ranks, device, kind, tp):
    for errors in ranks(tp)(masked_errors, kind, tp, device):
        assert max(errors.values()) < 1e-10, errors
        assert len(errors) == (6 if kind == "attention" else 14)


def seen_positions(kind, tp, device):
    "From which positions a gradient comes to the second one of each row, (b, s)."
    module, _ = modules(kind, bert_cases.config(), groups(tp, 1, device).tp_group, device)
    x, _ = inputs(bert_cases.config(), device)
    x = x.detach().requires_grad_()
    real = torch.arange(5) < torch.tensor([[5], [3], [0]])
    module(x, plain_bert.visible(real.long().to(device)))[:, 1].sum().backward()
    return (x.grad.abs().amax(-1) > 0).tolist()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["attention", "block"])
def test_positions_see_both_sides_and_no_padding(ranks, device, kind, tp):
    want = [[True] * 5, [True] * 3 + [False] * 2, [True] * 5]
    assert ranks(tp)(seen_positions, kind, tp, device) == [want] * tp


# ------------------------------------------------------------------------------- heads


def heads_of_each_rank(tp, device):
    "Per head outputs of the sharded attention's inside, and of the whole one's."
    changed = config(hidden_size=40, num_heads=8)
    group = groups(tp, 1, device).tp_group
    module, twin = modules("attention", changed, group, device)
    seen = []
    for each in (module, twin):
        each.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    x, _ = inputs(changed, device)
    module(x), twin(x)
    ours, whole = seen
    return (all_gather(ours, group) - whole).abs().max().item(), ours.shape[-1]


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_rank_r_holds_the_r_th_heads_whole(ranks, device, tp):
    for error, width in ranks(tp)(heads_of_each_rank, tp, device):
        assert error < 1e-10
        assert width == 40 // tp


def future_gradient(kind, tp, device):
    "Gradient that a late position sends to an early result: causality, on shards."
    module, _ = modules(kind, config(), groups(tp, 1, device).tp_group, device)
    x, _ = inputs(config(), device)
    x = x.detach().requires_grad_()
    module(x)[:, 2].sum().backward()
    return x.grad[:, 3:].abs().max().item(), x.grad[:, :3].abs().amax(-1).min().item()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["attention", "block"])
def test_no_position_sees_the_future(ranks, device, kind, tp):
    for future, past in ranks(tp)(future_gradient, kind, tp, device):
        assert future == 0
        assert past > 0


# ----------------------------------------------------------------------------- dropout


def with_dropout(kind, tp, device):
    "A result in training mode; whether the same seed repeats it; whether the stream went on."
    changed = config(dropout=0.4)
    module, _ = modules(kind, changed, groups(tp, 1, device).tp_group, device)
    x, _ = inputs(changed, device)
    seed_replica(3)
    first = module(x).detach()
    seed_replica(3)
    again = module(x).detach()
    return first.cpu(), torch.equal(first, again), torch.equal(first, module(x).detach())


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("kind", PAIRS)
def test_dropout_of_replicated_activations_agrees(ranks, device, kind, tp):
    results = ranks(tp)(with_dropout, kind, tp, device)
    for y, repeated, went_on in results:
        assert torch.equal(y, results[0][0])
        assert repeated and not went_on
    if kind != "block":
        dropped = (results[0][0] == 0).double().mean()
        assert 0.3 < dropped < 0.5


def local_heads_under_dropout(tp, device):
    "What each rank's heads give when all heads have the same weights."
    changed = config(dropout=0.4)
    module, _ = modules("attention", changed, groups(tp, 1, device).tp_group, device)
    with torch.no_grad():
        heads = module.qkv.weight.unflatten(0, (3, -1, changed.head_size))
        generator = torch.Generator().manual_seed(2)
        one = torch.randn((3, 1, *heads.shape[2:]), generator=generator, dtype=torch.float64)
        heads.copy_(one.expand_as(heads))
        module.qkv.bias.zero_()
    seen = []
    module.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().cpu()))
    x, _ = inputs(changed, device)
    seed_replica(3)
    module(x)
    module.eval()(x)
    return seen


@pytest.mark.parametrize("tp", [2, 4])
def test_attention_dropout_differs_between_ranks(ranks, device, tp):
    results = ranks(tp)(local_heads_under_dropout, tp, device)
    for trained, evaluated in results[1:]:
        assert not torch.equal(trained, results[0][0])
        assert torch.equal(evaluated, results[0][1])


# --------------------------------------------------------------------------- bad input


def build(kind, tp, changed):
    try:
        PAIRS[kind][0](changed, groups(tp, 1).tp_group)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("tp", [4])
@pytest.mark.parametrize(
    "kind, changes, value, nearest",
    [
        ("attention", {"num_heads": 3}, "num_heads=3", 4),
        ("block", {"num_heads": 9}, "num_heads=9", 8),
        ("mlp", {"ffn_hidden_size": 1}, "ffn_hidden_size=1", 4),
        ("block", {"ffn_hidden_size": 50}, "ffn_hidden_size=50", 48),
    ],
)
def test_sizes_that_do_not_divide(ranks, tp, kind, changes, value, nearest):
    for said in ranks(tp)(build, kind, tp, config(**changes)):
        assert value in said and "4 tensor-parallel ranks" in said
        assert f"nearest that does is {nearest}" in said
