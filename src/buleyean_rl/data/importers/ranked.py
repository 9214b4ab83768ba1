"""Rows with several answers to one prompt: rejections already counted, or scores."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from buleyean_rl.data.importers.protocol import Choices, Discards, Format, Preference
from buleyean_rl.data.importers.rows import (
    ANSWER_KEYS,
    accepted_record,
    answers_to_text,
    build_record,
    get_path,
    parse_answer,
    parse_number,
    pick_prompt,
    refuse_row,
)
from buleyean_rl.data.records import RejectionRecord, Row, parse_prompt, pick
from buleyean_rl.data.records.values import MAX_INTEGER, describe, fail, list_keys, parse_integer
from buleyean_rl.errors import RecordError
from buleyean_rl.system.wording import counted

Counted = tuple[list[Row], list[int], Any]  # candidates, how often each was rejected, rounds (unchecked)


def _read_candidates(row: Row, discards: Discards, _choices: Choices) -> Iterator[RejectionRecord]:
    yield from _build_records(row, discards, *_count_rejections(row, discards))


def _read_scored(row: Row, discards: Discards, _choices: Choices) -> Iterator[RejectionRecord]:
    yield from _build_records(row, discards, *_compare_scores(row, discards))


def _rank_candidates(row: Row) -> Preference:
    discards = Discards()
    candidates, counts, rounds = _count_rejections(row, discards)
    texts = [answers_to_text(candidate, ANSWER_KEYS) for candidate in candidates]
    answers = [_parse_candidate(candidate, k, discards) for k, candidate in enumerate(texts)]
    largest = max([1, *counts])
    checked_rounds = largest if rounds is None else parse_integer(rounds, "total_rounds", largest)
    return Preference(parse_prompt(pick_prompt(row, discards)), tuple(answers), tuple(counts), checked_rounds)


def _count_rejections(row: Row, discards: Discards) -> Counted:
    """The candidates of a row with their counts; without counts by their scores."""
    candidates = _pick_candidates(row)
    counts = [pick(candidate, "rejection_count", "rejectionCount") for candidate in candidates]
    if all(count is None for count in counts):
        return _compare_scores(row, discards)
    counts = [parse_integer(count, f"rejection_count of candidate {k}", 0) for k, count in enumerate(counts)]
    return candidates, counts, pick(row, "total_rounds", "totalRounds")


def _compare_scores(row: Row, discards: Discards) -> Counted:
    """The candidates of a row by their scores: each pair is a round, and the lower score loses it.

    With K answers each takes part in K - 1 rounds, so T = K - 1. A tie rejects neither.
    """
    candidates = _pick_candidates(row)
    scores = [_parse_score(candidate, k, row) for k, candidate in enumerate(candidates)]
    ascending = sorted(scores)
    losses = [len(scores) - bisect_right(ascending, score) for score in scores]
    discards.ties += sum(number * (number - 1) // 2 for number in Counter(scores).values())
    return candidates, losses, max(1, len(candidates) - 1)


def _build_records(
    row: Row, discards: Discards, candidates: Sequence[Row], counts: Sequence[int], rounds: object
) -> Iterator[RejectionRecord]:
    """The record of candidates with rejection counts: those at 0 are discarded."""
    rejected = [k for k, count in enumerate(counts) if count]
    if rejected:
        answers = [_parse_candidate(candidates[k], k, discards) for k in rejected]
        yield build_record(discards, pick_prompt(row, discards), answers, [counts[k] for k in rejected], rounds)
    else:
        discards.without_rejection += 1
        discards.unrated += not candidates
    discards.chosen_discarded += len(candidates) - len(rejected)
    yield from _accepted(row, candidates, counts, rounds)


def _accepted(row: Row, candidates: Sequence[Row], counts: Sequence[int], rounds: object) -> Iterator[RejectionRecord]:
    """The rounds that candidates at 0 won, as far as they can be read: they are only compared."""
    won = max(counts, default=1) if rounds is None else rounds
    if not isinstance(won, int) or not 1 <= won <= MAX_INTEGER:
        return
    try:
        prompt = pick_prompt(row, Discards())
    except RecordError:
        return
    accepted = [candidate for candidate, count in zip(candidates, counts, strict=True) if not count]
    answers = (next((candidate[key] for key in ANSWER_KEYS if key in candidate), None) for candidate in accepted)
    yield from accepted_record(prompt, answers, won)


def _pick_candidates(row: Row) -> list[Row]:
    """The answers of a row as objects, their texts unchecked."""
    value = pick(row, "completions", "candidates", "responses")
    if not isinstance(value, list):
        refuse_row("has no list of completions or candidates", row)
    scores = row.get("scores")
    if isinstance(scores, list) and all(isinstance(text, str) for text in value):
        if len(scores) != len(value):
            fail(f"has {counted(len(scores), 'score')} for {counted(len(value), 'answer')}: give each a score")
        return [{"response": text, "score": score} for text, score in zip(value, scores, strict=True)]
    for k, candidate in enumerate(value):
        if not isinstance(candidate, Mapping):
            fail(f"candidate {k} is {describe(candidate)}: it must be an object with a response")
    return value


def _parse_candidate(candidate: Row, k: int, discards: Discards) -> str:
    """The text of the k-th candidate."""
    answer = pick(candidate, *ANSWER_KEYS)
    if answer is None:
        fail(f"candidate {k} has no response (its keys: {list_keys(candidate)})")
    return parse_answer(answer, f"the response of candidate {k}", discards)


def _parse_score(candidate: Row, k: int, row: Row) -> float:
    """A candidate's score: one number, or the mean rating of UltraFeedback's aspects."""
    for key in ("score", "overall_score", "rating"):
        value = candidate.get(key)
        if value is not None:
            return parse_number(value, f"{key} of candidate {k}")
    aspects = candidate.get("annotations")
    if isinstance(aspects, Mapping):
        ratings = [get_path(aspect, "Rating") for aspect in aspects.values()]
        numbers = [float(rating) for rating in ratings if re.fullmatch(r"\d+(\.\d+)?", str(rating))]
        if numbers:  # an aspect that does not apply is rated "N/A"
            return sum(numbers) / len(numbers)
    fail(f"candidate {k} has no score (its keys: {list_keys(candidate)}; the row's: {list_keys(row)})")


def _has_scores(row: Row) -> bool:
    return isinstance(row.get("completions"), list) or (isinstance(row.get("responses"), list) and "scores" in row)


CANDIDATES = Format(
    "candidates",
    "prompt, candidates[response, rejection_count or score]",
    lambda row: isinstance(row.get("candidates"), list),
    _read_candidates,
    _rank_candidates,
)
SCORED = Format("scored", "prompt, completions[response, score]", _has_scores, _read_scored, _rank_candidates)
