"""One rejection record: what it is, and every check on it.

    a JSON object --parse_record--> checked fields --make_record--> RejectionRecord

Errors raised here name no place: the reader of the file adds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from buleyean_rl.data.records.prompt import Prompt, parse_prompt
from buleyean_rl.data.records.values import describe, fail, list_keys, parse_integer, parse_text, pick

Span = tuple[int, int]
Spans = tuple[Span, ...]
Entry = tuple[str, int, Spans]  # an answer, its count, its spans


@dataclass(frozen=True)
class RejectionRecord:
    """A prompt and the answers that were rejected for it.

    `make_record` checks and folds; building one by hand does neither.

    Args:
        prompt: the user's text, or a whole conversation as (role, content) messages.
        rejected_responses: K >= 1 answers. A text stands here twice only where its spans differ; "" is the
            answer that ended before it began.
        rejection_counts: c_k >= 0, how often each was rejected, one of them at least 1. 0 means an answer that
            was up for rejection and never was, such as a sample of the model's own.
        total_rounds: T >= max(c_k), how often each could have been rejected.
        rejected_spans: per answer, the [start, end) character ranges that are wrong; () for the whole answer.
    """

    prompt: Prompt
    rejected_responses: tuple[str, ...]
    rejection_counts: tuple[int, ...]
    total_rounds: int
    rejected_spans: tuple[Spans, ...]

    def entries(self) -> Iterable[Entry]:
        """(answer, count, spans) of each answer."""
        return zip(self.rejected_responses, self.rejection_counts, self.rejected_spans, strict=True)


def make_record(
    prompt: object,
    responses: object,
    counts: object = None,
    total_rounds: object = None,
    spans: object = None,
) -> RejectionRecord:
    """Check everything about one record and fold its duplicate answers into counts.

    Args:
        prompt: text, or a list of {"role", "content"} messages; one user message alone becomes its text.
        responses: the rejected answers, a list of texts.
        counts: how often each was rejected; None for once each.
        total_rounds: T; None derives it as the largest count after folding.
        spans: per answer a list of [start, end) character offsets, [] for the whole answer; None: all whole.

    Returns:
        The record. Answers alike in text and spans are one, their counts added; T grows if the sum needs it.

    Raises:
        RecordError: says which part is wrong, without a place: the caller knows the file and line.
    """
    checked_prompt = parse_prompt(prompt)
    if not isinstance(responses, list | tuple):
        fail(f"rejected_responses is {describe(responses)}: it must be a list of texts")
    if not responses:
        fail("rejected_responses is empty: a record needs at least one rejected answer")
    texts = [_parse_answer(value, k) for k, value in enumerate(responses)]
    checked_counts = [1] * len(texts) if counts is None else _parse_counts(counts, len(texts))
    largest = max(checked_counts)
    if largest == 0:
        fail("every rejection count is 0: a record needs at least one rejected answer")
    rounds = largest if total_rounds is None else parse_integer(total_rounds, "total_rounds", 1)
    if largest > rounds:
        fail(
            f"a rejection count is {largest} but total_rounds is {rounds}: "
            "no answer can be rejected in more rounds than there were"
        )
    checked_spans: list[Spans] = [()] * len(texts) if spans is None else _parse_all_spans(spans, texts)
    return fold_entries(checked_prompt, zip(texts, checked_counts, checked_spans, strict=True), rounds)


def parse_record(row: Mapping[str, Any]) -> RejectionRecord:
    """A record from one JSON object of a records file.

    Args:
        row: snake_case or camelCase keys; `messages` may stand for `prompt`, and `rejected` (a text or a
            list) for `rejected_responses`. Other keys are ignored.

    Raises:
        RecordError: as `make_record`, or a key is missing or given in two spellings.
    """
    prompt, responses = pick(row, "prompt", "messages"), pick_rejected_answers(row)
    if prompt is None or responses is None:
        missing = "prompt" if prompt is None else "rejected_responses"
        fail(f"has no {missing} (its keys: {list_keys(row)})")
    return make_record(
        prompt,
        responses,
        pick(row, "rejection_counts", "rejectionCounts"),
        pick(row, "total_rounds", "totalRounds"),
        pick(row, "rejected_spans", "rejectedSpans"),
    )


def pick_rejected_answers(row: Mapping[str, Any]) -> Any:
    """The rejected answers of a row, unchecked; a single text as a list of one, None if missing."""
    value = pick(row, "rejected_responses", "rejectedResponses", "rejected")
    return [value] if isinstance(value, str) else value


def fold_entries(prompt: Prompt, entries: Iterable[Entry], rounds: int) -> RejectionRecord:
    """A record of answers that may repeat: counts of equal (text, spans) add up.

    The same text with other spans stays apart, so that every token has exactly the rejections that meant it; the
    prefix trie adds them up where they meet.

    Args:
        prompt: checked.
        entries: checked, at least one.
        rounds: T; it grows where a sum exceeds it.
    """
    totals: dict[tuple[str, Spans], int] = {}
    for text, count, spans in entries:
        totals[text, spans] = totals.get((text, spans), 0) + count
    return RejectionRecord(
        prompt,
        tuple(text for text, _ in totals),
        tuple(totals.values()),
        max(rounds, *totals.values()),
        tuple(spans for _, spans in totals),
    )


def _parse_answer(value: object, k: int) -> str:
    text = parse_text(value, f"rejected_responses[{k}]")
    if text and text.isspace():
        fail(f'rejected_responses[{k}] is only whitespace: remove it, or write "" if the answer was empty')
    return text


def _parse_counts(value: object, answers: int) -> list[int]:
    if not isinstance(value, list | tuple):
        fail(f"rejection_counts is {describe(value)}: it must be a list of whole numbers")
    if len(value) != answers:
        fail(f"rejection_counts has {len(value)} entries for {answers} rejected_responses: give each a count")
    return [parse_integer(count, f"rejection_counts[{k}]", 0) for k, count in enumerate(value)]


def _parse_all_spans(value: object, texts: Sequence[str]) -> list[Spans]:
    if not isinstance(value, list | tuple):
        fail(f"rejected_spans is {describe(value)}: it must be a list, one list of [start, end] per answer")
    if len(value) != len(texts):
        fail(f"rejected_spans has {len(value)} entries for {len(texts)} rejected_responses: give each a list")
    return [_parse_spans(spans, text, k) for k, (spans, text) in enumerate(zip(value, texts, strict=True))]


def _parse_spans(value: object, text: str, k: int) -> Spans:
    """One answer's spans, sorted; those that overlap or touch are merged."""
    if not isinstance(value, list | tuple):
        fail(f"rejected_spans[{k}] is {describe(value)}: it must be a list of [start, end], [] for all of it")
    checked: list[Span] = []
    for i, span in enumerate(value):
        if not isinstance(span, list | tuple) or [type(offset) for offset in span] != [int, int]:
            fail(f"rejected_spans[{k}][{i}] is {describe(span)}: it must be [start, end], two whole numbers")
        start, end = span
        if not 0 <= start < end <= len(text):
            fail(
                f"rejected_spans[{k}][{i}] is [{start}, {end}] and the answer has {len(text)} characters: "
                f"it needs 0 <= start < end <= {len(text)}"
            )
        checked.append((start, end))
    merged: list[Span] = []
    for start, end in sorted(checked):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)
