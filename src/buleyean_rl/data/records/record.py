"""One rejection record: what it is, every check on it, and how duplicates fold into counts.

Errors raised here name no place: the reader of the file adds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from buleyean_rl.errors import RecordError

Span = tuple[int, int]
Spans = tuple[Span, ...]
Messages = tuple[tuple[str, str], ...]
Prompt = str | Messages

MAX_ROUNDS = 2**31 - 1  # counts travel as 32-bit integers further on


@dataclass(frozen=True)
class RejectionRecord:
    """A prompt and the answers that were rejected for it.

    `make_record` checks and folds; building one by hand does neither.

    Args:
        prompt: the user's text, or a whole conversation as (role, content) messages.
        rejected_responses: K >= 1 answers. A text stands here twice only where its spans differ; "" is the
            answer that ended before it began.
        rejection_counts: c_k >= 0, how often each was rejected, one of them at least 1. With 0 stands an answer that
            was up for rejection and never was, such as a sample of the model's own.
        total_rounds: T >= max(c_k), how often each could have been rejected.
        rejected_spans: per answer, the [start, end) character ranges that are wrong; () for the whole answer.
    """

    prompt: Prompt
    rejected_responses: tuple[str, ...]
    rejection_counts: tuple[int, ...]
    total_rounds: int
    rejected_spans: tuple[Spans, ...]


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
        fail(f"rejected_responses is {kind_of(responses)}: it must be a list of texts")
    if not responses:
        fail("rejected_responses is empty: a record needs at least one rejected answer")
    texts = [_response(value, k) for k, value in enumerate(responses)]
    numbers = [1] * len(texts) if counts is None else _counts(counts, len(texts))
    largest = max(numbers)
    if largest == 0:
        fail("every rejection count is 0: a record needs at least one rejected answer")
    rounds = largest if total_rounds is None else _whole(total_rounds, "total_rounds", 1)
    if largest > rounds:
        fail(
            f"a rejection count is {largest} but total_rounds is {rounds}: "
            "no answer can be rejected in more rounds than there were"
        )
    ranges: list[Spans] = [()] * len(texts) if spans is None else _all_spans(spans, texts)
    if len(texts) == 1:
        return RejectionRecord(checked_prompt, (texts[0],), (largest,), rounds, (ranges[0],))
    return _folded(checked_prompt, zip(texts, numbers, ranges, strict=True), rounds)


def parse_record(row: Mapping[str, Any]) -> RejectionRecord:
    """A record from one JSON object of a records file.

    Args:
        row: snake_case or camelCase keys; `messages` may stand for `prompt`, and `rejected` (a text or a
            list) for `rejected_responses`. Other keys are ignored.

    Raises:
        RecordError: as `make_record`, or a key is missing or given in two spellings.
    """
    prompt, responses = pick(row, "prompt", "messages"), rejected_answers(row)
    if prompt is None or responses is None:
        missing = "prompt" if prompt is None else "rejected_responses"
        fail(f"has no {missing} (its keys: {keys_of(row)})")
    return make_record(
        prompt,
        responses,
        pick(row, "rejection_counts", "rejectionCounts"),
        pick(row, "total_rounds", "totalRounds"),
        pick(row, "rejected_spans", "rejectedSpans"),
    )


def rejected_answers(row: Mapping[str, Any]) -> Any:
    """The rejected answers of a row as they stand there; a single text as a list of one, None if missing."""
    value = pick(row, "rejected_responses", "rejectedResponses", "rejected")
    return [value] if isinstance(value, str) else value


def pick(row: Mapping[str, Any], *names: str) -> Any:
    """The value a row has under one of several spellings of a key; None if missing or null.

    Raises:
        RecordError: two spellings are given at once.
    """
    found = [name for name in names if row.get(name) is not None]
    if len(found) > 1:
        fail(f"has both {found[0]!r} and {found[1]!r}, which mean the same: keep one")
    return row[found[0]] if found else None


def parse_prompt(value: object) -> Prompt:
    """A prompt: text, or a conversation whose last word is not the assistant's.

    Raises:
        RecordError: empty, not text, or a conversation that ends with an answer.
    """
    if isinstance(value, list | tuple):
        messages = parse_messages(value, "prompt")
        if messages[-1][0] == "assistant":
            fail("the prompt ends with an assistant message: put a rejected answer into rejected_responses")
        if not any(content.strip() for _, content in messages):
            fail("the prompt is empty: every message is blank")
        return messages[0][1] if len(messages) == 1 and messages[0][0] == "user" else messages
    text = parse_text(value, "prompt")
    if not text.strip():
        fail("the prompt is empty: give the text the answers were for, or remove the record")
    return text


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as a conversation that an engine answers."""
    messages = (("user", prompt),) if isinstance(prompt, str) else prompt
    return [{"role": role, "content": content} for role, content in messages]


def parse_messages(value: object, name: str) -> Messages:
    """A conversation as (role, content) pairs.

    Args:
        value: a list of {"role", "content"} objects; content is text, or a list of text parts.
        name: what to call it in an error.

    Raises:
        RecordError: not such a list, or empty.
    """
    if not isinstance(value, list | tuple) or not value:
        fail(f"{name} is {kind_of(value)}: it must be a list of messages with a role and a content")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            fail(f'{name}[{i}] is {kind_of(message)}: it must be {{"role": "user", "content": "..."}}')
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role.strip():
            fail(f"{name}[{i}] has no role: it must be user, assistant or system")
        if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
            content = "".join(parse_text(part["text"], f"{name}[{i}].content") for part in content)
        messages.append((role, parse_text(content, f"{name}[{i}].content")))
    return tuple(messages)


