"""`torch.compile` of the model on one device and on two ranks gives what eager mode gives."""

import shutil

import bert_cases
import gpt2_cases
import pytest
import torch
from gpt2_cases import groups

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
