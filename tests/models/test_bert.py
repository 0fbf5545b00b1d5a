"""The whole sharded BERT against the unsharded one, in both orders of its LayerNorms."""

import pytest
import torch
from bert_cases import KINDS, batch, config, pair
from gpt2_cases import groups, shake
from test_gpt2 import MAX_NORM, STEPS, autocast_errors, differences_after
from vocab_cases import message

from megatron_edu import reference
from megatron_edu.comm import all_gather
from megatron_edu.models.bert import Bert
from megatron_edu.reference.bert import visible
from megatron_edu.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_edu.tensor_parallel.random import seed_replica
from megatron_edu.tensor_parallel.shard import gather_state_dict, gather_tensors, shard_rules
from megatron_edu.testing import check_equivalence
from megatron_edu.training.data_parallel import DataParallel

grids = pytest.mark.parametrize("dp", [1, 2])
widths = pytest.mark.parametrize("tp", [1, 2, 4])
kinds = pytest.mark.parametrize("layer_norm", KINDS)


# ---------------------------------------------------------------------------- the four checks


def four_checks(
    tp, dp, config, data, device, dtype=torch.float64, recompute=False, **options
):
    "One step of both models with the same shaken weights."
    mine = groups(tp, dp, device)
    model, full = pair(config, mine.tp_group, dtype, device, recompute)
    wrapped = DataParallel(model, mine.dp_group)
    data = {name: tensor.to(device) for name, tensor in data.items()}
    return check_equivalence(wrapped, full, **data, dp_group=mine.dp_group, **options)


@grids
@widths
@kinds
@pytest.mark.parametrize("recompute", [False, True])
def test_equals_the_reference(ranks, device, tp, dp, layer_norm, recompute):
    changed = config(layer_norm=layer_norm)
    given = tp, dp, changed, batch(changed), device
    reports = ranks(tp * dp)(four_checks, *given, recompute=recompute)
    assert all(report == reports[0] for report in reports)


@kinds
def test_the_loss_divides_by_the_weights_summed_in_its_own_type(layer_norm):
    "Weights of three digits in float32; their number is another one."
    model, full = pair(config(layer_norm=layer_norm))
    data = batch(config())
    mask = torch.rand(4, 13, generator=torch.Generator().manual_seed(0)) + 0.1
    weights = mask.double()[data["labels"] != -100]
    both = [each.losses(**data, loss_mask=mask)["mlm"] for each in (model, full)]
    summed = model.losses(**data, loss_mask=mask, num_tokens=1)["mlm"]
    for loss in both:
        torch.testing.assert_close(loss, summed / weights.sum(), rtol=0, atol=1e-12)


def test_the_batch_is_in_general_position():
    "Rows of four lengths, one of them of padding alone; the halves count different numbers."
    data = batch(config())
    assert data["attention_mask"].sum(-1).tolist() == [13, 10, 0, 4]
    first, second = ((labels != -100).sum() for labels in data["labels"].chunk(2))
    assert 0 < second < first
    assert (data["labels"] != -100).any(-1).tolist() == [True, True, False, True]
    assert data["token_types"].unique().tolist() == [0, 1, 2]
    assert data["sentence_order"].unique().tolist() == [0, 1]


VARIANTS = {
    "GELU by tanh": config(gelu="tanh"),
    "f is not 4h": config(ffn_hidden_size=20, layer_norm="post"),
    "a rank of padding": config(vocab_size=60, vocab_multiple=128),
    "no padding": config(vocab_size=100, vocab_multiple=4, layer_norm="post"),
    "one layer, one position, one type": config(num_layers=1, max_seq_len=13, num_token_types=1),
}


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_reference(ranks, device, tp, variant):
    ranks(tp)(four_checks, tp, 1, VARIANTS[variant], batch(VARIANTS[variant]), device)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["token_types", "attention_mask", "sentence_order"])
def test_what_may_be_left_out(ranks, device, tp, name):
    ranks(tp)(four_checks, tp, 1, config(), batch(config(), without=(name,)), device)


