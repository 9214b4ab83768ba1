"""Answers and verdicts on disk as they fall, so that mining can be killed and resumed; in memory is where they stand.

{"format": 3, "model": ..., "prompts": ..., settings}            the header: what the answers depend on
{"tokenizer": "..."}                                             whose ids the token_ids are
{"prompt": 0, "sample": 0, "answer": "...", "token_ids": [...], "ended": true}    an answer
{"prompt": 1, "sample": 0, "cause": "content filter", ...}       why there is none, and never will be
{"judge": "loops", "prompt": 0, "sample": 0, ...}                a verdict on an answer
{"records": "sha256"}                                            a records file that was written from all that

A draw is a sample of the answers to a prompt: its number is `prompt * samples + sample`.
"""

from __future__ import annotations

import json
import threading
from array import array
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from buleyean_rl.data.records import decode_json
from buleyean_rl.errors import RecordError, UsageError
from buleyean_rl.inference.protocol import Answer, Unanswered
from buleyean_rl.mining.judges import Verdict
from buleyean_rl.system.disk import name_full_disk
from buleyean_rl.system.files import file_sha256
from buleyean_rl.system.locks import lock_file

T = TypeVar("T")

FORMAT = 3
REMEDY = "name another output, or begin anew with --overwrite"


def journal_path(output: Path) -> Path:
    """The journal beside a records file."""
    return output.parent / f"{output.stem}.mined.jsonl"


def read_answers(path: Path, prompts: int) -> list[list[str]]:
    """The distinct answers of a journal to each prompt, in the order of the samples.

    Args:
        path: the file; nobody else is writing to it.
        prompts: number of them.
    """
    by_prompt: list[dict[int, str]] = [{} for _ in range(prompts)]
    with path.open("rb") as file:
        for line in file:
            row = decode_json(line)
            if "answer" in row:
                by_prompt[row["prompt"]][row["sample"]] = row["answer"]
    return [list(dict.fromkeys(answers[sample] for sample in sorted(answers))) for answers in by_prompt]


class Stored(Generic[T]):
    """What the lines of a file say, by draw; a line is read when it is asked for.

    Args:
        read: what the line at a place says.
    """

    def __init__(self, read: Callable[[int], T]) -> None:
        self._read, self._places = read, array("q")

    def __contains__(self, draw: int) -> bool:
        return draw < len(self._places) and self._places[draw] > 0

    def __getitem__(self, draw: int) -> T:
        return self._read(self._places[draw])

    def store(self, draw: int, place: int) -> None:
        """The line at a place is of this draw. The first line of a file is of none."""
        if draw >= len(self._places):
            self._places.extend([0] * (draw + 1 - len(self._places)))
        self._places[draw] = place


