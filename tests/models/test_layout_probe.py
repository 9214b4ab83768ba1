"""Which models are packed, and that any other keeps its own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from buleyean_rl.models.layout_probe import probe_layout
from buleyean_rl.models.packed_attention import PACKED
from tiny import tiny_llama, tiny_mistral, tiny_model, tiny_qwen2, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
GEMMA = {"head_dim": 16, "sliding_window": 4}
PACKS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(TOKENIZER),
    "qwen2": lambda: tiny_qwen2(TOKENIZER),
    "mistral with a sliding window": lambda: tiny_mistral(TOKENIZER, sliding_window=4),
    "gpt2": lambda: tiny_model("GPT2LMHeadModel", TOKENIZER, n_positions=64),
    "gemma3": lambda: tiny_model("Gemma3ForCausalLM", TOKENIZER, **GEMMA),
}
PADS: dict[str, Callable[[], Any]] = {
    "mamba, which has no attention": lambda: tiny_model("MambaForCausalLM", TOKENIZER),
    "bloom, whose attention is its own": lambda: tiny_model("BloomForCausalLM", TOKENIZER, n_head=4),
    "lfm2, half convolutions": lambda: tiny_model("Lfm2ForCausalLM", TOKENIZER, layer_types=["conv", "full_attention"]),
    "gemma2, whose scores are capped": lambda: tiny_model(
        "Gemma2ForCausalLM", TOKENIZER, **GEMMA, attn_logit_softcapping=1.0
    ),
    "gemma2, hardly capped": lambda: tiny_model("Gemma2ForCausalLM", TOKENIZER, **GEMMA, query_pre_attn_scalar=1),
}


@pytest.mark.parametrize("make", PACKS.values(), ids=PACKS.keys())
def test_a_model_with_replaceable_attention_is_packed(make: Callable[[], Any]) -> None:
    model = make()
    assert probe_layout(model) == "packed"
    assert model.config._attn_implementation == PACKED


@pytest.mark.parametrize("make", PADS.values(), ids=PADS.keys())
def test_any_other_model_is_padded_and_keeps_its_attention(make: Callable[[], Any]) -> None:
    model = make()
    own = model.config._attn_implementation
    assert probe_layout(model) == "padded"
    assert model.config._attn_implementation == own