@pytest.mark.parametrize("tp, dp", [(2, 1), (1, 2), (2, 2)])
def test_weights_between_0_and_1(ranks, device, tp, dp):
    mask = torch.rand(4, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask[:, 1::3] = 0
    data = batch(config()) | {"loss_mask": mask}
    assert ((data["labels"] != -100) & (mask == 0)).any()
    ranks(tp * dp)(four_checks, tp, dp, config(), data, device)


@kinds
@pytest.mark.parametrize("tp", [3])
def test_three_heads_on_three_ranks(ranks, device, tp, layer_norm):
    changed = config(num_heads=3, ffn_hidden_size=45, vocab_multiple=3, layer_norm=layer_norm)
    ranks(tp)(four_checks, tp, 1, changed, batch(changed), device)


@pytest.mark.parametrize("tp", [8])
def test_one_head_a_rank_on_eight_ranks(ranks, device, tp):
    changed = config(hidden_size=40, num_heads=8)
    ranks(tp)(four_checks, tp, 1, changed, batch(changed), device)


# The ranks round their partial sums separately. Seen: 1e-6 in fp32 and 2.5e-2 in bf16.
@widths
@kinds
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 5e-6), (torch.bfloat16, 5e-2)])
def test_low_precision(ranks, device, tp, layer_norm, dtype, atol):
    changed = config(layer_norm=layer_norm)
    ranks(tp)(four_checks, tp, 1, changed, batch(changed), device, dtype=dtype, atol=atol)


@pytest.mark.parametrize("tp", [2, 4])
def test_bf16_autocast_errs_no_more_than_the_reference(ranks, device, tp):
    data = batch(config())
    for ours, theirs in ranks(tp)(autocast_errors, tp, device, pair, config(), data):
        assert 0 < ours[0] < 2**-9 and 0 < ours[1] < 2e-2      # of the loss, as in GPT-2's test
        assert ours[1] < 2 * theirs[1]


# --------------------------------------------------------------------- nothing is counted


@grids
@widths
def test_no_counted_token_on_the_last_rows(ranks, device, tp, dp):
    "With two replicas the second counts none at all, and its divisor is half of the first's."
    data = batch(config())
    data["labels"][2:] = -100
    ranks(tp * dp)(four_checks, tp, dp, config(), data, device)


def nothing_counted(tp, device, padding_alone):
    "Losses of a batch in which no token counts, the reference's, and whether a gradient is NaN."
    model, full = pair(config(), groups(tp, 1, device).tp_group, device=device)
    data = batch(config(), device=device)
    data["labels"][:] = -100
    if padding_alone:
        data["attention_mask"][:] = 0
    losses = model.losses(**data)
    sum(losses.values()).backward()
    want = {name: loss.item() for name, loss in full.losses(**data).items()}
    finite = all(p.grad.isfinite().all() for p in model.parameters())
    return {name: loss.item() for name, loss in losses.items()}, want, finite


@widths
@pytest.mark.parametrize("padding_alone", [False, True])
def test_no_counted_token_at_all(ranks, device, tp, padding_alone):
    for losses, want, finite in ranks(tp)(nothing_counted, tp, device, padding_alone):
        assert losses["mlm"] == 0
        assert losses == pytest.approx(want, abs=1e-12)
        assert losses["sop"] > 0.01
        assert finite


# -------------------------------------------------------------------------------- the mask


def hidden(tp, layer_norm, device):
    "Hidden states with other tokens below the padding, and the reference's for the first ones."
    changed = config(layer_norm=layer_norm)
    model, full = pair(changed, groups(tp, 1, device).tp_group, device=device)
    data = batch(changed, device=device)
    del data["labels"], data["sentence_order"]
    want = full.hidden_states(**data)
    first = model.hidden_states(**data)
    others = 1 + data["input_ids"] % 100
    data["input_ids"] = data["input_ids"].where(data["attention_mask"] != 0, others)
    second = model.hidden_states(**data)
    real = data["attention_mask"] != 0
    return (
        (first - want).abs().max().item(),
        (first - second)[real].abs().max().item(),
        (first - second)[~real].abs().min().item(),
    )


@kinds
@widths
def test_padding_is_not_looked_at(ranks, device, tp, layer_norm):
    for error, of_real, of_padding in ranks(tp)(hidden, tp, layer_norm, device):
        assert error < 1e-10
        assert of_real == 0
        assert of_padding > 0