class Journal:
    """Answers and verdicts on disk, a JSON line each; one process at a time.

    Args:
        path: the file; an earlier one is read first, without the half line that killing may leave.
        header: what the answers depend on: at least model and prompts; samples, if there are several of a prompt.
        overwrite: begin anew where an earlier journal has another header or format, or is damaged.

    Attributes:
        tokenizer: the hash of the tokenizer whose ids the answers have, if any.
        answers: by draw.
        unanswered: by draw, why there is no answer and never will be.

    Raises:
        UsageError: the file is no journal, which stays as it is, or has another header or format, or another process
            has it open.
        RecordError: an earlier journal is damaged.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path, self._header = path, {"format": FORMAT, **header}
        self._samples = int(header.get("samples", 1))
        self.tokenizer: str | None = None
        if path.exists() and not path.is_file():
            raise _foreign(path)
        self._forget()
        self._file = path.open("a+b")
        self._reader, self._lock = path.open("rb"), threading.Lock()  # an engine asks for lines from its own thread
        try:
            lock_file(self._file, path)
            try:
                size = self._read()
            except (_DifferentJournal, RecordError):
                self._file.seek(0)
                if not overwrite and sum(1 for _ in self._file) > 1:  # a header alone holds nothing to lose
                    raise
                self._forget()
                size = 0
            self._file.truncate(size)
            self._size = size
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

    def add_outcome(self, draw: int, outcome: Answer | Unanswered) -> None:
        """Write an answer, or why there is none."""
        row = self._name(draw)
        if isinstance(outcome, Answer):
            place = self._write({**row, "answer": outcome.text, "token_ids": outcome.token_ids, "ended": outcome.ended})
            self.answers.store(draw, place)
        else:
            self.unanswered[draw] = outcome
            self._write({**row, "cause": outcome.cause, "detail": outcome.detail})

    def has_outcome(self, draw: int) -> bool:
        """Whether a draw has an answer, or never will."""
        return draw in self.answers or draw in self.unanswered

    def add_verdict(self, judge: str, draw: int, verdict: Verdict) -> None:
        """Write a judge's verdict on an answer."""
        place = self._write({"judge": judge, **self._name(draw), **asdict(verdict)})
        self.verdicts_of(judge).store(draw, place)

    def verdicts_of(self, judge: str) -> Stored[Verdict]:
        """A judge's verdicts, by draw."""
        return self._verdicts.setdefault(judge, Stored(self._read_verdict))

    def add_records(self, sha256: str) -> None:
        """Write the hash of a records file that is about to take its name."""
        if sha256 not in self._written:
            self._write({"records": sha256})
            self._written.add(sha256)

    def _name(self, draw: int) -> dict[str, int]:
        return dict(zip(("prompt", "sample"), divmod(draw, self._samples), strict=True))

    def _forget(self) -> None:
        """Nothing has been read."""
        self.tokenizer = None
        self.answers: Stored[Answer] = Stored(self._read_answer)
        self.unanswered: dict[int, Unanswered] = {}
        self._verdicts: dict[str, Stored[Verdict]] = {}
        self._written: set[str] = set()

    def _read(self) -> int:
        """Read an earlier journal; returns the size of its whole lines."""
        self._file.seek(0)
        size = 0
        for number, line in enumerate(self._file, start=1):
            if number == 1:
                self._check_header(line)
            elif line.endswith(b"\n"):
                try:
                    self._add_line(decode_json(line), size)
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

    def _add_line(self, row: Mapping[str, Any], place: int) -> None:
        if "judge" in row:
            _parse_verdict(row)
            self.verdicts_of(row["judge"]).store(self._number(row), place)
        elif "answer" in row:
            _parse_answer(row)
            self.answers.store(self._number(row), place)
        elif "cause" in row:
            self.unanswered[self._number(row)] = Unanswered(_text(row["cause"]), _text(row["detail"]))
        elif "tokenizer" in row:
            self.tokenizer = _text(row["tokenizer"])
        else:
            self._written.add(row["records"])

    def _number(self, row: Mapping[str, Any]) -> int:
        """The draw that a line is of."""
        prompt, sample = row["prompt"], row["sample"]
        if not isinstance(prompt, int) or prompt < 0 or sample not in range(self._samples):
            raise ValueError
        return prompt * self._samples + int(sample)

    def _read_answer(self, place: int) -> Answer:
        return _parse_answer(self._read_line(place))

    def _read_verdict(self, place: int) -> Verdict:
        return _parse_verdict(self._read_line(place))

    def _read_line(self, place: int) -> Any:
        with self._lock:
            self._reader.seek(place)
            return json.loads(self._reader.readline())

    def _close(self) -> None:
        self._reader.close()
        with name_full_disk(self.path):  # what could not be written is tried once more
            self._file.close()

    def _write(self, row: Mapping[str, Any]) -> int:
        """Write a line; returns its place."""
        line, place = _encode(row), self._size
        with name_full_disk(self.path):
            self._file.write(line)
            self._file.flush()  # from here on killing the process loses nothing
        self._size += len(line)
        return place


class _DifferentJournal(UsageError):
    """A journal of ours, of other settings or another version."""


def _foreign(path: Path) -> UsageError:
    return UsageError(f"{path} is there already and is no journal of ours: move it away, or name another output")


def _parse_answer(row: Mapping[str, Any]) -> Answer:
    ids = row["token_ids"]
    return Answer(_text(row["answer"]), None, bool(row["ended"]), None if ids is None else tuple(map(int, ids)))


def _parse_verdict(row: Mapping[str, Any]) -> Verdict:
    spans = tuple((int(start), int(end)) for start, end in row["spans"])
    return Verdict(row["rejected"], spans, row["reason"])


def _encode(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
