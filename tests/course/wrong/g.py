"Wrong answers to puzzle g, and the hint that each must get."

import torch

from megatron_edu.comm import all_reduce


class no_sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, group):
        return y.clone()

    @staticmethod
    def backward(ctx, dz):
        return dz, None


class sums_twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, group):
        ctx.group = group
        return all_reduce(y, group)

    @staticmethod
    def backward(ctx, dz):
        return all_reduce(dz, ctx.group), None


class mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, group):
        return all_reduce(y, group) / group.size()

    @staticmethod
    def backward(ctx, dz):
        return dz, None


class overwrites(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, group):
        return all_reduce(y, group, inplace=True)

    @staticmethod
    def backward(ctx, dz):
        return dz, None


WRONG = [
    ("loss_partial", no_sum),
    ("times", sums_twice),
    ("loss_over", mean),
    ("in_place", overwrites),
]
