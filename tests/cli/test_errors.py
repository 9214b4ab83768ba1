"""What goes wrong is one line, whatever raised it."""

from __future__ import annotations

import pytest

from buleyean_rl import cli
from buleyean_rl.cli.options import Interrupted
from buleyean_rl.system.program import command_line


@pytest.mark.parametrize("text", ["", "not enough memory for the kernel decode: answer with a smaller --context"])
def test_too_little_memory(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(**_: object) -> None:
        raise MemoryError(text)

    monkeypatch.setattr(cli, "app", fail)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == f"error: {text or 'not enough memory'}\n"


@pytest.mark.parametrize(
    ("stop", "words", "said"),
    [
        (KeyboardInterrupt(), ["demo"], "stopped"),
        (Interrupted("half way"), ["train", "r"], "stopped: half way"),
        (
            Interrupted("half way", "--resume"),
            ["train", "my r"],
            "half way. Go on with: {} train 'my r' --resume",
        ),
        (Interrupted("half way", "--resume"), ["train", "--resume"], "half way. Go on with: {} train --resume"),
        (KeyboardInterrupt(), ["mine", "--debug", "p"], "Go on with: {} mine p"),
    ],
)
def test_ctrl_c_says_how_to_go_on(
    stop: BaseException,
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**_: object) -> None:
        raise stop

    monkeypatch.setattr(cli, "app", fail)
    assert cli.main(words) == 130
    program = command_line().rstrip()
    assert capsys.readouterr().err.endswith(f"{said.format(program)}\n")
