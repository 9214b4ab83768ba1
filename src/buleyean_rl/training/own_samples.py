"""Samples of the base model, added to the rejected answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from buleyean_rl.data.records import RejectionRecord, as_messages
from buleyean_rl.inference.protocol import Completer, Sampling

MAX_SAMPLE_TOKENS = 256


def add_own_samples(
    records: Sequence[RejectionRecord],
    engine: Completer,
    samples: int,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> list[RejectionRecord]:
    """Add samples of the base model to the rejected answers, with count 0.

    Args:
        records: the rejections.
        engine: of the base model.
        samples: number for each prompt; blank and repeated ones are left out.
        seed: of the sampling.
        on_done: called with the number of samples so far.

    Returns:
        The records, each with up to `samples` more answers.
    """
    conversations = [as_messages(record.prompt) for record in records for _ in range(samples)]
    texts = engine.complete_many(
        conversations, Sampling(MAX_SAMPLE_TOKENS, temperature=1.0, top_p=1.0, seed=seed), on_done
    )
    return [
        _add_samples(record, texts[index * samples : (index + 1) * samples]) for index, record in enumerate(records)
    ]


def _add_samples(record: RejectionRecord, samples: Sequence[str]) -> RejectionRecord:
    new = [text for text in dict.fromkeys(samples) if text.strip() and text not in record.rejected_responses]
    return replace(
        record,
        rejected_responses=(*record.rejected_responses, *new),
        rejection_counts=(*record.rejection_counts, *(0 for _ in new)),
        rounds=(*record.rounds, *(max(record.rounds) for _ in new)),
        rejected_spans=(*record.rejected_spans, *(() for _ in new)),
        token_ids=(*record.token_ids, *(None for _ in new)),
        ended=(*record.ended, *(None for _ in new)),
    )
