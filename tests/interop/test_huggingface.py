"To transformers and back: the same logits, the same bits, and messages for what cannot be read."

import json
import shutil

import pytest
import torch
import transformers
from gpt2_cases import config

from megatron_edu import reference
from megatron_edu.interop import load_huggingface, save_huggingface
from megatron_edu.interop.huggingface_gpt2 import names, read_config
from megatron_edu.mesh import ParallelDims
from megatron_edu.models.gpt2 import GPT2
from megatron_edu.tensor_parallel.shard import gather_state_dict

ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
IDS = torch.arange(26).view(2, 13) * 7 % 101


def theirs(activation="gelu_new", **changes):
    "A GPT-2 of transformers whose biases and LayerNorms are random, too."
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_embd=36, n_head=4, vocab_size=101, n_positions=17)
    built = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, activation_function=activation, **changes)
    )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built.eval()


@torch.no_grad()
def logits(model):
    return model.double()(IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("theirs") / "gpt2"
    theirs().save_pretrained(path)
    return path


@torch.no_grad()
def read(tp, device, folder):
    "Full logits and vocabulary of a folder, read by every rank."
    group = ParallelDims(tp=tp).build(device).tp_group
    model = load_huggingface(folder, group).double().to(device).eval()
    parts = model(IDS.to(device)).cpu()
    return model.config, parts, group is None


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_their_logits_on_any_number_of_ranks(ranks, device, tmp_path, tp, activation):
    model = theirs(activation)
    model.save_pretrained(tmp_path)
    found = ranks(tp)(read, tp, device, tmp_path)
    assert all(each[0].gelu == ACTIVATIONS[activation] for each in found)
    whole = torch.cat([each[1] for each in found], dim=-1)
    assert whole.shape[-1] == 1024 and found[0][0].vocab_size == 101
    torch.testing.assert_close(whole[..., :101], logits(model), rtol=0, atol=1e-10)


def test_the_two_gelus_differ(folder, tmp_path):
    theirs("gelu").save_pretrained(tmp_path)
    tanh, exact = (read(1, "cpu", path)[1] for path in (folder, tmp_path))
    assert (tanh - exact).abs().max() > 1e-6


def write(tp, device, gelu, folder):
    group = ParallelDims(tp=tp).build(device).tp_group
    model = GPT2(config(gelu=gelu), group).to(device)
    generator = torch.Generator().manual_seed(3)
    full = gather_state_dict(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.shape == full[name].shape:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise.to(device))
    save_huggingface(model, folder)
    full = {name: tensor.cpu() for name, tensor in gather_state_dict(model).items()}
    with torch.no_grad():
        return full, model.double().eval()(IDS.to(device)).cpu()


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_they_read_what_any_number_of_ranks_wrote(ranks, device, tmp_path, tp, gelu):
    folder = tmp_path / "new"
    found = ranks(tp)(write, tp, device, gelu, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    model, report = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.vocab_size == 101 and model.config.n_positions == 17
    ours = torch.cat([local for _, local in found], dim=-1)[..., :101]
    torch.testing.assert_close(logits(model.eval()), ours, rtol=0, atol=1e-10)


def test_there_and_back_keeps_every_bit(tmp_path):
    model = GPT2(config(vocab_size=128, ffn_hidden_size=100, dropout=0.25))
    save_huggingface(model, tmp_path / "there")
    back = load_huggingface(tmp_path / "there")
    assert back.config.ffn_size == 100 and back.config.dropout == 0.25
    for name, tensor in model.state_dict().items():
        rows = 128 if name == "wte.weight" else len(tensor)
        assert torch.equal(back.state_dict()[name][:rows], tensor[:rows]), name


def test_what_is_no_weight_goes_along(tmp_path):
    own = config(dropout=0.25, layer_norm_eps=1e-2, init_std=0.03, gelu="exact")
    save_huggingface(GPT2(own), tmp_path / "there")
    found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "there").config
    assert (found.resid_pdrop, found.embd_pdrop, found.attn_pdrop) == (0.25,) * 3
    assert (found.layer_norm_epsilon, found.initializer_range) == (1e-2, 0.03)
    assert found.activation_function == "gelu" and found.n_inner == 144
    assert found.bos_token_id is None and found.eos_token_id is None
    back = read_config(tmp_path / "there")
    assert (back.dropout, back.layer_norm_eps, back.gelu) == (0.25, 1e-2, "exact")


def test_a_configuration_without_an_activation_has_gpt2s(folder, tmp_path):
    assert read_config(changed(folder, tmp_path, activation_function=None)).gelu == "tanh"


def test_back_and_there_keeps_every_bit(folder, tmp_path):
    save_huggingface(load_huggingface(folder), tmp_path / "again")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again").state_dict()
    for name, tensor in theirs().state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_the_rows_that_pad_the_vocabulary_are_zero_and_stay_here(folder, tmp_path):
    model = load_huggingface(folder)
    assert model.wte.weight.shape == (1024, 36) and not model.wte.weight[101:].any()
    save_huggingface(model, tmp_path / "new")
    found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "new")
    assert found.transformer.wte.weight.shape == (101, 36)


