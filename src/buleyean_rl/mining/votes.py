"""Verdicts to records: how several judges' votes become counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from buleyean_rl.data.records import Prompt, RejectionRecord, Spans, as_messages, make_record
from buleyean_rl.evaluation.repetition import is_looping, repeated_spans
from buleyean_rl.inference.protocol import Answer
from buleyean_rl.mining.judges import Verdict

ROUNDS = 60  # T of a certain verdict: a token rejected in all of them is left 1/61 of its weight


def record_votes(
    prompt: Prompt,
    answers: Sequence[Answer],
    votes: Sequence[Sequence[Verdict]],
    *,
    tokenizer: str | None = None,
    policy: Mapping[str, Any] | None = None,
) -> RejectionRecord | None:
    """The record of several judges' verdicts on the answers to one prompt.

    All judges together are `ROUNDS` rounds: where two of three reject, 40 of 60 do. A judge that abstains has
    no rounds. Judges that reject other parts of an answer each have their own share of the rounds on it.

    Args:
        prompt: what was asked.
        answers: distinct, as they were drawn.
        votes: per answer, one verdict of every judge.
        tokenizer: the hash of the tokenizer of the answers' token ids.
        policy: what drew the answers.

    Returns:
        The record, or None where nothing was rejected.
    """
    judged: list[Answer] = []
    counts: list[int] = []
    spans: list[Spans] = []
    for answer, verdicts in zip(answers, votes, strict=True):
        voters = sum(verdict.rejected is not None for verdict in verdicts)
        parts = Counter(verdict.spans for verdict in verdicts if verdict.rejected)
        for part, judges in parts.items():
            judged.append(answer)
            counts.append(max(1, round(ROUNDS * judges / voters)))
            spans.append(part)
    if not judged:
        return None
    has_ids = tokenizer is not None
    return make_record(
        as_messages(prompt),
        [answer.text for answer in judged],
        counts,
        ROUNDS,
        spans,
        token_ids=[answer.token_ids for answer in judged] if has_ids else None,
        ended=[answer.ended for answer in judged],
        tokenizer=tokenizer,
        policy=policy,
    )


def reject_loops(prompts: Sequence[str], answers: Sequence[str]) -> list[RejectionRecord]:
    """One record for every answer that loops; only its repeats are rejected."""
    return [
        make_record(prompt, [answer], [ROUNDS], ROUNDS, [repeated_spans(answer)])
        for prompt, answer in zip(prompts, answers, strict=True)
        if is_looping(answer)
    ]
