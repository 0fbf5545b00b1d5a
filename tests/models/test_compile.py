"""`torch.compile` of the model on one device and on two ranks gives what eager mode gives."""

import shutil

import bert_cases
import gpt2_cases
import pytest
import torch
from gpt2_cases import groups
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from megatron_edu.comm import Ledger
from megatron_edu.config import GPT2Config
from megatron_edu.models.block import Block
from megatron_edu.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_edu.tensor_parallel.random import seed_replica

CASES = {"gpt2": gpt2_cases, "bert": bert_cases}
TINY = dict(num_layers=1, hidden_size=16, num_heads=2, vocab_size=29, vocab_multiple=32)
# Inductor wants a C++ compiler, and does not quote the paths that it hands to it.
COMPILER = any(map(shutil.which, ("c++", "g++", "clang++"))) and " " not in torch.__path__[0]
BACKEND = "inductor" if COMPILER else "aot_eager"


# Compiling C++ takes far longer than running it, so the model is as small as can be.
def loss_and_gradients(model, loss, data):
    model.zero_grad()
    value = loss(**data)
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def compare(kind, tp, backend, device, recompute=False, **changes):
    "Largest differences between eager and compiled, and how many graphs were compiled."
    cases = CASES[kind]
    changed = cases.config(**TINY, **changes)
    group = groups(tp, 1, device).tp_group
    model, _ = cases.pair(changed, group, torch.float32, device, recompute)
    data = cases.batch(changed, rows=2, device=device)
    if kind == "gpt2":
        data = dict(zip(("input_ids", "labels", "loss_mask"), (*data[:2], data[2].float())))
    graphs = []
    compiler = torch._dynamo.lookup_backend(backend)

    def counting(graph, inputs):
        graphs.append(graph)
        return compiler(graph, inputs)

    seed_replica(1)
    want, want_gradients = loss_and_gradients(model, model.loss, data)
    with torch._inductor.config.patch(compile_threads=1):
        seed_replica(1)
        compiled = torch.compile(model.loss, backend=counting)
        got, gradients = loss_and_gradients(model, compiled, data)
    errors = [(gradients[n] - g).abs().max().item() for n, g in want_gradients.items()]
    torch._dynamo.reset()
    return abs(got - want), max(errors), len(graphs)


@pytest.mark.parametrize("kind, tp", [("gpt2", 1), ("gpt2", 2), ("bert", 2)])
def test_compiled_equals_eager(ranks, device, kind, tp):
    for loss, gradients, graphs in ranks(tp)(compare, kind, tp, BACKEND, device):
        assert loss < 1e-5
        assert gradients < 1e-5
        assert graphs > 0


# Compiled C++ draws other random numbers than eager mode, so here operations run one by one.
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", CASES)
def test_compiled_with_dropout_and_recomputation(ranks, device, kind, tp):
    changes = {"dropout": 0.2, "recompute": True}
    for loss, gradients, graphs in ranks(tp)(compare, kind, tp, "aot_eager", device, **changes):
        assert loss < 1e-5
        assert gradients < 1e-5
        assert graphs > 0


def steps(graph, name):
    "How often a custom operator of ours stands in a graph."
    return sum(f"megatron_edu.{name}" in str(node.target) for node in graph.graph.nodes)


def step(run, module, x):
    "Result, gradients and ledger of one step."
    module.zero_grad()
    x.grad = None
    with Ledger() as ledger:
        y = run(x)
        y.square().sum().backward()
    gradients = [tensor.grad for tensor in (x, *module.parameters()) if tensor.grad is not None]
    return [y.detach(), *(grad.clone() for grad in gradients)], ledger.records


def compiled(module, x, autocast=False):
    "Largest difference from eager, whether the ledgers agree, graphs in, both graphs of the step."
    inputs, forward, backward = [], [], []

    def keep(graphs):
        def compiler(graph, inputs):
            graphs.append(graph)
            return graph

        return compiler

    both = aot_autograd(fw_compiler=keep(forward), bw_compiler=keep(backward))

    def counting(graph, example):
        inputs.append(graph)
        return both(graph, example)

    def runs(function):
        def run(x):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                return function(x)

        return step(run, module, x)

    want, written = runs(module)
    got, written_again = runs(torch.compile(module, backend=counting))
    torch._dynamo.reset()
    error = max((a - b).abs().max().item() for a, b in zip(got, want, strict=True))
    return error, written == written_again, len(inputs), forward, backward


def one_block(tp, device, dtype=torch.float64, trained=True, autocast=False):
    config = GPT2Config(1, 16, 2, vocab_size=29, max_seq_len=8, dropout=0.0)
    torch.manual_seed(0)
    block = Block(config, groups(tp, 1, device).tp_group).to(device, dtype)
    x = torch.randn(2, 5, 16, dtype=dtype, device=device, requires_grad=trained)
    error, agree, graphs, forward, backward = compiled(block, x, autocast)
    counts = [
        (len(side), steps(side[0], "all_reduce"), steps(side[0], "column_gradients"))
        for side in (forward, backward)
    ]
    return error, agree, graphs, counts


# Backward, the sum of an input's gradient lies inside the step that finds the other gradients, so
# it is under way meanwhile, in a graph as in eager mode.
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("trained", [True, False])
def test_a_block_is_one_graph(ranks, device, tp, trained):
    found = [(1, 2, 0), (1, 0, 2)] if tp > 1 else [(1, 0, 0), (1, 0, 0)]
    for error, agree, graphs, counts in ranks(tp)(one_block, tp, device, trained=trained):
        assert error < 1e-10
        assert agree and graphs == 1
        assert counts == found


@pytest.mark.world(2)
def test_a_block_under_autocast_is_one_graph(ranks, device):
    for error, agree, graphs, _ in ranks(2)(one_block, 2, device, torch.float32, autocast=True):
        assert error < 1e-5
        assert agree and graphs == 1


def switches_and_frozen(device):
    group = groups(2, 1, device).tp_group
    layers = nn.Sequential(
        ColumnParallelLinear(6, 12, group=group, blocks=3, gather_output=True),
        RowParallelLinear(12, 6, group=group, input_is_parallel=False),
        ColumnParallelLinear(6, 4, bias=False, group=group),
    ).double().to(device)
    layers[2].weight.requires_grad_(False)
    x = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)
    error, agree, graphs, forward, backward = compiled(layers, x)
    return error, agree, graphs, steps(forward[0], "all_gather"), steps(backward[0], "all_gather")


@pytest.mark.world(2)
def test_layers_that_gather_and_scatter_are_one_graph(ranks, device):
    for error, agree, graphs, forward, backward in ranks(2)(switches_and_frozen, device):
        assert error < 1e-10
        assert agree and graphs == 1
        assert (forward, backward) == (1, 1)
