"Wrong answers to puzzle column_linear, and the hint that each must get."

import torch.nn.functional as F

from megatron_edu.tensor_parallel.mappings import copy_to_tp, gather_from_tp, reduce_from_tp


def no_f(x, weight, bias, group):
    return F.linear(x, weight, bias)


def f_around_all(x, weight, bias, group):
    x, weight, bias = (copy_to_tp(each, group) for each in (x, weight, bias))
    return F.linear(x, weight, bias)


def gathers_weight(x, weight, bias, group):
    whole = gather_from_tp(weight, group, dim=0)
    y = F.linear(copy_to_tp(x, group), whole).chunk(group.size(), -1)[group.rank()]
    return y + bias


def gathers_result(x, weight, bias, group):
    return gather_from_tp(F.linear(copy_to_tp(x, group), weight, bias), group)


def adds_results(x, weight, bias, group):
    return reduce_from_tp(F.linear(copy_to_tp(x, group), weight, bias), group)


WRONG = [
    ("partial", no_f),
    ("summed", f_around_all),
    ("traffic", gathers_weight),
    ("shape", gathers_result),
    ("forward", adds_results),
]
