"The three knobs of sampling, and the same tokens on any number of ranks."

import pytest
import torch
from gpt2_cases import config

import megatron_edu.generate
from megatron_edu import reference
from megatron_edu.comm import Ledger
from megatron_edu.config import PRESETS
from megatron_edu.generate import SamplingConfig, choose, filter_logits, generate
from megatron_edu.mesh import ParallelDims
from megatron_edu.models.bert import Bert
from megatron_edu.models.gpt2 import GPT2

CONFIG = config()       # 101 ids, of 128 rows; at most 17 tokens
PROMPTS = torch.tensor([[5, 9, 2], [77, 100, 0]])
SETTINGS = {
    "plain": SamplingConfig(),
    "greedy": SamplingConfig(temperature=0),
    "cold": SamplingConfig(temperature=0.6, seed=2),
    "top-k": SamplingConfig(top_k=7, seed=3),
    "top-p": SamplingConfig(top_p=0.7, seed=4),
    "all": SamplingConfig(temperature=0.9, top_k=60, top_p=0.8, seed=5),
}


def model(group=None, device="cpu"):
    "Weights large enough that logits differ, and that a token does not just repeat itself."
    built = GPT2(CONFIG, group)
    with torch.no_grad():
        built.wte.weight.mul_(30)
        built.wpe.weight.mul_(150)
    return built.double().to(device)


def write(tp, device, settings, num_tokens=8):
    built = model(ParallelDims(tp=tp).build(device).tp_group, device)
    return {
        name: generate(built, PROMPTS.to(device), num_tokens, setting).cpu()
        for name, setting in settings.items()
    }


@pytest.fixture(scope="module")
def alone():
    return write(1, "cpu", SETTINGS)


# ------------------------------------------------------------------------------------- the knobs

LOGITS = torch.tensor([[1.0, 4.0, 2.0, 3.0, 0.0]], dtype=torch.float64)


def kept(logits, **knobs):
    kept = torch.isfinite(filter_logits(logits, SamplingConfig(**knobs)))[0]
    return kept.nonzero()[:, 0].tolist()


def test_temperature_divides():
    half = filter_logits(LOGITS, SamplingConfig(temperature=0.5))
    assert torch.equal(half - half[:, :1], (LOGITS - LOGITS[:, :1]) * 2)


@pytest.mark.parametrize(
    ("k", "ids"),
    [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (5, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])],
)
def test_top_k_keeps_the_k_likeliest(k, ids):
    assert kept(LOGITS, top_k=k) == ids


def test_top_k_keeps_ties_with_the_kth():
    assert kept(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), top_k=2) == [0, 1, 2]


# the shares of 4, 3, 2, 1, 0 are 0.636, 0.234, 0.086, 0.032, 0.012
@pytest.mark.parametrize(
    ("p", "ids"), [(0.01, [1]), (0.6, [1]), (0.64, [1, 3]), (0.86, [1, 3]), (0.88, [1, 2, 3])]
)
def test_top_p_keeps_the_token_that_crosses_the_line(p, ids):
    assert kept(LOGITS, top_p=p) == ids


def test_top_p_needs_no_second_token_where_the_first_has_exactly_p():
    assert len(kept(torch.zeros(1, 2, dtype=torch.float64), top_p=0.5)) == 1


def test_top_p_looks_at_what_top_k_and_temperature_left():
    "Of two tokens the first has 0.73; at temperature 4 it has 0.56, so the second is needed."
    assert kept(LOGITS, top_k=2, top_p=0.7) == [1]
    assert kept(LOGITS, top_k=2, top_p=0.7, temperature=4.0) == [1, 3]


def test_rows_are_filtered_by_themselves():
    both = torch.cat([LOGITS, LOGITS.flip(1)])
    found = torch.isfinite(filter_logits(both, SamplingConfig(top_k=3, top_p=0.8)))
    assert found.tolist() == [[False, True, False, True, False]] * 2


