"""`buleyean serve` and `buleyean swap` as processes, ended in every way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from buleyean_rl.cli import main
from buleyean_rl.live.target import Target
from served import tiny_target
from voids import free_port, until

Targets = dict[str, Target]


@contextmanager
def serving(target: Target, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A running server, and its URL."""
    port = free_port()
    arguments = ["serve", target.gguf, "--port", str(port), "--threads", "1", "--slots", "2", *words]
    process = subprocess.Popen(
        [sys.executable, "-c", f"from buleyean_rl.cli import main; raise SystemExit(main({arguments!r}))"],
        stderr=subprocess.PIPE,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(process, url), 120)
        yield process, url
    finally:
        process.kill()
        process.wait()
        process.stderr.close()  # type: ignore[union-attr]


def answers(process: subprocess.Popen[bytes], url: str) -> bool:
    assert process.poll() is None
    try:
        return httpx2.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.mark.slow
def test_a_server_is_swapped_and_ended_from_the_command_line(
    targets: Targets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "key"
    key.write_text("secret")
    key.chmod(0o600)
    mild = str(tiny_target(tmp_path, "mild", lora_alpha=1).adapter)
    with serving(targets["tiny"], "--api-key", str(key)) as (process, url):
        assert main(["swap", mild, "--url", url]) == 2  # without the key
        monkeypatch.setenv("BULEYEAN_SERVE_KEY", "secret")
        assert main(["swap", mild, "--url", url]) == 0
        assert "mild answers as tiny" in capsys.readouterr().err
        assert main(["swap", "--rollback", "--url", f"{url}/v1"]) == 0
        assert main(["swap", str(tmp_path / "none.gguf"), "--url", url]) == 1
        engines = psutil.Process(process.pid).children()
        assert len(engines) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert not [engine for engine in engines if engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE]
        assert "secret" not in process.stderr.read().decode()  # type: ignore[union-attr]
    assert main(["swap", "x", "--url", url]) == 1
    assert "is `buleyean serve` there?" in capsys.readouterr().err


@pytest.mark.slow
def test_an_engine_ends_with_a_server_that_is_killed(targets: Targets) -> None:
    with serving(targets["tiny"]) as (process, _):
        (engine,) = psutil.Process(process.pid).children()
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 30)


def test_what_cannot_be_served_is_said(targets: Targets, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = str(free_port())
    for words, said in (
        ([str(tmp_path / "none.gguf")], "no such file"),
        ([str(targets["first"].adapter)], "is an adapter: name the model"),
        ([targets["tiny"].gguf, "--api-key", "sk-in-place-of-a-file"], "name a file, not the key"),
        ([targets["tiny"].gguf, "--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
    ):
        assert main(["serve", *words, "--port", port]) in (1, 2)
        error = capsys.readouterr().err.splitlines()[-1]
        assert said in error
        assert "sk-in" not in error
    assert main(["swap"]) == 2
    assert "name the run to swap in" in capsys.readouterr().err
