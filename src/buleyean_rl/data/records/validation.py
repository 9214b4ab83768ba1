"""What training would make of a records file: how much it would use, fold, cut and drop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from buleyean_rl.data.records.files import handle_bad_row, read_rows
from buleyean_rl.data.records.prompt import looks_rendered
from buleyean_rl.data.records.record import RejectionRecord, parse_record, pick_rejected_answers
from buleyean_rl.data.records.sorted_rows import SortedRows
from buleyean_rl.data.records.spool import HASHES
from buleyean_rl.errors import RecordError
from buleyean_rl.system.wording import counted


class MeasuredRecord(NamedTuple):
    """A record in tokens.

    Args:
        prompt: its tokens.
        answers: of each, its tokens, and which of the first of them were judged.
        notes: what was changed or noticed in its text, with how often.
    """

    prompt: int
    answers: Sequence[tuple[int, Sequence[bool]]]
    notes: Mapping[str, int]


# Raises RecordError for a record that the chat template refuses.
Measure = Callable[[RejectionRecord], MeasuredRecord]

MAX_ERRORS_LISTED = 20
RENDERED_LABEL = (
    "prompts that look like a chat template's output and would be wrapped twice (give `messages` or the bare question)"
)


@dataclass
class Tokens:
    """A records file in a model's tokens.

    Args:
        max_length: tokens that a prompt and an answer may have together.
        prompts: tokens of all prompts that leave room for an answer.
        responses: tokens of all their answers, before cutting.
        longest_prompt: tokens of the longest prompt.
        longest_response: tokens of the longest answer.
        truncated: answers cut to fit.
        cut: tokens cut off them.
        over_length: records dropped because the prompt leaves no room for an answer.
        notes: what was changed or noticed in the text, with how often.
        remarks: on the model, in sentences.
    """

    max_length: int
    prompts: int = 0
    responses: int = 0
    longest_prompt: int = 0
    longest_response: int = 0
    truncated: int = 0
    cut: int = 0
    over_length: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)


@dataclass
class Validation:
    """What `validate_records` counted.

    Args:
        path: the file.
        rows: lines that are not blank.
        bad: lines that are no record; `errors` holds the first of them.
        records: lines that are one.
        rejections: the sum of their counts.
        answers: their rejected answers, each once.
        accepted: their answers that were never rejected, each once.
        anchors: records in which nothing was rejected: they only anchor.
        duplicates: answers that repeat another of their line, folded into its count.
        rendered: prompts that look like a chat template's output.
        repeated_prompts: records whose prompt an earlier line had.
        empty: rejected answers that are "", which have no token to reject.
        dropped: records training leaves out: nothing but empty answers, no room, or no rejected token in it.
        rejecting: records with a rejected token to train on.
        tokens: the token counts, if there was a tokenizer to count with.
        errors: the first messages, each with file and line.
    """

    path: str
    rows: int = 0
    bad: int = 0
    records: int = 0
    rejections: int = 0
    answers: int = 0
    accepted: int = 0
    anchors: int = 0
    duplicates: int = 0
    rendered: int = 0
    repeated_prompts: int = 0
    empty: int = 0
    dropped: int = 0
    rejecting: int = 0
    tokens: Tokens | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether training can read the file: no bad line, and a rejection left to train on."""
        return not self.bad and self.rejecting > 0

    def as_dict(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return {**asdict(self), "usable": self.usable}

    def _remedy(self) -> str:
        if self.bad:
            return "mend or remove the bad lines" if self.records else "no line is a record: see `buleyean data import`"
        if not self.answers:
            return "nothing in it is rejected: a file needs one rejection"
        if self.answers + self.accepted == self.empty:
            return "all answers are empty, with no token to reject"
        return "no record with a rejection is left to train on"

    def lines(self) -> list[str]:
        """The report for a person, zeros left out."""
        notes = {
            "accepted answers, which anchor the model": self.accepted,
            "records of accepted answers alone": self.anchors,
            "duplicate answers folded into counts": self.duplicates,
            "records that repeat a prompt, folded in training": self.repeated_prompts,
            RENDERED_LABEL: self.rendered,
            "empty answers, with no token to reject": self.empty,
        }
        if self.tokens is not None:
            notes |= {
                "tokens of prompts": self.tokens.prompts,
                "tokens of answers": self.tokens.responses,
                "tokens of the longest prompt": self.tokens.longest_prompt,
                "tokens of the longest answer": self.tokens.longest_response,
                f"prompts that leave no room within {self.tokens.max_length:,} tokens": self.tokens.over_length,
                f"answers cut at {self.tokens.max_length:,} tokens": self.tokens.truncated,
                "tokens cut off": self.tokens.cut,
                **self.tokens.notes,
            }
        notes |= {"records dropped": self.dropped, "bad lines": self.bad}
        verdict = "usable" if self.usable else f"not usable: {self._remedy()}"
        return [
            f"{self.path}: {counted(self.rows, 'row')}, {counted(self.records, 'record')}, "
            f"{counted(self.rejections, 'rejection')}; {verdict}",
            *(f"  {what}: {number:,}" for what, number in notes.items() if number),
            *(f"  note: {remark}" for remark in (self.tokens.remarks if self.tokens else [])),
            *(f"  {error}" for error in self.errors),
        ]


def validate_records(
    path: Path | str,
    *,
    measure: Measure | None = None,
    max_length: int = 1024,
    progress: Callable[[int], object] | None = None,
) -> Validation:
    """Read a whole records file and count what training would use, fold, cut and drop.

    Args:
        path: the file.
        measure: a record in tokens; without it the text alone is checked.
        max_length: with `measure`, tokens that a prompt and an answer may have together.
        progress: told the number of rows, every hundred.

    Raises:
        RecordError: the file is missing, empty or binary. Bad lines are counted, not raised.
    """
    report = Validation(str(path), tokens=Tokens(max_length) if measure else None)
    # the texts themselves, or a set of hashes, would not fit in memory
    with closing(SortedRows(1, *HASHES)) as prompts:
        for record in _count_records(path, report, measure, progress):
            prompts.add(hash(record.prompt))
        report.repeated_prompts = report.records - sum(len(np.unique(rows)) for rows in prompts.read())
    return report


def _count_records(
    path: Path | str, report: Validation, measure: Measure | None, progress: Callable[[int], object] | None
) -> Iterator[RejectionRecord]:
    """The records of a file, each once it is counted."""

    def note(error: RecordError) -> None:
        report.rows += 1
        report.bad += 1
        if len(report.errors) < MAX_ERRORS_LISTED:
            report.errors.append(str(error))

    for line, row in read_rows(path, skip_bad=note):
        try:
            record = parse_record(row)
            measured = measure(record) if measure is not None else None
        except RecordError as error:
            handle_bad_row(error, path, line, note)
            continue
        report.rows += 1
        report.records += 1
        if progress is not None and report.rows % 100 == 0:
            progress(report.rows)
        report.rejections += sum(record.rejection_counts)
        report.duplicates += max(0, len(pick_rejected_answers(row)) - len(record.rejected_responses))
        rejected, accepted = record.count_answers()
        report.answers += rejected
        report.accepted += accepted
        report.anchors += not record.rejects
        report.empty += record.rejected_responses.count("")
        report.rendered += looks_rendered(record.prompt)
        if measured is None or report.tokens is None:
            left = [bool(text) for text in record.rejected_responses]
        else:
            left = _count_tokens(report.tokens, measured)
        usable = any(left if not record.rejects else compress(left, record.rejection_counts))
        report.dropped += not usable
        report.rejecting += usable and record.rejects
        yield record


def _count_tokens(tokens: Tokens, record: MeasuredRecord) -> list[bool]:
    """Add a record to the token counts; whether of each answer a token that was judged is left after cutting."""
    tokens.notes.update(record.notes)
    tokens.longest_prompt = max(tokens.longest_prompt, record.prompt)
    room = tokens.max_length - record.prompt
    if room < 1:
        tokens.over_length += 1
        return []
    tokens.prompts += record.prompt
    for length, _ in record.answers:
        tokens.responses += length
        tokens.longest_response = max(tokens.longest_response, length)
        tokens.truncated += length > room
        tokens.cut += max(0, length - room)
    return [any(rejected[:room]) for _, rejected in record.answers]
