"""The cache of reference states: what is written is read, what is not known is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from buleyean_rl.reference import ReferenceCache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read_again(tmp_path: Path, dtype: torch.dtype) -> None:
    states = torch.randn(7, 3).to(dtype)
    cache = ReferenceCache(tmp_path / "new", [2, 4, 1], 3, dtype)
    assert cache.read([1]) is None
    cache.write([2, 0], states[:3])
    assert cache.read([0, 1]) is None
    assert cache.read([0, 2]).equal(states[[1, 2, 0]])
    cache.write([1], states[3:])
    for again in (cache, ReferenceCache(tmp_path / "new", [2, 4, 1], 3, dtype)):
        assert again.read([0, 1, 2]).equal(states[[1, 2, 3, 4, 5, 6, 0]])


def test_a_cache_of_nothing(tmp_path: Path) -> None:
    assert ReferenceCache(tmp_path, [1], 3, torch.float32).read([0]) is None
