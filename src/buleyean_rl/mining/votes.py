"""Verdicts to records: how several judges' votes become counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from buleyean_rl.data.records import Prompt, RejectionRecord, Spans, as_messages, make_record
from buleyean_rl.evaluation.repetition import is_looping, repeated_spans
from buleyean_rl.mining.judges import Verdict

ROUNDS = 60  # T of a certain verdict: a token rejected in all of them is left 1/61 of its weight


def record_votes(prompt: Prompt, answers: Sequence[str], votes: Sequence[Sequence[Verdict]]) -> RejectionRecord | None:
    """The record of several judges' verdicts on the answers to one prompt.

    All judges together are `ROUNDS` rounds: where two of three reject, 40 of 60 do. A judge that abstains has
    no rounds. Judges that reject other parts of an answer each have their own share of the rounds on it.

    Args:
        prompt: what was asked.
        answers: distinct.
        votes: per answer, one verdict of every judge.

    Returns:
        The record, or None where nothing was rejected.
    """
    texts: list[str] = []
    counts: list[int] = []
    spans: list[Spans] = []
    for text, verdicts in zip(answers, votes, strict=True):
        voters = sum(verdict.rejected is not None for verdict in verdicts)
        parts = Counter(verdict.spans for verdict in verdicts if verdict.rejected)
        for part, judges in parts.items():
            texts.append(text)
            counts.append(max(1, round(ROUNDS * judges / voters)))
            spans.append(part)
    if not texts:
        return None
    return make_record(as_messages(prompt), texts, counts, ROUNDS, spans)


def reject_loops(prompts: Sequence[str], answers: Sequence[str]) -> list[RejectionRecord]:
    """One record for every answer that loops; only its repeats are rejected."""
    return [
        make_record(prompt, [answer], [ROUNDS], ROUNDS, [repeated_spans(answer)])
        for prompt, answer in zip(prompts, answers, strict=True)
        if is_looping(answer)
    ]
