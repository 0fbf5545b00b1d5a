"BERT to transformers and back, in both orders: logits, losses, bits, missing heads, messages."

import json
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from bert_cases import KINDS, config
from gpt2_cases import shake
from safetensors.torch import load_file, save_file
from vocab_cases import message

from megatron_edu.interop import load_huggingface, save_huggingface
from megatron_edu.interop.huggingface_bert import head_of, names, read_config
from megatron_edu.mesh import ParallelDims
from megatron_edu.models.bert import Bert
from megatron_edu.tensor_parallel.shard import gather_state_dict, gather_tensors, shard_state_dict

CLASSES = {
    "post": (transformers.BertConfig, transformers.BertForPreTraining),
    "pre": (transformers.MegatronBertConfig, transformers.MegatronBertForPreTraining),
}
MASKED = {"post": transformers.BertForMaskedLM, "pre": transformers.MegatronBertForMaskedLM}
TRUNK = {"post": transformers.BertModel, "pre": transformers.MegatronBertModel}
FILE = "model.safetensors"
ACTIVATIONS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
kinds = pytest.mark.parametrize("layer_norm", KINDS)


def theirs(layer_norm, **changes):
    "A BERT of transformers in which no bias is 0, no LayerNorm 1 and no table's row empty."
    torch.manual_seed(0)
    sizes = dict(
        num_hidden_layers=2, hidden_size=36, num_attention_heads=4, intermediate_size=52,
        vocab_size=101, max_position_embeddings=17, type_vocab_size=3, layer_norm_eps=1e-5,
    )
    their_config, their_model = CLASSES[layer_norm]
    model = their_model(their_config(**(sizes | changes)))
    shake(model)
    return model.eval()


def rows(device="cpu"):
    "Three rows of which two end in padding, token types of three kinds, two labels of order."
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(101, (2, 3, 13), generator=generator)
    ids[0, 3] = 0
    real = torch.arange(13) < torch.tensor([[13], [9], [4]])
    counted = (torch.rand(3, 13, generator=generator) < 0.4) & real
    data = {
        "input_ids": ids,
        "labels": labels.where(counted, -100),
        "token_types": torch.randint(3, (3, 13), generator=generator),
        "attention_mask": real.long(),
        "sentence_order": torch.tensor([0, 1, 1]),
    }
    return {name: tensor.to(device) for name, tensor in data.items()}


def test_the_rows_say_something():
    data = rows()
    assert data["attention_mask"].sum(-1).tolist() == [13, 9, 4]
    assert (data["labels"] != -100).any(-1).all()
    assert data["token_types"].unique().tolist() == [0, 1, 2]
    assert (data["input_ids"] == 0).any()


def ask(model):
    "Logits of tokens and of order, and the sum of the two losses, by a model of transformers."
    data = rows()
    found = model.double()(
        data["input_ids"],
        token_type_ids=data["token_types"],
        attention_mask=data["attention_mask"],
        labels=data["labels"],
        next_sentence_label=data["sentence_order"],
    )
    return found.prediction_logits, found.seq_relationship_logits, found.loss


def answer(model, device="cpu"):
    "The same by a model of ours; the logits of tokens are this rank's columns."
    data = rows(device)
    model = model.double().to(device).eval()
    inputs = {name: data[name] for name in ("input_ids", "token_types", "attention_mask")}
    with torch.no_grad():
        tokens, order = model(**inputs)
        losses = model.losses(**data)
    return tokens.cpu(), order.cpu(), {name: loss.cpu() for name, loss in losses.items()}


def compare(answers, model):
    "What the ranks answered, and a model of transformers."
    tokens, order, total = ask(model)
    whole = torch.cat([answer[0] for answer in answers], dim=-1)[..., :101]
    data = rows()
    mlm = F.cross_entropy(tokens.flatten(0, 1), data["labels"].flatten())
    sop = F.cross_entropy(order, data["sentence_order"])
    torch.testing.assert_close(mlm + sop, total, rtol=0, atol=1e-10)
    torch.testing.assert_close(whole, tokens.detach(), rtol=0, atol=1e-10)
    for _, mine, losses in answers:
        torch.testing.assert_close(mine, order.detach(), rtol=0, atol=1e-10)
        wanted = {"mlm": mlm.detach(), "sop": sop.detach()}
        torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-10)


