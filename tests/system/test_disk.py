"""Room is taken before it is used, and a full disk is named, whoever meets it."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from buleyean_rl.system.disk import allocate, full_disk, name_full_disk

LIMIT = 1 << 16


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """No file grows beyond a size, as on a disk that is full."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("is_posix", [True, False])
def test_a_file_has_its_room_or_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_posix: bool
) -> None:
    if not is_posix:
        monkeypatch.delattr(os, "posix_fallocate")
    with (tmp_path / "file").open("w+b") as file:
        allocate(file, LIMIT)
        assert os.fstat(file.fileno()).st_blocks * 512 >= LIMIT
        with files_at_most(LIMIT), pytest.raises(OSError, match="large") as caught:
            allocate(file, LIMIT + 4096)
        assert full_disk(caught.value) == errno.EFBIG


@pytest.mark.parametrize(
    "write",
    [
        lambda path, data: path.write_bytes(data.tobytes()),
        lambda path, data: save_file({"data": torch.from_numpy(data)}, path),
        lambda path, data: torch.save(torch.from_numpy(data), path),
        lambda path, data: data.tofile(path),
    ],
    ids=["python", "safetensors", "torch", "numpy"],
)
def test_every_library_has_its_words_for_a_full_disk(tmp_path: Path, write: object) -> None:
    data = np.zeros(2 * LIMIT, dtype=np.uint8)
    with files_at_most(LIMIT), pytest.raises(OSError, match="large|space") as caught, name_full_disk(tmp_path):
        write(tmp_path / "file", data)  # type: ignore[operator]
    assert caught.value.filename == str(tmp_path)
    assert full_disk(caught.value)


def test_any_other_error_passes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="other"), name_full_disk(tmp_path):
        raise RuntimeError("other")
    with pytest.raises(FileNotFoundError), name_full_disk(tmp_path):
        (tmp_path / "missing").read_bytes()
