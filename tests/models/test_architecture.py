"A record says what the library must know of a kind of model; a third kind needs nothing else."

import ast
import importlib
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from gpt2_cases import batch, config, groups
from plain import full_tensors
from torch import nn

import megatron_edu
from megatron_edu import reference
from megatron_edu.config import PRESETS, GPT2Config
from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.token_writer import TokenFileWriter
from megatron_edu.mesh import ParallelDims
from megatron_edu.models import GPT2
from megatron_edu.models.architecture import (
    ARCHITECTURES,
    architecture_of,
    build_model,
    register,
    resolve,
)
from megatron_edu.resume import MODEL, load_config
from megatron_edu.settings import OptimizerConfig, RunConfig, TrainConfig, quick_recipe, recipe
from megatron_edu.tensor_parallel.shard import gather_state_dict, shard_state_dict
from megatron_edu.testing import check_equivalence
from megatron_edu.training.checkpoint import checkpoint_folder, load_model, save_checkpoint
from megatron_edu.training.journal import read_metrics
from megatron_edu.training.loop import train
from megatron_edu.verify import compare_split, compare_splits

# ------------------------------------------------- a third kind: all layers are one and the same


@dataclass(frozen=True)
class SharedConfig(GPT2Config):
    "A GPT-2 whose layers share their weights."

    def parameter_counts(self):
        "Those of a GPT-2 of one layer."
        return GPT2Config(**{**asdict(self), "num_layers": 1}).parameter_counts()


class Repeated(nn.ModuleList):
    "One block, which comes several times."

    def __init__(self, block, times):
        super().__init__([block])
        self.times = times

    def __iter__(self):
        return repeat(self[0], self.times)


class SharedGPT2(GPT2):
    "The split model."

    def __init__(self, config, group=None, *, seed=1):
        super().__init__(config, group, seed=seed)
        self.blocks = Repeated(self.blocks[0], config.num_layers)


class SharedReference(reference.GPT2):
    "The same on one device."

    def __init__(self, config, *, seed=1):
        super().__init__(config, seed=seed)
        self.blocks = Repeated(self.blocks[0], config.num_layers)


SHARED = replace(
    ARCHITECTURES["gpt2"], name="shared", title="shared GPT-2", config=SharedConfig,
    model=f"{__name__}:SharedGPT2", reference=f"{__name__}:SharedReference",
    exchange=None, lesson=None,
)


@contextmanager
def registered():
    "The third kind is known within the block: in this process alone."
    register(SHARED)
    try:
        yield
    finally:
        del ARCHITECTURES["shared"]


@pytest.fixture
def shared():
    with registered():
        yield SharedConfig(**asdict(config(num_layers=3)))


def checked(config, tp, device):
    "The four checks in float64, with weights moved away from zeros and ones."
    with registered():
        model = build_model(config, groups(tp, 1, device).tp_group).to(device, torch.float64)
        full = resolve(architecture_of(config).reference)(config).to(device, torch.float64)
    generator = torch.Generator().manual_seed(3)
    for p in full.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(device)
    model.load_state_dict(shard_state_dict(full.state_dict(), model))
    check_equivalence(model, full, *batch(config, device=device))
    state = gather_state_dict(model)
    return type(model).__name__, sum(tensor.numel() for tensor in state.values()), list(state)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_third_kind_passes_the_four_checks(ranks, device, shared, tp):
    for name, size, parameters in ranks(tp)(checked, shared, tp, device):
        assert name == "SharedGPT2" and size == shared.num_parameters()
        assert not any(each.startswith("blocks.1") for each in parameters)


def test_a_third_kind_has_the_parameters_of_one_layer(shared):
    one, many = (replace(shared, num_layers=n).num_parameters() for n in (1, 24))
    assert one == many == config(num_layers=1).num_parameters() < config().num_parameters()


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    "A token file of 20 documents that count upwards."
    path = tmp_path_factory.mktemp("data") / "tokens"
    generator = np.random.default_rng(0)
    with TokenFileWriter(path, 90) as writer:
        for _ in range(20):
            writer.append((generator.integers(90) + np.arange(120)) % 90)
            writer.end_document()
    return path


