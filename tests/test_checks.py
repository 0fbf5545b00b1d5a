"Kinds of the fields of configurations, before any rule about their values."

import math
from pathlib import Path

import pytest

from megatron_edu.checks import check_kind, check_seed
from megatron_edu.settings import (
    BENCH_CASES,
    BenchConfig,
    DemoConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
)

OUT = Path("run")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RunConfig("run"), "out='run': must be a path"),
        (lambda: RunConfig(OUT, steps=2.0), "steps=2.0: must be a whole number"),
        (lambda: RunConfig(OUT, steps=True), "steps=True: must be a whole number"),
        (
            lambda: RunConfig(OUT, micro_batch="2"),
            "micro_batch='2': must be a whole number or None",
        ),
        (lambda: RunConfig(OUT, validation="0.1"), "validation='0.1': must be a number"),
        (lambda: RunConfig(OUT, compile=1), "compile=1: must be True or False"),
        (lambda: OptimizerConfig(lr=None), "lr=None: must be a number"),
        (lambda: OptimizerConfig(beta1=[0.9]), r"beta1=\[0.9\]: must be a number"),
        (lambda: SamplingConfig(top_k=1.5), "top_k=1.5: must be a whole number or None"),
        (lambda: BenchConfig(cases="fp32-batch-8"), "cases='fp32-batch-8': must be a tuple, each"),
        (lambda: BenchConfig(cases=(1,)), r"cases=\(1,\): must be a tuple, each of it a text"),
        (lambda: DemoConfig(out=None), "out=None: must be a path"),
    ],
)
def test_another_kind_is_a_type_error(make, words):
    with pytest.raises(TypeError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RunConfig(OUT, precision="fp64"), "precision='fp64': must be 'fp32' or 'tf32' or"),
        (lambda: RunConfig(OUT, steps=2**63), "too large"),
        (lambda: RunConfig(OUT, seed=2**64), "seed=.*: too large"),
        (lambda: RunConfig(OUT, seed=-1), "seed=-1: must be from 0 to"),
        (lambda: RunConfig(OUT, validation=math.nan), "validation=nan"),
        (lambda: SamplingConfig(seed=-5), "seed=-5: must be from 0 to"),
        (lambda: SamplingConfig(temperature=math.nan), "temperature=nan"),
        (lambda: DemoConfig(model="t5"), "model='t5': must be 'gpt2' or 'bert'"),
        (lambda: DemoConfig(tp=0), "tp=0: must be at least 1"),
        (lambda: BenchConfig(seconds=math.inf), "seconds=inf"),
        (lambda: BenchConfig(cases=("no",)), r"cases \['no'\] are unknown"),
    ],
)
def test_a_wrong_value_is_a_value_error(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_long_value_is_shortened_in_the_message():
    with pytest.raises(TypeError, match="^x='yyy.*: must be a whole number$") as caught:
        check_kind("x", "y" * 10**5, int)
    assert len(str(caught.value)) < 100


def test_what_fits_is_taken():
    assert RunConfig(OUT, seed=0, validation=0.5).micro_batch is None
    assert OptimizerConfig(lr=1, min_lr=0).lr == 1  # a whole number is a number
    check_seed(2**63 - 1)


def test_the_cases_that_can_be_named_are_those_that_are_measured():
    from megatron_edu.scaling.bench import CASES

    assert tuple(CASES) == BENCH_CASES