def parse_text(value: object, name: str) -> str:
    """Text that every tokenizer and every UTF-8 file can hold.

    Raises:
        RecordError: not text, or text with half a surrogate pair in it.
    """
    if not isinstance(value, str):
        fail(f"{name} is {kind_of(value)}: it must be text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            fail(f"{name} has half a surrogate pair at character {error.start}, which is not text: remove it")
    return value


def _response(value: object, k: int) -> str:
    text = parse_text(value, f"rejected_responses[{k}]")
    if text and text.isspace():
        fail(f'rejected_responses[{k}] is only whitespace: remove it, or write "" if the answer was empty')
    return text


def _counts(value: object, wanted: int) -> list[int]:
    if not isinstance(value, list | tuple):
        fail(f"rejection_counts is {kind_of(value)}: it must be a list of whole numbers")
    if len(value) != wanted:
        fail(f"rejection_counts has {len(value)} entries for {wanted} rejected_responses: give each a count")
    return [_whole(count, f"rejection_counts[{k}]", 0) for k, count in enumerate(value)]


def _whole(value: object, name: str, least: int) -> int:
    # isinstance alone would let true and false through.
    if not isinstance(value, int) or isinstance(value, bool):
        fail(f"{name} is {kind_of(value)}: it must be a whole number, {least} or more")
    if not least <= value <= MAX_ROUNDS:
        fail(f"{name} is {kind_of(value)}: it must be between {least} and {MAX_ROUNDS}")
    return value


def _all_spans(value: object, texts: Sequence[str]) -> list[Spans]:
    if not isinstance(value, list | tuple):
        fail(f"rejected_spans is {kind_of(value)}: it must be a list, one list of [start, end] per answer")
    if len(value) != len(texts):
        fail(f"rejected_spans has {len(value)} entries for {len(texts)} rejected_responses: give each a list")
    return [_spans(spans, text, k) for k, (spans, text) in enumerate(zip(value, texts, strict=True))]


def _spans(value: object, text: str, k: int) -> Spans:
    """One answer's spans, sorted; those that overlap or touch are one."""
    if not isinstance(value, list | tuple):
        fail(f"rejected_spans[{k}] is {kind_of(value)}: it must be a list of [start, end], [] for all of it")
    checked: list[Span] = []
    for i, span in enumerate(value):
        if not isinstance(span, list | tuple) or [type(offset) for offset in span] != [int, int]:
            fail(f"rejected_spans[{k}][{i}] is {kind_of(span)}: it must be [start, end], two whole numbers")
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
    entries = (entry for record in group for entry in _entries(record))
    return _folded(group[0].prompt, entries, sum(record.total_rounds for record in group))


def fold_records(records: Iterable[RejectionRecord]) -> list[RejectionRecord]:
    """One record per prompt, in the order of first appearance, held in memory.

    Args:
        records: any records; see `write_folded` for files too big to hold.
    """
    by_prompt: dict[Prompt, list[RejectionRecord]] = {}
    for record in records:
        by_prompt.setdefault(record.prompt, []).append(record)
    return [merge_records(group) for group in by_prompt.values()]


def accumulate_records(records: Iterable[RejectionRecord]) -> list[RejectionRecord]:
    """One record per prompt of verdicts on different answers: counts add, and each answer keeps its own rate.

    `fold_records` reads two records of one prompt as rounds in which all their answers took part, so that one
    rejected in the first alone has half the rate. Here each answer's rounds are those it was given in: where
    it was rejected in all of them it stays rejected for certain.

    Args:
        records: any records, such as those of several minings.

    Returns:
        Records in the order of first appearance, held in memory. T is the most rounds that any answer of the
        prompt has; the counts of the others are scaled to it.
    """
    by_prompt: dict[Prompt, dict[tuple[str, Spans], tuple[int, int]]] = {}
    for record in records:
        answers = by_prompt.setdefault(record.prompt, {})
        for text, count, spans in _entries(record):
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


def _entries(record: RejectionRecord) -> Iterable[tuple[str, int, Spans]]:
    return zip(record.rejected_responses, record.rejection_counts, record.rejected_spans, strict=True)


def _folded(prompt: Prompt, entries: Iterable[tuple[str, int, Spans]], rounds: int) -> RejectionRecord:
    """Add up the counts of equal (text, spans).

    The same text with other spans stays apart, so that every token keeps exactly the rejections that meant
    it: the trie adds them up where they meet.
    """
    totals: dict[tuple[str, Spans], int] = {}
    for text, count, spans in entries:
        totals[text, spans] = totals.get((text, spans), 0) + count
    return RejectionRecord(
        prompt,
        tuple(text for text, _ in totals),
        tuple(totals.values()),
        max(rounds, *totals.values()),  # folding inside one record may need more rounds than it had
        tuple(spans for _, spans in totals),
    )


def fail(problem: str) -> NoReturn:
    """Raise a RecordError without a place."""
    raise RecordError(problem)


def kind_of(value: object) -> str:
    """What a JSON value is, in words short enough for an error message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        # Python refuses to print an integer of thousands of digits, and nobody could read it.
        return f"the number {value}" if abs(value) < 10**20 else "a huge number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def keys_of(row: Mapping[str, Any]) -> str:
    """The keys of a row, for an error message."""
    return ", ".join(list(row)[:12]) or "none"
