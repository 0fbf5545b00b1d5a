"Several hundred inputs that the command must refuse in one line, or take as the clean ones."

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.all_cases import CASES
from limits import HANG

WORKER = Path(__file__).parent / "fuzz/worker.py"


@pytest.fixture(scope="module")
def verdicts(request):
    "What is wrong with how each chosen case ended. They run in a process without threads."
    mine = [item for item in request.session.items if item.path == request.path]
    chosen = [item.callspec.params["name"] for item in mine if hasattr(item, "callspec")]
    done = subprocess.run(
        [sys.executable, WORKER],
        input=json.dumps(chosen), stdout=subprocess.PIPE, text=True, timeout=HANG,
    )
    assert done.returncode == 0
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_case(verdicts, name):
    assert not verdicts[name], f"megatron-edu {' '.join(map(ascii, CASES[name].line))}"


def test_there_are_several_hundred():
    assert len(CASES) >= 400
