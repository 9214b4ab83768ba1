"""One judged answer, and several of the same text as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

Span = tuple[int, int]
Spans = tuple[Span, ...]
TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One answer of a record.

    Args:
        text: what was answered; "" where the answer ended before it began.
        count: c, how often it was rejected, for what is in `spans`.
        rounds: T >= c, how often it was judged.
        spans: the [start, end) character ranges that are wrong; () for the whole answer.
        token_ids: the tokens that were drawn, if they are recorded.
        ended: whether the answer came to its end, if that is recorded.
    """

    text: str
    count: int
    rounds: int
    spans: Spans = ()
    token_ids: TokenIds | None = None
    ended: bool | None = None


def merge_answers(answers: Iterable[JudgedAnswer]) -> list[JudgedAnswer]:
    """Answers, those alike in text and spans as one: counts and rounds add up, what is recorded of any is kept."""
    merged: dict[tuple[str, Spans], JudgedAnswer] = {}
    for answer in answers:
        first = merged.setdefault((answer.text, answer.spans), answer)
        if first is not answer:
            merged[answer.text, answer.spans] = replace(
                first,
                count=first.count + answer.count,
                rounds=first.rounds + answer.rounds,
                token_ids=answer.token_ids if first.token_ids is None else first.token_ids,
                ended=answer.ended if first.ended is None else first.ended,
            )
    return list(merged.values())


def share_rounds(answers: Iterable[JudgedAnswer]) -> list[JudgedAnswer]:
    """Answers that were all judged in the same T rounds: one that stands here several times is cut into parts."""
    by_text: dict[str, list[JudgedAnswer]] = {}
    for answer in answers:
        by_text.setdefault(answer.text, []).append(answer)
    return [part for group in by_text.values() for part in (_cut_into_parts(group) if len(group) > 1 else group)]


def _cut_into_parts(group: Sequence[JudgedAnswer]) -> Iterator[JudgedAnswer]:
    """One text with several spans in the same rounds as parts that do not overlap, each rejected equally often."""
    (whole,) = merge_answers(replace(answer, spans=()) for answer in group)
    length, total = len(whole.text), group[0].rounds
    changes: Counter[int] = Counter()  # offset -> how the count changes there
    for answer in group:
        for start, end in answer.spans or ((0, length),):
            changes[start] += answer.count
            changes[end] -= answer.count
    parts: dict[int, list[Span]] = {}
    count = 0
    for start, end in pairwise(sorted(changes)):
        count += changes[start]
        parts.setdefault(count, []).append((start, end))
    parts.pop(0, None)
    for count, spans in (parts or {whole.count: []}).items():
        merged = merge_spans(spans)
        yield replace(whole, count=count, rounds=max(total, count), spans=() if merged == ((0, length),) else merged)


def merge_spans(spans: Iterable[Span]) -> Spans:
    """Spans in order; those that overlap or touch are one."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)