def looked_at(tp, device):
    "Gradient of the second row's first position with respect to the words of each position."
    model, _ = pair(config(), groups(tp, 1, device).tp_group, device=device)
    data = batch(config(), device=device)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = model.hidden_states(data["input_ids"], attention_mask=data["attention_mask"])
    (gradient,) = torch.autograd.grad(x[1, 0].square().sum(), seen[0])
    return gradient.abs().amax(-1).cpu()


@pytest.mark.parametrize("tp", [1, 2])
def test_both_directions_and_no_padding(ranks, device, tp):
    for gradient in ranks(tp)(looked_at, tp, device):
        assert (gradient[1, :10] > 0).all()
        assert (gradient[1, 10:] == 0).all()
        assert (gradient[[0, 2, 3]] == 0).all()


def test_a_row_of_padding_may_look_at_all_of_it():
    mask = visible(torch.tensor([[1, 1, 0], [0, 0, 0]]))
    assert mask.tolist() == [[[[True, True, False]]], [[[True, True, True]]]]
    assert visible(None) is None


# ------------------------------------------------------------------------------ training


def training_differences(tp, dp, config, recompute, device):
    mine = groups(tp, dp, device)
    batches = [batch(config, seed=seed, device=device) for seed in range(STEPS)]
    both = pair(config, mine.tp_group, device=device, recompute=recompute)
    return differences_after(*both, mine, dp, batches)


@grids
@widths
@kinds
@pytest.mark.parametrize("recompute", [False, True])
def test_five_clipped_steps_equal_the_references(ranks, device, tp, dp, layer_norm, recompute):
    changed = config(layer_norm=layer_norm)
    for differences, moved, norms in ranks(tp * dp)(
        training_differences, tp, dp, changed, recompute, device
    ):
        assert max(differences.values()) < 1e-10, differences
        assert min(moved.values()) > 1e-3, moved
        assert len(norms) == STEPS and min(norms) > MAX_NORM


# ------------------------------------------------------------------------ weights and logits


def fresh_state(tp, layer_norm, device):
    "The full state of a fresh model, and the reference's with the same and another seed."
    changed = config(layer_norm=layer_norm)
    model = Bert(changed, groups(tp, 1, device).tp_group, seed=3)
    states = [reference.Bert(changed, seed=seed).state_dict() for seed in (3, 4)]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return gather_state_dict(model.to(device)), *states, shard_rules(model), sizes


@kinds
@widths
def test_initial_weights_do_not_depend_on_tp(ranks, device, tp, layer_norm):
    for got, want, other, rules, sizes in ranks(tp)(fresh_state, tp, layer_norm, device):
        assert list(got) == list(want)
        assert all(torch.equal(got[name].cpu(), want[name]) for name in want)
        assert not torch.equal(want["mlm.dense.weight"], other["mlm.dense.weight"])
        for name, rule in rules.items():
            assert sizes[name] == want[name].numel() // (1 if rule is None else tp), name


BLOCK = {
    *(f"blocks.0.{name}.{part}" for name in ("ln_1", "ln_2") for part in ("weight", "bias")),
    "blocks.0.attn.proj.bias",
    "blocks.0.mlp.down.bias",
}
HEADS = {
    f"{name}.{part}"
    for name in ("pooler", "sop", "mlm.dense", "mlm.ln")
    for part in ("weight", "bias")
}


@pytest.mark.parametrize("layer_norm, norm", [("pre", "ln_f"), ("post", "ln_emb")])
def test_sharded_and_replicated_parameters(layer_norm, norm):
    "The bias of the vocabulary is sharded; the heads, positions and token types are not."
    rules = shard_rules(Bert(config(num_layers=1, layer_norm=layer_norm)))
    replicated = {name for name, rule in rules.items() if rule is None}
    tables = {"wpe.weight", "token_types.weight", f"{norm}.weight", f"{norm}.bias"}
    assert replicated == tables | BLOCK | HEADS
    assert "mlm.bias" in rules


