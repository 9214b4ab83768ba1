"""Rows with a chosen and a rejected answer, as TRL, LLaMA-Factory, Axolotl, ms-swift and OpenAI write them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from buleyean_rl.data.importers.protocol import Choices, Discards, Format, Preference
from buleyean_rl.data.importers.rows import (
    OTHER_PROMPT_KEYS,
    PROMPT_KEYS,
    accepted_record,
    add_context,
    answers_to_text,
    build_record,
    context_to_prompt,
    is_conversation,
    pick_prompt,
    refuse_row,
    split_conversation,
    unpack_messages,
)
from buleyean_rl.data.records import RejectionRecord, Row, parse_messages, parse_prompt, parse_text, pick
from buleyean_rl.data.records.values import describe, fail

REJECTED_KEYS = ("rejected", "rejected_response", "non_preferred_output", "rejected_messages")
CHOSEN_KEYS = ("chosen", "chosen_response", "preferred_output", "chosen_messages")
_PLAIN_KEYS = {"prompt", "chosen", "rejected"}
_SIDE_KEYS = frozenset({*REJECTED_KEYS, *CHOSEN_KEYS})
_ALL_PROMPT_KEYS = frozenset({*PROMPT_KEYS, *OTHER_PROMPT_KEYS})


def _read_records(row: Row, discards: Discards, _choices: Choices) -> Iterator[RejectionRecord]:
    """The rejected answer of a pair, and a round that the chosen one won.

    Answers are texts beside a prompt, message lists beside a prompt, or whole conversations that share
    everything but their last message, as messages or as a text of `Human:` and `Assistant:` (HH-RLHF).
    """
    pair = _rename(row, discards)
    prompt, answers = _pick_side(pair, "rejected", "chosen", discards)
    record = build_record(discards, prompt, answers)
    yield record
    if pair.get("chosen") is not None:
        chosen = _chosen_texts(pair)
        discards.chosen_discarded += len(chosen)
        discards.same_as_chosen += isinstance(answers, list) and any(text in answers for text in chosen)
        yield from accepted_record(record.prompt, chosen)


def _read_preference(row: Row) -> Preference:
    pair = _rename(answers_to_text(row, (*CHOSEN_KEYS, *REJECTED_KEYS)), Discards())
    prompt, rejected = _pick_side(pair, "rejected", "chosen", Discards())
    chosen = [] if pair.get("chosen") is None else _pick_side(pair, "chosen", "rejected", Discards())[1]
    answers = [*_parse_texts(chosen, "chosen"), *_parse_texts(rejected, "rejected")]
    return Preference(parse_prompt(prompt), tuple(answers), (0,) * len(chosen) + (1,) * len(rejected), 1)


def _rename(row: Row, discards: Discards) -> Row:
    """A pair of any dialect with its sides under `chosen` and `rejected`, those that are messages as lists."""
    if row.keys() == _PLAIN_KEYS:
        sides = {side: unpack_messages(row[side], side, discards) for side in ("chosen", "rejected")}
        return {"prompt": row["prompt"], **sides}
    pair = {key: value for key, value in row.items() if key not in _SIDE_KEYS}
    chosen, rejected = pick(row, *CHOSEN_KEYS), pick(row, *REJECTED_KEYS)
    if chosen is None:
        messages = pair.get("messages")
        if isinstance(messages, list) and is_conversation(messages) and messages[1:]:  # ms-swift
            chosen, pair["messages"] = messages, messages[:-1]
        elif "rejected_response" in row:  # ms-swift before 3
            chosen = row.get("response")
    has_prompt = not pair.keys().isdisjoint(_ALL_PROMPT_KEYS)
    for side, value in (("chosen", chosen), ("rejected", rejected)):
        unpacked = unpack_messages(value, side, discards)
        pair[side] = unpacked if has_prompt else _parse_transcript(unpacked)
    return pair


def _pick_side(row: Row, side: str, other_side: str, discards: Discards) -> tuple[Any, Any]:
    """The prompt of a pair, and the answers of one of its two sides, unchecked.

    The other side is looked at only where the prompt is the part that both share.
    """
    answer, other = row[side], row[other_side]
    if answer is None:
        refuse_row(f"has no {side} answer", row)
    if not is_conversation(answer):
        return pick_prompt(row, discards), [answer] if isinstance(answer, str) else answer
    context, text = split_conversation(answer, side, discards)
    if context and context[0][0] == "assistant":
        fail(f"{side} is more than one answer: which of them was {side} is unclear")
    if not context:
        return pick_prompt(row, discards), [text]
    if is_conversation(other) and (len(other) < 2 or parse_messages(other[:-1], other_side) != context):
        fail(f"{other_side} and {side} part ways before their last answers: which was {side} is unclear")
    return add_context(row, context_to_prompt(context), discards), [text]


def _chosen_texts(row: Row) -> list[Any]:
    """The chosen answers of a row as far as they can be read: they are only compared."""
    chosen = row["chosen"]
    if is_conversation(chosen):
        return [chosen[-1:]]
    return chosen if isinstance(chosen, list) else [chosen]


def _parse_transcript(value: Any) -> Any:
    """The messages of a text in which each turn starts with its speaker; anything else as it is."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", value) if isinstance(value, str) else (value,)
    if before or not turns:
        return value
    roles = ({"Human": "user", "Assistant": "assistant"}[speaker] for speaker in turns[::2])
    return [{"role": role, "content": text.strip()} for role, text in zip(roles, turns[1::2], strict=True)]


def _parse_texts(values: Any, name: str) -> list[str]:
    if not isinstance(values, list):
        fail(f"{name} is {describe(values)}: it must be text, a list of texts, or messages")
    return [parse_text(value, f"{name}[{k}]") for k, value in enumerate(values)]


PAIRS = Format(
    "pairs",
    "prompt, chosen, rejected",
    lambda row: not row.keys().isdisjoint(REJECTED_KEYS),
    _read_records,
    _read_preference,
)
