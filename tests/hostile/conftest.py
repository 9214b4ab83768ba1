"""What the commands under attack are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostile.background import Inputs, make_inputs


@pytest.fixture(scope="module")
def inputs(base: Path, rejections: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(base, rejections, tmp_path_factory.mktemp("inputs"))
