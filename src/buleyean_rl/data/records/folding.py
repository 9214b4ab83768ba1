"""One record per prompt out of many: the labels of a text are rounds of it.

merge_records   several records of one prompt
fold_records    any records, in memory
write_folded    any records, through a file: only an index in memory

An answer's rounds are those of the records it stands in, whatever else its prompt has: rejected once in two records of
one round each it is 1 of 2; rejected in one and absent from the other, 1 of 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from buleyean_rl.data.records.files import decode_json, format_record, replace_file
from buleyean_rl.data.records.prompt import Prompt
from buleyean_rl.data.records.record import (
    JudgedAnswer,
    RejectionRecord,
    build_record,
    merge_answers,
    parse_record,
)
from buleyean_rl.data.records.values import MAX_INTEGER
from buleyean_rl.errors import RecordError

COPY_BYTES = 1 << 20
FilePart = tuple[int, int]  # offset, length


def merge_records(records: Sequence[RejectionRecord]) -> RejectionRecord:
    """One record out of several of the same prompt: counts and rounds of equal answers add up.

    Args:
        records: at least one; all with the first one's prompt.

    Returns:
        The merged record, its answers in the order of their first appearance. Token ids are those of the first
        tokenizer that is named; a policy stays only where all records have it. Rounds beyond what a records file can
        say are scaled down with their count.
    """
    if len(records) == 1:
        return records[0]
    tokenizer = next((record.tokenizer for record in records if record.tokenizer), None)
    answers = [
        answer if record.tokenizer == tokenizer else replace(answer, token_ids=None)
        for record in records
        for answer in record.entries()
    ]
    policy = records[0].policy
    same_policy = all(record.policy == policy for record in records)
    merged = [_bound(answer) for answer in merge_answers(answers)]
    return build_record(records[0].prompt, merged, tokenizer, policy if same_policy else None)


def _bound(answer: JudgedAnswer) -> JudgedAnswer:
    """An answer with rounds that a records file can say, rejected at the same rate."""
    if answer.rounds <= MAX_INTEGER:
        return answer
    count = max(min(answer.count, 1), answer.count * MAX_INTEGER // answer.rounds)
    return replace(answer, count=count, rounds=MAX_INTEGER)


def fold_records(records: Iterable[RejectionRecord]) -> list[RejectionRecord]:
    """One record per prompt, in the order of first appearance.

    Args:
        records: few enough for memory; see `write_folded` for others.
    """
    by_prompt: dict[Prompt, list[RejectionRecord]] = {}
    for record in records:
        by_prompt.setdefault(record.prompt, []).append(record)
    return [merge_records(group) for group in by_prompt.values()]


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
        bounded: answers whose rounds add up to more than a records file can say, and were scaled down.
    """

    records: int = 0
    rejections: int = 0
    answers: int = 0
    answers_folded: int = 0
    prompts_repeated: int = 0
    empty: int = 0
    bounded: int = 0

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
        self.bounded += sum(record.rounds.count(MAX_INTEGER) for record in folded)


def write_folded(path: Path | str, records: Iterable[RejectionRecord], *, limit: int | None = None) -> FoldReport:
    """Write one record per prompt, in the order of first appearance, with only an index in memory.

        records --> spool, and where the lines of each repeated prompt stand --second pass--> file

    The file appears whole or not at all, and not if there is no record.

    Args:
        path: the target; replaced if it exists.
        records: streamed once.
        limit: stop reading once there are so many records.

    Raises:
        RecordError: as `write_records`, or no record came.
    """
    report = FoldReport()
    first_lines: dict[int, FilePart] = {}  # hash of a prompt -> its first line
    repeats: dict[FilePart, list[FilePart]] = {}  # first line -> the later lines of that prompt
    with replace_file(path) as target, tempfile.TemporaryFile(dir=Path(target.name).parent) as spool:
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
