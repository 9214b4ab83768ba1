"""One record per prompt out of many: the labels of a text are rounds of it.

fold_records   in memory
fold_stream    through temporary files: bounded memory
write_folded   the same, into a records file

An answer's rounds are those of the records it stands in, whatever else its prompt has: rejected once in two records of
one round each it is 1 of 2; rejected in one and absent from the other, 1 of 1. A record that rejects nothing stays, as
anchors; or, where accepted answers are not kept, is only a round of the texts that others reject.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from buleyean_rl.data.records.answers import JudgedAnswer, Spans, merge_answers
from buleyean_rl.data.records.files import decode_json, format_record
from buleyean_rl.data.records.prompt import Prompt
from buleyean_rl.data.records.record import RejectionRecord, build_record, parse_record
from buleyean_rl.data.records.spool import Place, Spool
from buleyean_rl.data.records.values import MAX_INTEGER
from buleyean_rl.errors import RecordError
from buleyean_rl.system.outputs import check_output_file, is_stream, open_output

GROUP_RECORDS = 4096  # of one prompt, in memory at once


def merge_records(records: Sequence[RejectionRecord]) -> RejectionRecord:
    """One record out of several of the same prompt: counts and rounds of equal answers add up.

    Args:
        records: all with the first one's prompt.

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
    """What folding made of a stream of records.

    Args:
        records: left, one per prompt.
        rejections: the sum of all counts.
        answers: rejected answers left, each once.
        accepted: answers left that were never rejected, each once.
        answers_folded: answers that repeated an earlier one of the same prompt in another record.
        prompts_repeated: records whose prompt an earlier one had.
        empty: answers left that are "".
        rounds_won: answers not rejected that count as rounds of the same text, rejected in another record.
        bounded: answers whose rounds add up to more than a records file can say, and were scaled down.
    """

    records: int = 0
    rejections: int = 0
    answers: int = 0
    accepted: int = 0
    answers_folded: int = 0
    prompts_repeated: int = 0
    empty: int = 0
    rounds_won: int = 0
    bounded: int = 0

    def add(self, record: RejectionRecord) -> None:
        """Count a record that is kept as if its prompt were new."""
        self.rejections += sum(record.rejection_counts)
        self._count([record], 1)

    def fold(
        self,
        kept: Sequence[RejectionRecord],
        folded: Sequence[RejectionRecord],
        compared: Sequence[RejectionRecord] = (),
    ) -> None:
        """Count records that were added before as those they were folded into; those compared won a round."""
        self._count(kept, -1)
        self._count(folded, 1)
        self.prompts_repeated += len(kept) - len(folded)
        self.bounded += sum(record.rounds.count(MAX_INTEGER) for record in folded)
        self.rounds_won += sum(len(record.rejected_responses) for record in compared)

    def _count(self, records: Sequence[RejectionRecord], sign: int) -> None:
        self.records += sign * len(records)
        for record in records:
            rejected, accepted = record.count_answers()
            self.answers += sign * rejected
            self.accepted += sign * accepted
            self.empty += sign * record.rejected_responses.count("")


def keep_all(_record: RejectionRecord) -> bool:
    """Keep every record, for `write_folded`."""
    return True


def write_folded(
    path: Path | str,
    records: Iterable[RejectionRecord],
    *,
    limit: int | None = None,
    is_kept: Callable[[RejectionRecord], bool] = keep_all,
) -> FoldReport:
    """Write one record per prompt, in the order of first appearance, in bounded memory.

    The file appears whole or not at all, and not if nothing in it is rejected.

    Args:
        path: as for `write_records`.
        records: streamed once.
        limit: stop reading once there are so many records.
        is_kept: of each record as it comes, whether it is written; else it is only a round of what others reject.

    Raises:
        RecordError: no rejected answer is left.
        UsageError: as `write_records`.
    """
    report = FoldReport()
    output = Path(path)
    check_output_file(output, overwrite=True)
    folder = None if is_stream(output) else Path(os.path.realpath(output)).parent  # where there is room for the records
    with open_output(output) as target:
        target.writelines(_fold_lines(records, report, limit, folder, is_kept))
        if not report.rejections:
            raise RecordError("no rejected answer was found, so nothing was written")
    return report


def fold_stream(records: Iterable[RejectionRecord], folder: Path | None = None) -> Iterator[RejectionRecord]:
    """One record per prompt, in the order of first appearance, in bounded memory.

    Args:
        records: streamed once, all of them before the first is returned.
        folder: where the temporary file is; None for the system's.
    """
    for line in _fold_lines(records, FoldReport(), folder=folder):
        yield parse_record(decode_json(line))


def _fold_lines(
    records: Iterable[RejectionRecord],
    report: FoldReport,
    limit: int | None = None,
    folder: Path | None = None,
    is_kept: Callable[[RejectionRecord], bool] = keep_all,
) -> Iterator[bytes]:
    """The lines of the folded records.

    records --> Spool --second pass, prompt by prompt--> lines
    """
    prompts: set[int] = set()  # hashes of those that are kept, up to the limit
    with closing(Spool(folder)) as spool:
        for record in records:
            is_written = is_kept(record)
            spool.add(record, is_written)
            if not is_written:
                continue
            report.add(record)
            if limit is not None:
                prompts.add(hash(record.prompt))
                if len(prompts) == limit:
                    break
        for places in spool.groups():
            if len(places) == 1:
                yield spool.read_line(places[0])
                continue
            folded = _fold_group(spool, places, report)
            for record in folded:
                yield format_record(record).encode() + b"\n"


def _fold_group(spool: Spool, places: Sequence[Place], report: FoldReport) -> list[RejectionRecord]:
    """Records whose prompts have one hash, folded by the prompt itself; so many at a time: a log may have only one."""
    chunks = [places[start : start + GROUP_RECORDS] for start in range(0, len(places), GROUP_RECORDS)]
    loaded = [spool.read(place) for place in places] if len(chunks) == 1 else None
    rejected: dict[Prompt, set[str]] = {}
    if not all(is_kept for is_kept, _ in places):
        for record in loaded or map(spool.read, places):
            if record.rejects:
                rejected.setdefault(record.prompt, set()).update(record.rejected_responses)
    folded: list[RejectionRecord] = []
    numbers: dict[Prompt, int] = {}  # of the prompts, so that each is hashed once a record
    distinct: set[tuple[int, str, Spans]] = set()
    for chunk in chunks:
        kept, compared, group = [*folded], list[RejectionRecord](), [*folded]
        for (is_kept, _), record in zip(chunk, loaded or map(spool.read, chunk), strict=True):
            if is_kept:
                kept.append(record)
                group.append(record)
                number = numbers.setdefault(record.prompt, len(numbers))
                distinct.update((number, answer.text, answer.spans) for answer in record.entries())
                report.answers_folded += len(record.rejected_responses)
            elif (part := _keep_answers(record, rejected.get(record.prompt, set()))) is not None:
                compared.append(part)
                group.append(part)
        folded = fold_records(group)
        report.fold(kept, folded, compared)
    report.answers_folded -= len(distinct)
    return folded


def _keep_answers(record: RejectionRecord, texts: set[str]) -> RejectionRecord | None:
    """A record with only some of its answers; None where none is left."""
    if texts.issuperset(record.rejected_responses):
        return record
    answers = [answer for answer in record.entries() if answer.text in texts]
    return build_record(record.prompt, answers, record.tokenizer, record.policy) if answers else None
