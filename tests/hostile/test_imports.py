"""Broken data of every format: a message or a whole file, and no verdict that is not counted."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from buleyean_rl.data.importers import Choices, import_records
from buleyean_rl.data.importers.run import ImportReport
from buleyean_rl.data.records import read_records
from buleyean_rl.errors import BuleyeanError
from hostile.attack import HANG_SECONDS, Outcome, assert_clear, run_command
from hostile.import_samples import ASKED, ROWS, draw_file
from hostile.scale import runs

SEED = 20_261
OPTIONS: list[dict[str, Any]] = [
    {},
    {"skip_bad": True},
    {"redact": True},
    {"redact": True, "skip_bad": True},
    {"skip_bad": True, "choices": Choices(below=3)},
    {"skip_bad": True, "choices": Choices(score="u")},
    {"format": "kto"},
    {"format": "pairs", "skip_bad": True},
    {"choices": Choices({"prompt": "prompt", "answer": "completion", "score": "label"})},
]
CHATS = ("openwebui", "librechat")  # a row may have any number of ratings


@pytest.mark.slow
def test_broken_imports_end_with_a_message_or_a_whole_file(tmp_path: Path) -> None:
    random = Random(SEED)
    imported = 0
    for number in range(runs(24_000)):
        name, content = draw_file(random)
        source, output, options = tmp_path / name, tmp_path / "records", random.choice(OPTIONS)
        source.write_bytes(content)
        with suppress(BuleyeanError):  # a message; anything else ends the test
            check_report(import_records(str(source), output, **options), output)
            imported += 1
            output.unlink()
        assert os.listdir(tmp_path) == [name], (number, options)
        source.unlink()
    assert imported > runs(24_000) / 20, "the samples are broken so badly that nothing is tested"


def check_report(report: ImportReport, output: Path) -> None:
    """The file is what the report says, and every row is somewhere in it."""
    records = list(read_records(output))
    assert len(records) == report.records
    assert sum(sum(record.rejection_counts) for record in records) == report.rejections
    rows = report.records + report.prompts_repeated + report.without_rejection + report.skipped
    if report.format not in CHATS:
        assert rows + sum(report.unusable.values()) == report.rows, report


def _pair(rejected: str) -> bytes:
    return json.dumps({"prompt": "p", "chosen": "y", "rejected": rejected}).encode()


def _ranked(prompt: object, answers: int) -> bytes:
    """Two lines that accept many answers, and reject one and then most of them."""
    completions = [{"response": str(k), "score": 1} for k in range(answers)]
    rows = [[*completions, {"response": "n", "score": 0}], [{**answer, "score": 0} for answer in completions[1:]]]
    rows[1].append(completions[0])
    return b"".join(json.dumps({"prompt": prompt, "completions": row}).encode() + b"\n" for row in rows)


def _chat(messages: dict[str, Any]) -> bytes:
    return json.dumps({"chat": {"history": {"messages": messages}}}).encode()


def _rated(parent: str, content: str) -> dict[str, Any]:
    return {"parentId": parent, "role": "assistant", "content": content, "annotation": {"rating": -1}}


# Files of a megabyte on which a step of quadratic time takes more than a minute.
SIZE = 1 << 20
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
    "blank prompt": lambda: json.dumps({"prompt": " " * SIZE + "p", "chosen": "y", "rejected": "n"}).encode(),
    "long prompt": lambda: _ranked("p" * (SIZE // 2), SIZE // 60),
    "long talk": lambda: _ranked([{"role": "user", "content": "p"}] * (SIZE // 60), SIZE // 60),
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
