import torch
from torch import nn

from megatron_edu.tensor_parallel.linear import ColumnParallelLinear
from megatron_edu.tensor_parallel.mappings import gather_from_tp


class LSTMCell(nn.Module):
    "nn.LSTMCell with its hidden units split over the ranks."

    def __init__(self, inputs, hidden, group):
        super().__init__()
        self.group = group
        # self.gates: one column-parallel linear from (inputs + hidden) to the four gates, which
        # stand below each other in the order of nn.LSTMCell: input, forget, cell, output
        self.gates = ColumnParallelLinear(inputs + hidden, 4 * hidden, group=group, blocks=4)

    def forward(
        self,
        x,      # (b, inputs), equal on every rank
        h,      # (b, hidden), equal on every rank
        c,      # (b, hidden/t): the cell state of this rank's units
    ):          # h and c after the step, cut as they came
        i, forget, cell, o = self.gates(torch.cat([x, h], -1)).chunk(4, -1)
        c = forget.sigmoid() * c + i.sigmoid() * cell.tanh()
        h = o.sigmoid() * c.tanh()
        return gather_from_tp(h, self.group), c