def test_draws_have_the_probabilities_that_are_left():
    setting = SamplingConfig(top_k=3)
    draws = choose(LOGITS.expand(20_000, 5), setting, torch.Generator().manual_seed(0))
    wanted = filter_logits(LOGITS, setting).softmax(-1)[0]
    share = draws.bincount(minlength=5) / 20_000
    torch.testing.assert_close(share.double(), wanted, rtol=0, atol=0.015)
    assert share[0] == share[4] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_draw_does_not_depend_on_the_type_of_the_logits(dtype):
    logits = torch.randn(500, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    draws = (
        choose(x, SamplingConfig(), torch.Generator().manual_seed(1))
        for x in (logits, logits.double())
    )
    assert torch.equal(*draws)


def test_greedy_takes_the_likeliest_and_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert choose(LOGITS, SamplingConfig(temperature=0), generator).tolist() == [1]
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("knob", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")),
     ("top_k", 0), ("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan"))],
)
def test_a_knob_that_makes_no_sense_is_named(knob, value):
    with pytest.raises(ValueError, match=f"{knob}={value}"):
        SamplingConfig(**{knob: value})


# ------------------------------------------------------------------------------------- any split


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_rank_of_any_split_writes_the_same_tokens(ranks, device, alone, tp):
    for found in ranks(tp)(write, tp, device, SETTINGS):
        for name, ids in found.items():
            assert torch.equal(ids, alone[name]), name


def test_the_settings_differ_and_no_padding_id_is_chosen(alone):
    assert len({tuple(ids.flatten().tolist()) for ids in alone.values()}) == len(alone)
    assert all(ids.max() < CONFIG.vocab_size and ids.min() >= 0 for ids in alone.values())
    assert all(torch.equal(ids[:, :3], PROMPTS) for ids in alone.values())


def test_a_padding_id_is_not_chosen_though_its_logit_is_the_largest():
    built = model()
    with torch.no_grad():
        built.wte.weight[CONFIG.vocab_size :] = 1e3 * built.ln_f.weight
        built.ln_f.bias.fill_(1.0)      # so that every state points to these rows
    assert (built(PROMPTS)[:, -1].argmax(-1) >= CONFIG.vocab_size).all()
    for setting in (SamplingConfig(temperature=0), SamplingConfig()):
        assert generate(built, PROMPTS, 4, setting).max() < CONFIG.vocab_size


def test_greedy_follows_the_models_own_logits(alone):
    ids, built = alone["greedy"], model().eval()
    for s in range(3, ids.shape[1]):
        logits = built(ids[:, :s])[:, -1, : CONFIG.vocab_size]
        assert torch.equal(logits.argmax(-1), ids[:, s])


def count(tp, device):
    built = model(ParallelDims(tp=tp).build(device).tp_group, device)
    with Ledger() as ledger:
        generate(built, PROMPTS.to(device), 5)
    gathered = ledger.count("all_gather"), ledger.elements("all_gather")
    return gathered, ledger.count("broadcast"), ledger.elements("broadcast"), len(ledger.records)


def write_with_a_rank_that_would_choose_otherwise(tp, device, prompts, num_tokens, stop_id=None):
    group = ParallelDims(tp=tp).build(device).tp_group
    own = megatron_edu.generate.choose
    megatron_edu.generate.choose = lambda *args: (own(*args) + group.rank()) % CONFIG.vocab_size
    try:
        built, greedy = model(group, device), SETTINGS["greedy"]
        return generate(built, prompts.to(device), num_tokens, greedy, stop_id).cpu()
    finally:
        megatron_edu.generate.choose = own


@pytest.mark.parametrize("tp", [2])
def test_the_first_ranks_choice_is_everyones(ranks, device, alone, tp):
    for ids in ranks(tp)(write_with_a_rank_that_would_choose_otherwise, tp, device, PROMPTS, 4):
        assert torch.equal(ids, alone["greedy"][:, :7])


@pytest.mark.parametrize("tp", [2, 4])
def test_a_token_costs_one_gather_of_the_last_position(ranks, device, tp):
    for gathered, broadcasts, ids, _ in ranks(tp)(count, tp, device):
        assert gathered == (5, 5 * 2 * 128)     # 5 tokens of 2 prompts, 128 logits each
        assert (broadcasts, ids) == (5, 5 * 2)