def plan(out, model, tp=1, **settings):
    given = {"steps": 4, "batch_size": 4, "save_every": 2, "eval_every": 4, "eval_batches": 1}
    run = RunConfig(out, **{**given, "validation": 0.1, "recompute": True, **settings})
    rates = OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1)
    return TrainConfig(model, run, rates, ParallelDims(tp=tp))


def trained(config, prefix, device):
    "Whether this rank's model recomputes."
    with registered():
        groups = config.parallel.build(device)
        return train(config, TokenFile(prefix), groups, device, quiet=True).recompute


def compared(tp, folder, given):
    "The row of `verify` for a checkpoint."
    with registered():
        return compare_split(tp, folder, given)


def losses(out):
    return [line["loss"] for line in read_metrics(out)]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_third_kind_trains_and_goes_on(ranks, device, shared, prefix, tmp_path, tp):
    "Straight through, and from a checkpoint in the middle on; then its table of checks."
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert ranks(tp)(trained, plan(whole, shared, tp), prefix, device) == [True] * tp
    assert losses(whole)[-1] < losses(whole)[0]
    shutil.copytree(whole, again)
    shutil.rmtree(checkpoint_folder(again, 4))
    ranks(tp)(trained, plan(again, shared, tp, resume="auto"), prefix, device)
    ends = [checkpoint_folder(out, 4) for out in (whole, again)]
    assert load_config(ends[0]) == shared
    states = [load_model(folder).state_dict() for folder in ends]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    kept = full_tensors(ends[0], MODEL)
    assert sum(tensor.numel() for tensor in kept.values()) == shared.num_parameters()
    given = dict(zip(("input_ids", "labels", "loss_mask"), batch(shared), strict=True))
    assert all(row.report.passed for row in ranks(tp)(compared, tp, ends[0], given))


def test_a_checkpoint_of_a_third_kind_is_unknown_without_its_record(shared, prefix, tmp_path):
    trained_here = plan(tmp_path / "run", shared, steps=1)
    train(trained_here, TokenFile(prefix), trained_here.parallel.build(), quiet=True)
    folder = checkpoint_folder(tmp_path / "run", 1)
    assert type(load_model(folder)) is SharedGPT2
    record = ARCHITECTURES.pop("shared")
    with pytest.raises(ValueError, match="'shared' is not known here.*import the module that reg"):
        load_model(folder)
    ARCHITECTURES["shared"] = record


def test_a_third_kind_has_its_recipes(shared):
    assert recipe(shared, Path("run")).run.recompute
    quick = quick_recipe(shared, Path("run"), 50)
    assert (quick.optimizer.lr, quick.run.steps, quick.run.recompute) == (2e-3, 50, False)


# -------------------------------------------------------------------------------- the registry


def test_a_name_or_a_configuration_that_is_taken_is_refused():
    for change in ({"config": GPT2Config}, {"name": "bert"}):
        with pytest.raises(ValueError, match="is registered; give the new kind a name and"):
            register(replace(SHARED, **change))
    assert list(ARCHITECTURES) == ["gpt2", "bert"]
    with pytest.raises(TypeError, match="architecture='gpt2': must be a Architecture"):
        register("gpt2")


def test_a_record_made_again_takes_the_place_of_the_first(shared):
    "As a cell of a notebook does that is run twice."
    again = type("SharedConfig", (SharedConfig,), {"__module__": SharedConfig.__module__})
    assert again.__qualname__ == SharedConfig.__qualname__
    register(replace(SHARED, config=again))
    assert list(ARCHITECTURES) == ["gpt2", "bert", "shared"]
    assert ARCHITECTURES["shared"].config is again
    register(SHARED)
    assert architecture_of(shared) is SHARED


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"config": PRESETS["tiny"]}, TypeError, "must be a subclass of ModelConfig; pass the cl"),
        ({"config": dict}, TypeError, "must be a subclass of ModelConfig"),
        ({"samples": "nope"}, ValueError, "samples='nope' is no import path; write .module:name."),
        ({"reference": SharedConfig}, ValueError, "reference=<class .* is no import path"),
    ],
)
def test_a_record_of_wrong_parts_is_refused(change, error, words):
    with pytest.raises(error, match=f"architecture 'shared': .*{words}"):
        register(replace(SHARED, **change))
    assert list(ARCHITECTURES) == ["gpt2", "bert"]


