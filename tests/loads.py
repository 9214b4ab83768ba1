"""How often a command loads the weights of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from buleyean_rl.models import weights


@contextmanager
def counting_loads(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the models whose weights were loaded, of which checks read none."""
    load, loaded = weights._load, list[str]()

    def record(source: Any, **options: Any) -> Any:
        if options.get("device_map") != "meta":
            loaded.append(source.name)
        return load(source, **options)

    with patch.context() as within:
        within.setattr(weights, "_load", record)
        yield loaded
