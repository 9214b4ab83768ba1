"""Pre-tokenizers of byte-level BPE, which split text before merging, and llama.cpp's names for them.

A GGUF file has only the name (`tokenizer.ggml.pre`), a tokenizer.json the pre-tokenizer itself. When transformers
reads a GGUF, it ignores the name and splits as GPT-2 does, which differs for example on " \u00bd".
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

_WORD_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHER_PATTERN = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "llama-bpe": _WORD_PATTERN + r"\p{N}{1,3}" + _OTHER_PATTERN,
    "qwen2": _WORD_PATTERN + r"\p{N}" + _OTHER_PATTERN,
}
NAMES = ("gpt-2", "smollm", *PATTERNS)


def make_pre_tokenizer(name: str) -> PreTokenizer | None:
    """The pre-tokenizer with one of llama.cpp's names; None for an unknown name."""
    if name == "gpt-2":
        return ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if name in PATTERNS:
        words = Split(Regex(PATTERNS[name]), behavior="isolated")
        return Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    return None


def find_name(pre_tokenizer: Any) -> str | None:
    """llama.cpp's name of a pre-tokenizer.

    Args:
        pre_tokenizer: the `pre_tokenizer` entry of a tokenizer.json.

    Returns:
        One of `NAMES`, or None.
    """
    settings = _split_settings(pre_tokenizer)
    return next((name for name in NAMES if _split_settings(_to_json(make_pre_tokenizer(name))) == settings), None)


def _to_json(pre_tokenizer: PreTokenizer | None) -> Any:
    """A pre-tokenizer as tokenizer.json writes it."""
    return json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer is not None else None


def _split_settings(spec: Any) -> list[tuple[Any, ...]]:
    """The settings of a pre-tokenizer that decide where it splits."""
    steps = (spec or {}).get("pretokenizers", [spec or {}])
    keys = ("type", "pattern", "invert", "individual_digits", "add_prefix_space", "use_regex")
    return [tuple((key, json.dumps(step.get(key))) for key in keys) for step in steps]
