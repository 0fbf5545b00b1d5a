"An output layer with a table of its own: equal to the reference, saved, converted, never confused."

import json
import warnings
from dataclasses import replace

import bert_cases
import gpt2_cases
import pytest
import torch
import transformers
from gpt2_cases import groups, shake
from plain import make_plain
from safetensors.torch import load_file, save_file

from megatron_edu import reference, resume
from megatron_edu.cli.parse import parse
from megatron_edu.comm import all_gather
from megatron_edu.interop import load_huggingface, save_huggingface
from megatron_edu.models import build_model
from megatron_edu.tensor_parallel.shard import Shard, gather_state_dict, shard_rules
from megatron_edu.testing import check_equivalence
from megatron_edu.training.checkpoint import load_model, save_checkpoint
from megatron_edu.training.data_parallel import DataParallel
from megatron_edu.training.initial import check_sizes, find_source, load_initial

CONFIGS = {
    "gpt2": gpt2_cases.config(tie_embeddings=False),
    "pre-LN bert": bert_cases.config(tie_embeddings=False, layer_norm="pre"),
    "post-LN bert": bert_cases.config(tie_embeddings=False, layer_norm="post"),
}
kinds = pytest.mark.parametrize("kind", CONFIGS)
widths = pytest.mark.parametrize("tp", [1, 2, 4])


def case(kind, group, device):
    "A sharded model, the reference, and what `loss` takes."
    config, cases = CONFIGS[kind], gpt2_cases if kind == "gpt2" else bert_cases
    data = cases.batch(config, device=device)
    if kind == "gpt2":
        data = dict(zip(("input_ids", "labels", "loss_mask"), data, strict=True))
    return *cases.pair(config, group, device=device), data


def whole_reference(kind, seed):
    build = reference.GPT2 if kind == "gpt2" else reference.Bert
    return build(CONFIGS[kind], seed=seed)


# ---------------------------------------------------------------------------------- the model


def four_checks(kind, tp, dp, recompute, device):
    mine = groups(tp, dp, device)
    model, full, data = case(kind, mine.tp_group, device)
    model.recompute = recompute
    wrapped = DataParallel(model, mine.dp_group)
    return check_equivalence(wrapped, full, **data, dp_group=mine.dp_group)


@pytest.mark.parametrize("dp", [1, 2])
@widths
@kinds
@pytest.mark.parametrize("recompute", [False, True])
def test_equals_the_reference(ranks, device, kind, tp, dp, recompute):
    reports = ranks(tp * dp)(four_checks, kind, tp, dp, recompute, device)
    assert all(report == reports[0] for report in reports)


@torch.no_grad()
def logits_of_both(kind, tp, device):
    group = groups(tp, 1, device).tp_group
    model, full, data = case(kind, group, device)
    names = ("input_ids",) if kind == "gpt2" else ("input_ids", "token_types", "attention_mask")
    rows = [data[name] for name in names]
    local, want = model(*rows), full(*rows)
    if kind != "gpt2":
        local, want = local[0], want[0]
    return local.shape[-1], (all_gather(local, group) - want).abs().max().item()


@widths
@kinds
def test_logits_are_the_references(ranks, device, kind, tp):
    for columns, error in ranks(tp)(logits_of_both, kind, tp, device):
        assert columns == 128 // tp and error < 1e-10


def fresh(kind, tp, device):
    model = build_model(CONFIGS[kind], groups(tp, 1, device).tp_group, seed=7).to(device)
    full = {name: tensor.cpu() for name, tensor in gather_state_dict(model).items()}
    return full, model.output.weight.shape, shard_rules(model)["output.weight"]


