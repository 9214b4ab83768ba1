"""Samples of the base model, added to the rejected answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from buleyean_rl.data.encode import tokenizer_hash
from buleyean_rl.data.records import RejectionRecord, as_messages
from buleyean_rl.inference.progress import answer_all
from buleyean_rl.inference.protocol import Answer, Engine, Outcome, Sampling

MAX_SAMPLE_TOKENS = 256


def add_own_samples(
    records: Sequence[RejectionRecord],
    engine: Engine,
    samples: int,
    seed: int = 0,
    console: Console | None = None,
) -> list[RejectionRecord]:
    """Add samples of the base model to the rejected answers, with count 0.

    Args:
        records: the rejections.
        engine: of the base model.
        samples: number for each prompt; blank and repeated ones are left out.
        seed: of the sampling.
        console: for progress; None for no output.

    Returns:
        The records, each with up to `samples` more answers.
    """
    conversations = [as_messages(record.prompt) for record in records for _ in range(samples)]
    sampling = Sampling(MAX_SAMPLE_TOKENS, temperature=1.0, top_p=1.0, seed=seed)
    outcomes = answer_all(engine, conversations, sampling, console or Console(quiet=True), "samples of the base model")
    tokenizer = None if engine.tokenizer is None else tokenizer_hash(engine.tokenizer)
    return [
        _add_samples(record, outcomes[index * samples : (index + 1) * samples], tokenizer)
        for index, record in enumerate(records)
    ]


def _add_samples(record: RejectionRecord, outcomes: Sequence[Outcome], tokenizer: str | None) -> RejectionRecord:
    texts = {"", *record.rejected_responses}
    new: list[Answer] = []
    for outcome in outcomes:
        if isinstance(outcome, Answer) and outcome.text.strip() and outcome.text not in texts:
            texts.add(outcome.text)
            new.append(outcome)
    # a record has one tokenizer: where its own answers have another's ids, the samples have none
    has_ids = tokenizer is not None and record.tokenizer in (None, tokenizer)
    return replace(
        record,
        rejected_responses=(*record.rejected_responses, *(answer.text for answer in new)),
        rejection_counts=(*record.rejection_counts, *(0 for _ in new)),
        rounds=(*record.rounds, *(max(record.rounds) for _ in new)),
        rejected_spans=(*record.rejected_spans, *(() for _ in new)),
        token_ids=(*record.token_ids, *(answer.token_ids if has_ids else None for answer in new)),
        ended=(*record.ended, *(answer.ended for answer in new)),
        tokenizer=tokenizer if has_ids else record.tokenizer,
        policy=None if new else record.policy,  # of all answers or none
    )
