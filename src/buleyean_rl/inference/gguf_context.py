"""How many tokens a GGUF file's model was made for, and what they cost: read from the file's head, without its tensors.

`gguf.GGUFReader` reads the whole vocabulary first, which takes seconds; these few keys come before it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from buleyean_rl.errors import EngineError
from buleyean_rl.inference.context import affordable_tokens, choose_context

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
VOCABULARY = "tokenizer."  # keys from here on are not read
MAX_KEYS = 4096
MAX_BYTES = 1 << 20  # of a text or a list before the vocabulary
CACHE_BYTES = {False: 2, True: 4}  # of a number, by whether the cache is exact


def gguf_context(path: Path, requested: int | None, *, exact: bool, parallel: int = 1) -> tuple[int, int]:
    """The maximum tokens of a conversation, and of all conversations at once.

    Args:
        path: a GGUF file.
        requested: see `choose_context`.
        exact: whether keys and values are stored in fp32.
        parallel: conversations at once.
    """
    keys = read_model_keys(path)
    own = _whole(keys.get("context_length"))
    heads, layers = _whole(keys.get("attention.head_count")) or 1, _whole(keys.get("block_count")) or 1
    kv_heads = keys.get("attention.head_count_kv", heads)
    all_kv_heads = sum(kv_heads) if isinstance(kv_heads, list) else (_whole(kv_heads) or heads) * layers
    head_size = (_whole(keys.get("embedding_length")) or 1) // heads
    sizes = sum(_whole(keys.get(f"attention.{name}_length")) or head_size for name in ("key", "value"))
    free = psutil.virtual_memory().available - path.stat().st_size
    affordable = affordable_tokens(all_kv_heads * sizes * CACHE_BYTES[exact], free)
    context = choose_context(requested, own, affordable)
    return context, max(context, min(context * parallel, affordable))


def read_model_keys(path: Path) -> dict[str, Any]:
    """The keys of the file's architecture, without its name: context_length, block_count and so on.

    Raises:
        EngineError: the file is cut short or damaged.
    """
    with path.open("rb") as file:
        try:
            file.seek(16)
            count = _scalar(file, "<Q")
            keys: dict[str, Any] = {}
            for _ in range(min(count, MAX_KEYS)):
                name = _text(file)
                if name.startswith(VOCABULARY):
                    break
                keys[name] = _value(file, _scalar(file, "<I"))
        except (struct.error, ValueError, KeyError) as error:
            raise EngineError(f"{path}: the file is cut short or damaged; copy or export it again") from error
    prefix = f"{keys.get('general.architecture')}."
    return {name.removeprefix(prefix): value for name, value in keys.items() if name.startswith(prefix)}


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _text(file)
    if kind != ARRAY:
        return _scalar(file, SCALARS[kind])
    kind, size = _scalar(file, "<I"), _scalar(file, "<Q")
    if kind == ARRAY or size > MAX_BYTES:
        raise ValueError
    read: Callable[[], Any] = (lambda: _text(file)) if kind == STRING else (lambda: _scalar(file, SCALARS[kind]))
    return [read() for _ in range(size)]


def _text(file: BinaryIO) -> str:
    size = _scalar(file, "<Q")
    if size > MAX_BYTES:
        raise ValueError
    return file.read(size).decode(errors="replace")


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _whole(value: Any) -> int | None:
    """A positive integer; None for anything else, such as a list that has one number per layer."""
    return value if isinstance(value, int) and value > 0 else None
