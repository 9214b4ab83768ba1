"""What the command asks of the libraries below torch, before torch is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from buleyean_rl.system.environment import DEFAULTS

SHOW = "import json, os, sys, buleyean_rl.cli; assert 'torch' not in sys.modules; print(json.dumps(dict(os.environ)))"


@pytest.mark.parametrize("is_set", [False, True])
def test_a_default_is_set_unless_the_user_has_set_it(is_set: bool) -> None:
    expected = dict.fromkeys(DEFAULTS, "7") if is_set else DEFAULTS
    environment = {key: value for key, value in os.environ.items() if key not in DEFAULTS}
    environment |= expected if is_set else {}
    command = [sys.executable, "-c", SHOW]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout).items() >= expected.items()
