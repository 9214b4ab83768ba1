"""Text to token ids: prompts through the chat template, answers with their rejected spans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import repeat
from typing import Any

from buleyean_rl.data.records import Prompt, Spans, as_messages


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of one prompt, see `encode_prompts`."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of prompts, up to where the model's answer begins.

    Args:
        tokenizer: a transformers tokenizer; its chat template is used if it has one.
        prompts: the user's text, or (role, content) messages.
    """
    if not prompts:
        return []
    templated = tokenizer.chat_template is not None
    texts = [_apply_template(tokenizer, prompt) if templated else _join_messages(prompt) for prompt in prompts]
    return list(tokenizer(texts, add_special_tokens=not templated).input_ids)


def _apply_template(tokenizer: Any, prompt: Prompt) -> str:
    return tokenizer.apply_chat_template(as_messages(prompt), tokenize=False, add_generation_prompt=True)


def _join_messages(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(content for _, content in prompt) + "\n\n"


def encode_response(tokenizer: Any, text: str, spans: Spans = ()) -> tuple[list[int], list[bool]]:
    """Token ids of one response and which of them are rejected, see `encode_responses`."""
    return encode_responses(tokenizer, [text], [spans])[0]


def encode_responses(
    tokenizer: Any, texts: Sequence[str], spans: Sequence[Spans]
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of responses, and which of them are rejected.

    Args:
        tokenizer: a fast transformers tokenizer (one that knows character offsets).
        texts: the responses, without the end-of-turn token.
        spans: of each, rejected [start, end) character ranges; none means all of it. A token that reaches
            into a span counts as rejected.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=any(spans))
    offsets = encoded.offset_mapping if any(spans) else repeat(())
    return [
        (ids, _overlap(token_offsets, ranges) if ranges else [True] * len(ids))
        for ids, token_offsets, ranges in zip(encoded.input_ids, offsets, spans, strict=False)
    ]


def _overlap(offsets: Sequence[tuple[int, int]], spans: Spans) -> list[bool]:
    return [any(start < span_end and end > span_start for span_start, span_end in spans) for start, end in offsets]


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what token ids mean: of every token's id and text.

    Args:
        tokenizer: of transformers.
    """
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:32]
