"""What the parity gate measured of a written file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParityReport:
    """What was compared, and how close it was.

    Args:
        texts: number of texts with equal token ids.
        chats: number of chats rendered alike.
        tensors: number of tensors equal bit for bit.
        positions: number of positions whose next-token log-probabilities were compared.
        divergence: KL(llama.cpp || transformers) over the likeliest tokens, in nats, the mean of positions.
        tolerance: the largest `divergence` that passes.
        largest: difference of any log-probability, in nats; rises with how unlikely the token is.
        notes: what differs on purpose, in sentences.
        seconds: duration of the gate.
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
