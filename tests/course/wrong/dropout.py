"Wrong answers to puzzle dropout, and the hint that each must get."

import torch
import torch.nn.functional as F


def one_stream(x, p, group, cut):
    return F.dropout(x, p)


def a_stream_each(x, p, group, cut):
    torch.manual_seed(int(torch.randint(2**40, ())) + group.rank())
    return F.dropout(x, p)


def not_put_back(x, p, group, cut):
    if cut:
        torch.manual_seed(int(torch.randint(2**40, ())) + group.rank())
    return F.dropout(x, p)


def fixed_seed(x, p, group, cut):
    if not cut:
        return F.dropout(x, p)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + group.rank())
        return F.dropout(x, p)


def from_nowhere(x, p, group, cut):
    if not cut:
        return F.dropout(x, p)
    with torch.random.fork_rng(devices=[]):
        torch.seed()
        return F.dropout(x, p)


def no_scale(x, p, group, cut):
    if not cut:
        return F.dropout(x, p)
    start = int(torch.randint(2**40, ()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start + group.rank())
        return x * (torch.rand(x.shape) >= p)


def drops_nothing(x, p, group, cut):
    return x.clone()


WRONG = [
    ("alike_where_cut", one_stream),
    ("unlike_where_whole", a_stream_each),
    ("stream_left", not_put_back),
    ("repeats", fixed_seed),
    ("not_replayed", from_nowhere),
    ("scale", no_scale),
    ("rate", drops_nothing),
]
