"""Import a source: rows in, one record per prompt out, and a report of everything that is not in the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from buleyean_rl.data.importers.formats import Format, detect_format, find_format
from buleyean_rl.data.importers.logs import DEFAULT
from buleyean_rl.data.importers.redact import KINDS, redact_record
from buleyean_rl.data.importers.rows import Discards
from buleyean_rl.data.importers.scores import Choices
from buleyean_rl.data.importers.sources import Placed, open_rows
from buleyean_rl.data.records import RejectionRecord, SkipBad, reject_row, write_folded
from buleyean_rl.errors import RecordError, UsageError

ROWS_LOOKED_AT = 20  # by `auto`
ROWS_PER_TICK = 1000
MAX_ERRORS_KEPT = 20


@dataclass
class ImportReport:
    """What an import read, wrote and left out.

    Args:
        source: the file or data set.
        output: the records file.
        format: the format it was read as.
        rows: rows read.
        records: records written, one per prompt.
        rejections: the sum of all their counts.
        answers: rejected answers in them.
        chosen_discarded: answers that were chosen, accepted, or never rejected.
        ties: pairs of equal scores.
        without_rejection: rows in which nothing was rejected.
        duplicates_folded: rejected answers that repeat another one of their prompt.
        prompts_repeated: records that joined an earlier one of the same prompt.
        empty: rejected answers that are "".
        same_as_chosen: rows that reject the very text they choose.
        skipped: bad rows left out.
        errors: the first messages about those.
        redacted: finds of personal data taken out, by kind; None where nobody asked for it.
    """

    source: str
    output: str
    format: str
    rows: int = 0
    records: int = 0
    rejections: int = 0
    answers: int = 0
    chosen_discarded: int = 0
    ties: int = 0
    without_rejection: int = 0
    duplicates_folded: int = 0
    prompts_repeated: int = 0
    empty: int = 0
    same_as_chosen: int = 0
    skipped: int = 0
    errors: list[str] = field(default_factory=list)
    redacted: dict[str, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for a person: what was written, then what was not, zeros left out."""
        notes = {
            "chosen, accepted or never rejected answers discarded": self.chosen_discarded,
            "ties, which reject nothing": self.ties,
            "rows without a rejection": self.without_rejection,
            "duplicate answers folded into counts": self.duplicates_folded,
            "rows that joined an earlier record of the same prompt": self.prompts_repeated,
            "empty answers kept (training drops them: they have no token to reject)": self.empty,
            "rows that reject the very text they choose, kept": self.same_as_chosen,
            "bad rows skipped": self.skipped,
        }
        taken_out = ", ".join(f"{number:,} {kind}" for kind, number in (self.redacted or {}).items())
        return [
            f"{self.source} ({self.format}): {self.rows:,} rows -> {self.records:,} records, "
            f"{self.rejections:,} rejections of {self.answers:,} answers, in {self.output}",
            *(f"  {what}: {number:,}" for what, number in notes.items() if number),
            *([f"  redacted: {taken_out}; names and addresses are not looked for"] if self.redacted else []),
            *(f"  {error}" for error in self.errors[:3]),
        ]


def import_records(
    source: str,
    output: Path | str,
    *,
    format: str = "auto",
    split: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    choices: Choices = DEFAULT,
    redact: bool = False,
    progress: Callable[[int], object] | None = None,
) -> ImportReport:
    """Turn a file, a folder or a Hub data set into a records file, one record per prompt.

    Args:
        source: a .jsonl, .json, .csv or .tsv file, a folder of bad answers, or a Hub data set id.
        output: the records file to write; it appears whole or not at all.
        format: a format's name; "auto" looks at the first rows.
        split: the part of a Hub data set.
        limit: stop once there are so many records.
        skip_bad: leave bad rows out and count them, instead of stopping at the first.
        choices: what the user says of rows that do not speak for themselves.
        redact: take e-mail addresses, phone numbers and keys out.
        progress: told the number of rows read, every thousand.

    Raises:
        RecordError: with the place of the first bad row; or nothing in the source is a rejection.
        UsageError: no such format, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit}: it must be 1 or more")
    chosen_format = None if format == "auto" else find_format(format, choices)
    found: Counter[str] = Counter()
    report, discards = ImportReport(source, str(output), format), Discards()

    def note(error: RecordError) -> None:
        report.skipped += 1
        if len(report.errors) < MAX_ERRORS_KEPT:
            report.errors.append(str(error))

    def note_unreadable(error: RecordError) -> None:
        report.rows += 1
        note(error)

    chosen_format, rows = rows_in(source, chosen_format, choices, split, note_unreadable if skip_bad else False)
    report.format = chosen_format.name
    convert = chosen_format.convert

    def records() -> Iterator[RejectionRecord]:
        any_rejected = False
        for place, row in rows:
            report.rows += 1
            if progress is not None and report.rows % ROWS_PER_TICK == 0:
                progress(report.rows)
            try:
                for record in convert(row, discards):
                    any_rejected = True
                    yield redact_record(record, found) if redact else record
            except RecordError as error:
                reject_row(error, source, place, note if skip_bad else False)
        if not any_rejected:
            problem = f"has no rejected answer in {report.rows:,} rows read as {report.format}"
            raise RecordError(f"{problem}; nothing was written", path=source)

    written = write_folded(output, records(), limit=limit)
    for name, value in (asdict(discards) | asdict(written)).items():
        if name != "answers_folded":
            setattr(report, name, value)
    report.duplicates_folded += written.answers_folded
    report.redacted = {kind: found[kind] for kind in KINDS} if redact else None
    return report


def rows_in(
    source: str,
    known: Format | None,
    choices: Choices = DEFAULT,
    split: str | None = None,
    skip_bad: SkipBad = False,
) -> tuple[Format, Placed]:
    """The rows of a source with their places, and the format they are in.

    Args:
        source: see `open_rows`.
        known: the format, if it is known; None looks at the first rows.
        choices: what the user says of the rows.
        split: see `open_rows`.
        skip_bad: see `open_rows`.

    Raises:
        RecordError: the source cannot be read, or is in no known format.
    """
    rows = open_rows(source, split=split, skip_bad=skip_bad)
    if known is not None:
        return known, rows
    first = list(islice(rows, ROWS_LOOKED_AT))
    try:
        found = detect_format([row for _, row in first], choices)
    except RecordError as error:
        raise RecordError(error.problem, path=source) from error
    return found, chain(first, rows)
