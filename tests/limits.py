"How long a test may wait. No test judges by seconds: this limit does nothing but end a hang."

import configparser
import time
from collections.abc import Callable
from pathlib import Path

INI = Path(__file__).resolve().parents[1] / "pytest.ini"


def read_limit() -> float:
    "Seconds of pytest.ini after which a whole test counts as hung."
    ini = configparser.ConfigParser()
    ini.read(INI, encoding="utf-8")
    return ini.getfloat("pytest", "faulthandler_timeout")


HANG = read_limit() / 3     # of one wait within a test, so that it fails before the test is ended
FOREVER = 100 * HANG        # of what is ended from outside, or the test has failed


def wait_for(done: Callable[[], bool], what: str) -> None:
    "Wait until `done()`."
    end = time.monotonic() + HANG
    while not done():
        assert time.monotonic() < end, f"still waiting for {what}"
        time.sleep(0.02)
