"Wrong answers to puzzle pair, and the hint that each must get."

import torch

from megatron_edu.comm import all_gather, all_reduce, reduce_scatter


def own(x, group):
    return x.chunk(group.size(), 1)[group.rank()].clone()


class enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return all_gather(x, group, dim=1)

    @staticmethod
    def backward(ctx, dy):
        return reduce_scatter(dy, ctx.group, dim=1), None


class leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, group):
        ctx.group = group
        return reduce_scatter(y, group, dim=1)

    @staticmethod
    def backward(ctx, dz):
        return all_gather(dz, ctx.group, dim=1), None


class enter_keeps_own(enter):
    @staticmethod
    def backward(ctx, dy):
        return own(dy, ctx.group), None


class leave_without_sum(leave):
    @staticmethod
    def forward(ctx, y, group):
        ctx.group = group
        return own(y, group)


class leave_pads(leave):
    @staticmethod
    def backward(ctx, dz):
        whole = torch.zeros(2, 4, 8, dtype=dz.dtype)
        own_part = whole.chunk(ctx.group.size(), 1)[ctx.group.rank()]
        own_part.copy_(dz)
        return whole, None


class sums_whole(enter):
    @staticmethod
    def backward(ctx, dy):
        return own(all_reduce(dy, ctx.group), ctx.group), None


class other_dim(enter):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return all_gather(x, group)


WRONG = [
    ("partial", enter_keeps_own, leave),
    ("leaves_without_sum", enter, leave_without_sum),
    ("own_tokens", enter, leave_pads),
    ("traffic", sums_whole, leave),
    ("shape", other_dim, leave),
]
