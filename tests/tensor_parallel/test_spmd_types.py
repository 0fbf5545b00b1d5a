"""What f, g, the layers and the loss do over the ranks, judged by a type system that is not ours.

`spmd-types` gives every tensor a type over the tensor-parallel axis and rejects what does not fit:

    I  invariant: equal on every rank, and so is its gradient, which is complete
    R  replicated: equal on every rank, but each rank has a part of the gradient
    V  varying: each rank has its own
    P  partial: each rank has a summand

Ours, and checked: the forward passes of the layers and of the loss, as they are; the two bodies of
each of our autograd Functions, as they are, each run on typed tensors, so that the types come from
the products and the collectives in the body. No Function has a rule written down for it here: all
types of its result are tried, and one fits if the backward body gives each input the kind of
gradient that this input's type demands (`backward_type` of the package).
Theirs: the types of all operations of PyTorch, of the collective, and of gradients.
Replaced: `comm`'s all-reduce, by the package's, on a group without a wire; a maximum is typed as a
sum. Not seen: values; that a mask of a rank's own ids varies (`first` is a plain number); how a
weight is cut, which the layer's shard rules declare. The fused loss is not here: it writes into
slices of arrays in place, where the package does not follow.
"""

from contextlib import ExitStack, suppress
from functools import partial
from unittest import mock

import pytest
import spmd_types as spmd
import torch
import torch.nn.functional as F
from spmd_types import I, P, R, V
from spmd_types._testing import fake_pg
from spmd_types.checker import typecheck
from torch.distributed.device_mesh import init_device_mesh

from megatron_edu.comm import Pending
from megatron_edu.course.mutants_gpt2 import MUTANTS
from megatron_edu.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    cross_entropy,
    linear,
    mappings,
    vocab_parallel_cross_entropy,
)
from megatron_edu.tensor_parallel.mappings import Region

RANKS = 2
FORWARD = {I: R, R: R, V: V, P: P}      # what a body sees of an input: it computes no gradients
RESULTS = {R: (I, R), V: (V,), P: (P,)}     # of what a body gives: the types that it may have
# The gradient that an input's type demands. A part of a gradient may be called one or not.
DEMANDS = {I: {R}, R: {P, V}, V: {V}, P: {R}}
READINGS = ({}, {V: P})     # what varies may be read as a summand


def tensor(x) -> bool:
    return isinstance(x, torch.Tensor)


class Context:
    "What autograd hands to the bodies of a Function."

    def __init__(self, inputs):
        self.needs_input_grad = [tensor(x) and x.is_floating_point() for x in inputs]

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


class Judge:
    "Our code on one process, with the package's types and collectives. `group` has two ranks."

    def __init__(self, group):
        self.group = group

    def kind(self, x):
        return spmd.get_axis_local_type(x, self.group)

    def tensor(self, kind, *shape):
        return self.of_kind(torch.rand(shape), kind).requires_grad_()

    def of_kind(self, x, kind):
        with spmd.no_typecheck():
            copy = x.detach().clone()
        return spmd.assert_type(copy, {self.group: kind})

    def copies(self, inputs, renamed):
        "The same inputs, their kinds renamed."
        kinds = [renamed.get(self.kind(x), self.kind(x)) if tensor(x) else None for x in inputs]
        return [self.of_kind(x, kind) if kind else x for x, kind in zip(inputs, kinds)]

    def layer(self, kind, *sizes, **options):
        "A layer of ours: what its shard rules cut varies, the rest is equal on every rank."
        with spmd.no_typecheck():
            layer = kind(*sizes, group=self.group, **options)
        for name, parameter in layer.named_parameters():
            spmd.assert_type(parameter, {self.group: V if name in layer.shard_rules else I})
        return layer

    def all_reduce(self, x, group, op="sum", inplace=False):
        if group is None:
            return x
        return spmd.all_reduce(x, group, src=V if self.kind(x) is V else P, dst=R)

    def all_reduce_start(self, x, group, op="sum"):
        return Pending(self.all_reduce(x, group), None)

    def backward(self, function, context, inputs, result, kind):
        "The backward body, for a result of this kind. Raises if a gradient is not what it must be."
        gradient = self.of_kind(torch.ones_like(result), FORWARD[kind.backward_type()])
        for x, grad in zip(inputs, function.backward(context, gradient)):
            if grad is not None and self.kind(grad) not in DEMANDS[self.kind(x)]:
                raise spmd.SpmdTypeError(f"{self.kind(grad)} is no gradient of {self.kind(x)}")

    def both_bodies(self, function, inputs):
        "Types of the result with which the two bodies agree, and the result."
        context, agree = Context(inputs), []
        result = function.forward(context, *self.copies(inputs, FORWARD))
        for kind in RESULTS[self.kind(result)]:
            with suppress(spmd.SpmdTypeError):
                self.backward(function, context, inputs, result, kind)
                agree.append(kind)
        return agree, result

    def apply(self, function, *inputs):
        "Run an autograd Function on the types alone."
        with torch.no_grad():
            for reading in READINGS:
                with suppress(spmd.SpmdTypeError):
                    agree, result = self.both_bodies(function, self.copies(inputs, reading))
                    if agree:
                        return self.of_kind(result, agree[0]).requires_grad_()
        kinds = [self.kind(x) for x in inputs if tensor(x)]
        raise spmd.SpmdTypeError(f"the bodies of {function.__name__} have no types for {kinds}")


