from megatron_edu.comm import all_reduce, group_rank
from megatron_edu.tensor_parallel.mappings import reduce_from_tp


def cross_entropy(
    logits,     # (n, v/t): this rank's columns; rank 0 has the columns of the first v/t ids
    targets,    # (n,): ids in the whole vocabulary
    group,
):              # (n,): the loss of each row, equal on every rank
    columns = logits.shape[1]
    top = all_reduce(logits.detach().amax(1), group, "max")
    shifted = logits - top[:, None]
    place = targets - group_rank(group) * columns
    here = (place >= 0) & (place < columns)
    picked = shifted.gather(1, place.clamp(0, columns - 1)[:, None])[:, 0] * here
    total = reduce_from_tp(shifted.exp().sum(1), group)
    return total.log() - reduce_from_tp(picked, group)
