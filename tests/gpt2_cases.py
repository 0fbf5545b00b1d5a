"""Configurations, batches and pairs of models that several test modules share."""

import torch

from megatron_edu import reference
from megatron_edu.config import GPT2Config
from megatron_edu.mesh import ParallelDims
from megatron_edu.models.gpt2 import GPT2
from megatron_edu.tensor_parallel.shard import shard_state_dict


def config(**changes) -> GPT2Config:
    "Odd sizes that 1, 2 and 4 ranks can share; of 128 rows of the vocabulary 27 are padding."
    sizes = dict(
        num_layers=2,
        hidden_size=36,
        num_heads=4,
        vocab_size=101,
        max_seq_len=17,
        dropout=0.0,
        vocab_multiple=64,
    )
    return GPT2Config(**(sizes | changes))


def batch(
    config: GPT2Config,
    rows: int = 4,
    length: int = 13,
    seed: int = 0,
    masked: bool = True,
    device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    "Ids, labels with some not counted, and weights of which later rows have fewer."
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, length)
    ids, labels = torch.randint(config.vocab_size, (2, *shape), generator=generator)
    labels[0, :2] = -100
    chance = torch.linspace(1, 0.2, rows)[:, None]
    mask = (torch.rand(shape, generator=generator) < chance).double()
    mask[:, 0] = 1.0
    return ids.to(device), labels.to(device), mask.to(device) if masked else None


def shake(model: torch.nn.Module, seed: int = 0) -> None:
    "Move every parameter: zero biases and unit LayerNorms would hide mistakes."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.2 * noise.to(parameter)


def pair(
    config: GPT2Config,
    group=None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    recompute: bool = False,
) -> tuple[GPT2, reference.GPT2]:
    "A sharded model and a reference with the same shaken weights."
    full = reference.GPT2(config).to(device, dtype)
    shake(full)
    model = GPT2(config, group).to(device, dtype)
    model.load_state_dict(shard_state_dict(full.state_dict(), model))
    model.recompute = recompute
    return model, full


def tp_group(tp: int, dp: int = 1, device: str = "cpu"):
    "This rank's tensor-parallel group in a world of tp x dp ranks; one for each grid."
    return groups(tp, dp, device).tp_group


def groups(tp: int, dp: int = 1, device: str = "cpu"):
    "This rank's groups in a world of tp x dp ranks; made once a world."
    if (tp, dp, device) not in _groups:
        _groups[tp, dp, device] = ParallelDims(tp=tp, dp=dp).build(device)
    return _groups[tp, dp, device]


_groups = {}
