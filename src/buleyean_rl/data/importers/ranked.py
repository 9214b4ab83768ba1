"""Rows with several answers: scores, ranks or votes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from buleyean_rl.data.importers.rows import Discards, _number, _only_answer, _path, _record, prompt_of
from buleyean_rl.data.records import RejectionRecord, Row, pick
from buleyean_rl.data.records.record import fail, keys_of, kind_of


def from_candidates(row: Row, discards: Discards) -> Iterator[RejectionRecord]:
    """Several answers to one prompt, with the rejections of each already counted, or with scores."""
    yield from _counted(row, discards, *tallied(row, discards))


def tallied(row: Row, discards: Discards) -> tuple[list[Row], list[int], Any]:
    """The candidates of a row, how often each was rejected, and in how many rounds; by scores without counts."""
    candidates = candidates_of(row)
    tallies = [pick(candidate, "rejection_count", "rejectionCount") for candidate in candidates]
    if all(tally is None for tally in tallies):
        return scored(row, discards)
    for k, tally in enumerate(tallies):
        if not isinstance(tally, int) or isinstance(tally, bool) or tally < 0:
            fail(f"rejection_count of candidate {k} is {kind_of(tally)}: it must be a whole number, 0 or more")
    return candidates, tallies, pick(row, "total_rounds", "totalRounds")


def from_scores(row: Row, discards: Discards) -> Iterator[RejectionRecord]:
    """Several scored answers to one prompt."""
    yield from _counted(row, discards, *scored(row, discards))


def scored(row: Row, discards: Discards) -> tuple[list[Row], list[int], int]:
    """The candidates of a row by their scores: each pair is a round, and the lower score loses it.

    With K answers each takes part in K - 1 rounds, so T = K - 1. A tie rejects neither.
    """
    candidates = candidates_of(row)
    scores = [_score(candidate, k, row) for k, candidate in enumerate(candidates)]
    losses = [sum(score < other for other in scores) for score in scores]
    discards.ties += sum(a == b for a, b in combinations(scores, 2))
    return candidates, losses, max(1, len(candidates) - 1)


def _counted(
    row: Row, discards: Discards, candidates: Sequence[Row], tallies: Sequence[int], rounds: object
) -> Iterator[RejectionRecord]:
    """The record of candidates with rejection counts: those at 0 are discarded."""
    rejected = [k for k, tally in enumerate(tallies) if tally]
    if rejected:
        answers = [answer_of(candidates[k], k) for k in rejected]
        yield _record(discards, prompt_of(row), answers, [tallies[k] for k in rejected], rounds)
    else:
        discards.without_rejection += 1
    discards.chosen_discarded += len(candidates) - len(rejected)


def candidates_of(row: Row) -> list[Row]:
    """The answers of a row as objects, their texts unchecked."""
    value = pick(row, "completions", "candidates", "responses")
    if not isinstance(value, list):
        fail(f"has no list of completions or candidates (its keys: {keys_of(row)})")
    scores = row.get("scores")
    if isinstance(scores, list) and all(isinstance(text, str) for text in value):
        if len(scores) != len(value):
            fail(f"has {len(scores)} scores for {len(value)} answers: give each a score")
        return [{"response": text, "score": score} for text, score in zip(value, scores, strict=True)]
    for k, candidate in enumerate(value):
        if not isinstance(candidate, Mapping):
            fail(f"candidate {k} is {kind_of(candidate)}: it must be an object with a response")
    return value


def answer_of(candidate: Row, k: int) -> str:
    """The text of the k-th candidate."""
    answer = pick(candidate, "response", "completion", "text", "answer", "content")
    if answer is None:
        fail(f"candidate {k} has no response (its keys: {keys_of(candidate)})")
    return _only_answer(answer, f"the response of candidate {k}")


def _score(candidate: Row, k: int, row: Row) -> float:
    """A candidate's score: one number, or the mean rating of UltraFeedback's aspects."""
    for name in ("score", "overall_score", "rating"):
        value = candidate.get(name)
        if value is not None:
            return _number(value, f"{name} of candidate {k}")
    aspects = candidate.get("annotations")
    if isinstance(aspects, Mapping):
        ratings = [_path(aspect, "Rating") for aspect in aspects.values()]
        numbers = [float(rating) for rating in ratings if re.fullmatch(r"\d+(\.\d+)?", str(rating))]
        if numbers:  # an aspect that does not apply is rated "N/A"
            return sum(numbers) / len(numbers)
    fail(f"candidate {k} has no score (its keys: {keys_of(candidate)}; the row's: {keys_of(row)})")
