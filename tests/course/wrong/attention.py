"Wrong answers to puzzle attention, and the hint that each must get."

import torch.nn.functional as F
from torch import nn

from megatron_edu.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_edu.tensor_parallel.mappings import reduce_from_tp


class Right(nn.Module):
    "With parts to be replaced."

    blocks = 3

    def __init__(self, hidden, heads, group):
        super().__init__()
        self.group, self.heads, self.width = group, heads, hidden // heads
        self.qkv = ColumnParallelLinear(hidden, 3 * hidden, group=group, blocks=self.blocks)
        self.proj = RowParallelLinear(hidden, hidden, group=group)

    def joined(self, x):
        return self.qkv(x)

    def shape(self):
        return -1, self.width

    def out(self, y):
        return self.proj(y)

    def forward(self, x):
        q, k, v = self.joined(x).chunk(3, -1)
        q, k, v = (each.unflatten(-1, self.shape()).transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal())
        return self.out(y.transpose(1, 2).flatten(2))

    def causal(self):
        return True


class Thirds(Right):
    blocks = 1


class AllHeads(Right):
    def shape(self):
        return self.heads, -1


class NoF(Right):
    def joined(self, x):
        return F.linear(x, self.qkv.weight, self.qkv.bias)


class BiasEverywhere(Right):
    def out(self, y):
        return reduce_from_tp(F.linear(y, self.proj.weight, self.proj.bias), self.group)


class LooksAhead(Right):
    def causal(self):
        return False


WRONG = [
    ("cut", Thirds),
    ("heads", AllHeads),
    ("partial", NoF),
    ("bias", BiasEverywhere),
    ("forward", LooksAhead),
]
