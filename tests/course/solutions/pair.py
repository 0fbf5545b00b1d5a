import torch

from megatron_edu.comm import all_gather, reduce_scatter


class enter(torch.autograd.Function):
    "In place of f where each rank holds its tokens alone: dim 1 is cut outside, whole inside."

    @staticmethod
    def forward(ctx, x, group):     # x: (b, s/t, h), this rank's tokens
        ctx.ranks = group
        tokens = all_gather(x, group, dim=1)
        return tokens               # (b, s, h), equal on every rank

    @staticmethod
    def backward(ctx, dy):          # dy: (b, s, h), what this rank's columns contribute
        own = reduce_scatter(dy, ctx.ranks, dim=1)
        return own, None            # (b, s/t, h); None for the group


class leave(torch.autograd.Function):
    "In place of g: the partial sums are added, and each rank keeps its tokens of the sum."

    @staticmethod
    def forward(ctx, y, group):     # y: (b, s, h), this rank's partial sum
        ctx.ranks = group
        own = reduce_scatter(y, group, dim=1)
        return own                  # (b, s/t, h)

    @staticmethod
    def backward(ctx, dz):          # dz: (b, s/t, h), of this rank's tokens
        tokens = all_gather(dz, ctx.ranks, dim=1)
        return tokens, None         # (b, s, h); None for the group
