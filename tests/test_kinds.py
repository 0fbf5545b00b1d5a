"Models, layers and conversions that are given the wrong kind of thing say so in our words."

import pytest
import torch
from bert_cases import config as bert_config
from gpt2_cases import config

from megatron_edu import reference
from megatron_edu.interop import load_huggingface, save_huggingface
from megatron_edu.models import Bert, GPT2, build_model
from megatron_edu.models.attention import Attention
from megatron_edu.models.block import Block
from megatron_edu.models.mlp import MLP
from megatron_edu.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron_edu.tensor_parallel.shard import Shard

KINDS = {       # what takes a configuration, and the one of the other kind
    GPT2: bert_config(), reference.GPT2: bert_config(),
    Bert: config(), reference.Bert: config(),
}
MODELS = [*KINDS, MLP, Attention, Block, build_model]


@pytest.mark.parametrize("wrong", ["x", None, 5, {"num_layers": 2}], ids=str)
@pytest.mark.parametrize("build", MODELS, ids=lambda each: f"{each.__module__}.{each.__name__}")
def test_a_model_is_built_from_a_configuration(build, wrong):
    with pytest.raises(TypeError, match="^config=.*: must be a "):
        build(wrong)


@pytest.mark.parametrize("build", KINDS, ids=lambda each: f"{each.__module__}.{each.__name__}")
def test_a_model_is_built_from_its_own_kind_of_configuration(build):
    with pytest.raises(TypeError, match="must be a (GPT2|Bert)Config$"):
        build(KINDS[build])


SIZED = {
    "column": lambda group: ColumnParallelLinear(4, 4, group=group),
    "row": lambda group: RowParallelLinear(4, 4, group=group),
    "embedding": lambda group: VocabParallelEmbedding(4, 4, group=group),
    "mlp": lambda group: MLP(config(), group),
    "attention": lambda group: Attention(config(), group),
    "gpt2": lambda group: GPT2(config(), group),
    "bert": lambda group: Bert(bert_config(), group),
}


@pytest.mark.parametrize("wrong", ["tp", 2, [0, 1], torch.zeros(2)], ids=str)
@pytest.mark.parametrize("layer", SIZED)
def test_a_group_is_a_process_group_or_none(layer, wrong):
    with pytest.raises(TypeError, match="^group=.*: must be a ProcessGroup or None"):
        SIZED[layer](wrong)


@pytest.mark.parametrize("value, kind", [(4.0, TypeError), ("4", TypeError), (True, TypeError),
                                         (None, TypeError), (0, ValueError), (-4, ValueError)])
@pytest.mark.parametrize("layer", [ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding])
@pytest.mark.parametrize("place", [0, 1])
def test_sizes_are_whole_numbers(layer, place, value, kind):
    sizes = [4, 4]
    sizes[place] = value
    with pytest.raises(kind, match=f"^[a-z_]+={value!r}: must be a whole number"):
        layer(*sizes)


@pytest.mark.parametrize("blocks", ["3", 3.0, False, 0])
def test_blocks_are_a_whole_number(blocks):
    with pytest.raises((TypeError, ValueError), match="blocks=.*: must be a whole number"):
        ColumnParallelLinear(6, 6, blocks=blocks)


@pytest.mark.parametrize("wrong", [{"dim": "0"}, {"dim": 0, "blocks": 1.0}, {"dim": None}])
def test_a_rule_counts_in_whole_numbers(wrong):
    with pytest.raises(TypeError, match="must be a whole number"):
        Shard(**wrong)


@pytest.mark.parametrize("seed, kind", [("1", TypeError), (1.0, TypeError), (-1, ValueError),
                                        (2**64, ValueError)])
@pytest.mark.parametrize("build", KINDS, ids=lambda each: f"{each.__module__}.{each.__name__}")
def test_a_seed_that_is_none(build, seed, kind):
    fits = config() if build in (GPT2, reference.GPT2) else bert_config()
    with pytest.raises(kind, match=f"^seed={seed!r}: "):
        build(fits, seed=seed)


@pytest.mark.parametrize("build", KINDS, ids=lambda each: f"{each.__module__}.{each.__name__}")
def test_input_that_is_no_table_of_ids(build):
    model = build(config() if build in (GPT2, reference.GPT2) else bert_config())
    for wrong in ([[1, 2]], "text", torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)):
        with pytest.raises(TypeError, match="^input_ids"):
            model(wrong)
    for wrong in (torch.zeros(2, dtype=torch.long), torch.zeros(1, 2, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"must be \(b, s\)"):
            model(wrong)


def test_a_table_of_words_is_only_made_larger(ranks):
    assert ranks(2)(smallest_table) == ["the next that does is 8"] * 2


def smallest_table():
    with pytest.raises(ValueError) as caught:
        VocabParallelEmbedding(7, 4, group=torch.distributed.group.WORLD)
    return str(caught.value).rpartition("; ")[2]


@pytest.mark.parametrize("folder", [5, None, ["here"], b"here"], ids=str)
def test_a_folder_is_a_path(folder):
    with pytest.raises(TypeError, match="^folder=.*: must be a text or a path"):
        load_huggingface(folder)
    with pytest.raises(TypeError, match="^folder=.*: must be a text or a path"):
        save_huggingface(GPT2(config()), folder)


@pytest.mark.parametrize("model", [{"wte.weight": torch.zeros(1)}, None, "gpt2", GPT2], ids=type)
def test_a_model_is_written_and_nothing_else(tmp_path, model):
    with pytest.raises(TypeError, match="cannot be written; pass a GPT2 or"):
        save_huggingface(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())
