"""Import sources: rows in, one record per prompt out, and a report of everything that was left out.

names --expand_sources--> sources --open_source--> rows
rows --Format.read_records--> records --redact--> --write_folded--> records file
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from buleyean_rl.data.importers.expand import expand_sources
from buleyean_rl.data.importers.formats import find_format
from buleyean_rl.data.importers.protocol import NO_CHOICES, Choices, Discards, Format
from buleyean_rl.data.importers.redact import KINDS, redact_record
from buleyean_rl.data.importers.sources import open_source
from buleyean_rl.data.records import RejectionRecord, handle_bad_row, looks_rendered, write_folded
from buleyean_rl.data.records.validation import MAX_ERRORS_LISTED, RENDERED_LABEL
from buleyean_rl.errors import NothingRejected, RecordError, UnsupportedContent, UsageError
from buleyean_rl.system.outputs import check_output_file
from buleyean_rl.system.wording import counted

ROWS_PER_TICK = 1000


@dataclass
class ImportReport:
    """What an import read, wrote and left out.

    Args:
        source: the files or data sets, as they were named.
        output: the records file.
        format: the format it was read as; of several sources all of them.
        sources: files and data sets read.
        sources_skipped: those of them that could not be read, or not to their end.
        rows: rows read.
        records: records written, one per prompt.
        rejections: the sum of all their counts.
        answers: rejected answers in them.
        accepted: accepted answers in them, kept as anchors.
        chosen_discarded: answers that were chosen, accepted, or never rejected.
        ties: pairs of equal scores.
        without_rejection: rows in which nothing was rejected.
        duplicates_folded: rejected answers that repeat another one of their prompt.
        prompts_repeated: records that joined an earlier one of the same prompt.
        empty: rejected answers that are "".
        same_as_chosen: rows that reject the very text they choose.
        rendered: prompts that look like a chat template's output.
        unrated: rows without a rejection that nobody rated.
        unusable: reason -> sound rows that training on text cannot use, left out.
        context_dropped: key -> rows imported without what they have under it.
        parsed_texts: conversations that stood in the data as text.
        reasoning_removed: rejected answers whose reasoning was taken out.
        edited: answers that a person edited later, imported as the model wrote them.
        skipped: bad rows left out.
        errors: the first messages about those.
        rounds_won: accepted answers that count as rounds of the same text, rejected elsewhere.
        bounded: answers whose rounds add up to more than a records file can say, and were scaled down.
        redacted: pieces of personal data taken out, by kind; None without redaction.
    """

    source: str
    output: str
    format: str
    sources: int = 1
    sources_skipped: int = 0
    rows: int = 0
    records: int = 0
    rejections: int = 0
    answers: int = 0
    accepted: int = 0
    chosen_discarded: int = 0
    ties: int = 0
    without_rejection: int = 0
    duplicates_folded: int = 0
    prompts_repeated: int = 0
    empty: int = 0
    same_as_chosen: int = 0
    rendered: int = 0
    unrated: int = 0
    unusable: dict[str, int] = field(default_factory=dict)
    context_dropped: dict[str, int] = field(default_factory=dict)
    parsed_texts: int = 0
    reasoning_removed: int = 0
    edited: int = 0
    skipped: int = 0
    rounds_won: int = 0
    bounded: int = 0
    errors: list[str] = field(default_factory=list)
    redacted: dict[str, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for a person: what was written, then what was not, zeros left out.

        A row without a rejection stands here as its accepted answers, or as one without a rating.
        """
        notes = {
            "accepted answers kept as anchors": self.accepted,
            "chosen, accepted or never rejected answers discarded": self.chosen_discarded,
            "ties, which reject nothing": self.ties,
            "rows without a rating": self.unrated,
            "duplicate answers folded into counts": self.duplicates_folded,
            "rows that joined an earlier record of the same prompt": self.prompts_repeated,
            "empty answers, with no token to reject (training drops them)": self.empty,
            "rows that reject the very text they choose": self.same_as_chosen,
            "answers without the reasoning before them": self.reasoning_removed,
            "answers as the model wrote them, before a person edited them": self.edited,
            "conversations parsed out of text": self.parsed_texts,
            **{f"rows left out: {reason}": number for reason, number in self.unusable.items()},
            **{f"rows without their {key}, which no prompt can hold": n for key, n in self.context_dropped.items()},
            "accepted answers that are rounds of the same text, rejected elsewhere": self.rounds_won,
            "answers whose rounds were scaled down to 2,147,483,647": self.bounded,
            RENDERED_LABEL: self.rendered,
            "bad rows skipped": self.skipped,
            "files skipped, or what is left of them": self.sources_skipped,
        }
        files = f" of {self.sources:,} files" if self.sources > 1 else ""
        redacted = ", ".join(f"{number:,} {kind}" for kind, number in (self.redacted or {}).items())
        return [
            f"{self.source} ({self.format}): {counted(self.rows, 'row')}{files} -> {counted(self.records, 'record')}, "
            f"{counted(self.rejections, 'rejection')} of {counted(self.answers, 'answer')}, in {self.output}",
            *(f"  {what}: {number:,}" for what, number in notes.items() if number),
            *([f"  redacted: {redacted}; names and addresses are not looked for"] if self.redacted else []),
            *(f"  {error}" for error in self.errors[:3]),
        ]


