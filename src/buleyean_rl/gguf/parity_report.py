"""What the parity gate measured of a written file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParityReport:
    """What was compared, and how close it was.

    Args:
        texts: tokenised alike.
        chats: rendered alike.
        tensors: equal bit for bit.
        positions: whose next-token log-probabilities were compared.
        divergence: KL(llama.cpp || transformers) over the likeliest tokens, in nats, the mean of positions.
        tolerance: what `divergence` was allowed to be.
        largest: difference of any log-probability, in nats; rises with how unlikely the token is.
        notes: what differs on purpose, in sentences.
        seconds: it took.
    """

    texts: int
    chats: int
    tensors: int
    positions: int
    divergence: float
    tolerance: float
    largest: float
    notes: tuple[str, ...]
    seconds: float
