"Wrong answers to puzzle row_linear, and the hint that each must get."

import torch.distributed as dist
import torch.nn.functional as F

from megatron_edu.comm import all_reduce
from megatron_edu.tensor_parallel.mappings import copy_to_tp, gather_from_tp, reduce_from_tp


def bias_everywhere(x, weight, bias, group):
    return reduce_from_tp(F.linear(x, weight, bias), group)


def bias_in_shares(x, weight, bias, group):
    return reduce_from_tp(F.linear(x, weight, bias / group.size()), group)


def bias_on_the_first(x, weight, bias, group):
    return reduce_from_tp(F.linear(x, weight, bias * (group.rank() == 0)), group)


def no_autograd(x, weight, bias, group):
    return all_reduce(F.linear(x, weight), group) + bias


def sums_backward(x, weight, bias, group):
    return copy_to_tp(reduce_from_tp(F.linear(x, weight), group), group) + bias


def gathers_all(x, weight, bias, group):
    return F.linear(gather_from_tp(x, group), gather_from_tp(weight, group), bias)


def no_sum(x, weight, bias, group):
    return F.linear(x, weight) + bias / group.size()


def bias_of_the_first(x, weight, bias, group):
    return reduce_from_tp(F.linear(x, weight, bias if group.rank() == 0 else None), group)


def whole_bias_no_sum(x, weight, bias, group):
    return F.linear(x, weight) + bias


def no_bias(x, weight, bias, group):
    return reduce_from_tp(F.linear(x, weight), group)


def of_the_world(x, weight, bias, group):
    return reduce_from_tp(F.linear(x, weight), dist.group.WORLD) + bias


def detached(x, weight, bias, group):
    return reduce_from_tp(F.linear(x, weight), group) + bias.detach()


WRONG = [
    ("bias", bias_everywhere),
    ("over", bias_in_shares),
    ("one_rank", bias_on_the_first),
    ("one_rank", bias_of_the_first),
    ("no_bias", no_bias),
    ("loss_partial", whole_bias_no_sum),
    ("group", of_the_world),
    ("missing", detached),
    ("missing", no_autograd),
    ("times", sums_backward),
    ("traffic", gathers_all),
    ("loss_partial", no_sum),
]
