"""What the tests of the vocabulary-parallel embedding and losses share."""

import torch
import torch.distributed as dist

SIZES = [1, 2, 3, 4, 8]
PADDED, VOCAB = 120, 101    # 15 columns on each of 8 ranks: rank 6 has some padding, rank 7 all


def group_of(tp):
    "All ranks of the world; None for one, as on one device."
    return dist.group.WORLD if tp > 1 else None


def rank_of(tp):
    return dist.get_rank() if tp > 1 else 0


def message(fn, *args, **kwargs):
    "What the ValueError of a call says."
    try:
        fn(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "no error"


def normal(*shape, seed=0, dtype=torch.float64):
    "The same normal numbers on every rank and in every process."
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def assert_equal_everywhere(tensors):
    "Every rank has the same bits (NaN included)."
    for tensor in tensors[1:]:
        torch.testing.assert_close(tensor, tensors[0], rtol=0, atol=0, equal_nan=True)


def close(x, y, atol=1e-10):
    torch.testing.assert_close(x, y, rtol=0, atol=atol)
