import torch
import torch.nn.functional as F

from megatron_edu.comm import group_rank


def dropout(
    x,          # whole on every rank, or this rank's piece
    p,          # the probability that an element is dropped; the others become x / (1 - p)
    group,
    cut,        # False: x is equal on every rank, and the result must be; True: x is a piece
):              # the shape of x
    # All ranks come with PyTorch's generator in the same state. They must leave so, too.
    if not cut:
        return F.dropout(x, p)
    start = int(torch.randint(2**40, ()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start + group_rank(group))
        return F.dropout(x, p)
