"""Starting the page: the folder, the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from buleyean_rl.cli import main
from voids import free_port, running


@pytest.mark.slow
def test_a_folder_is_one_servers_alone(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(base, tmp_path) as void:
        assert main(["void", "--model", str(base), "-o", str(tmp_path), "--port", str(free_port())]) == 2
        assert f"in use by process {void.process.pid}" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "theirs.txt").write_text("theirs")
    assert main(["void", "--model", str(base), "-o", str(tmp_path / "other"), "--port", str(free_port())]) == 2
    assert "name another folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["theirs.txt"]


@pytest.mark.parametrize("model", ["http://127.0.0.1:9/v1", "nonsense"])
def test_a_model_that_cannot_be_trained(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["void", "--model", model, "-o", str(tmp_path / "v"), "--port", str(free_port())]) in (1, 2)
    assert model in capsys.readouterr().err
