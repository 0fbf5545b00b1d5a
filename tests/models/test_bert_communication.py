"""Every collective of a step of BERT, counted: the paper's table, with heads only where asked."""

import pytest
import torch
import torch.distributed as dist
from bert_cases import KINDS, batch, config, pair
from gpt2_cases import groups
from test_communication import counted, forbid_collectives
from torch.utils.checkpoint import set_checkpoint_early_stop

from megatron_edu.comm import Ledger
from megatron_edu.models.bert import Bert
from megatron_edu.tensor_parallel.norm import clip_grad_norm, grad_norm
from megatron_edu.training.data_parallel import DataParallel
from megatron_edu.training.optimizer import OptimizerConfig, make_optimizer

LAYERS, ROWS, LENGTH, WIDTH = 3, 4, 13, 36
ACTIVATION = ROWS * LENGTH * WIDTH                                              # b s h
MASKED = int((batch(config(), ROWS, LENGTH)["labels"] != -100).sum())           # m: counted tokens


def one_step(tp, dp, layer_norm, recompute, device):
    "How often each collective of a step came, and what the replica's share of it counted."
    mine = groups(tp, dp, device)
    changed = config(num_layers=LAYERS, layer_norm=layer_norm)
    model, _ = pair(changed, mine.tp_group, device=device, recompute=recompute)
    wrapped = DataParallel(model, mine.dp_group)
    data = batch(changed, dp * ROWS, LENGTH, device=device)
    data = {name: tensor.chunk(dp)[mine.dp_rank] for name, tensor in data.items()}
    with Ledger() as step, set_checkpoint_early_stop(False):
        wrapped.loss(**data).backward()
    with Ledger() as norm:
        clip_grad_norm(model, 1.0)
    with Ledger() as update:
        make_optimizer(model, OptimizerConfig()).step()
    masked = (data["labels"] != -100).sum().item()
    return [counted(step), counted(norm), counted(update)], step.bytes(), masked


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layer_norm", KINDS)
@pytest.mark.parametrize("tp, dp", [(2, 1), (4, 1), (2, 2)])
def test_a_step_is_the_papers_table(ranks, device, tp, dp, layer_norm, recompute):
    "Two and two a layer; the output layer and the loss speak of the masked tokens alone."
    seen = set()
    for (step, norm, update), moved, masked in ranks(tp * dp)(
        one_step, tp, dp, layer_norm, recompute, device
    ):
        per_layer = 4 if recompute else 2
        assert step == {
            ("forward", "all_reduce", "tp", "float64", ACTIVATION): 2 * LAYERS + 1,
            ("backward", "all_reduce", "tp", "float64", ACTIVATION): per_layer * LAYERS,
            ("forward", "all_gather", "tp", "float64", tp * 2 * masked): 1,
            ("backward", "all_reduce", "tp", "float64", masked * WIDTH): 1,
        }
        activations = (2 + per_layer) * LAYERS + 1
        assert moved == 8 * (activations * ACTIVATION + (WIDTH + 2 * tp) * masked)
        assert norm == {("forward", "all_reduce", "tp", "float64", 1): 1}
        assert update == {}
        seen.add(masked)
    assert len(seen) == dp, "the replicas count different numbers"


@pytest.mark.parametrize("tp", [2])
@pytest.mark.parametrize("layer_norm", KINDS)
def test_bytes_under_bf16_autocast(ranks, device, tp, layer_norm):
    "Layers and output layer speak bf16; embedding and loss, whose numbers are fp32, speak fp32."

    def step():
        changed = config(num_layers=LAYERS, layer_norm=layer_norm)
        model, _ = pair(changed, groups(tp, 1, device).tp_group, torch.float32, device)
        with Ledger() as ledger:
            with torch.autocast(device, torch.bfloat16):
                loss = model.loss(**batch(changed, ROWS, LENGTH, device=device))
            loss.backward()
        return counted(ledger)

    for found in ranks(tp)(step):
        assert found == {
            ("forward", "all_reduce", "tp", "float32", ACTIVATION): 1,
            ("forward", "all_reduce", "tp", "bfloat16", ACTIVATION): 2 * LAYERS,
            ("backward", "all_reduce", "tp", "bfloat16", ACTIVATION): 2 * LAYERS,
            ("forward", "all_gather", "tp", "float32", tp * 2 * MASKED): 1,
            ("backward", "all_reduce", "tp", "bfloat16", MASKED * WIDTH): 1,
        }


