"""Answers of the base model's own, put beside the rejected ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from buleyean_rl.data.records import RejectionRecord, as_messages
from buleyean_rl.inference.protocol import Completer, Sampling

OWN_TOKENS = 256  # of a sample, at most: it is only there to be ranked


def add_own_samples(
    records: Sequence[RejectionRecord],
    engine: Completer,
    samples: int,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> list[RejectionRecord]:
    """Put answers of the model's own, never rejected, beside the rejected ones.

    Args:
        records: what was rejected.
        engine: of the base model.
        samples: for each prompt; those that are blank or stand there already are left out.
        seed: same seed, same answers.
        on_done: called with how many are drawn.

    Returns:
        The records, each with up to `samples` answers more, at count 0.
    """
    conversations = [as_messages(record.prompt) for record in records for _ in range(samples)]
    drawn = engine.complete_many(conversations, Sampling(OWN_TOKENS, temperature=1.0, top_p=1.0, seed=seed), on_done)
    return [
        _with_samples(record, drawn[place * samples : (place + 1) * samples]) for place, record in enumerate(records)
    ]


def _with_samples(record: RejectionRecord, drawn: Sequence[str]) -> RejectionRecord:
    own = [text for text in dict.fromkeys(drawn) if text.strip() and text not in record.rejected_responses]
    return replace(
        record,
        rejected_responses=(*record.rejected_responses, *own),
        rejection_counts=(*record.rejection_counts, *(0 for _ in own)),
        rejected_spans=(*record.rejected_spans, *(() for _ in own)),
    )
