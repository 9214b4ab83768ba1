"""Verdicts to records: how several judges' votes become counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from buleyean_rl.data.records import Prompt, RejectionRecord, as_messages, fold_records, make_record
from buleyean_rl.evaluation.repetition import is_looping, repeated_spans
from buleyean_rl.inference.protocol import Answer
from buleyean_rl.mining.judges import Verdict


def record_votes(
    prompt: Prompt,
    answers: Sequence[Answer],
    votes: Sequence[Sequence[Verdict]],
    *,
    tokenizer: str | None = None,
    policy: Mapping[str, Any] | None = None,
    keep_accepted: bool = True,
) -> RejectionRecord | None:
    """The record of several judges' verdicts on the answers to one prompt.

    Each verdict is a round: where two of three judges reject, 2 of 3 do. A judge that abstains has no round. Judges
    that reject other parts of an answer each have their share of the rounds on their part.

    Args:
        prompt: what was asked.
        answers: distinct, as they were drawn.
        votes: per answer, one verdict of every judge.
        tokenizer: the hash of the tokenizer of the answers' token ids.
        policy: what drew the answers.
        keep_accepted: keep answers that no judge rejected, as anchors.

    Returns:
        The record, or None where no answer is left.
    """
    records = []
    for answer, verdicts in zip(answers, votes, strict=True):
        rounds = sum(verdict.rejected is not None for verdict in verdicts)
        parts = Counter(verdict.spans for verdict in verdicts if verdict.rejected)
        if not rounds or not (parts or keep_accepted):
            continue
        parts = parts or Counter({(): 0})
        record = make_record(
            as_messages(prompt),
            [answer.text] * len(parts),
            list(parts.values()),
            rounds,
            list(parts),
            token_ids=None if tokenizer is None else [answer.token_ids] * len(parts),
            ended=[answer.ended] * len(parts),
            tokenizer=tokenizer,
            policy=policy,
        )
        records.append(record)
    return next(iter(fold_records(records)), None)


def judge_loops(prompts: Sequence[str], answers: Sequence[str]) -> list[RejectionRecord]:
    """A record for every answer: of one that loops only its repeats are rejected, the others are accepted."""
    return [
        make_record(prompt, [answer], [1], 1, [repeated_spans(answer)])
        if is_looping(answer)
        else make_record(prompt, [answer], [0], 1)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.strip()
    ]