def import_records(
    source: str | Sequence[str],
    output: Path | str,
    *,
    format: str = "auto",
    split: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    choices: Choices = NO_CHOICES,
    keep_accepted: bool | None = None,
    redact: bool = False,
    encoding: str | None = None,
    overwrite: bool = True,
    progress: Callable[[int], object] | None = None,
) -> ImportReport:
    """Turn files, folders or Hub data sets into a records file, one record per prompt.

    Args:
        source: see `open_rows`; or several, or patterns, see `expand_sources`. Their order does not matter.
        output: the records file to write; it appears whole or not at all.
        format: a format's name; "auto" looks at the first rows.
        split: the part of a Hub data set.
        limit: stop once there are so many records.
        skip_bad: leave bad rows out and count them, of several files bad ones too, instead of stopping at the first.
        choices: the user's reading of rows that are ambiguous.
        keep_accepted: keep accepted answers, as anchors; None for those of formats that log a model's own answers.
        redact: take e-mail addresses, phone numbers and keys out.
        encoding: of a text file that is not UTF-8, as Python calls it.
        overwrite: replace the file at `output`, if there is one.
        progress: told the number of rows read, every thousand.

    Raises:
        RecordError: with the place of the first bad row; or nothing in the source is a rejection.
        UsageError: no such format, a limit below 1, or an output that may not be written.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit}: it must be 1 or more")
    row_format = None if format == "auto" else find_format(format, choices)
    names = [source] if isinstance(source, str) else list(source)
    sources = expand_sources(names)
    redactions: Counter[str] = Counter()
    report, discards = ImportReport(", ".join(names), str(output), format, len(sources)), Discards()
    check_output_file(Path(output), overwrite=overwrite)
    reading = _Reading(report, discards, choices, keep_accepted, redactions if redact else None, skip_bad, progress)

    def read_all() -> Generator[RejectionRecord]:
        for each in sources:
            try:
                yield from reading.read(each, row_format, split, encoding)
            except RecordError as error:
                if len(sources) == 1 or not skip_bad:
                    raise
                report.sources_skipped += 1
                reading.note(error)
        if not reading.any_rejected:
            problem = _describe_nothing(report, discards, reading.accepted)
            raise NothingRejected(problem, path=report.source, skipped=report.skipped + report.sources_skipped)

    with closing(read_all()) as records:
        folded = write_folded(output, records, limit=limit, is_kept=reading.is_kept)
    for name, value in (asdict(discards) | asdict(folded)).items():
        if name != "answers_folded":
            setattr(report, name, value)
    report.duplicates_folded += folded.answers_folded
    report.chosen_discarded -= folded.rounds_won
    report.redacted = {kind: redactions[kind] for kind in KINDS} if redact else None
    return report


@dataclass
class _Reading:
    """Reads one source after the other, and counts.

    Args:
        report: gets the rows, the formats and the errors.
        discards: get what is left out.
        choices: see `import_records`.
        keep_accepted: see `import_records`.
        redactions: count what is taken out; None takes nothing out.
        skip_bad: see `import_records`.
        progress: see `import_records`.
        any_rejected: whether a row so far has a rejection.
        accepted: answers so far that are kept as anchors.
    """

    report: ImportReport
    discards: Discards
    choices: Choices
    keep_accepted: bool | None
    redactions: Counter[str] | None
    skip_bad: bool
    progress: Callable[[int], object] | None
    any_rejected: bool = False
    accepted: int = 0

    def is_kept(self, record: RejectionRecord) -> bool:
        """Whether a record of the source that is being read is written, and not only compared with those that are."""
        return self._keeps or record.rejects

    def read(
        self, source: str, row_format: Format | None, split: str | None, encoding: str | None
    ) -> Iterator[RejectionRecord]:
        """The records of a source."""
        row_format, rows = open_source(
            source, row_format, self.choices, split, self._note_unreadable if self.skip_bad else False, encoding
        )
        formats = {*self.report.format.split(", "), row_format.name} - {"auto"}
        self.report.format = ", ".join(sorted(formats))
        self._keeps = row_format.keeps_accepted if self.keep_accepted is None else self.keep_accepted
        report, discards, choices, keeps = self.report, self.discards, self.choices, self._keeps
        with closing(rows):
            for line, row in rows:
                report.rows += 1
                if self.progress is not None and report.rows % ROWS_PER_TICK == 0:
                    self.progress(report.rows)
                without_rejection, accepted, rejects = discards.without_rejection, self.accepted, False
                try:
                    for record in row_format.read_records(row, discards, choices):
                        if record.rejects:
                            rejects = self.any_rejected = True
                            report.rendered += looks_rendered(record.prompt)
                        elif keeps:
                            discards.chosen_discarded -= len(record.rejected_responses)
                            self.accepted += len(record.rejected_responses)
                        yield record if self.redactions is None else self._redact(record)
                    if self.accepted > accepted and not rejects:
                        discards.without_rejection = without_rejection  # it is not lost: it anchors
                except UnsupportedContent as error:
                    discards.note_unusable(error.problem)
                except RecordError as error:
                    handle_bad_row(error, source, line, self._note_bad if self.skip_bad else False)

    def note(self, error: RecordError) -> None:
        """Keep the first errors."""
        if len(self.report.errors) < MAX_ERRORS_LISTED:
            self.report.errors.append(str(error))

    def _redact(self, record: RejectionRecord) -> RejectionRecord:
        assert self.redactions is not None
        return redact_record(record, self.redactions if self.is_kept(record) else Counter())

    def _note_bad(self, error: RecordError) -> None:
        self.report.skipped += 1
        self.note(error)

    def _note_unreadable(self, error: RecordError) -> None:
        self.report.rows += 1
        self._note_bad(error)


def _describe_nothing(report: ImportReport, discards: Discards, accepted: int) -> str:
    """That nothing was rejected, and what the rows were instead."""
    accepted += discards.chosen_discarded
    rows = {
        "accepted answers": accepted,
        "rows without a rating": discards.unrated,
        "bad rows skipped": report.skipped,
        **discards.unusable,
    }
    instead = "; ".join(f"{what}: {number:,}" for what, number in rows.items() if number)
    problem = f"has no rejected answer in {counted(report.rows, 'row')} read as {report.format}; nothing was written"
    hint = ". A score below 0.5 rejects: --below sets another limit" if accepted else ""
    return f"{problem} ({instead}){hint}" if instead else problem
