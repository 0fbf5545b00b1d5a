from megatron_edu.tensor_parallel.mappings import reduce_from_tp


def row_linear(
    x,          # (b, s, in/t): this rank's columns
    weight,     # (out, in/t): this rank's columns
    bias,       # (out,), whole on every rank
    group,
):              # (b, s, out), equal on every rank
    mine = x @ weight.t()
    total = reduce_from_tp(mine, group)
    return total + bias
