"""Two of a command on one output at once: one result, whole, and the second is told who is at it."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from hostile.attack import assert_clear
from hostile.background import RESULTS, Inputs, leftovers, results, start
from hostile.scale import runs

pytestmark = pytest.mark.slow

CLAIMED = {"train", "walk"}


@pytest.mark.parametrize("command", RESULTS)
def test_two_at_once(command: str, inputs: Inputs, tmp_path: Path) -> None:
    pauses = random.Random(command)
    (alone := tmp_path / "alone").mkdir()
    assert start(inputs.words(command, alone), tmp_path / "log").wait().code == 0
    expected = results(command, alone)
    for number in range(runs(20)):
        (folder := tmp_path / str(number)).mkdir()
        first = start(inputs.words(command, folder), tmp_path / "first.log")
        time.sleep(pauses.uniform(0, 0.2))
        second = start(inputs.words(command, folder), tmp_path / "second.log")
        outcomes = [first.wait(), second.wait()]
        for outcome in outcomes:
            assert_clear(outcome)
        codes = sorted(outcome.code for outcome in outcomes)
        assert codes[0] == 0, outcomes
        if command in CLAIMED:
            assert codes == [0, 2], outcomes
            refused = next(outcome for outcome in outcomes if outcome.code == 2)
            processes = "|".join(str(running.process.pid) for running in (first, second))
            assert re.search(rf"in use by process ({processes})", refused.err), refused
        assert results(command, folder) == expected
        assert not leftovers(folder)