def group_of(tp, device):
    return ParallelDims(tp=tp).build(device).tp_group


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A folder of each kind, as transformers writes it."
    path = tmp_path_factory.mktemp("theirs")
    for layer_norm in KINDS:
        theirs(layer_norm).save_pretrained(path / layer_norm)
    return {layer_norm: path / layer_norm for layer_norm in KINDS}


def quietly(folder, group=None):
    "Read a folder of which nothing is missing and nothing left out: no warning."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_huggingface(folder, group)


# ------------------------------------------------------------------------------- what it computes


def read(tp, device, folder):
    model = quietly(folder, group_of(tp, device))
    return model.config, *answer(model, device)


@kinds
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_their_answers_on_any_number_of_ranks(ranks, device, tmp_path, tp, layer_norm, activation):
    model = theirs(layer_norm, hidden_act=activation)
    model.save_pretrained(tmp_path)
    found = ranks(tp)(read, tp, device, tmp_path)
    for own, tokens, *_ in found:
        assert (own.gelu, own.layer_norm) == (ACTIVATIONS[activation], layer_norm)
        assert (own.vocab_size, tokens.shape[-1]) == (101, 1024 // tp)
    compare([each[1:] for each in found], model)


def shaken(tp, device, own):
    "A model of ours in which no bias is 0 and no LayerNorm 1."
    model = Bert(own, group_of(tp, device)).to(device)
    full = gather_state_dict(model)
    for name, tensor in full.items():   # shaken alike on all ranks, each takes its slice below
        generator = torch.Generator().manual_seed(len(name))
        tensor += 0.2 * torch.randn(tensor.shape, generator=generator).to(device)
    model.load_state_dict(shard_state_dict(full, model))
    return model


def write(tp, device, own, folder):
    model = shaken(tp, device, own)
    save_huggingface(model, folder)
    full = {name: tensor.cpu() for name, tensor in gather_state_dict(model).items()}
    return full, answer(model, device)


@kinds
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_they_read_what_any_number_of_ranks_wrote(ranks, device, tmp_path, tp, layer_norm, gelu):
    folder = tmp_path / "new"
    own = config(layer_norm=layer_norm, gelu=gelu, ffn_hidden_size=52)
    found = ranks(tp)(write, tp, device, own, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    kind = CLASSES[layer_norm][1]
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert transformers.AutoModelForPreTraining.from_pretrained(folder).__class__ is kind
    compare([answers for _, answers in found], model.eval())


def write_trunk(tp, device, own, folder):
    "Hidden states and the pooled first token of what is written, as our model gives them."
    model = shaken(tp, device, own)
    save_huggingface(model, folder)
    model, data = model.double().eval(), rows(device)
    with torch.no_grad():
        x = model.hidden_states(data["input_ids"], data["token_types"], data["attention_mask"])
        return x.cpu(), torch.tanh(model.pooler(x[:, 0])).cpu()


HEADS = {       # what a folder holds besides the trunk
    "cls.predictions.bias", "cls.predictions.transform.dense.weight",
    "cls.predictions.transform.dense.bias", "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.bias", "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
}


@kinds
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_their_trunk_reads_what_we_wrote(ranks, device, tmp_path, tp, layer_norm):
    "Without heads, as one takes a BERT to fine-tune it: `BertModel`, `MegatronBertModel`."
    own = config(layer_norm=layer_norm, ffn_hidden_size=52)
    found = ranks(tp)(write_trunk, tp, device, own, tmp_path / "new")
    model, report = TRUNK[layer_norm].from_pretrained(tmp_path / "new", output_loading_info=True)
    assert set(report["unexpected_keys"]) == HEADS
    assert not report["missing_keys"] and not report["mismatched_keys"]
    data = rows()
    there = model.double().eval()(
        data["input_ids"],
        token_type_ids=data["token_types"],
        attention_mask=data["attention_mask"],
    )
    for x, pooled in found:
        torch.testing.assert_close(x, there.last_hidden_state, rtol=0, atol=1e-10)
        torch.testing.assert_close(pooled, there.pooler_output, rtol=0, atol=1e-10)


def gradients(tp, device, folder):
    "Of all parameters, in full, under our names."
    model = quietly(folder, group_of(tp, device)).double().to(device).eval()
    model.loss(**rows(device)).backward()
    full = gather_tensors({name: p.grad for name, p in model.named_parameters()}, model)
    return {name: tensor.cpu() for name, tensor in full.items()}


@kinds
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_what_they_wrote_learns_here_as_there(ranks, device, tmp_path, tp, layer_norm):
    model = theirs(layer_norm, pad_token_id=None)
    model.save_pretrained(tmp_path)
    ask(model)[2].backward()
    wanted = {name.removeprefix("bert."): p.grad for name, p in model.named_parameters()}
    for found in ranks(tp)(gradients, tp, device, tmp_path):
        for own, parts in names(config(layer_norm=layer_norm)).items():
            want = torch.cat([wanted[part] for part in parts])
            torch.testing.assert_close(found[own][: len(want)], want, rtol=0, atol=1e-10)
            assert want.any() and not found[own][len(want) :].any(), own


@kinds
def test_what_we_wrote_learns_there_as_here(tmp_path, layer_norm):
    "Also the row of token 0, which transformers would hold still if it were called padding."
    model = Bert(config(layer_norm=layer_norm))
    save_huggingface(model, tmp_path / "new")
    there = CLASSES[layer_norm][1].from_pretrained(tmp_path / "new").eval()
    ask(there)[2].backward()
    model.double().eval().loss(**rows()).backward()
    found = there.bert.embeddings.word_embeddings.weight.grad
    torch.testing.assert_close(found, model.wte.weight.grad[:101], rtol=0, atol=1e-10)


@kinds
def test_a_model_that_was_read_trains_with_the_dropout_of_its_configuration(tmp_path, layer_norm):
    changes = dict(hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.25)
    theirs(layer_norm, **changes).save_pretrained(tmp_path)
    model = quietly(tmp_path)
    assert model.config.dropout == 0.25 and model.training
    first, second = (model.loss(**rows()) for _ in range(2))
    assert first != second
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    for _ in range(20):
        loss = model.loss(**rows())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert sum(seen[-3:]) < sum(seen[:3])
    for name, tensor in model.state_dict().items():
        assert not torch.equal(tensor, before[name]), name


# ---------------------------------------------------------------------------------- bit for bit


def copy(tp, device, source, target):
    save_huggingface(quietly(source, group_of(tp, device)), target)


@kinds
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_back_and_there_keeps_every_bit(ranks, device, folders, tmp_path, tp, layer_norm):
    ranks(tp)(copy, tp, device, folders[layer_norm], tmp_path / "again")
    first, again = (load_file(path / FILE) for path in (folders[layer_norm], tmp_path / "again"))
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor), name
    model = CLASSES[layer_norm][1].from_pretrained(tmp_path / "again")
    for name, tensor in theirs(layer_norm).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@kinds
@pytest.mark.parametrize("vocab_size", [101, 1024])
def test_there_and_back_keeps_every_bit(tmp_path, layer_norm, vocab_size):
    own = config(layer_norm=layer_norm, vocab_size=vocab_size, vocab_multiple=1024)
    model = Bert(own)
    shake(model)
    save_huggingface(model, tmp_path / "there")
    back = quietly(tmp_path / "there").state_dict()
    assert back.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        kept = vocab_size if name in ("wte.weight", "mlm.bias") else len(tensor)
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name][:kept], tensor[:kept]), name
        assert not back[name][kept:].any(), name


