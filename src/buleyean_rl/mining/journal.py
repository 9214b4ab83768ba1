"""Answers and verdicts on disk as they fall, so that mining can be killed and resumed.

{"format": 2, "model": ..., settings}             the header: what the answers depend on
{"prompt": 0, "answers": ["..."]}                  a line for each prompt that was answered
{"judge": "loops", "prompt": 0, "answer": 0, ...}  a line for each verdict
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from buleyean_rl.data.records import decode_json
from buleyean_rl.errors import RecordError, UsageError
from buleyean_rl.mining.judges import Verdict
from buleyean_rl.system.locks import lock_file

FORMAT = 2


def journal_path(output: Path) -> Path:
    """The journal beside a records file."""
    return output.with_name(f"{output.stem}.mined.jsonl")


class Journal:
    """Answers and verdicts on disk, a JSON line each; one process at a time.

    Args:
        path: the file; an earlier one is read first, without the half line that killing may leave.
        header: what the answers depend on.

    Raises:
        UsageError: an earlier journal has another header or format, or another process has it open.
        RecordError: an earlier journal is damaged.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.answers: dict[int, list[str]] = {}
        self.verdicts: dict[tuple[str, int, int], Verdict] = {}
        self._file = path.open("a+b")
        try:
            lock_file(self._file, path)
            self._read({"format": FORMAT, **header})
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add_answers(self, answers: Mapping[int, list[str]]) -> None:
        """Write the answers to some prompts, all of them or none."""
        self._write([{"prompt": index, "answers": texts} for index, texts in answers.items()])
        self.answers |= answers

    def add_verdict(self, judge: str, index: int, k: int, verdict: Verdict) -> None:
        """Write a judge's verdict on a prompt's k-th answer."""
        self._write([{"judge": judge, "prompt": index, "answer": k, **asdict(verdict)}])
        self.verdicts[judge, index, k] = verdict

    def _read(self, header: Mapping[str, Any]) -> None:
        self._file.seek(0)
        size = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row: Any = decode_json(line)
            except RecordError as error:
                raise RecordError(error.problem, path=self.path, line=number) from error
            if number == 1:
                self._check_header(row, header)
            elif "answers" in row:
                self.answers[row["prompt"]] = row["answers"]
            else:
                spans = tuple((start, end) for start, end in row["spans"])
                verdict = Verdict(row["rejected"], spans, row["reason"])
                self.verdicts[row["judge"], row["prompt"], row["answer"]] = verdict
            size += len(line)
        self._file.truncate(size)
        if size == 0:
            self._write([header])

    def _check_header(self, row: Any, header: Mapping[str, Any]) -> None:
        if not isinstance(row, dict) or row.get("format") != FORMAT:
            raise UsageError(f"{self.path} is not a journal of format {FORMAT}: delete it, or name another output")
        differing = [name for name in header if row.get(name) != header[name]]
        if differing:
            raise UsageError(
                f"{self.path} was mined with another {', '.join(differing)}: name another output, or delete it"
            )

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file.flush()  # from here on killing the process loses nothing
