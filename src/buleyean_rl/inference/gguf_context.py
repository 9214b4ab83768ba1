"""How many tokens a GGUF file's model was made for, and what they cost: read from the file's header."""

from __future__ import annotations

from typing import Any

import psutil

from buleyean_rl.inference.context import affordable_tokens, choose_context
from buleyean_rl.models.gguf_header import Array, Header

CACHE_BYTES = {False: 2, True: 4}  # of a number, by whether the cache is exact


def gguf_context(header: Header, requested: int | None, *, exact: bool, parallel: int = 1) -> tuple[int, int]:
    """The maximum tokens of a conversation, and of all conversations at once.

    Args:
        header: of a GGUF file that holds a model.
        requested: see `choose_context`.
        exact: whether keys and values are stored in fp32.
        parallel: conversations at once.
    """

    def size(key: str) -> int | None:
        return _whole(header.metadata.get(f"{header.architecture}.{key}"))

    heads, layers = size("attention.head_count") or 1, size("block_count") or 1
    kv_heads = header.metadata.get(f"{header.architecture}.attention.head_count_kv", heads)
    all_kv_heads = int(sum(kv_heads.items)) if isinstance(kv_heads, Array) else (_whole(kv_heads) or heads) * layers
    head_size = (size("embedding_length") or 1) // heads
    sizes = sum(size(f"attention.{name}_length") or head_size for name in ("key", "value"))
    free = psutil.virtual_memory().available - header.path.stat().st_size
    affordable = affordable_tokens(all_kv_heads * sizes * CACHE_BYTES[exact], free)
    context = choose_context(requested, size("context_length"), affordable)
    return context, max(context, min(context * parallel, affordable))


def _whole(value: Any) -> int | None:
    """A positive integer; None for anything else, such as a list that has one number per layer."""
    return value if isinstance(value, int) and value > 0 else None