@kinds
def test_the_padding_of_the_vocabulary_stays_here(folders, tmp_path, layer_norm):
    model = quietly(folders[layer_norm])
    assert model.wte.weight.shape == (1024, 36) and not model.wte.weight[101:].any()
    assert model.mlm.bias.shape == (1024,) and not model.mlm.bias[101:].any()
    save_huggingface(model, tmp_path / "new")
    found = load_file(tmp_path / "new" / FILE)
    assert found["bert.embeddings.word_embeddings.weight"].shape == (101, 36)
    assert found["cls.predictions.bias"].shape == (101,)


@kinds
def test_what_is_no_weight_goes_along(tmp_path, layer_norm):
    own = config(
        layer_norm=layer_norm, dropout=0.25, layer_norm_eps=1e-3, init_std=0.03, gelu="tanh"
    )
    save_huggingface(Bert(own), tmp_path / "there")
    found = CLASSES[layer_norm][0].from_pretrained(tmp_path / "there")
    assert (found.hidden_dropout_prob, found.attention_probs_dropout_prob) == (0.25, 0.25)
    assert (found.layer_norm_eps, found.initializer_range) == (1e-3, 0.03)
    assert (found.hidden_act, found.intermediate_size) == ("gelu_new", 144)
    assert (found.type_vocab_size, found.max_position_embeddings) == (3, 17)
    assert found.pad_token_id is None and not found.is_decoder
    back = read_config(tmp_path / "there")
    assert (back.dropout, back.layer_norm_eps, back.init_std) == (0.25, 1e-3, 0.03)
    assert (back.gelu, back.layer_norm, back.num_token_types) == ("tanh", layer_norm, 3)