def inference(tp, device):
    "Collectives of building the model, and of both logits without gradients."
    changed = config(num_layers=LAYERS)
    with Ledger() as building:
        model = Bert(changed, groups(tp, 1, device).tp_group).to(device)
    model.recompute = True
    data = batch(changed, ROWS, LENGTH, device=device)
    with Ledger() as ledger, torch.no_grad():
        model(data["input_ids"], data["token_types"], data["attention_mask"])
    return counted(building), counted(ledger)


@pytest.mark.parametrize("tp", [2, 4])
def test_logits_without_gradients(ranks, device, tp):
    for building, found in ranks(tp)(inference, tp, device):
        assert building == {}
        assert found == {("forward", "all_reduce", "tp", "float32", ACTIVATION): 2 * LAYERS + 1}


def heads_alone(tp, device):
    "Collectives of the sentence-order loss, and of the masked-token loss, after the blocks."
    model, _ = pair(config(num_layers=1), groups(tp, 1, device).tp_group, device=device)
    data = batch(config(), ROWS, LENGTH, device=device)
    losses = model.losses(**data)
    found = []
    for name in ("sop", "mlm"):
        with Ledger() as ledger:
            losses[name].backward(retain_graph=True, inputs=[model.ln_f.weight])
        found.append(counted(ledger))
    return found


@pytest.mark.parametrize("tp", [2, 4])
def test_the_sentence_order_says_nothing(ranks, device, tp):
    for of_order, of_tokens in ranks(tp)(heads_alone, tp, device):
        assert of_order == {}
        assert of_tokens == {("backward", "all_reduce", "tp", "float64", MASKED * WIDTH): 1}


def nothing_counted(tp, by, device):
    model, _ = pair(config(num_layers=1), groups(tp, 1, device).tp_group, device=device)
    data = batch(config(), ROWS, LENGTH, device=device)
    if by == "label":
        data["labels"][:] = -100
    else:
        data["loss_mask"] = torch.zeros_like(data["labels"])
    with Ledger() as ledger:
        model.loss(**data).backward()
    return counted(ledger)


@pytest.mark.parametrize("tp", [2])
@pytest.mark.parametrize("by", ["label", "mask"])
def test_where_nothing_is_counted_the_loss_says_nothing(ranks, device, tp, by):
    for found in ranks(tp)(nothing_counted, tp, by, device):
        assert found == {
            ("forward", "all_reduce", "tp", "float64", ACTIVATION): 2 + 1,
            ("backward", "all_reduce", "tp", "float64", ACTIVATION): 2,
            ("backward", "all_reduce", "tp", "float64", 0): 1,
        }


# ----------------------------------------------------------------------- one device


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layer_norm", KINDS)
def test_one_device_says_nothing(monkeypatch, layer_norm, recompute):
    "No process group, no collective call, in building, a step, clipping and an update."
    forbid_collectives(monkeypatch)
    assert not dist.is_initialized()
    changed = config(dropout=0.1, layer_norm=layer_norm)
    model, full = pair(changed, groups(1).tp_group, recompute=recompute)
    with Ledger() as ledger:
        DataParallel(model, groups(1).dp_group).loss(**batch(changed)).backward()
        clip_grad_norm(model, 1e-3)
        make_optimizer(model, OptimizerConfig()).step()
    assert ledger.records == []
    assert not dist.is_initialized()
    assert grad_norm(model) == pytest.approx(1e-3, rel=1e-3)
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in full.named_parameters()
    }


def world_of_one(device):
    "A process group of one rank, as `torchrun` with one process makes it."
    model, _ = pair(config(), dist.group.WORLD, device=device)
    with Ledger() as ledger:
        model.loss(**batch(config(), device=device)).backward()
        grad_norm(model)
    return ledger.records


def test_a_group_of_one_rank_says_nothing(ranks, device):
    assert ranks(1)(world_of_one, device) == [[]]
