import torch.nn.functional as F

from megatron_edu.tensor_parallel.mappings import copy_to_tp


def column_linear(
    x,          # (b, s, in), equal on every rank
    weight,     # (out/t, in): this rank's rows
    bias,       # (out/t,): this rank's part
    group,
):              # (b, s, out/t): this rank's columns of the result
    inside = copy_to_tp(x, group)
    return F.linear(inside, weight, bias)