def test_what_a_configuration_leaves_out_is_as_in_the_original(folders, tmp_path):
    absent = dict.fromkeys(
        ["hidden_act", "layer_norm_eps", "initializer_range", "hidden_dropout_prob",
         "attention_probs_dropout_prob", "is_decoder", "add_cross_attention"]
    )
    back = read_config(changed(folders["post"], tmp_path, **absent))
    assert (back.gelu, back.layer_norm_eps, back.init_std) == ("exact", 1e-12, 0.02)
    assert back.dropout == 0.1


@kinds
def test_every_parameter_has_one_name_there(layer_norm):
    own = config(layer_norm=layer_norm)
    table = names(own)
    assert set(table) == set(dict(Bert(own).named_parameters()))
    listed = [part for parts in table.values() for part in parts]
    stored = {name.removeprefix("bert.") for name, _ in theirs(layer_norm).named_parameters()}
    assert len(set(listed)) == len(listed) and set(listed) == stored
    assert {head_of(name) for name in table} == {None, "pooler", "sop", "mlm"}


# --------------------------------------------------------------- other names for the same weights


def renamed(folder, tmp_path, change):
    "A copy whose tensors are those that `change` makes of the folder's."
    there = shutil.copytree(folder, tmp_path / "copy")
    save_file(change(load_file(folder / FILE)), there / FILE, metadata={"format": "pt"})
    return there


