"""Every classic mistake turns a check red, and the right code none, on the very same inputs."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from gpt2_cases import groups

from megatron_edu.course.mutants import ALL_CHECKS, GPT2_SUBJECT, Mutant, examine
from megatron_edu.course.mutants_bert import BERT_MUTANTS, bert_subject
from megatron_edu.course.mutants_gpt2 import MUTANTS
from megatron_edu.tensor_parallel import linear
from megatron_edu.training.data_parallel import DataParallel

WIDTHS = {1: [2, 4], 2: [2]}    # tensor-parallel sizes for the number of replicas
GRIDS = [(tp, dp) for dp in WIDTHS for tp in WIDTHS[dp]]
EVERY = MUTANTS | BERT_MUTANTS
SUBJECTS = {
    "gpt2": GPT2_SUBJECT,
    "untied gpt2": GPT2_SUBJECT.changed(tie_embeddings=False),
    "bert": bert_subject(),
    "post-LN bert": bert_subject(layer_norm="post"),
}


def cases(mutants, subject):
    "Each mutant on all sizes that it may be seen on."
    sizes = [(name, mutant.dp) for name, mutant in mutants.items()]
    return [(subject, name, tp, dp) for name, dp in sizes for tp in WIDTHS[dp]]


# What GPT-2's lesson makes wrong in code that BERT uses, too; on two ranks each.
INHERITED = [
    ("bert", name, 2, mutant.dp)
    for name, mutant in MUTANTS.items()
    if not mutant.target.startswith("models.gpt2")
]
# A post-LN BERT has blocks of its own, one LayerNorm more and no last one. What surrounds them, the
# masks, heads, table, norm and replicas, could be wired in it differently, so every mistake that
# either order allows is made in both, on two ranks. One is none there: it needs the last LayerNorm.
NEEDS_PRE_LN = "pooled_before_the_norm"
POST_LN = [
    ("post-LN bert", name, 2, mutant.dp)
    for name, mutant in BERT_MUTANTS.items()
    if name != NEEDS_PRE_LN
]
POST_LN += [("post-LN bert", *rest) for _, *rest in INHERITED]
CASES = cases(MUTANTS, "gpt2") + cases(BERT_MUTANTS, "bert") + INHERITED + POST_LN


def verdict(subject, name, tp, dp, device):
    "Of the code with one mistake in it; of the right code for None."
    mine = groups(tp, dp, device)
    if name is None:
        return examine(mine, DataParallel, device, SUBJECTS[subject])
    with EVERY[name].made():
        changed = SUBJECTS[subject].changed(**EVERY[name].changes)
        return examine(mine, DataParallel, device, changed)


def verdict_of(mutant, device):
    "On two ranks, on the usual subject with the mutant's changes."
    with mutant.made():
        subject = GPT2_SUBJECT.changed(**mutant.changes)
        return examine(groups(2, 1, device), DataParallel, device, subject)


def verdict_of_all(ranks, subject, name, tp, dp, device):
    "The ranks must agree on it."
    verdicts = ranks(tp * dp)(verdict, subject, name, tp, dp, device)
    assert all(each == verdicts[0] for each in verdicts)
    return verdicts[0]


@pytest.mark.parametrize("tp, dp", GRIDS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_right_code_is_green(ranks, device, subject, tp, dp):
    assert verdict_of_all(ranks, subject, None, tp, dp, device).red == []


@pytest.mark.parametrize("subject, name, tp, dp", CASES)
def test_no_mutant_survives(ranks, device, subject, name, tp, dp):
    found = verdict_of_all(ranks, subject, name, tp, dp, device)
    assert found.red, f"{EVERY[name].mistake}: no check sees it"
    assert set(found.red) <= set(ALL_CHECKS)


@pytest.mark.world(2)
def test_what_needs_the_last_layer_norm_is_no_mistake_without_it(ranks, device):
    assert verdict_of_all(ranks, "post-LN bert", NEEDS_PRE_LN, 2, 1, device).red == []


@pytest.mark.world(2)
def test_what_needs_an_output_layer_of_its_own_is_no_mistake_without_it(ranks, device):
    tied = replace(EVERY["logits_by_the_embedding"], changes={})
    for found in ranks(2)(verdict_of, tied, device):
        assert found.red == []
    with_its_own = verdict_of_all(ranks, "gpt2", "logits_by_the_embedding", 2, 1, device)
    assert with_its_own.red == ["loss", "sharded", "replicated", "norm"]


# A bias of the whole vocabulary on every rank, of which a rank takes one slice; what sees it.
WHOLE_BIAS = {
    "token_bias_first_slice": ["loss", "sharded", "replicated", "norm"],
    "token_bias_own_gradient": ["replicated", "norm"],
}


@pytest.mark.parametrize("tp", WIDTHS[1])
@pytest.mark.parametrize("subject", ["bert", "post-LN bert"])
@pytest.mark.parametrize("name", WHOLE_BIAS)
def test_who_sees_a_bias_that_is_whole(ranks, device, name, subject, tp):
    assert verdict_of_all(ranks, subject, name, tp, 1, device).red == WHOLE_BIAS[name]


# What the loss, which is right to the last bit, does not see; and what sees it.
SILENT = {
    "no_f": ["sharded", "replicated", "norm"],
    "g_reduces_backward": ["sharded", "replicated", "norm"],
    "embedding_reduces_backward": ["sharded", "norm"],
    "tied_output_half_missing": ["sharded", "norm"],
    "position_gradient_summed": ["replicated", "norm"],
    "replicated_counted_everywhere": ["norm"],
    "norm_not_reduced": ["norm"],
    "qkv_joined_by_rank": ["weights"],
    "weights_drawn_per_rank": ["weights"],
    "one_stream_for_all": ["masks"],
    "stream_not_put_back": ["masks"],
    "private_generator": ["recompute"],
}
SILENT_IN_BERT = {
    "mask_lost_in_recomputation": ["recompute"],
    "token_bias_own_gradient": ["replicated", "norm"],
    "token_bias_summed": ["sharded", "norm"],
    "token_bias_counted_once": ["norm"],
    "token_table_half_missing": ["sharded", "norm"],
    "token_head_summed": ["replicated", "norm"],
    "heads_drawn_per_rank": ["weights"],
    "order_counted_on_every_rank": ["sharded", "replicated", "norm"],
}


SILENT_CASES = [("gpt2", name) for name in SILENT] + [
    (subject, name) for subject in ("bert", "post-LN bert") for name in SILENT_IN_BERT
]


@pytest.mark.parametrize("tp", [2])
@pytest.mark.parametrize("subject, name", SILENT_CASES)
def test_the_loss_is_identical_and_others_are_red(ranks, device, subject, name, tp):
    right = verdict_of_all(ranks, subject, None, tp, 1, device)
    found = verdict_of_all(ranks, subject, name, tp, 1, device)
    assert found.loss == right.loss
    assert found.red == (SILENT | SILENT_IN_BERT)[name]


def test_there_are_many():
    assert len(MUTANTS) >= 30 and len(BERT_MUTANTS) >= 16 and len(INHERITED) >= 25
    assert len(POST_LN) == len(BERT_MUTANTS) - 1 + len(INHERITED)
    assert len(EVERY) == len(MUTANTS) + len(BERT_MUTANTS)
    assert len({mutant.mistake for mutant in EVERY.values()}) == len(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_a_mistake_is_undone(name):
    "Also after an error, and with nothing left behind in a class that inherited the target."
    from pkgutil import resolve_name

    path, _, last = f"megatron_edu.{EVERY[name].target}".rpartition(".")
    before, was_own = getattr(resolve_name(path), last), last in vars(resolve_name(path))
    with pytest.raises(KeyError), EVERY[name].made():
        assert getattr(resolve_name(path), last) is not before
        raise KeyError
    assert getattr(resolve_name(path), last) is before
    assert (last in vars(resolve_name(path))) == was_own


def test_a_target_that_is_gone():
    with pytest.raises(AttributeError, match="no_such_layer"):
        Mutant("gone", "", "", "tensor_parallel.linear.no_such_layer", print).made()


def calls():
    "What a replacement is given: the real function, and what it was called with."
    seen = []

    def wrong(real, x, weight, bias, region):
        seen.append(real is linear_before)
        return real(x, weight, bias, region)

    linear_before = linear.column_linear
    layer = linear.ColumnParallelLinear(4, 4, group=dist.group.WORLD)
    with Mutant("spy", "", "", "tensor_parallel.linear.column_linear", wrong).made():
        layer(torch.ones(4))
    layer(torch.ones(4))
    return seen


@pytest.mark.world(2)
def test_a_mistake_is_made_where_the_layer_looks(ranks):
    assert ranks(2)(calls) == [[True], [True]]
