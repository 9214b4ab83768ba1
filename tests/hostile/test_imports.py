"""Broken data of every format: a message or a whole file, and no verdict that is not counted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from buleyean_rl.data.records import read_records
from hostile.attack import HANG_SECONDS, Outcome, assert_clear, run_command
from hostile.import_samples import ASKED, ROWS, draw_file
from hostile.scale import runs

SEED = 20_261
# What may stand in the options of an import, each as likely as the others.
OPTIONS: list[list[str]] = [
    [],
    [],
    ["--skip-bad"],
    ["--redact"],
    ["--skip-bad", "--below", "3"],
    ["--format", "kto"],
    ["--score", "u"],
    ["--column", "prompt=prompt", "--column", "answer=completion", "--column", "score=label"],
    ["--format", "pairs", "--skip-bad"],
]
CHATS = ("openwebui", "librechat")  # a row may have any number of ratings


@pytest.mark.slow
def test_broken_imports_end_with_a_message_or_a_whole_file(tmp_path: Path) -> None:
    random = Random(SEED)
    imported = 0
    for number in range(runs(24_000)):
        folder = tmp_path / str(number % 50)
        folder.mkdir(exist_ok=True)
        name, content = draw_file(random)
        source, output = folder / name, folder / "records"
        source.write_bytes(content)
        outcome = run_command("data", "import", source, "-o", output, "--json", *random.choice(OPTIONS))
        assert_clear(outcome)
        assert {path.name for path in folder.iterdir()} <= {name, output.name}, number
        assert output.exists() == (outcome.code == 0), (number, content, outcome)
        if outcome.code == 0:
            check_report(json.loads(outcome.out), output)
            imported += 1
            output.unlink()
        source.unlink()
    assert imported > runs(24_000) / 10, "the samples are broken so badly that nothing is tested"


def check_report(report: dict[str, Any], output: Path) -> None:
    """The file is what the report says, and every row is somewhere in it."""
    records = list(read_records(output))
    assert len(records) == report["records"]
    assert sum(sum(record.rejection_counts) for record in records) == report["rejections"]
    left_out = report["without_rejection"] + report["skipped"] + sum(report["unusable"].values())
    rows = report["records"] + report["prompts_repeated"] + left_out
    if report["format"] not in CHATS:
        assert rows == report["rows"], report


def _pair(rejected: str) -> bytes:
    return json.dumps({"prompt": "p", "chosen": "y", "rejected": rejected}).encode()


def _chat(messages: dict[str, Any]) -> bytes:
    return json.dumps({"chat": {"history": {"messages": messages}}}).encode()


def _rated(parent: str, content: str) -> dict[str, Any]:
    return {"parentId": parent, "role": "assistant", "content": content, "annotation": {"rating": -1}}


# Files of some megabytes on which a step of quadratic time takes more than a minute.
SIZE = 2 << 20
LARGE_FILES: dict[str, Callable[[], bytes]] = {
    **{
        f"redact {text}": lambda text=text: _pair(text * (SIZE // len(text)))
        for text in ("'", "%", "a@", "a@b.cd ", "eyJ-", "token='", "12 ", "sk-")
    },
    "reasoning": lambda: _chat({"u": ASKED, "a": _rated("u", '<details type="reasoning"' * (SIZE // 25))}),
    "circle": lambda: _chat({str(k): _rated(str(k + 1), "x") for k in range(2000)}),
    "scores": lambda: json.dumps(
        {"prompt": "p", "completions": [{"response": str(k), "score": k} for k in range(SIZE // 30)]}
    ).encode(),
    "late key": lambda: ("{" + "".join(f'"{k}": 0, ' for k in range(SIZE // 12)) + '"z": 0, "z": 0}').encode(),
    "broken lines": lambda: b'{"prompt": "p",\n' * (SIZE // 16),
    "nested lines": lambda: b'{"a":\n' * (SIZE // 6),
    "open lists": lambda: b"[\n" * (SIZE // 2),
    "half a table": lambda: b'a,"b\n' * (SIZE // 5),
    "python text": lambda: _pair("[{'role': " * (SIZE // 10) + "]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LARGE_FILES))
def test_time_is_linear(tmp_path: Path, name: str) -> None:
    source = tmp_path / ("a.csv" if "table" in name else "a.json")
    source.write_bytes(LARGE_FILES[name]())
    options = ["--redact"] if name.startswith("redact") else ["--skip-bad"]
    begin = time.monotonic()
    assert_clear(run_command("data", "import", source, "-o", tmp_path / "r", *options))
    assert time.monotonic() - begin < HANG_SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ROWS))
def test_whole_samples_are_read(tmp_path: Path, name: str) -> None:
    for number, row in enumerate(ROWS[name]):
        source = tmp_path / f"{number}.jsonl"
        source.write_text(json.dumps(row) + "\n")
        outcome: Outcome = run_command("data", "import", source, "-o", tmp_path / f"{number}.out", "--json")
        assert outcome.code == 0 or "accepted answers: 1" in outcome.err, (row, outcome)
