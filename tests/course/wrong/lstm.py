"Wrong answers to puzzle lstm, and the hint that each must get."

import torch
import torch.nn.functional as F
from torch import nn

from megatron_edu.comm import all_gather
from megatron_edu.tensor_parallel.linear import ColumnParallelLinear
from megatron_edu.tensor_parallel.mappings import gather_from_tp


class Cell(nn.Module):
    "A right one, with parts to be replaced."

    blocks = 4

    def __init__(self, inputs, hidden, group):
        super().__init__()
        self.group = group
        size = inputs + hidden
        self.gates = ColumnParallelLinear(size, 4 * hidden, group=group, blocks=self.blocks)

    def four(self, x, h):
        return self.gates(torch.cat([x, h], -1)).chunk(4, -1)

    def join(self, h):
        return gather_from_tp(h, self.group)

    def forward(self, x, h, c):
        i, forget, cell, o = self.four(x, h)
        c = forget.sigmoid() * c + i.sigmoid() * cell.tanh()
        return self.join(o.sigmoid() * c.tanh()), c


class OneBlock(Cell):
    blocks = 1


class OtherOrder(Cell):
    def four(self, x, h):
        i, forget, o, cell = self.gates(torch.cat([x, h], -1)).chunk(4, -1)
        return i, forget, cell, o


class NoF(Cell):
    def four(self, x, h):
        y = F.linear(torch.cat([x, h], -1), self.gates.weight, self.gates.bias)
        return y.chunk(4, -1)


class NoAutograd(Cell):
    def join(self, h):
        return all_gather(h, self.group)


class GathersGates(Cell):
    def forward(self, x, h, c):
        own = self.gates(torch.cat([x, h], -1)).unflatten(-1, (4, -1))
        gates = gather_from_tp(own, self.group)                     # (b, 4, hidden)
        i, forget, cell, o = gates.unbind(1)
        whole = forget.sigmoid() * gather_from_tp(c, self.group) + i.sigmoid() * cell.tanh()
        return o.sigmoid() * whole.tanh(), whole.chunk(self.group.size(), -1)[self.group.rank()]


class Whole(Cell):
    def __init__(self, inputs, hidden, group):
        super().__init__(inputs, hidden, group)
        self.gates = nn.Linear(inputs + hidden, 4 * hidden)


class OtherNames(Cell):
    def __init__(self, inputs, hidden, group):
        super().__init__(inputs, hidden, group)
        self.linear = self.gates
        del self.gates


WRONG = [
    ("cut", OneBlock),
    ("order", OtherOrder),
    ("partial", NoF),
    ("missing", NoAutograd),
    ("whole", Whole),
    ("names", OtherNames),
]
