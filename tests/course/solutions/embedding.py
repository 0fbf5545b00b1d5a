from megatron_edu.comm import group_rank
from megatron_edu.tensor_parallel.mappings import reduce_from_tp


def embedding(
    ids,        # (b, s): token ids in the whole vocabulary
    table,      # (v/t, h): this rank's rows; rank 0 has the rows of the first v/t ids
    group,
):              # (b, s, h), equal on every rank
    rows = table.shape[0]
    place = ids - group_rank(group) * rows
    here = (place >= 0) & (place < rows)
    found = table[place.clamp(0, rows - 1)] * here[..., None]
    return reduce_from_tp(found, group)
