"""What goes wrong is one line, whatever raised it."""

from __future__ import annotations

from pathlib import Path

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
        (KeyboardInterrupt(), ["doctor"], "stopped"),
        (Interrupted("half way"), ["train", "r"], "stopped: half way"),
        (
            Interrupted("half way", "--resume"),
            ["train", "my r"],
            "half way\nGo on with: {} train 'my r' --resume",
        ),
        (Interrupted("half way", "--resume"), ["train", "--resume"], "half way\nGo on with: {} train --resume"),
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


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "r.jsonl", "--model", "none", "-o", "run"], "training none on r.jsonl"),
        (["train", "r.jsonl", "--model", "none", "-o", "run", "--dry-run"], "planning a run of none on r.jsonl"),
        (["evaluate", "none", "--compare", "other"], "measuring none, other"),
        (["export", "none", "-o", "m.gguf"], "exporting none to m.gguf"),
        (["chat", "none"], "opening none"),
        (["mine", "--model", "none"], "mining records.jsonl: none answers, loops judges"),
        (["walk", "--model", "none"], "walking in walk: 3 rounds at most of mining, training and measuring none"),
    ],
)
def test_a_command_first_says_what_it_is_about_to_do(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.jsonl").write_text('{"prompt": "Hi", "rejected_responses": ["Go."]}\n')
    assert cli.main(words) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[0] == line
    assert err[-1].startswith("error: ")
