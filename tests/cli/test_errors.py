"""What goes wrong is one line, whatever raised it."""

from __future__ import annotations

import pytest

from buleyean_rl import cli


@pytest.mark.parametrize("text", ["", "not enough memory for the kernel decode: answer with a smaller --context"])
def test_too_little_memory(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(**_: object) -> None:
        raise MemoryError(text)

    monkeypatch.setattr(cli, "app", fail)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == f"error: {text or 'not enough memory'}\n"