def old_names(tensors):
    "As bert-base-uncased was published: gamma and beta; and with buffers of older releases."
    found = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        found[name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    assert found.keys() != tensors.keys()
    buffers = {"position_ids": torch.arange(17)[None], "token_type_ids": torch.zeros(1, 17).long()}
    return found | {f"bert.embeddings.{name}": buffer for name, buffer in buffers.items()}


def second_names(tensors):
    "Both names of what is tied."
    weight = tensors["bert.embeddings.word_embeddings.weight"].clone()
    decoder = {"weight": weight, "bias": tensors["cls.predictions.bias"].clone()}
    return tensors | {f"cls.predictions.decoder.{name}": t for name, t in decoder.items()}


def only_second_names(tensors):
    found = second_names(tensors)
    del found["bert.embeddings.word_embeddings.weight"], found["cls.predictions.bias"]
    return found


@kinds
@pytest.mark.parametrize("change", [old_names, second_names, only_second_names])
def test_other_names_of_the_same_weights(folders, tmp_path, layer_norm, change):
    model = quietly(renamed(folders[layer_norm], tmp_path, change))
    wanted = quietly(folders[layer_norm]).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("name", ["decoder.weight", "decoder.bias"])
def test_what_should_be_tied_and_is_not_is_refused(folders, tmp_path, name):
    def change(tensors):
        found = second_names(tensors)
        found[f"cls.predictions.{name}"][7] += 1e-6
        return found

    there = renamed(folders["post"], tmp_path, change)
    words = f"cls.predictions.{name} differs from .*use a model in which they are tied"
    with pytest.raises(ValueError, match=words):
        load_huggingface(there)


@kinds
def test_several_files_with_an_index(tmp_path, layer_norm):
    model = theirs(layer_norm)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    compare([answer(quietly(tmp_path))], model)


# ------------------------------------------------------------------------- folders without heads

EVERY = "has no pooler, no sentence-order head, no masked-token head, which start from"
LACKING = {     # what saved the folder -> what is missing, and how the warning says it
    "MaskedLM": ({"pooler", "sop"}, "has no pooler, no sentence-order head, which start from"),
    "Model": ({"sop", "mlm"}, "has no sentence-order head, no masked-token head, which start from"),
    "Model without pooler": ({"pooler", "sop", "mlm"}, EVERY),
}


def save_part(kind, layer_norm, folder):
    "A part of the model of `theirs`, saved by transformers itself."
    whole = theirs(layer_norm)
    if kind == "MaskedLM":
        part = MASKED[layer_norm](whole.config)
        part.cls.predictions.load_state_dict(whole.cls.predictions.state_dict())
    else:
        part = TRUNK[layer_norm](whole.config, add_pooling_layer=kind == "Model")
    trunk = part if kind != "MaskedLM" else part.bert
    found = trunk.load_state_dict(whole.bert.state_dict(), strict=False)
    assert not found.missing_keys
    part.save_pretrained(folder)


def read_part(tp, device, folder):
    "Full weights and the warnings of this rank."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_huggingface(folder, group_of(tp, device))
    full = {name: tensor.cpu() for name, tensor in gather_state_dict(model).items()}
    return full, [str(each.message) for each in caught]


@kinds
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", LACKING)
def test_a_missing_head_starts_anew(ranks, device, folders, tmp_path, tp, layer_norm, kind):
    missing, words = LACKING[kind]
    save_part(kind, layer_norm, tmp_path)
    whole = quietly(folders[layer_norm])
    fresh = Bert(whole.config).state_dict()
    for rank, (full, said) in enumerate(ranks(tp)(read_part, tp, device, tmp_path)):
        assert [words in text for text in said] == [True] * (rank == 0)
        for name, tensor in full.items():
            wanted = fresh if head_of(name) in missing else whole.state_dict()
            assert torch.equal(tensor, wanted[name]), name


NEEDED = [
    "cls.predictions.bias",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.seq_relationship.bias",
    "pooler.dense.weight",
    "encoder.layer.1.attention.self.key.bias",
    "embeddings.token_type_embeddings.weight",
]


@kinds
@pytest.mark.parametrize("lost", NEEDED)
def test_half_a_head_and_a_hole_in_the_trunk_are_refused(folders, tmp_path, layer_norm, lost):
    def change(tensors):
        return {name: t for name, t in tensors.items() if name.removeprefix("bert.") != lost}

    there = renamed(folders[layer_norm], tmp_path, change)
    words = f"lacks 1 of 46 tensors, {lost} first; save the model anew"
    assert words in message(load_huggingface, there)


def test_a_folder_of_heads_alone_is_refused(folders, tmp_path):
    def change(tensors):
        return {name: t for name, t in tensors.items() if name.startswith("cls.")}

    with pytest.raises(ValueError, match="lacks 37 of 44 tensors, embeddings.LayerNorm.bias first"):
        load_huggingface(renamed(folders["post"], tmp_path, change))


@pytest.mark.parametrize("count", [1, 2])
def test_what_has_no_place_is_left_out_with_a_warning(folders, tmp_path, count):
    more = {"classifier.bias": torch.ones(3), "classifier.weight": torch.ones(3, 36)}

    def change(tensors):
        return tensors | dict(list(more.items())[:count])

    there = renamed(folders["post"], tmp_path, change)
    words = "tensors have no place here and are left out, classifier.bias first"
    words = f"{count} of {46 + count} {words}"
    with pytest.warns(UserWarning, match=words) as caught:
        load_huggingface(there)
    assert len(caught) == 1


# --------------------------------------------------------------------------------------- messages


def changed(folder, tmp_path, **fields):
    "A copy whose config.json says something else; None takes the field away."
    there = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((there / "config.json").read_text()) | fields
    kept = {name: value for name, value in content.items() if value is not None}
    (there / "config.json").write_text(json.dumps(kept))
    return there


@kinds
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "roberta"}, "model_type 'roberta'; only 'gpt2', 'bert', 'megatron-bert'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'.*'gelu' or 'gelu_new' or 'gelu_pytorch"),
        ({"position_embedding_type": "relative_key"}, "is 'relative_key'.*where it is 'absolute'"),
        ({"is_decoder": True}, "is_decoder is True.*where it is False"),
        ({"add_cross_attention": True}, "add_cross_attention is True.*where it is False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False.*where it is True"),
        ({"num_attention_heads": None}, "lacks num_attention_heads; save the model anew"),
        ({"type_vocab_size": None, "vocab_size": None}, "lacks vocab_size, type_vocab_size"),
        ({"num_hidden_layers": 3}, "lacks 16 of 62 tensors, encoder.layer.2"),
        ({"num_hidden_layers": 1}, "have layer encoder.layer.1, but .* num_hidden_layers 1; use"),
        (
            {"max_position_embeddings": 32},
            r"position_embeddings.weight has shape \(17, 36\) .* makes it \(32, 36\); use the",
        ),
        (
            {"vocab_size": 103},
            r"has shape \(101, 36\) .* makes it \(103, 36\); use the config.json",
        ),
        (
            {"num_attention_heads": 5},
            "hidden_size 36 does not divide by num_attention_heads 5; use",
        ),
    ],
)
def test_another_kind_of_model_is_refused(folders, tmp_path, layer_norm, fields, words):
    there = changed(folders[layer_norm], tmp_path, **fields)
    assert re.search(words, message(load_huggingface, there))


