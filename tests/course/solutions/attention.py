import torch.nn.functional as F
from torch import nn

from megatron_edu.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear


class Heads(nn.Module):
    "Causal self-attention in which each rank has some of the heads."

    def __init__(self, hidden, heads, group):
        super().__init__()
        # self.qkv: hidden -> queries, keys and values, (3 hidden), one after the other
        # self.proj: hidden -> hidden
        self.width = hidden // heads
        self.qkv = ColumnParallelLinear(hidden, 3 * hidden, group=group, blocks=3)
        self.proj = RowParallelLinear(hidden, hidden, group=group)

    def forward(
        self,
        x,      # (b, s, hidden), equal on every rank
    ):          # (b, s, hidden), equal on every rank
        b, s, _ = x.shape
        joined = self.qkv(x).view(b, s, 3, -1, self.width)      # (b, s, 3, heads/t, width)
        q, k, v = joined.permute(2, 0, 3, 1, 4)                 # (b, heads/t, s, width) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, s, -1))
