"""One rejection record: what it is, and every check on it.

    a JSON object --parse_record--> checked fields --make_record--> RejectionRecord

Errors raised here name no place: the reader of the file adds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from buleyean_rl.data.records.answers import (
    JudgedAnswer,
    Span,
    Spans,
    TokenIds,
    merge_answers,
    merge_spans,
    share_rounds,
)
from buleyean_rl.data.records.prompt import Prompt, parse_prompt
from buleyean_rl.data.records.values import MAX_INTEGER, describe, fail, list_keys, parse_integer, parse_text, pick
from buleyean_rl.system.wording import counted

# Context that other tools keep beside the prompt; a record has it in `messages`.
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
HISTORY_KEYS = ("history", "chat_history")
_PLAIN_KEYS = {"prompt", "rejected_responses", "rejection_counts", "total_rounds"}
FORMAT_VERSION = 2  # of a line; 1, or none: one T for all answers, no token ids

Policy = dict[str, Any]


@dataclass(frozen=True, init=False)
class RejectionRecord:
    """A prompt and the answers that were judged for it.

    `make_record` checks and folds; building one by hand does neither.

    Args:
        prompt: the user's text, or a whole conversation as (role, content) messages.
        rejected_responses: K >= 1 answers. A text stands here twice only where its spans differ; "" is the
            answer that ended before it began.
        rejection_counts: c_k >= 0, how often each was rejected. 0 means an answer that was judged and never rejected,
            which anchors the model.
        rounds: T_k >= c_k, how often each was judged. Of a text with several spans, each entry has its own rounds.
        rejected_spans: per answer, the [start, end) character ranges that are wrong; () for the whole answer.
        token_ids: per answer the tokens that were drawn, None where they are not recorded.
        ended: per answer whether it came to its end, None where that is not recorded.
        tokenizer: the hash of the tokenizer that `token_ids` belong to.
        policy: what drew the answers: model, adapter, temperature.
    """

    prompt: Prompt
    rejected_responses: tuple[str, ...]
    rejection_counts: tuple[int, ...]
    rounds: tuple[int, ...]
    rejected_spans: tuple[Spans, ...]
    token_ids: tuple[TokenIds | None, ...]
    ended: tuple[bool | None, ...]
    tokenizer: str | None
    policy: Policy | None = field(hash=False)

    def __init__(
        self,
        prompt: Prompt,
        rejected_responses: tuple[str, ...],
        rejection_counts: tuple[int, ...],
        rounds: tuple[int, ...],
        rejected_spans: tuple[Spans, ...],
        token_ids: tuple[TokenIds | None, ...] = (),
        ended: tuple[bool | None, ...] = (),
        tokenizer: str | None = None,
        policy: Policy | None = None,
    ) -> None:
        unrecorded = (None,) * len(rejected_responses)
        vars(self).update(  # all at once: a frozen class sets one by one, in twice the time
            prompt=prompt,
            rejected_responses=rejected_responses,
            rejection_counts=rejection_counts,
            rounds=rounds,
            rejected_spans=rejected_spans,
            token_ids=token_ids or unrecorded,
            ended=ended or unrecorded,
            tokenizer=tokenizer,
            policy=policy,
        )

    @property
    def rejects(self) -> bool:
        """Whether any of its answers was rejected; one that rejects none only anchors."""
        return any(self.rejection_counts)

    def count_answers(self) -> tuple[int, int]:
        """How many answers were rejected, one for each of its spans; and how many texts never were."""
        counts = self.rejection_counts
        rejected = {text for text, count in zip(self.rejected_responses, counts, strict=True) if count}
        return len(counts) - counts.count(0), len(set(self.rejected_responses) - rejected)

    def entries(self) -> Iterator[JudgedAnswer]:
        """Its answers, one by one."""
        columns = (self.rejected_responses, self.rejection_counts, self.rounds, self.rejected_spans)
        for column in zip(*columns, self.token_ids, self.ended, strict=True):
            yield JudgedAnswer(*column)


def make_record(
    prompt: object,
    responses: object,
    counts: object = None,
    total_rounds: object = None,
    spans: object = None,
    *,
    rounds: object = None,
    token_ids: object = None,
    ended: object = None,
    tokenizer: object = None,
    policy: object = None,
) -> RejectionRecord:
    """Check everything about one record and fold its duplicate answers into counts.

    Args:
        prompt: text, or a list of {"role", "content"} messages; one user message alone becomes its text.
        responses: the judged answers, a list of texts.
        counts: how often each was rejected, 0 for one that never was; None for once each.
        total_rounds: T, how often every answer was judged; None with no `rounds` for the largest count.
        spans: per answer a list of [start, end) character offsets, [] for the whole answer; None: all whole.
        rounds: T_k, how often each answer was judged, instead of `total_rounds`.
        token_ids: per answer the ids that were drawn, or None; they need `tokenizer`.
        ended: per answer true, false or None.
        tokenizer: the hash of the tokenizer of `token_ids`.
        policy: what drew the answers, an object of texts and numbers.

    Returns:
        The record. Answers alike in text and spans are one: their counts add up, and so do their `rounds`. With one T
        for all answers, a text that stands here several times was judged T times in all, or as often as its counts add
        up to; its spans are cut where they overlap, and the counts add up there.

    Raises:
        RecordError: says which part is wrong, without a place: the caller knows the file and line.
    """
    checked_prompt = parse_prompt(prompt)
    texts = _parse_answers(responses)
    size = len(texts)
    checked_counts = (1,) * size if counts is None else _parse_integers(counts, "rejection_counts", size, 0)
    if rounds is not None and total_rounds is not None:
        fail("has both 'rounds' and 'total_rounds', which mean the same: keep one")
    if rounds is not None:
        checked_rounds = _parse_integers(rounds, "rounds", size, 1)
    else:
        largest = max(1, *checked_counts)
        checked_rounds = (largest if total_rounds is None else parse_integer(total_rounds, "total_rounds", 1),) * size
    for count, judged in zip(checked_counts, checked_rounds, strict=True):
        if count > judged:
            name = "total_rounds is" if rounds is None else "its rounds are"
            fail(
                f"a rejection count is {count} but {name} {judged}: "
                "no answer can be rejected in more rounds than there were"
            )
    checked_spans: tuple[Spans, ...] = ((),) * size if spans is None else _parse_all_spans(spans, texts)
    checked_ids = (None,) * size if token_ids is None else _parse_token_ids(token_ids, size)
    if checked_ids.count(None) < size and tokenizer is None:
        fail("has token_ids but no tokenizer: name the hash of the tokenizer they belong to, or leave them out")
    record = RejectionRecord(
        checked_prompt,
        texts,
        checked_counts,
        checked_rounds,
        checked_spans,
        checked_ids,
        (None,) * size if ended is None else _parse_ended(ended, size),
        None if tokenizer is None else parse_text(tokenizer, "tokenizer"),
        None if policy is None else _parse_policy(policy),
    )
    return record if len(set(texts)) == size else _fold_answers(record, same_rounds=rounds is None)


def parse_record(row: Mapping[str, Any]) -> RejectionRecord:
    """A record from one JSON object of a records file.

    Args:
        row: snake_case or camelCase keys; `messages` may stand for `prompt`, and `rejected` (a text or a
            list) for `rejected_responses`. Other keys are ignored.

    Raises:
        RecordError: as `make_record`, or a key is missing or given in two spellings, or a later version wrote it, or
            part of the conversation stands beside the prompt.
    """
    if row.keys() == _PLAIN_KEYS and None not in row.values():  # most are: no spelling is to be looked for
        return make_record(row["prompt"], pick_rejected_answers(row), row["rejection_counts"], row["total_rounds"])
    version = pick(row, "format_version", "formatVersion")
    if version is not None and parse_integer(version, "format_version", 1) > FORMAT_VERSION:
        fail(f"is of records format {version}, of a later version of buleyean-rl: update it to read this file")
    prompt, responses = pick(row, "prompt", "messages"), pick_rejected_answers(row)
    if prompt is None or responses is None:
        missing = "prompt" if prompt is None else "rejected_responses"
        fail(f"has no {missing} (its keys: {list_keys(row)}): `buleyean data import` makes records of other formats")
    context = next((key for key in (*SYSTEM_KEYS, *HISTORY_KEYS) if row.get(key)), None)
    if context is not None:
        fail(f"has its {context} beside the prompt: `data import` puts it into messages, as a records file needs it")
    return make_record(
        prompt,
        responses,
        pick(row, "rejection_counts", "rejectionCounts"),
        pick(row, "total_rounds", "totalRounds"),
        pick(row, "rejected_spans", "rejectedSpans"),
        rounds=row.get("rounds"),
        token_ids=pick(row, "token_ids", "tokenIds"),
        ended=row.get("ended"),
        tokenizer=row.get("tokenizer"),
        policy=row.get("policy"),
    )


def pick_rejected_answers(row: Mapping[str, Any]) -> Any:
    """The rejected answers of a row, unchecked; a single text as a list of one, None if missing."""
    value = pick(row, "rejected_responses", "rejectedResponses", "rejected")
    return [value] if isinstance(value, str) else value


def _fold_answers(record: RejectionRecord, *, same_rounds: bool) -> RejectionRecord:
    """A record in which a text stands several times, with those alike as one."""
    answers = share_rounds(record.entries()) if same_rounds else merge_answers(record.entries())
    if max(answer.rounds for answer in answers) > MAX_INTEGER:
        fail(f"the rounds of one answer add up to more than {MAX_INTEGER}: give smaller ones")
    return build_record(record.prompt, answers, record.tokenizer, record.policy)


def build_record(
    prompt: Prompt, answers: Sequence[JudgedAnswer], tokenizer: str | None = None, policy: Policy | None = None
) -> RejectionRecord:
    """A record of answers that are checked and stand in it once each, at least one."""
    return RejectionRecord(
        prompt,
        tuple(answer.text for answer in answers),
        tuple(answer.count for answer in answers),
        tuple(answer.rounds for answer in answers),
        tuple(answer.spans for answer in answers),
        tuple(answer.token_ids for answer in answers),
        tuple(answer.ended for answer in answers),
        tokenizer,
        policy,
    )


def _parse_answers(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        fail(f"rejected_responses is {describe(value)}: it must be a list of texts")
    if not value:
        fail("rejected_responses is empty: a record needs at least one answer")
    return tuple([_parse_answer(text, f"rejected_responses[{k}]") for k, text in enumerate(value)])


def _parse_answer(value: object, name: str) -> str:
    text = parse_text(value, name)
    if text and text.isspace():
        fail(f'{name} is only whitespace: remove it, or write "" if the answer was empty')
    return text


def _parse_column(value: object, name: str, answers: int, items: str) -> Sequence[object]:
    """A list with one entry for each answer."""
    if not isinstance(value, list | tuple):
        fail(f"{name} is {describe(value)}: it must be a list of {items}, one for each answer")
    if len(value) != answers:
        fail(
            f"{name} has {counted(len(value), 'entry', 'entries')} for {answers} rejected_responses: "
            "give each answer one"
        )
    return value


def _parse_integers(value: object, name: str, answers: int, minimum: int) -> tuple[int, ...]:
    column = _parse_column(value, name, answers, "whole numbers")
    return tuple([parse_integer(count, f"{name}[{k}]", minimum) for k, count in enumerate(column)])


def _parse_token_ids(value: object, answers: int) -> tuple[TokenIds | None, ...]:
    column = _parse_column(value, "token_ids", answers, "lists of token ids")
    return tuple([None if ids is None else _parse_ids(ids, f"token_ids[{k}]") for k, ids in enumerate(column)])


def _parse_ids(value: object, name: str) -> TokenIds:
    if not isinstance(value, list | tuple):
        fail(f"{name} is {describe(value)}: it must be a list of token ids, or null")
    return tuple(parse_integer(token, f"{name}[{i}]", 0) for i, token in enumerate(value))


def _parse_ended(value: object, answers: int) -> tuple[bool | None, ...]:
    column = _parse_column(value, "ended", answers, "true, false or null")
    checked: list[bool | None] = []
    for k, ended in enumerate(column):
        if ended is not None and not isinstance(ended, bool):
            fail(f"ended[{k}] is {describe(ended)}: it must be true, false or null")
        checked.append(ended)
    return tuple(checked)


def _parse_policy(value: object) -> Policy:
    if not isinstance(value, Mapping):
        fail(f'policy is {describe(value)}: it must be an object, such as {{"model": ..., "temperature": ...}}')
    return {
        parse_text(name, "a key of policy"): _parse_scalar(entry, f"policy[{name!r}]") for name, entry in value.items()
    }


def _parse_scalar(value: object, name: str) -> object:
    if isinstance(value, str):
        return parse_text(value, name)
    if value is not None and not isinstance(value, bool | int | float):
        fail(f"{name} is {describe(value)}: it must be text, a number, true, false or null")
    if isinstance(value, float) and not math.isfinite(value):
        fail(f"{name} is {value}, which JSON cannot say: leave it out")
    return value


def _parse_all_spans(value: object, texts: Sequence[str]) -> tuple[Spans, ...]:
    column = _parse_column(value, "rejected_spans", len(texts), "lists of [start, end]")
    return tuple([_parse_spans(spans, text, k) for k, (spans, text) in enumerate(zip(column, texts, strict=True))])


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
                f"rejected_spans[{k}][{i}] is [{start}, {end}] and the answer has {counted(len(text), 'character')}: "
                f"it needs 0 <= start < end <= {len(text)}"
            )
        checked.append((start, end))
    return merge_spans(checked)