@widths
@kinds
def test_initial_weights_are_the_references_and_do_not_depend_on_tp(ranks, device, kind, tp):
    want = whole_reference(kind, seed=7).state_dict()
    for full, shape, rule in ranks(tp)(fresh, kind, tp, device):
        assert list(full) == list(want)
        assert all(torch.equal(full[name], want[name]) for name in want)
        assert shape == (128 // tp, 36) and rule == Shard(0)


@kinds
def test_the_output_layer_is_drawn_by_itself(kind):
    state = build_model(CONFIGS[kind], seed=7).state_dict()
    output = state["output.weight"]
    assert not torch.equal(output, state["wte.weight"])
    assert not output[101:].any() and output[:101].std().item() == pytest.approx(0.02, rel=0.05)


@kinds
def test_a_tied_model_has_no_such_parameter_and_as_many_fewer(kind):
    tied = replace(CONFIGS[kind], tie_embeddings=True)
    model = build_model(tied)
    assert model.output is None and "output.weight" not in model.state_dict()
    assert model.output_table() is model.wte.weight
    assert CONFIGS[kind].num_parameters() - tied.num_parameters() == 128 * 36


# --------------------------------------------------------------------- checkpoints and options


def saved(kind, tp, run, device):
    mine = groups(tp, 1, device)
    model = build_model(CONFIGS[kind], mine.tp_group).to(device)
    save_checkpoint(run, 1, model, groups=mine)


def loaded(tp, folder, device):
    model = load_model(folder, groups(tp, 1, device).tp_group).to(device)
    full = gather_state_dict(model)
    return model.config, {name: tensor.cpu() for name, tensor in full.items()}


@pytest.mark.world(4)
@kinds
def test_a_checkpoint_of_two_ranks_is_loaded_by_four_bit_by_bit(ranks, device, tmp_path, kind):
    ranks(2)(saved, kind, 2, tmp_path / "run", device)
    want = whole_reference(kind, seed=1).state_dict()
    for config, full in ranks(4)(loaded, 4, tmp_path / "run" / "step-00000001", device):
        assert config == CONFIGS[kind]
        assert list(full) == list(want)
        assert all(torch.equal(full[name], want[name]) for name in want)


@kinds
def test_what_was_saved_before_there_was_a_choice_is_tied(tmp_path, kind):
    model = build_model(replace(CONFIGS[kind], tie_embeddings=True))
    make_plain(save_checkpoint(tmp_path / "run", 1, model))
    folder = tmp_path / "run" / "step-00000001"
    described = json.loads((folder / "config.json").read_text())
    assert described["model"].pop("tie_embeddings") is True
    (folder / "config.json").write_text(json.dumps(described))
    assert load_model(folder).config.tie_embeddings


OPTIONS = {"--tie-embeddings": True, "--no-tie-embeddings": False}


@pytest.mark.parametrize("option, tied", OPTIONS.items())
def test_a_run_cannot_change_it_and_the_option_to_give_is_one_that_there_is(option, tied):
    before, now = (replace(CONFIGS["gpt2"], tie_embeddings=each) for each in (tied, not tied))
    said = resume.refusal("model", resume.differences(before, now))
    assert said == f"tie_embeddings is {tied}, and {not tied} here; go on with {option}"
    asked = parse("train", ["--data", "x.txt", "--out", "never-written", option])
    assert asked.config.model.tie_embeddings == tied


# ---------------------------------------------------------------------------------- conversion

FILE = "model.safetensors"
SIZES = {
    "gpt2": dict(n_layer=2, n_embd=36, n_head=4, vocab_size=101, n_positions=17),
    "bert": dict(
        num_hidden_layers=2,
        hidden_size=36,
        num_attention_heads=4,
        intermediate_size=52,
        vocab_size=101,
        max_position_embeddings=17,
        type_vocab_size=3,
    ),
}
THEIRS = {
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "pre-LN bert": (transformers.MegatronBertConfig, transformers.MegatronBertForPreTraining),
    "post-LN bert": (transformers.BertConfig, transformers.BertForPreTraining),
}
OUTPUT = {"gpt2": "lm_head.weight", "pre-LN bert": "cls.predictions.decoder.weight"}
OUTPUT["post-LN bert"] = OUTPUT["pre-LN bert"]
TABLE = {"gpt2": "transformer.wte.weight", "pre-LN bert": "bert.embeddings.word_embeddings.weight"}
TABLE["post-LN bert"] = TABLE["pre-LN bert"]
IDS = torch.arange(26).view(2, 13) * 7 % 101
berts = pytest.mark.parametrize("kind", ["pre-LN bert", "post-LN bert"])


def theirs(kind, **changes):
    "An untied model of transformers in which no two tensors are equal."
    config, model = THEIRS[kind]
    sizes = SIZES["gpt2" if kind == "gpt2" else "bert"]
    torch.manual_seed(0)
    built = model(config(**sizes, **{"tie_word_embeddings": False} | changes))
    shake(built)
    return built.eval()


@torch.no_grad()
def their_logits(kind, model):
    found = model.double().eval()(IDS)
    return found.logits if kind == "gpt2" else found.prediction_logits


@torch.no_grad()
def our_logits(kind, model, device="cpu"):
    "This rank's columns."
    found = model.double().eval()(IDS.to(device))
    return (found if kind == "gpt2" else found[0]).cpu()


@pytest.fixture
def folder(tmp_path, request):
    kind = request.node.callspec.params["kind"]
    theirs(kind).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def changed(folder, change=None, **fields):
    "Other tensors and other fields in a folder."
    if change is not None:
        content = load_file(folder / FILE)
        save_file(change(content), folder / FILE, metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def read(kind, tp, folder, device):
    model = load_huggingface(folder, groups(tp, 1, device).tp_group).to(device)
    return model.config.tie_embeddings, our_logits(kind, model, device)


@widths
@kinds
def test_their_logits_on_any_number_of_ranks(ranks, device, folder, kind, tp):
    found = ranks(tp)(read, kind, tp, folder, device)
    assert not any(tied for tied, _ in found)
    whole = torch.cat([local for _, local in found], dim=-1)[..., :101]
    want = their_logits(kind, theirs(kind))
    torch.testing.assert_close(whole, want, rtol=0, atol=1e-9)
    assert (want - their_logits(kind, theirs(kind, tie_word_embeddings=True))).abs().max() > 0.1


def write(kind, tp, folder, device):
    config = replace(CONFIGS[kind], dropout=0.1)
    model = build_model(config, groups(tp, 1, device).tp_group, seed=3).to(device)
    save_huggingface(model, folder)
    return our_logits(kind, model, device)


@widths
@kinds
def test_they_read_what_any_number_of_ranks_wrote(ranks, device, tmp_path, kind, tp):
    found = ranks(tp)(write, kind, tp, tmp_path / "new", device)
    kept = dict(output_loading_info=True, dtype=torch.float32)
    model, report = THEIRS[kind][1].from_pretrained(tmp_path / "new", **kept)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.tie_word_embeddings is False
    ours = torch.cat(found, dim=-1)[..., :101]
    torch.testing.assert_close(their_logits(kind, model), ours, rtol=0, atol=1e-9)


@kinds
def test_the_tensors_have_the_names_that_they_give_them(folder, tmp_path, kind):
    save_huggingface(build_model(CONFIGS[kind]), tmp_path / "ours")
    assert load_file(tmp_path / "ours" / FILE).keys() == load_file(folder / FILE).keys()


@kinds
def test_there_and_back_keeps_every_bit(tmp_path, kind):
    model = build_model(CONFIGS[kind], seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter[:2] += 1 / 7
    save_huggingface(model, tmp_path / "there")
    back = load_huggingface(tmp_path / "there", vocab_multiple=64).state_dict()
    assert back.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor), name


@kinds
def test_an_untied_folder_without_an_output_layer_is_refused_by_name(folder, kind):
    changed(folder, lambda tensors: {n: t for n, t in tensors.items() if n != OUTPUT[kind]})
    with pytest.raises(ValueError, match=f"lacks 1 of .* tensors, {OUTPUT[kind]} first"):
        load_huggingface(folder)


@kinds
def test_a_folder_that_says_tied_and_holds_two_tables_is_refused(folder, kind):
    changed(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="use a model in which they are tied") as caught:
        load_huggingface(folder)
    assert OUTPUT[kind] in str(caught.value) and TABLE[kind] in str(caught.value)


@berts
def test_the_bias_is_the_one_that_transformers_adds(folder, kind):
    "Untied, it has two of them and lets one lie; older versions saved that one alone."
    biases = ["cls.predictions.decoder.bias", "cls.predictions.bias"]
    content = load_file(folder / FILE)
    assert not torch.equal(*(content[name] for name in biases))
    for name in biases:
        assert torch.equal(load_huggingface(folder).mlm.bias[:101], content[name])
        changed(folder, lambda tensors, name=name: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(ValueError, match="tensors, cls.predictions.bias first"):
        load_huggingface(folder)


@berts
def test_the_output_layer_is_of_a_head_that_a_folder_may_lack(folder, kind):
    changed(folder, lambda tensors: {n: t for n, t in tensors.items() if "cls.pred" not in n})
    with pytest.warns(UserWarning, match="has no masked-token head, which start"):
        model = load_huggingface(folder)
    fresh = build_model(replace(model.config, init_std=0.02), seed=1)
    assert torch.equal(model.output.weight, fresh.output.weight)


@kinds
def test_a_run_begins_with_the_output_layer_of_a_folder(folder, kind):
    source = find_source(folder)
    model = build_model(replace(source.model, vocab_multiple=64), seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_initial(source, model) == []
    assert torch.equal(model.output.weight[:101], load_file(folder / FILE)[OUTPUT[kind]])
    check_sizes(model.config, source)
    words = "tie_embeddings is False, and True here; go on with --no-tie-embeddings"
    with pytest.raises(ValueError, match=words):
        check_sizes(replace(source.model, tie_embeddings=True), source)
