"""Rejection records: what people said no to, how often, out of how many rounds.

A records file is JSON Lines, one `RejectionRecord` a line.
"""

from __future__ import annotations

from dataclasses import dataclass

type_Span = tuple[int, int]


@dataclass(frozen=True)
class RejectionRecord:
    """A prompt and the answers that were rejected for it.

    Args:
        prompt: the user's text, or a whole conversation as (role, content) messages.
        rejected_responses: K >= 1 distinct answers.
        rejection_counts: c_k >= 1, how often each was rejected.
        total_rounds: T >= max(c_k), how often each could have been rejected.
        rejected_spans: per answer, the [start, end) character ranges that are wrong; () for the whole answer.
    """

    prompt: str | tuple[tuple[str, str], ...]
    rejected_responses: tuple[str, ...]
    rejection_counts: tuple[int, ...]
    total_rounds: int
    rejected_spans: tuple[tuple[tuple[int, int], ...], ...]
