"""A command that is killed at any moment loses nothing it has written down, and the next one makes the same bytes."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from hostile.background import RESULTS, WHOLE, Inputs, finish, journals_grow, leftovers, results, start
from hostile.scale import runs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", RESULTS)
def test_killed_commands(command: str, inputs: Inputs, tmp_path: Path) -> None:
    moments, log = random.Random(command), tmp_path / "log"
    (whole := tmp_path / "whole").mkdir()
    began = time.monotonic()
    assert start(inputs.words(command, whole), log).wait().code == 0, log.read_text()
    seconds, expected = time.monotonic() - began, results(command, whole)
    assert set(expected) == set(RESULTS[command])
    for number in range(runs(20)):
        (folder := tmp_path / str(number)).mkdir()
        (folder / "notes.txt").write_text("theirs")
        running = start(inputs.words(command, folder), log)
        time.sleep(moments.uniform(0.1, seconds))
        assert running.kill().code in (0, -signal.SIGKILL), log.read_text()
        if command in WHOLE:
            assert results(command, folder).items() <= expected.items()
        for path in (*folder.rglob("run.json"), *folder.rglob("walk.json")):
            json.loads(path.read_text())
        with journals_grow(folder):
            finish(inputs, command, folder, log)
        assert results(command, folder) == expected
        assert (folder / "notes.txt").read_text() == "theirs"
        assert not leftovers(folder)
        assert not list(folder.rglob("checkpoint-*"))