@pytest.mark.parametrize("layer_norm, other", [("post", "megatron-bert"), ("pre", "bert")])
def test_a_folder_that_says_it_is_of_the_other_kind_is_refused(
    folders, tmp_path, layer_norm, other
):
    there = changed(folders[layer_norm], tmp_path, model_type=other)
    assert "lacks 10 of 46 tensors" in message(load_huggingface, there)


def test_dropouts_that_differ_become_one_with_a_warning(folders, tmp_path):
    there = changed(folders["pre"], tmp_path, attention_probs_dropout_prob=0.3)
    words = "hidden_dropout_prob 0.1, attention_probs_dropout_prob 0.3; .* one .* becomes 0.1"
    with pytest.warns(UserWarning, match=words):
        assert load_huggingface(there).config.dropout == 0.1


def test_pickled_weights_are_not_opened(folders, tmp_path):
    there = changed(folders["post"], tmp_path)
    (there / FILE).unlink()
    torch.save(theirs("post").state_dict(), there / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no readable model.safetensors.*pickled weights"):
        load_huggingface(there)


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not ours; .* name another place"):
        save_huggingface(Bert(config()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_library_does_not_need_transformers(tmp_path, folders):
    "Reading and writing in a process where importing transformers fails."
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from megatron_edu.interop import load_huggingface, save_huggingface\n"
        f"save_huggingface(load_huggingface({str(folders['pre'])!r}), {str(tmp_path / 'new')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "new" / FILE).is_file()