def logits_and_losses(tp, layer_norm, device):
    "Errors of both logits, of the losses, and of the masked-token loss taken from the logits."
    changed = config(layer_norm=layer_norm)
    group = groups(tp, 1, device).tp_group
    model, full = pair(changed, group, device=device)
    data = batch(changed, device=device)
    inputs = [data[name] for name in ("input_ids", "token_types", "attention_mask")]
    (local, order), (want, want_order) = model(*inputs), full(*inputs)
    each = vocab_parallel_cross_entropy(
        local, data["labels"], group=group, vocab_size=changed.vocab_size
    )
    losses, want_losses = model.losses(**data), full.losses(**data)
    from_logits = each.sum() / (data["labels"] != -100).sum()
    from_logits.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    whole = gather_tensors(gradients, model)
    want_losses["mlm"].backward()
    wanted = {n: p.grad for n, p in full.named_parameters() if p.grad is not None}
    assert whole.keys() == wanted.keys() and "pooler.weight" not in wanted
    errors = {name: abs(losses[name] - want_losses[name]).item() for name in want_losses}
    errors["from logits"] = abs(from_logits - losses["mlm"]).item()
    errors["token logits"] = (all_gather(local.detach(), group) - want).abs().max().item()
    errors["order logits"] = (order - want_order).abs().max().item()
    errors["gradients"] = max((whole[n] - g).abs().max().item() for n, g in wanted.items())
    return errors, local.shape, (model.loss(**data) - sum(losses.values())).item()


@kinds
@widths
def test_logits_and_losses(ranks, device, tp, layer_norm):
    for errors, shape, of_sum in ranks(tp)(logits_and_losses, tp, layer_norm, device):
        assert errors.keys() >= {"mlm", "sop"}
        assert max(errors.values()) < 1e-10, errors
        assert shape == (4, 13, 128 // tp)
        assert of_sum == 0


def divided(tp, device):
    "Ratios of losses with divisors given to those without; the losses without a sentence order."
    model, full = pair(config(), groups(tp, 1, device).tp_group, device=device)
    data, divisors = batch(config(), device=device), {"num_tokens": 3.5, "num_samples": 8}
    plain, given = model.losses(**data), model.losses(**data, **divisors)
    want = full.losses(**data, **divisors)
    assert all(abs(given[name] - want[name]) < 1e-10 for name in want)
    del data["sentence_order"]
    alone = model.losses(**data)
    ratios = [(given[name] / plain[name]).item() for name in ("mlm", "sop")]
    counted = (data["labels"] != -100).sum().item()
    return ratios, counted, list(alone), (alone["mlm"] - plain["mlm"]).item()


@pytest.mark.parametrize("tp", [1, 2])
def test_divisors_and_the_loss_without_an_order(ranks, device, tp):
    for ratios, counted, alone, change in ranks(tp)(divided, tp, device):
        assert ratios == pytest.approx([counted / 3.5, 4 / 8], rel=1e-12)
        assert alone == ["mlm"] and change == 0


# ------------------------------------------------------------------------------- dropout


def loss_and_gradients(tp, recompute, layer_norm, device):
    "With dropout 0.3 everywhere."
    changed = config(dropout=0.3, layer_norm=layer_norm)
    group = groups(tp, 1, device).tp_group
    model, _ = pair(changed, group, device=device, recompute=recompute)
    seed_replica(5)
    loss = model.loss(**batch(changed, device=device))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.item(), {n: g.cpu() for n, g in gradients.items()}, shard_rules(model)


@kinds
@pytest.mark.parametrize("tp", [1, 2])
def test_recomputation_replays_the_dropout_masks(ranks, device, tp, layer_norm):
    kept = ranks(tp)(loss_and_gradients, tp, False, layer_norm, device)
    again = ranks(tp)(loss_and_gradients, tp, True, layer_norm, device)
    for (loss, gradients, _), (loss_again, gradients_again, _) in zip(kept, again, strict=True):
        assert loss == loss_again == kept[0][0]
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradients_again[name], gradient, rtol=0, atol=1e-12)


@kinds
@pytest.mark.parametrize("tp", [2, 4])
def test_replicated_gradients_agree_under_dropout(ranks, device, tp, layer_norm):
    results = ranks(tp)(loss_and_gradients, tp, False, layer_norm, device)
    first, rules = results[0][1], results[0][2]
    for _, gradients, _ in results[1:]:
        for name in first:
            same = torch.equal(gradients[name], first[name])
            assert same == (rules[name] is None), name


