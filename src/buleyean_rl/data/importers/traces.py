"""Traces of observability tools, and tables whose columns the user names."""

from __future__ import annotations

from collections.abc import Iterator

from buleyean_rl.data.importers.rows import Discards, _record
from buleyean_rl.data.importers.scores import (
    Choices,
    cells,
    is_bad,
    trace_answer,
    trace_prompt,
    trace_scores,
    without_last_answers,
)
from buleyean_rl.data.records import RejectionRecord, Row, pick

DEFAULT = Choices()


def from_trace(row: Row, discards: Discards, choices: Choices = DEFAULT) -> Iterator[RejectionRecord]:
    """A logged call with scores, as LangSmith and Langfuse export them: of its n scores, those that are bad count."""
    scores = trace_scores(row, choices)
    bad = sum(is_bad(value, choices.below, f"the score {name}") for name, value in scores)
    if not bad:
        discards.chosen_discarded += bool(scores)
        discards.without_rejection += 1
        return
    answer = trace_answer(pick(row, "output", "outputs"))
    prompt = without_last_answers(trace_prompt(pick(row, "input", "inputs")))
    yield _record(discards, prompt, [answer], [bad], len(scores))


def from_columns(row: Row, discards: Discards, choices: Choices = DEFAULT) -> Iterator[RejectionRecord]:
    """A table's row, its columns named by the user; without a score every row is a rejection."""
    found = dict(cells(row, choices))
    if "score" in found and not is_bad(found["score"], choices.below, f"column {choices.columns['score']!r}"):
        discards.chosen_discarded += 1
        discards.without_rejection += 1
        return
    prompt = found["prompt"]
    if found.get("system"):
        prompt = [{"role": "system", "content": found["system"]}, {"role": "user", "content": prompt}]
    yield _record(discards, prompt, [found["answer"]])
