"""What the command asks of the libraries below torch, before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from buleyean_rl.system.environment import DEFAULTS

SHOW = "import os, sys, buleyean_rl.cli; assert 'torch' not in sys.modules; print(os.environ[sys.argv[1]])"


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("given", [None, "7"])
def test_a_default_is_set_unless_it_was_given(name: str, given: str | None) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in DEFAULTS}
    environment |= {name: given} if given else {}
    command = [sys.executable, "-c", SHOW, name]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == (given or DEFAULTS[name])
