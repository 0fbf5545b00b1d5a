"Wrong answers to puzzle f, and the hint that each must get."

import torch
import torch.distributed as dist

from megatron_edu.comm import all_reduce


class no_sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class sums_twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, dy):
        return all_reduce(dy, ctx.group), None


class mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return all_reduce(dy, ctx.group) / ctx.group.size(), None


class leaves_the_sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        all_reduce(dy, ctx.group)
        return dy, None


class of_the_world(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return all_reduce(dy, dist.group.WORLD), None


class forgets_to_return(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        all_reduce(dy, ctx.group)
        return None, None


class half_for_two(torch.autograd.Function):
    "Right on two ranks: the other one's gradient is that of the neighbour."

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        total = all_reduce(dy, ctx.group)
        return total * 2 / ctx.group.size(), None


class overwrites_gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy.copy_(all_reduce(dy, ctx.group)), None


WRONG = [
    ("partial", no_sum),
    ("partial", leaves_the_sum),
    ("group", of_the_world),
    ("added_forward", sums_twice),
    ("over", mean),
    ("missing", forgets_to_return),
    ("backward", half_for_two),
    ("in_place", overwrites_gradient),
]
