"""Configurations, batches and pairs of BERT models that several test modules share."""

import torch
from gpt2_cases import shake

from megatron_edu import reference
from megatron_edu.config import BertConfig
from megatron_edu.models.bert import Bert
from megatron_edu.tensor_parallel.shard import shard_state_dict

KINDS = ["pre", "post"]     # where the LayerNorms stand


def config(**changes) -> BertConfig:
    "Odd sizes that 1, 2 and 4 ranks can share; of 128 rows of the vocabulary 27 are padding."
    sizes = dict(
        num_layers=2,
        hidden_size=36,
        num_heads=4,
        vocab_size=101,
        max_seq_len=17,
        dropout=0.0,
        num_token_types=3,
        vocab_multiple=64,
    )
    return BertConfig(**(sizes | changes))


def batch(
    config: BertConfig,
    rows: int = 4,
    length: int = 13,
    seed: int = 0,
    device: str = "cpu",
    without: tuple[str, ...] = (),      # what to leave out
) -> dict[str, torch.Tensor]:
    """What `loss` takes. Row 2 (5, 8, ...) is padding alone, later rows end in more of it.

    Earlier rows count more tokens, so that replicas differ in the number they count.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, length)
    ids, labels = torch.randint(config.vocab_size, (2, *shape), generator=generator)
    row, place = torch.arange(rows)[:, None], torch.arange(length)
    real = (place < length - 3 * row % length) & (row % 3 != 2)
    chance = torch.linspace(0.6, 0.2, rows)[:, None]
    counted = (torch.rand(shape, generator=generator) < chance) & real
    counted[0, 0] = True
    data = {
        "input_ids": ids,
        "labels": labels.where(counted, -100),
        "token_types": torch.randint(config.num_token_types, shape, generator=generator),
        "attention_mask": real.long(),
        "sentence_order": torch.randint(2, (rows,), generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in data.items() if name not in without}


def pair(
    config: BertConfig,
    group=None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    recompute: bool = False,
) -> tuple[Bert, reference.Bert]:
    "A sharded model and a reference with the same shaken weights."
    full = reference.Bert(config).to(device, dtype)
    shake(full)
    model = Bert(config, group).to(device, dtype)
    model.load_state_dict(shard_state_dict(full.state_dict(), model))
    model.recompute = recompute
    return model, full