@kinds
def test_on_one_device_dropout_is_the_references(layer_norm):
    "The same random numbers, drawn in the same order and with the same p."
    model, full = pair(config(dropout=0.3, layer_norm=layer_norm))
    data, losses = batch(config()), []
    for each in (model, full):
        torch.manual_seed(5)
        losses.append(each.loss(**data))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
    assert abs(losses[0] - model.eval().loss(**data)) > 1e-3


def dropout_off(tp, device):
    "In eval mode a model with dropout is the one without."
    group = groups(tp, 1, device).tp_group
    model, _ = pair(config(dropout=0.5), group, device=device)
    plain, _ = pair(config(), group, device=device)
    data = batch(config(), device=device)
    want = plain.loss(**data)
    in_eval = torch.equal(model.eval().loss(**data), want)
    return in_eval, torch.equal(model.train().loss(**data), want)


@pytest.mark.parametrize("tp", [1, 2])
def test_eval_has_no_dropout(ranks, device, tp):
    assert ranks(tp)(dropout_off, tp, device) == [(True, False)] * tp


# ----------------------------------------------------------------------------- bad input


BAD = {
    "input_ids": (101, "token id 101 is out of range: ids go from 0 to 100"),
    "labels": (101, "target id 101 is out of range: ids go from 0 to 100"),
    "token_types": (3, "token type 3 is out of range: ids go from 0 to 2"),
    "sentence_order": (2, "sentence order 2 is out of range: ids go from 0 to 1"),
}
SHAPES = {
    "labels": "labels and loss_mask have the shapes [(4, 13), (4, 12), (4, 13)]",
    "loss_mask": "labels and loss_mask have the shapes [(4, 13), (4, 13), (4, 12)]",
    "token_types": "token_types has shape (4, 12), input_ids (4, 13)",
    "attention_mask": "attention_mask has shape (4, 12), input_ids (4, 13)",
    "sentence_order": "sentence_order has shape (3,), the batch 4 rows",
}


def complaints(tp):
    "What the model says of one bad number, and of one tensor that is too short."
    model = Bert(config(), groups(tp, 1).tp_group)
    good = batch(config()) | {"loss_mask": torch.ones(4, 13)}
    said = {"good": message(model.loss, **good)}
    for name, (bad, _) in BAD.items():
        wrong = good[name].clone()
        wrong.view(-1)[0] = bad
        said[f"bad {name}"] = message(model.loss, **(good | {name: wrong}))
    for name in SHAPES:
        said[f"short {name}"] = message(model.loss, **(good | {name: good[name].T[1:].T}))
    return said


@widths
def test_bad_input(ranks, tp):
    for said in ranks(tp)(complaints, tp):
        assert said.pop("good") == "no error"
        for name, (_, rule) in BAD.items():
            assert rule in said.pop(f"bad {name}")
        for name, rule in SHAPES.items():
            assert rule in said.pop(f"short {name}")
        assert said == {}


def long_sequence(tp, length):
    model = Bert(config(), groups(tp, 1).tp_group)
    return message(model, torch.zeros(2, length, dtype=torch.int64))


@pytest.mark.parametrize("tp", [1, 2])
def test_too_long_a_sequence(ranks, tp):
    for said in ranks(tp)(long_sequence, tp, 18):
        assert "18 tokens" in said and "max_seq_len=17" in said
    assert ranks(tp)(long_sequence, tp, 17) == ["no error"] * tp


def build(tp, **changes):
    return message(Bert, config(**changes), groups(tp, 1).tp_group)


@pytest.mark.parametrize("tp", [4])
@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"num_heads": 6}, ["num_heads=6", "nearest that does is 8"]),
        ({"ffn_hidden_size": 70}, ["ffn_hidden_size=70", "nearest that does is 72"]),
        ({"vocab_multiple": 1}, ["padded_vocab_size=101", "104", "vocab_multiple", "of 4"]),
    ],
)
def test_sizes_that_do_not_divide(ranks, tp, changes, parts):
    for said in ranks(tp)(build, tp, **changes):
        assert all(part in said for part in ["4 tensor-parallel ranks", *parts]), said


def test_shaken_weights_are_all_different_from_the_initial_ones():
    full = reference.Bert(config()).double()
    before = {name: p.clone() for name, p in full.named_parameters()}
    shake(full)
    assert all(p.ne(before[name]).all() for name, p in full.named_parameters())
