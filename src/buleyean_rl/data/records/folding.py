"""One record per prompt out of many: counts of equal answers add up.

merge_records        several records of one prompt: rounds add up too
fold_records         any records, in memory
write_folded         any records, through a file: only an index in memory
accumulate_records   verdicts on different answers: each answer has its own rounds
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from buleyean_rl.data.records.files import decode_json, format_record
from buleyean_rl.data.records.prompt import Prompt
from buleyean_rl.data.records.record import RejectionRecord, Spans, fold_entries, parse_record
from buleyean_rl.errors import RecordError
from buleyean_rl.system.outputs import check_output_file, is_stream, open_output

COPY_BYTES = 1 << 20
FilePart = tuple[int, int]  # offset, length


def merge_records(records: Iterable[RejectionRecord]) -> RejectionRecord:
    """One record out of several of the same prompt: counts of equal answers add up, and so do the rounds.

    Two records of T = 1 tell of two rounds, so the merged T is 2: an answer rejected in both has count 2, one
    rejected in the first alone has count 1 of 2.

    Args:
        records: at least one; all with the first one's prompt.

    Returns:
        The merged record, its answers in the order of their first appearance.
    """
    group = list(records)
    if len(group) == 1:
        return group[0]
    entries = (entry for record in group for entry in record.entries())
    return fold_entries(group[0].prompt, entries, sum(record.total_rounds for record in group))


def fold_records(records: Iterable[RejectionRecord]) -> list[RejectionRecord]:
    """One record per prompt, in the order of first appearance.

    Args:
        records: few enough for memory; see `write_folded` for others.
    """
    by_prompt: dict[Prompt, list[RejectionRecord]] = {}
    for record in records:
        by_prompt.setdefault(record.prompt, []).append(record)
    return [merge_records(group) for group in by_prompt.values()]


def accumulate_records(records: Iterable[RejectionRecord]) -> list[RejectionRecord]:
    """One record per prompt of verdicts on different answers: counts add, and each answer keeps its own rate.

    `fold_records` reads two records of one prompt as rounds in which all their answers took part, so that one
    rejected in the first alone has half the rate. Here an answer's rounds are those of its own records: where it
    was rejected in all of them it stays rejected for certain.

    Args:
        records: any records that fit in memory, such as those of several minings.

    Returns:
        Records in the order of first appearance. T is the largest number of rounds that any answer of the prompt
        has; the counts of the others are scaled to it.
    """
    by_prompt: dict[Prompt, dict[tuple[str, Spans], tuple[int, int]]] = {}
    for record in records:
        answers = by_prompt.setdefault(record.prompt, {})
        for text, count, spans in record.entries():
            counts, rounds = answers.get((text, spans), (0, 0))
            answers[text, spans] = counts + count, rounds + record.total_rounds
    accumulated = []
    for prompt, answers in by_prompt.items():
        total = max(rounds for _, rounds in answers.values())
        accumulated.append(
            RejectionRecord(
                prompt,
                tuple(text for text, _ in answers),
                tuple(max(min(count, 1), round(count * total / rounds)) for count, rounds in answers.values()),
                total,
                tuple(spans for _, spans in answers),
            )
        )
    return accumulated


@dataclass
class FoldReport:
    """What `write_folded` wrote, and how much of it was repetition.

    Args:
        records: lines written, one per prompt.
        rejections: the sum of all counts.
        answers: rejected answers written, each once.
        answers_folded: rejected answers that repeated an earlier one of the same prompt in another record.
        prompts_repeated: records whose prompt an earlier one had.
        empty: answers written that are "".
    """

    records: int = 0
    rejections: int = 0
    answers: int = 0
    answers_folded: int = 0
    prompts_repeated: int = 0
    empty: int = 0

    def add(self, record: RejectionRecord) -> None:
        """Count a record as if its prompt were new."""
        self.records += 1
        self.rejections += sum(record.rejection_counts)
        self.answers += len(record.rejected_responses)
        self.empty += record.rejected_responses.count("")

    def fold(self, group: list[RejectionRecord], folded: list[RejectionRecord]) -> None:
        """Count records that were added before as those they were folded into."""
        answers_folded = _count_answers(group) - _count_answers(folded)
        self.records -= len(group) - len(folded)
        self.prompts_repeated += len(group) - len(folded)
        self.answers -= answers_folded
        self.answers_folded += answers_folded
        self.empty -= _count_empty(group) - _count_empty(folded)


def write_folded(path: Path | str, records: Iterable[RejectionRecord], *, limit: int | None = None) -> FoldReport:
    """Write one record per prompt, in the order of first appearance, with only an index in memory.

        records --> spool, and where the lines of each repeated prompt stand --second pass--> file

    The file appears whole or not at all, and not if there is no record.

    Args:
        path: as for `write_records`.
        records: streamed once.
        limit: stop reading once there are so many records.

    Raises:
        RecordError: no record came.
        UsageError: as `write_records`.
    """
    report = FoldReport()
    first_lines: dict[int, FilePart] = {}  # hash of a prompt -> its first line
    repeats: dict[FilePart, list[FilePart]] = {}  # first line -> the later lines of that prompt
    output = Path(path)
    check_output_file(output, overwrite=True)
    folder = None if is_stream(output) else output.resolve().parent  # where there is room for the records
    with open_output(output) as target, tempfile.TemporaryFile(dir=folder) as spool:
        offset = 0
        for record in records:
            line = format_record(record).encode() + b"\n"
            part = (offset, len(line))
            first = first_lines.setdefault(hash(record.prompt), part)
            if first is not part:
                repeats.setdefault(first, []).append(part)
            spool.write(line)
            offset += len(line)
            report.add(record)
            if len(first_lines) == limit:
                break
        if not report.records:
            raise RecordError("no rejected answer was found, so nothing was written")
        later_lines = (part for parts in repeats.values() for part in parts)
        copied = 0
        for start, length in sorted([*repeats, *later_lines]):
            _copy(spool, target, copied, start)
            copied = start + length
            if (start, length) in repeats:
                lines = [_read_part(spool, part) for part in [(start, length), *repeats[start, length]]]
                group = [parse_record(decode_json(line)) for line in lines]
                # By the prompt itself, so that two prompts of one hash stay two.
                folded = fold_records(group)
                for record in folded:
                    target.write(format_record(record).encode() + b"\n")
                report.fold(group, folded)
        _copy(spool, target, copied, offset)
    return report


def _count_answers(records: Iterable[RejectionRecord]) -> int:
    return sum(len(record.rejected_responses) for record in records)


def _count_empty(records: Iterable[RejectionRecord]) -> int:
    return sum(record.rejected_responses.count("") for record in records)


def _read_part(file: IO[bytes], part: FilePart) -> bytes:
    offset, length = part
    file.seek(offset)
    return file.read(length)


def _copy(source: IO[bytes], target: IO[bytes], start: int, end: int) -> None:
    source.seek(start)
    while start < end:
        chunk = source.read(min(COPY_BYTES, end - start))
        target.write(chunk)
        start += len(chunk)
