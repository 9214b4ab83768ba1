"""Starting the page: the address, the token, the folder, the model."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx2
import pytest

from buleyean_rl.cli import main
from buleyean_rl.errors import UsageError
from buleyean_rl.void import listener as listening
from buleyean_rl.void import serve as serving
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


def test_only_this_machines_addresses_go_without_a_token() -> None:
    assert serving._choose_token("localhost") is None
    assert serving._choose_token("0.0.0.0")


def test_answers_go_out_at_once() -> None:
    with listening.listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # by which asyncio knows to switch Nagle's algorithm off


@pytest.mark.parametrize("token", ["žluť", "two words", "line\n"])
def test_a_token_that_no_browser_can_show_is_refused(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serving.TOKEN_VARIABLE, token)
    with pytest.raises(UsageError, match="ASCII"):
        serving._choose_token("0.0.0.0")


def test_the_addresses_that_are_printed_open() -> None:
    assert listening.urls("127.0.0.1", 7860) == ["http://127.0.0.1:7860/"]
    assert listening.urls("::1", 7860) == ["http://[::1]:7860/"]
    with listening.listen("0.0.0.0", 0) as listener:
        port = listener.getsockname()[1]
        urls = listening.urls("0.0.0.0", port)
        assert urls[0] == f"http://127.0.0.1:{port}/"
        for url in urls:
            socket.create_connection((httpx2.URL(url).host, port), timeout=10).close()
