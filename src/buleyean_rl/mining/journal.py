"""Answers and verdicts on disk as they fall, so that mining can be killed and resumed.

{"format": 3, "model": ..., "prompts": ..., settings}            the header: what the answers depend on
{"tokenizer": "..."}                                             whose ids the token_ids are
{"prompt": 0, "sample": 0, "answer": "...", "token_ids": [...], "ended": true}    an answer
{"prompt": 1, "sample": 0, "cause": "content filter", ...}       why there is none, and never will be
{"judge": "loops", "prompt": 0, "sample": 0, ...}                a verdict on an answer
{"records": "sha256"}                                            a records file that was written from all that
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from buleyean_rl.data.records import decode_json
from buleyean_rl.errors import RecordError, UsageError
from buleyean_rl.inference.protocol import Answer, Unanswered
from buleyean_rl.mining.judges import Verdict
from buleyean_rl.system.disk import name_full_disk
from buleyean_rl.system.files import file_sha256
from buleyean_rl.system.locks import lock_file

FORMAT = 3
REMEDY = "name another output, or begin anew with --overwrite"


def journal_path(output: Path) -> Path:
    """The journal beside a records file."""
    return output.parent / f"{output.stem}.mined.jsonl"


class Journal:
    """Answers and verdicts on disk, a JSON line each; one process at a time.

    An answer is known by its draw: the numbers of its prompt and of the sample.

    Args:
        path: the file; an earlier one is read first, without the half line that killing may leave.
        header: what the answers depend on: at least model and prompts.
        overwrite: begin anew where an earlier journal has another header or format, or is damaged.

    Raises:
        UsageError: the file is no journal, which stays as it is, or has another header or format, or another process
            has it open.
        RecordError: an earlier journal is damaged.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path, self._header = path, {"format": FORMAT, **header}
        if path.exists() and not path.is_file():
            raise _foreign(path)
        self.tokenizer: str | None = None
        self.outcomes: dict[tuple[int, int], Answer | Unanswered] = {}
        self.verdicts: dict[tuple[str, int, int], Verdict] = {}
        self._written: set[str] = set()
        self._file = path.open("a+b")
        try:
            lock_file(self._file, path)
            try:
                size = self._read()
            except (_DifferentJournal, RecordError):
                self._file.seek(0)
                if not overwrite and sum(1 for _ in self._file) > 1:  # a header alone holds nothing to lose
                    raise
                self._clear()
                size = 0
            self._file.truncate(size)
            if size == 0:
                self._write(self._header)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def has_written(self, path: Path) -> bool:
        """Whether a records file was written from this journal, and not changed since."""
        return file_sha256(path) in self._written

    def add_tokenizer(self, tokenizer: str | None) -> None:
        """Write the hash of the tokenizer whose ids the answers have."""
        if tokenizer is not None and tokenizer != self.tokenizer:
            self._write({"tokenizer": tokenizer})
            self.tokenizer = tokenizer

    def add_outcome(self, prompt: int, sample: int, outcome: Answer | Unanswered) -> None:
        """Write an answer, or why there is none."""
        draw = {"prompt": prompt, "sample": sample}
        if isinstance(outcome, Answer):
            self._write({**draw, "answer": outcome.text, "token_ids": outcome.token_ids, "ended": outcome.ended})
        else:
            self._write({**draw, "cause": outcome.cause, "detail": outcome.detail})
        self.outcomes[prompt, sample] = outcome

    def add_verdict(self, judge: str, prompt: int, sample: int, verdict: Verdict) -> None:
        """Write a judge's verdict on an answer."""
        self._write({"judge": judge, "prompt": prompt, "sample": sample, **asdict(verdict)})
        self.verdicts[judge, prompt, sample] = verdict

    def add_records(self, sha256: str) -> None:
        """Write the hash of a records file that is about to take its name."""
        if sha256 not in self._written:
            self._write({"records": sha256})
            self._written.add(sha256)

    def _clear(self) -> None:
        """Forget what was read."""
        self.tokenizer = None
        for lines in (self.outcomes, self.verdicts, self._written):
            lines.clear()

    def _read(self) -> int:
        """Read an earlier journal; returns the size of its whole lines."""
        self._file.seek(0)
        size = 0
        for number, line in enumerate(self._file, start=1):
            if number == 1:
                self._check_header(line)
            elif line.endswith(b"\n"):
                try:
                    self._add_line(decode_json(line))
                except RecordError as error:
                    raise RecordError(f"{error.problem}; {REMEDY}", path=self.path, line=number) from error
                except (LookupError, TypeError, ValueError, AttributeError) as error:
                    raise RecordError(f"is no line of a journal; {REMEDY}", path=self.path, line=number) from error
            size += len(line) if line.endswith(b"\n") else 0
        return size

    def _check_header(self, line: bytes) -> None:
        """Raises UsageError: it is the header of another journal, or of none."""
        if not line.endswith(b"\n") and _encode(self._header).startswith(line):
            return  # the first line was being written
        try:
            row = decode_json(line)
        except RecordError:
            row = None
        if not (isinstance(row, dict) and isinstance(row.get("format"), int) and {"model", "prompts"} <= row.keys()):
            raise _foreign(self.path)
        if row["format"] != FORMAT:
            age = "an earlier" if row["format"] < FORMAT else "a later"
            raise _DifferentJournal(f"{self.path} is a journal of {age} version, format {row['format']}: {REMEDY}")
        differing = [name for name in self._header if row.get(name) != self._header[name]]
        if differing:
            raise _DifferentJournal(f"{self.path} was mined with another {', '.join(differing)}: {REMEDY}")

    def _add_line(self, row: Mapping[str, Any]) -> None:
        if "judge" in row:
            spans = tuple((int(start), int(end)) for start, end in row["spans"])
            self.verdicts[row["judge"], row["prompt"], row["sample"]] = Verdict(row["rejected"], spans, row["reason"])
        elif "answer" in row:
            ids = row["token_ids"]
            answer = Answer(
                _text(row["answer"]), None, bool(row["ended"]), None if ids is None else tuple(map(int, ids))
            )
            self.outcomes[row["prompt"], row["sample"]] = answer
        elif "cause" in row:
            self.outcomes[row["prompt"], row["sample"]] = Unanswered(_text(row["cause"]), _text(row["detail"]))
        elif "tokenizer" in row:
            self.tokenizer = _text(row["tokenizer"])
        else:
            self._written.add(row["records"])

    def _close(self) -> None:
        with name_full_disk(self.path):  # what could not be written is tried once more
            self._file.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        with name_full_disk(self.path):
            self._file.write(_encode(row))
            self._file.flush()  # from here on killing the process loses nothing


class _DifferentJournal(UsageError):
    """A journal of ours, of other settings or another version."""


def _foreign(path: Path) -> UsageError:
    return UsageError(f"{path} is there already and is no journal of ours: move it away, or name another output")


def _encode(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
