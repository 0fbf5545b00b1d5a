from megatron_edu.comm import all_reduce


def grad_norm(
    sharded,        # list of gradients of which each rank has its own pieces
    replicated,     # list of gradients that every rank has whole
    group,
):                  # scalar, equal on every rank: the norm of the whole model's gradient
    pieces = sum(gradient.square().sum() for gradient in sharded)
    once = sum(gradient.square().sum() for gradient in replicated)
    return (all_reduce(pieces, group) + once).sqrt()
