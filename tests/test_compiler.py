"Functions that stay out of compiled graphs, and a start without the compiler."

import subprocess
import sys

import pytest
import torch

from megatron_edu.compiler import uncompiled

COMPILER = "torch._dynamo"


@pytest.mark.parametrize("module", ["cli.train", "models", "testing", "generate", "interop"])
def test_an_import_is_no_import_of_the_compiler(module):
    program = f"import sys, megatron_edu.{module}; print('{COMPILER}' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_building_and_running_a_model_is_no_import_of_the_compiler():
    program = (
        "import sys, torch\nfrom megatron_edu.models import Bert, BertConfig, GPT2, GPT2Config\n"
        "sizes = dict(vocab_size=8, max_seq_len=4, hidden_size=4, num_layers=1, num_heads=1)\n"
        "ids = torch.zeros(1, 4, dtype=torch.int64)\n"
        "GPT2(GPT2Config(**sizes)).loss(ids, ids).backward()\n"
        "Bert(BertConfig(**sizes))(ids)\n"
        f"print('{COMPILER}' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_a_call_is_no_import_of_the_compiler():
    program = (
        "import sys\nfrom megatron_edu.compiler import uncompiled\n"
        f"print(uncompiled(lambda x, *, y: x - y)(5, y=3), '{COMPILER}' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "2 False\n", done.stderr


@pytest.mark.parametrize("mark, kept", [(uncompiled, True), (lambda fn: fn, False)])
def test_nothing_of_it_is_in_a_graph(mark, kept):
    @mark
    def inner(x, *, factor):
        return torch.cos(x) * factor

    def outer(x):
        return inner(torch.sin(x), factor=3) + 1

    seen = []

    def keep(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x = torch.linspace(-1, 1, 5)
    for _ in range(2):      # the first call is traced, the second is not
        got = torch.compile(outer, backend=keep)(x)
        assert torch.equal(got, torch.cos(torch.sin(x)) * 3 + 1)
    assert any("sin" in target for target in seen)
    assert any("cos" in target for target in seen) != kept


def test_the_mark_keeps_the_name():
    def some_name():
        "What it does."

    assert uncompiled(some_name).__name__ == "some_name"
    assert uncompiled(some_name).__doc__ == "What it does."
