"""Tiny models that are served: a base, and two runs of it that answer otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from buleyean_rl.live.target import Target
from served import tiny_target


@pytest.fixture(scope="session")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    folder: Path = tmp_path_factory.mktemp("served")
    adapters = {"first": {"lora_alpha": 8}, "second": {"lora_alpha": 40}}
    return {"tiny": tiny_target(folder, "tiny")} | {
        name: tiny_target(folder, name, **lora) for name, lora in adapters.items()
    }