MINE = """
from dataclasses import dataclass, replace
from megatron_edu.config import GPT2Config
from megatron_edu.models.architecture import ARCHITECTURES, register

@dataclass(frozen=True)
class MyConfig(GPT2Config):
    "A kind of its own."

register(replace(ARCHITECTURES["gpt2"], name="mine", config=MyConfig, exchange=None, lesson=None))
"""


def test_ranks_compare_a_kind_that_a_module_of_the_users_registers(tmp_path, monkeypatch):
    "They import the module of its configuration."
    (tmp_path / "my_kind.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("my_kind").MyConfig(**asdict(config()))
    try:
        folder = save_checkpoint(tmp_path / "run", 0, build_model(own))
        ids, labels, _ = batch(own)
        rows = compare_splits(folder, {"input_ids": ids, "labels": labels}, (2,))
    finally:
        del ARCHITECTURES["mine"], sys.modules["my_kind"]
    assert [row.tp for row in rows] == [2] and rows[0].report.passed


def test_an_unknown_kind_is_refused_with_the_known_ones():
    "Also a subclass of a known one: the exact class decides."
    for wrong in (SharedConfig(**asdict(PRESETS["tiny"])), "gpt2", None):
        words = r"^config=.*which are GPT2Config \(gpt2\), BertConfig \(bert\)"
        with pytest.raises(TypeError, match=words):
            architecture_of(wrong)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_path_of_a_record_leads_somewhere(name):
    record = ARCHITECTURES[name]
    paths = [*asdict(record.exchange).values(), *asdict(record.lesson).values()]
    paths = [path for path in [*paths, *vars(record).values()] if ":" in str(path)[:60]]
    paths = [path for path in paths if isinstance(path, str)]
    assert len(paths) == 13 and all(map(resolve, paths))
    assert record.preset in PRESETS and architecture_of(PRESETS[record.preset]) is record


LAZY = """
import sys
import megatron_edu.models as models
models.GPT2Config, models.BertConfig, models.PRESETS, models.build_model
found = [name for name in sys.modules if name.startswith("megatron_edu.")]
print(*sorted(name.removeprefix("megatron_edu.") for name in found), "torch" in sys.modules)
print(models.gpt2.__name__, models.Bert.__module__, "GPT2" in dir(models), models.GPT2.__name__)
"""


def test_the_records_load_nothing_that_they_name():
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=True)
    loaded, models = done.stdout.splitlines()
    assert loaded == "checks config models models.architecture False"
    assert models == "megatron_edu.models.gpt2 megatron_edu.models.bert True GPT2"


# ------------------------------------------------------------------------- who knows the kinds

MAY_KNOW = {    # what a kind is, what is of one kind alone, and what shows both
    "__init__.py": "the public names",
    "config.py": "the configurations",
    "models": "the models and their records",
    "reference": "the oracle",
    "interop/huggingface_gpt2.py": "the layout of one kind",
    "interop/huggingface_bert.py": "the layout of one kind",
    "interop/megatron.py": "the layouts of both",
    "demo": "one for each kind",
    "course": "lessons and mistakes, of one kind each",
    "scaling/bench.py": "times a GPT-2",
    "scaling/contenders.py": "times a GPT-2",
}
KINDS = {"GPT2Config", "BertConfig"}


def names(node: ast.AST) -> set[str]:
    "Names in a piece of code."
    fields = {"Name": "id", "Attribute": "attr", "alias": "name"}
    parts = [each for each in ast.walk(node) if type(each).__name__ in fields]
    return {getattr(each, fields[type(each).__name__]) for each in parts}


def kinds_named(source: str) -> set[str]:
    "Configurations, kinds by name and by `isinstance`: of which code, not its texts, speaks."
    tree = ast.parse(source)
    found = KINDS & names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and "isinstance" in names(node.func):
            found |= {"GPT2", "Bert"} & names(node)
        elif isinstance(node, ast.Constant) and node.value in ("gpt2", "bert"):
            found.add(node.value)
    return found


def test_no_other_module_knows_the_kinds():
    root = Path(megatron_edu.__file__).parent
    modules = [path for path in root.rglob("*.py") if path.name != "_modidx.py"]
    knowing = {
        path.relative_to(root).as_posix() for path in modules if kinds_named(path.read_text())
    }
    strangers = {name for name in knowing if not {name, name.partition("/")[0]} & set(MAY_KNOW)}
    assert len(modules) > 80 and len(knowing) > 8
    assert not strangers