@pytest.fixture
def judge():
    with ExitStack() as stack:
        stack.enter_context(fake_pg(RANKS))
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
        found = Judge(mesh.get_group("tp"))
        for module in (mappings, cross_entropy):
            stack.enter_context(mock.patch.object(module, "all_reduce", found.all_reduce))
        stack.enter_context(mock.patch.object(mappings, "all_reduce_start", found.all_reduce_start))
        for module in (mappings, linear, cross_entropy):
            for each in vars(module).values():
                if isinstance(each, type) and issubclass(each, torch.autograd.Function):
                    apply = partial(found.apply, each)
                    stack.enter_context(mock.patch.object(each, "apply", apply))
        stack.enter_context(spmd.set_current_mesh(mesh))
        stack.enter_context(typecheck())
        yield found


def test_f_and_g_have_the_types_of_megatron(judge):
    region = Region(judge.group)
    assert judge.kind(region.enter(judge.tensor(I, 3))) is R
    for kind in (V, P):
        assert judge.kind(region.leave(judge.tensor(kind, 3))) is I


@pytest.mark.parametrize("kind", [R, V, P])
def test_f_takes_only_what_every_rank_has_with_its_gradient(judge, kind):
    with pytest.raises(spmd.SpmdTypeError):
        Region(judge.group).enter(judge.tensor(kind, 3))


@pytest.mark.parametrize("kind", [I, R])
def test_g_takes_only_summands(judge, kind):
    with pytest.raises(spmd.SpmdTypeError):
        Region(judge.group).leave(judge.tensor(kind, 3))


def run_mlp(judge, activation=F.gelu):
    "Two linears with what stands around them in a block: a LayerNorm's weight, the residual."
    x, scale = judge.tensor(I, 5, 6), judge.tensor(I, 6)
    up, down = judge.layer(ColumnParallelLinear, 6, 8), judge.layer(RowParallelLinear, 8, 6)
    y = activation(up(x * scale))
    assert judge.kind(y) is V
    return x + down(y)


def test_an_mlp_is_equal_everywhere_again_and_so_is_its_gradient(judge):
    assert judge.kind(run_mlp(judge)) is I


def test_an_embedding_and_a_loss(judge):
    ids = judge.of_kind(torch.randint(10, (2, 5)), R)
    x = judge.layer(VocabParallelEmbedding, 10, 6)(ids)
    assert judge.kind(x) is I
    logits = judge.layer(ColumnParallelLinear, 6, 10)(x)
    losses = vocab_parallel_cross_entropy(logits, ids, group=judge.group)
    assert judge.kind(losses.sum()) is I


@pytest.mark.parametrize(
    "name, reason",
    [
        ("no_f", r"_ColumnLinear have no types for \[I, V, V\]"),
        ("f_reduces_forward", r"_ReduceFromTP have no types for \[I\]"),
        ("no_g", r"cannot mix with other types. Found types: \[V, I\]"),
        ("row_bias_everywhere", r"cannot mix with other types. Found types: \[V, V, I\]"),
        ("g_reduces_backward", r"cannot mix with other types. Found types: \[R, I\]"),
    ],
)
def test_a_classic_mistake_is_rejected(judge, name, reason):
    with MUTANTS[name].made(), pytest.raises(spmd.SpmdTypeError, match=reason):
        run_mlp(judge)


@pytest.mark.parametrize("name", ["no_g_in_embedding", "embedding_reduces_backward"])
def test_an_embedding_with_a_mistake_is_not_equal_everywhere_with_its_gradient(judge, name):
    with MUTANTS[name].made():
        x = judge.layer(VocabParallelEmbedding, 10, 6)(judge.of_kind(torch.randint(10, (5,)), R))
        assert judge.kind(x) in (V, R)
        with pytest.raises(spmd.SpmdTypeError, match="no types"):
            judge.layer(ColumnParallelLinear, 6, 8)(x)


def test_a_loss_whose_backward_pass_reduces_is_rejected(judge):
    function = cross_entropy._VocabParallelCrossEntropy
    real = function.backward

    def twice(context, grad):
        return real(context, judge.all_reduce(grad, judge.group))

    logits, ids = judge.tensor(V, 5, 5), judge.of_kind(torch.randint(10, (5,)), R)
    with mock.patch.object(function, "backward", twice):
        losses = vocab_parallel_cross_entropy(logits, ids, group=judge.group)
        assert judge.kind(losses) is R
        with pytest.raises(spmd.SpmdTypeError):
            losses.sum().backward()