def test_several_files_with_an_index(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    _, found, _ = read(1, "cpu", tmp_path)
    torch.testing.assert_close(found[..., :101], logits(model), rtol=0, atol=1e-10)


def test_weights_without_the_prefix_of_the_language_model(tmp_path):
    model = theirs()
    model.transformer.save_pretrained(tmp_path)
    _, found, _ = read(1, "cpu", tmp_path)
    torch.testing.assert_close(found[..., :101], logits(model), rtol=0, atol=1e-10)


def test_every_parameter_has_one_name_there():
    table = names(config())
    assert set(table) == set(dict(GPT2(config()).named_parameters()))
    assert len({their for their, _ in table.values()}) == len(table)


# --------------------------------------------------------------------------------------- messages


def changed(folder, tmp_path, **fields):
    "A copy whose config.json says something else; None takes the field away."
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((copy / "config.json").read_text()) | fields
    kept = {name: value for name, value in content.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(kept))
    return copy


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "llama"}, "model_type 'llama'; only 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function is 'relu', .* it is 'gelu_new' or"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"n_head": None}, "lacks n_head"),
        ({"n_layer": 3}, "lacks 12 of 40 tensors, h.2.attn.c_attn.bias first"),
        ({"n_layer": 1}, "the weights have layer h.1, but config.json says n_layer 1; use the"),
    ],
)
def test_another_kind_of_model_is_refused(folder, tmp_path, fields, words):
    with pytest.raises(ValueError, match=words):
        load_huggingface(changed(folder, tmp_path, **fields))


def test_sizes_that_do_not_fit_the_weights_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="wpe.weight"):
        load_huggingface(changed(folder, tmp_path, n_positions=32))


def test_a_vocabulary_that_does_not_fit_the_weights_is_refused(folder, tmp_path):
    words = r"wte.weight has shape \(101, 36\) .* makes it \(103, 36\); use the config.json that"
    with pytest.raises(ValueError, match=words):
        load_huggingface(changed(folder, tmp_path, vocab_size=103))


def test_pickled_weights_are_not_opened(folder, tmp_path):
    copy = changed(folder, tmp_path)
    (copy / "model.safetensors").unlink()
    torch.save(theirs().state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no readable model.safetensors.*pickled weights"):
        load_huggingface(copy)


def test_a_file_cut_short_is_refused(folder, tmp_path):
    copy = changed(folder, tmp_path)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no readable model.safetensors"):
        load_huggingface(copy)


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_a_folder_without_a_configuration_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json cannot be read"):
        load_huggingface(tmp_path)


def test_an_index_leads_to_no_file_outside_its_folder(folder, tmp_path):
    copy = changed(folder, tmp_path)
    (copy / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../outside.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no readable model.safetensors"):
        load_huggingface(copy)


def test_dropouts_that_differ_become_one_with_a_warning(folder, tmp_path):
    copy = changed(folder, tmp_path, attn_pdrop=0.3, resid_pdrop=0.2)
    words = "resid_pdrop 0.2, embd_pdrop 0.1, attn_pdrop 0.3; .* becomes 0.2"
    with pytest.warns(UserWarning, match=words):
        assert load_huggingface(copy).config.dropout == 0.2


@pytest.mark.parametrize("kind", [reference.GPT2, torch.nn.Identity])
def test_what_is_no_model_of_ours_is_not_written(tmp_path, kind):
    with pytest.raises(TypeError, match=f"{kind.__name__} cannot be written; pass a GPT2 or"):
        save_huggingface(kind(config()), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not ours; .* name another place"):
        save_huggingface(GPT2(config()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
