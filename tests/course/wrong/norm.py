"Wrong answers to puzzle norm, and the hint that each must get."

import torch

from megatron_edu.comm import all_gather, all_reduce


def squares(gradients):
    return sum(gradient.square().sum() for gradient in gradients)


def counts_everywhere(sharded, replicated, group):
    return all_reduce(squares(sharded + replicated), group).sqrt()


def not_reduced(sharded, replicated, group):
    return squares(sharded + replicated).sqrt()


def adds_norms(sharded, replicated, group):
    return all_reduce(squares(sharded).sqrt(), group) + squares(replicated).sqrt()


def adds_norms_of_ranks(sharded, replicated, group):
    return all_reduce(squares(sharded + replicated).sqrt(), group)


def no_root(sharded, replicated, group):
    return all_reduce(squares(sharded), group) + squares(replicated)


def gathers(sharded, replicated, group):
    flat = torch.cat([gradient.flatten() for gradient in sharded])
    return (all_gather(flat, group).square().sum() + squares(replicated)).sqrt()


def forgets_replicated(sharded, replicated, group):
    return all_reduce(squares(sharded), group).sqrt()


WRONG = [
    ("counted_everywhere", counts_everywhere),
    ("not_reduced", not_reduced),
    ("norms_added", adds_norms),
    ("norms_added", adds_norms_of_ranks),
    ("no_root", no_root),
    ("traffic", gathers),
    ("norm", forgets_replicated),
]
