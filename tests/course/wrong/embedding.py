"Wrong answers to puzzle embedding, and the hint that each must get."

import torch.nn.functional as F

from megatron_edu.comm import all_reduce
from megatron_edu.tensor_parallel.mappings import copy_to_tp, gather_from_tp, reduce_from_tp


def local(ids, table, group):
    place = ids - group.rank() * len(table)
    here = (place >= 0) & (place < len(table))
    return place, here


def clamps(ids, table, group):
    place, _ = local(ids, table, group)
    return reduce_from_tp(table[place.clamp(0, len(table) - 1)], group)


def wraps(ids, table, group):
    return reduce_from_tp(table[ids % len(table)], group)


def own_rows(ids, table, group):
    place, here = local(ids, table, group)
    return table[place.where(here, 0)] * here[..., None]


def no_sum(ids, table, group):
    return own_rows(ids, table, group)


def no_autograd(ids, table, group):
    return all_reduce(own_rows(ids, table, group), group)


def sums_backward(ids, table, group):
    return copy_to_tp(reduce_from_tp(own_rows(ids, table, group), group), group)


def gathers_table(ids, table, group):
    return F.embedding(ids, gather_from_tp(table, group, dim=0))


def no_offset(ids, table, group):
    here = ids < len(table)
    return reduce_from_tp(table[ids.where(here, 0)] * here[..., None], group)


def no_mask(ids, table, group):
    return reduce_from_tp(table[ids - group.rank() * len(table)], group)


WRONG = [
    ("foreign", clamps),
    ("foreign", wraps),
    ("loss_partial", no_sum),
    ("missing", no_autograd),
    ("times", sums_backward),
    ("traffic", gathers_table),
    ("forward", no_offset),
    ("raises", no_mask),
]
