"""LoRA's dropout, whose masks a seed reproduces; within `dropout_keys_in_use` they go with the record.

A mask is then a function of a layer's seed and of each token's key, whatever else is in its batch: it does not matter
how records are packed, nor which process computes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, 2014), its constants as signed numbers.
STEP, FIRST, SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

_active_keys: Tensor | None = None


@contextmanager
def dropout_keys_in_use(keys: Tensor | None) -> Iterator[None]:
    """Let the masks within go by the tokens' keys; state of the process, as `segments_in_use` is.

    Args:
        keys: of a batch's tokens, int64; None for masks that go by their seed alone. Shape: (rows, tokens).
    """
    global _active_keys
    before, _active_keys = _active_keys, None if keys is None else keys.flatten()
    try:
        yield
    finally:
        _active_keys = before


def seeded_dropout(x: Tensor, p: float, seed: int, add_to: Tensor | None = None) -> Tensor:
    """Dropout, added to `add_to` if given. Shape: any; with keys (tokens, width).

    Args:
        x: what is dropped.
        p: which share.
        seed: of the mask.
        add_to: changed in place.
    """
    if not p:
        return x
    # 16 random bits an element, four from a draw: three times as fast as a Bernoulli draw an element
    bits = _bits(x, seed) if _active_keys is None else _keyed_bits(x, _active_keys, seed)
    dropped = (bits >= round(p * 2**16) - 2**15) * x * (1 / (1 - p))
    return dropped if add_to is None else add_to.add_(dropped)


def _bits(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    return draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()].view(x.shape)


def _keyed_bits(x: Tensor, keys: Tensor, seed: int) -> Tensor:
    columns = torch.arange(-(-x.shape[-1] // 4), device=x.device)
    offset = (seed * STEP + 2**63) % 2**64 - 2**63
    draws = _mix(_mix(keys + offset).unsqueeze(1) + columns * STEP)
    return draws.view(torch.int16)[:, : x.shape[-1]]


def _mix(z: Tensor) -> Tensor:
    """64 bits from 64, each of which depends on all."""
    for shift, factor in ((30, FIRST), (27, SECOND)):
        z = (z ^ _shift(z, shift)) * factor
    return z ^ _shift(z, 31)


def _shift(z: Tensor, places: int) -> Tensor:
    """To the right, as if it had no sign."""
    return (z >> places) & (2 ** (64 - places) - 1)