def test_one_device_makes_no_collective_call():
    assert count(1, "cpu")[-1] == 0


# ------------------------------------------------------------------------------- length and stop


def test_a_context_that_is_too_long_goes_on_with_its_last_tokens():
    built, setting = model(), SamplingConfig(temperature=0)
    long = torch.arange(40)[None]
    ids = generate(built, long, 3, setting)
    assert ids.shape == (1, 43) and torch.equal(ids[:, :40], long)
    assert torch.equal(ids[:, 40:], generate(built, long[:, -17:], 3, setting)[:, 17:])
    for s in range(40, 43):
        last = built(ids[:, s - 17 : s])[:, -1, : CONFIG.vocab_size]
        assert torch.equal(last.argmax(-1), ids[:, s])


def test_writing_ends_when_every_row_has_the_stop_id(alone):
    ids = alone["plain"]
    single = next(i for i in ids[0, 3:].tolist() if i not in ids[1, 3:].tolist())
    assert torch.equal(generate(model(), PROMPTS, 8, SETTINGS["plain"], single), ids)
    short = generate(model(), PROMPTS[:1], 8, SETTINGS["greedy"])
    stop = int(short[0, 5])
    end = 3 + short[0, 3:].tolist().index(stop) + 1
    assert torch.equal(generate(model(), PROMPTS[:1], 8, SETTINGS["greedy"], stop), short[:, :end])


@pytest.mark.parametrize("tp", [2, 4])
def test_all_ranks_stop_at_the_first_ranks_choice(ranks, device, tp):
    alone = generate(model(), PROMPTS[:1], 8, SETTINGS["greedy"])
    stop = int(alone[0, 6])
    end = 3 + alone[0, 3:].tolist().index(stop) + 1
    options = device, PROMPTS[:1], 8, stop
    for ids in ranks(tp)(write_with_a_rank_that_would_choose_otherwise, tp, *options):
        assert end > 4 and torch.equal(ids, alone[:, :end])


def test_a_stop_id_in_the_prompt_does_not_count():
    built, greedy = model(), SETTINGS["greedy"]
    ids = generate(built, PROMPTS[:1], 4, greedy)
    absent = next(int(i) for i in PROMPTS[0] if int(i) not in ids[0, 3:].tolist())
    assert torch.equal(generate(built, PROMPTS[:1], 4, greedy, absent), ids)


def test_the_model_is_left_in_the_mode_it_had_and_draws_no_dropout():
    built = GPT2(config(dropout=0.5))
    built.train()
    state = torch.get_rng_state()
    first, second = (generate(built, PROMPTS, 8, SETTINGS["greedy"]) for _ in range(2))
    assert built.training and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    built.eval()
    assert torch.equal(generate(built, PROMPTS, 8, SETTINGS["greedy"]), first)
    assert not built.training


def test_nothing_is_kept_for_a_backward_pass(monkeypatch):
    built, seen = model(), []
    states = built.hidden_states
    monkeypatch.setattr(built, "hidden_states", lambda ids: seen.append(states(ids)) or seen[-1])
    generate(built, PROMPTS, 2)
    assert len(seen) == 2 and not any(x.requires_grad for x in seen)


def test_a_prompt_without_a_token_is_refused():
    with pytest.raises(ValueError, match="no token; start from"):
        generate(model(), torch.zeros(1, 0, dtype=torch.long), 1)


def test_a_bert_has_no_next_token():
    with pytest.raises(ValueError, match="no next token; generate with a GPT-2, or .*fill_mask"):
        generate(Bert(PRESETS["bert-tiny"]), PROMPTS, 1)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("wrong", [-1, 101, 127])
def test_an_id_outside_the_vocabulary_is_refused_on_every_rank(ranks, device, tp, wrong):
    assert ranks(tp)(refused, tp, device, wrong) == [True] * tp


def refused(tp, device, wrong):
    built = model(ParallelDims(tp=tp).build(device).tp_group, device)
    with pytest.raises(ValueError, match=rf"{wrong}\b"):
        generate(built, torch.tensor([[3, wrong]], device=device), 1)
    return True


