"""How byte-level BPE tokenizers split text before merging: llama.cpp's names for it, and what they mean.

A GGUF file names the split (`tokenizer.ggml.pre`); a tokenizer.json spells it out. transformers ignores
the name when it reads a GGUF and always splits like GPT-2, which parts company with the real tokenizer on
the likes of " \u00bd". `named` makes the split a name stands for; `name_of` finds the name of a split.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
}
NAMES = ("gpt-2", "smollm", *PATTERNS)


def named(name: str) -> PreTokenizer | None:
    """The split that llama.cpp calls `name`; None for any other."""
    if name == "gpt-2":
        return ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if name in PATTERNS:
        words = Split(Regex(PATTERNS[name]), behavior="isolated")
        return Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    return None


def name_of(pre_tokenizer: Any) -> str | None:
    """What llama.cpp calls a split.

    Args:
        pre_tokenizer: the `pre_tokenizer` entry of a tokenizer.json.

    Returns:
        The name, or None if it is none of `NAMES`.
    """
    return next((name for name in NAMES if _shape(pre_tokenizer) == _shape(_spec(named(name)))), None)


def _spec(pre_tokenizer: PreTokenizer | None) -> Any:
    """A pre-tokenizer as tokenizer.json writes it."""
    return json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer is not None else None


def _shape(spec: Any) -> list[tuple[Any, ...]]:
    """What of a split's description decides where it splits."""
    steps = (spec or {}).get("pretokenizers", [spec or {}])
    decides = ("type", "pattern", "invert", "individual_digits", "add_prefix_space", "use_regex")
    return [tuple((key, json.dumps(step.get(key))) for key in decides) for step in steps]
