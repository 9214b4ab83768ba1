"""A finished run that several files compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import start


@pytest.fixture(scope="session")
def uninterrupted(base: Path, rejections: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with `runs.SETTINGS`; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    start(base, rejections, folder)
    return folder