# ------------------------------------------------------------------------------ what it looks at


@pytest.mark.parametrize("temperature", [1e-310, 5e-324, 1e-200, 1e-30, 1e-8])
@pytest.mark.parametrize("knobs", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_a_tiny_temperature_is_greedy(alone, temperature, knobs):
    tiny = SamplingConfig(temperature=temperature, **knobs)
    assert torch.equal(generate(model(), PROMPTS, 8, tiny), alone["greedy"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-310, 1e-45, 1e-3, 1e300])
def test_no_temperature_makes_a_logit_nan(dtype, temperature):
    logits = torch.tensor([[1e4, 1e4, -1e4, 0.0]], dtype=dtype)
    found = filter_logits(logits, SamplingConfig(temperature=temperature))
    assert not found.isnan().any() and found[0, :2].tolist() == [0.0, 0.0]


def modes(built):
    return {name: part.training for name, part in built.named_modules()}


@pytest.mark.parametrize("fault", ["nan", "callback", "interrupt", "none"])
def test_every_part_has_its_mode_again_whatever_happens(fault):
    built = GPT2(config(dropout=0.5)).train()
    built.blocks[1].eval()
    built.blocks[1].mlp.up.train()
    before, failing = modes(built), None
    if fault == "nan":
        with torch.no_grad():
            built.ln_f.bias[0] = torch.nan
        failing = FloatingPointError

    def stop(ids):
        assert not any(modes(built).values())
        if fault == "callback":
            raise RuntimeError("no more")
        if fault == "interrupt":
            raise KeyboardInterrupt

    failing = {"callback": RuntimeError, "interrupt": KeyboardInterrupt}.get(fault, failing)
    if failing is None:
        generate(built, PROMPTS, 2, on_token=stop)
    else:
        with pytest.raises(failing):
            generate(built, PROMPTS, 2, on_token=stop)
    assert modes(built) == before and len(set(before.values())) == 2


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("setting", ["greedy", "plain", "all"])
def test_logits_that_are_not_finite_are_refused_on_every_rank(ranks, device, tp, value, setting):
    found = ranks(tp)(write_with, tp, device, value, setting)
    assert len(set(found)) == 1 and "the logits of new token 1 are not finite" in found[0]


def write_with(tp, device, value, setting):
    built = model(ParallelDims(tp=tp).build(device).tp_group, device)
    with torch.no_grad():
        built.ln_f.bias[3] = value
    with pytest.raises(FloatingPointError) as caught:
        generate(built, PROMPTS.to(device), 3, SETTINGS[setting])
    return str(caught.value)


def test_a_step_that_goes_wrong_later_is_named():
    built = model()
    with torch.no_grad():
        built.wpe.weight[5] = torch.nan
    with pytest.raises(FloatingPointError, match="new token 4 are not finite"):
        generate(built, PROMPTS, 8, SETTINGS["greedy"])


def test_a_padding_row_that_is_not_finite_does_not_count(alone):
    built = model()
    with torch.no_grad():
        built.wte.weight[CONFIG.vocab_size :] = torch.nan
    assert torch.equal(generate(built, PROMPTS, 8, SETTINGS["greedy"]), alone["greedy"])


@pytest.mark.parametrize("tp", [1, 2])
def test_banned_ids_are_never_chosen(ranks, device, alone, tp):
    for name, ids in ranks(tp)(write_banned, tp, device, alone):
        assert not set(ids[:, 3:].flatten().tolist()) & set(alone[name][:, 3:].flatten().tolist())


def write_banned(tp, device, alone):
    "Of one setting, everything banned that it would have chosen."
    built, name = model(ParallelDims(tp=tp).build(device).tp_group, device), "greedy"
    banned = alone[name][:, 3:].unique()
    ids = generate(built, PROMPTS.to(device), 8, SETTINGS[name], banned=banned.to(device))
    return name, ids.cpu()


def test_top_k_counts_what_is_not_banned():
    built, banned = model(), torch.arange(3, CONFIG.vocab_size)
    ids = generate(built, PROMPTS, 20, SamplingConfig(top_k=50), banned=banned)
    assert set(ids[:, 3:].flatten().tolist()) == {0, 1, 2}


@pytest.mark.parametrize("tp", [1, 2])
def test_each_step_is_told_on_every_rank(ranks, device, alone, tp):
    for told in ranks(tp)(tell, tp, device):
        assert torch.equal(torch.stack(told, 1), alone["plain"][:, 3:])


def tell(tp, device):
    told = []
    built = model(ParallelDims(tp=tp).build(device).tp_group, device)
    add = lambda ids: told.append(ids.cpu().clone())    # noqa: E731
    generate(built, PROMPTS.to(device), 8, SETTINGS["plain"], on_token=add)
    return told


WRONG = [
    (dict(model="x"), TypeError, "a str writes no text; pass a GPT2"),
    (dict(model=torch.nn.Linear(2, 2)), TypeError, "a Linear writes no text"),
    (dict(model=reference.GPT2(CONFIG)), TypeError, "pass a GPT2 of megatron_edu.models"),
    (dict(input_ids=[[1, 2]]), TypeError, "input_ids=.*must be a Tensor"),
    (dict(input_ids=PROMPTS.float()), TypeError, "input_ids are torch.float32"),
    (dict(input_ids=PROMPTS.bool()), TypeError, "input_ids are torch.bool"),
    (dict(input_ids=PROMPTS[0]), ValueError, r"input_ids has shape \(3,\): must be \(b, s\)"),
    (dict(input_ids=PROMPTS[:0]), ValueError, "the prompt has no token"),
    (dict(input_ids=PROMPTS - 100), ValueError, "token id -95 is out of range"),
    (dict(input_ids=PROMPTS + 50), ValueError, "token id 127 is out of range"),
    (dict(num_tokens=-1), ValueError, "num_tokens=-1: must be a whole number, at least 0"),
    (dict(num_tokens=2.0), TypeError, "num_tokens=2.0: must be a whole number"),
    (dict(num_tokens=True), TypeError, "num_tokens=True"),
    (dict(config={"top_k": 3}), TypeError, "config=.*must be a SamplingConfig"),
    (dict(stop_id="end"), TypeError, "stop_id='end': must be a whole number or None"),
    (dict(banned=[3]), TypeError, "banned=.*must be a Tensor or None"),
    (dict(banned=torch.tensor([101])), ValueError, "banned id 101 is out of range"),
    (dict(banned=torch.arange(101)), ValueError, "all 101 ids are banned"),
]


@pytest.mark.parametrize("wrong, error, words", WRONG, ids=lambda x: str(x)[:40])
def test_what_it_cannot_do_is_refused_in_our_words(wrong, error, words):
    with pytest.raises(error, match=words):
        generate(**({"model": model(), "input_ids": PROMPTS, "num_tokens": 1} | wrong))


def test_a_bad_id_far_back_is_refused_though_it_is_not_looked_at():
    long = torch.cat([torch.tensor([[999]]), torch.arange(40)[None]], 1)
    with pytest.raises(ValueError, match="token id 999"):
        generate(model(), long, 1)


def test_no_tokens_are_the_prompt():
    assert torch.equal(generate(model(), PROMPTS, 0), PROMPTS)


@pytest.mark.parametrize("knob, value", [
    ("temperature", "1"), ("temperature", True), ("temperature", None), ("top_k", 2.0),
    ("top_k", "3"), ("top_k", False), ("top_p", "0.5"), ("top_p", None), ("seed", 1.0),
    ("seed", "1"), ("seed", True),
])
def test_a_knob_of_another_kind_is_a_type_error(knob, value):
    with pytest.raises(TypeError, match=f"^{knob}={value!r}: must be"):
        SamplingConfig(**{knob: value})


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63, 2**64, 10**30])
def test_a_seed_outside_the_range_is_refused(seed):
    with pytest.raises(ValueError, match=f"^seed={seed}: "):
        SamplingConfig(seed=seed)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_seeds_at_the_ends_of_the_range_draw(seed):
    assert generate(model(), PROMPTS, 2, SamplingConfig(seed=seed)).shape == (2, 5)
