"""Figures of greedy answers: loops, variety, length, and likeness to rejected answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from buleyean_rl.data.importers import Preference
from buleyean_rl.errors import EngineError
from buleyean_rl.evaluation.repetition import distinct, is_looping, overlap, prefix_match
from buleyean_rl.evaluation.statistics import UNCOUNTED, Figure
from buleyean_rl.inference.protocol import Answer, Outcome, Unanswered


def describe_unanswered(model: str, outcomes: Sequence[Outcome]) -> tuple[int, list[str]]:
    """How many prompts have no answer, and what the engine says about the first of each cause.

    Raises:
        EngineError: none has one.
    """
    unanswered = [outcome for outcome in outcomes if isinstance(outcome, Unanswered)]
    if len(unanswered) == len(outcomes):
        raise EngineError(f"{model}: no prompt has an answer: {unanswered[0].detail}")
    first = {outcome.cause: outcome.detail for outcome in reversed(unanswered)}
    notes = [f"{model}: prompts are left out, {cause}, such as: {detail}" for cause, detail in first.items()]
    return len(unanswered), notes


def answer_figures(outcomes: Sequence[Outcome]) -> tuple[dict[str, Figure], float | None]:
    """Figures of greedy answers to prompts, and their distinct 4-grams over all 4-grams."""
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]

    def figure(value: Callable[[Answer], float]) -> Figure:
        return Figure([(value(outcome), 1.0) if isinstance(outcome, Answer) else UNCOUNTED for outcome in outcomes])

    figures = {"loop_rate": figure(lambda answer: float(is_looping(answer.text)))}
    if all(answer.tokens is not None for answer in answers):
        figures["mean_length"] = figure(lambda answer: float(answer.tokens or 0))
    figures["ended_share"] = figure(lambda answer: float(answer.ended))
    return figures, distinct([answer.text for answer in answers])


def regeneration_figures(records: Sequence[Preference], outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """Similarity of greedy answers to rejected ones: for each record, the maximum over its rejected answers."""
    similarities: dict[str, Callable[[str, str], float]] = {
        "regeneration_prefix": prefix_match,
        "regeneration_overlap": overlap,
    }
    figures = {}
    for name, similarity in similarities.items():
        items = []
        for record, outcome in zip(records, outcomes, strict=True):
            if isinstance(outcome, Unanswered):
                items.append(UNCOUNTED)
                continue
            rejected = [text for text, v in zip(record.answers, record.rejections, strict=True) if v]
            best = max((similarity(outcome.text, text) for text in rejected), default=None)
            items.append(UNCOUNTED if best is None else (best, 1.0))
        figures[name] = Figure(items)
    return figures
