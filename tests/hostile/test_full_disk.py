"""A disk that fills up at any byte: one line that names the folder, and with room again the same result."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from hostile.attack import assert_clear
from hostile.background import RESULTS, WHOLE, Inputs, finish, journals_grow, leftovers, results, start
from hostile.disk import small_disk
from hostile.scale import runs

pytestmark = pytest.mark.slow

COMMANDS = ("import", "mine", "train", "walk", "export")


@pytest.mark.parametrize("command", COMMANDS)
def test_disks_of_many_sizes(command: str, inputs: Inputs, tmp_path: Path) -> None:
    levels, log = random.Random(command), tmp_path / "log"
    with small_disk(tmp_path / "whole", 1 << 28) as disk:
        environment = {"XDG_CACHE_HOME": str(disk / "cache"), "BULEYEAN_KERNELS": "0"}
        assert start(inputs.words(command, disk), log, environment).wait().code == 0, log.read_text()
        expected, needed = results(command, disk), sum(path.stat().st_blocks * 512 for path in disk.rglob("*"))
    assert set(expected) == set(RESULTS[command])
    count = runs(8)
    for number in range(count):
        size = int(needed * (number + levels.random()) / count)
        with small_disk(tmp_path / str(number), max(size, 4096)) as disk:
            environment |= {"XDG_CACHE_HOME": str(disk / "cache")}
            outcome = start(inputs.words(command, disk), log, environment).wait()
            assert_clear(outcome, (0, 1))
            if outcome.code == 1:
                errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
                assert len(errors) == 1, outcome
                assert str(disk) in errors[0]
            if command in WHOLE:
                assert results(command, disk).items() <= expected.items()
            subprocess.run(["mount", "-o", f"remount,size={1 << 28}", str(disk)], check=True)
            with journals_grow(disk):
                finish(inputs, command, disk, log, environment)
            assert results(command, disk) == expected
            assert not leftovers(disk)
