"""How many tokens a GGUF file's model was made for, and what they cost: read from the file's header."""

from __future__ import annotations

from typing import Any

import psutil

from buleyean_rl.inference.context import DEFAULT_TOKENS, affordable_tokens, choose_context
from buleyean_rl.models.gguf_header import Array, Header

CACHE_BYTES = {False: 2, True: 4}  # of a number, by whether the cache is exact
MAX_SLOTS = 8  # conversations at once, where nobody says how many
MIN_SLOT_TOKENS = 8192  # rather fewer slots than shorter ones


def gguf_context(header: Header, requested: int | None, *, exact: bool, parallel: int = 1) -> tuple[int, int]:
    """The maximum tokens of a conversation, and of all conversations at once.

    Args:
        header: of a GGUF file that holds a model.
        requested: see `choose_context`.
        exact: whether keys and values are stored in fp32.
        parallel: conversations at once.
    """

    affordable = _affordable(header, exact=exact)
    context = choose_context(requested, _own_context(header), affordable)
    return context, max(context, min(context * parallel, affordable))


def gguf_slots(header: Header, context: int | None, slots: int | None) -> tuple[int, int]:
    """The tokens of a conversation and the number of conversations, such that two engines of that size fit.

    Args:
        header: of a GGUF file that holds a model.
        context: requested by the user; None for as much as memory allows.
        slots: requested by the user; None for as many as memory allows.
    """
    affordable = _affordable(header, exact=False) // 2
    own = _own_context(header) or DEFAULT_TOKENS
    per_slot = max(affordable // (slots or MAX_SLOTS), min(own, MIN_SLOT_TOKENS, affordable))
    tokens = choose_context(context, own, per_slot)
    return tokens, slots or max(1, min(MAX_SLOTS, affordable // tokens))


def _own_context(header: Header) -> int | None:
    return _whole(header.metadata.get(f"{header.architecture}.context_length"))


def _affordable(header: Header, *, exact: bool) -> int:
    """The tokens whose keys and values fit into the memory that is left beside the weights."""

    def size(key: str) -> int | None:
        return _whole(header.metadata.get(f"{header.architecture}.{key}"))

    heads, layers = size("attention.head_count") or 1, size("block_count") or 1
    kv_heads = header.metadata.get(f"{header.architecture}.attention.head_count_kv", heads)
    all_kv_heads = int(sum(kv_heads.items)) if isinstance(kv_heads, Array) else (_whole(kv_heads) or heads) * layers
    head_size = (size("embedding_length") or 1) // heads
    sizes = sum(size(f"attention.{name}_length") or head_size for name in ("key", "value"))
    free = psutil.virtual_memory().available - header.path.stat().st_size
    return affordable_tokens(all_kv_heads * sizes * CACHE_BYTES[exact], free)


def _whole(value: Any) -> int | None:
    """A positive integer; None for anything else, such as a list that has one number per layer."""
    return value if isinstance(value, int) and value > 0 else None
