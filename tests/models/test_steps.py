"A model step by step: embed, a range of its blocks, the losses; positions passed in."

import pytest
import torch
from bert_cases import KINDS
from bert_cases import batch as bert_batch
from bert_cases import config as bert_config
from gpt2_cases import batch, config

from megatron_edu.definitions import visible
from megatron_edu.mesh import ParallelDims
from megatron_edu.models import GPT2, build_model

MODELS = {"gpt2": config(num_layers=3)}
MODELS |= {kind: bert_config(layer_norm=kind) for kind in KINDS}


def built(kind, tp=1):
    own = MODELS[kind]
    model = build_model(own, ParallelDims(tp=tp).build().tp_group)
    torch.manual_seed(3)
    if tp == 1:         # unlike any initial weights
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double()


def in_pieces(model, cut):
    "The losses, with the blocks run in two ranges, or all at once."
    parts = (None,) if cut is None else (range(cut), range(cut, model.config.num_layers))
    mask = None
    if isinstance(model, GPT2):
        input_ids, *end = batch(model.config)
        x = model.embed(input_ids)
    else:
        data = bert_batch(model.config)
        x = model.embed(data["input_ids"], data["token_types"])
        mask = visible(data["attention_mask"])
        end = data["labels"], None, data["sentence_order"]
    for part in parts:
        x = model.run(x, mask, part)
    return model.losses_of(model.ln_f(x), *end)


def steps_of(kind, tp):
    "Losses and gradients of a step in one, and of the same in pieces."
    model, found = built(kind, tp), []
    for cut in (None, 1):
        model.zero_grad()
        losses = in_pieces(model, cut)
        sum(losses.values()).backward()
        found.append([*losses.values(), *(p.grad for p in model.parameters())])
    return [[tensor.detach().clone() for tensor in each] for each in found]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_blocks_may_be_run_in_ranges(ranks, kind, tp):
    for whole, parts in ranks(tp)(steps_of, kind, tp):
        assert len(whole) == len(parts) > 10
        assert all(torch.equal(a, b) for a, b in zip(whole, parts))


def test_a_range_runs_its_own_blocks_alone():
    model = built("gpt2").eval()
    x = torch.randn(2, 5, model.config.hidden_size, dtype=torch.float64)
    assert torch.equal(model.run(x, layers=range(1, 2)), model.blocks[1](x))
    assert torch.equal(model.run(x, layers=range(0)), x)
    names = {name.split(".")[1] for name, _ in model.named_parameters() if "blocks" in name}
    assert names == {"0", "1", "2"}


@pytest.mark.parametrize("kind", MODELS)
def test_positions_are_passed_in(kind):
    model = built(kind).eval()
    ids = torch.arange(8).view(2, 4)
    assert torch.equal(model.embed(ids, positions=torch.arange(4)), model.embed(ids))
    shifted = model.embed(ids[:, 2:], positions=torch.arange(2, 4))
    torch.testing.assert_close(shifted, model.embed(ids)[:, 2:], rtol=0, atol=1e-12)
    rows = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    mixed = model.embed(ids, positions=rows)
    for row, positions in enumerate(rows):
        alone = model.embed(ids[row : row + 1], positions=positions)
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0, atol=1e-12)
