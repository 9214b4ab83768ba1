"""A tiny model of every architecture that exports, in every shape that a file may have."""

from __future__ import annotations

from typing import Any

from tiny import tiny_model, tiny_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.5}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
LONGROPE = {
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
    },
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie": False, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-wide": ("Llama", {"num_key_value_heads": 4, "head_dim": 32, "vocab_size": 448, "rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "qwen2": ("Qwen2", {"tie": False, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": ("Gemma2", GEMMA | {"sliding_window": 24}),
    "gemma2-uncapped": ("Gemma2", GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", GEMMA | {"sliding_window": 24, "num_hidden_layers": 7, "tie": False}),
    "gemma3-capped": ("Gemma3", GEMMA | {"final_logit_softcapping": 2.0}),
    "phi3": ("Phi3", {"rope_parameters": PARTIAL}),
    "phi3-long": ("Phi3", LONGROPE | {"tie": False}),
}


def make_shape(shape: str, **sizes: Any) -> Any:
    """The model of a shape, with other sizes where they are given."""
    architecture, settings = SHAPES[shape]
    return tiny_model(f"{architecture}ForCausalLM", tiny_tokenizer(), **(settings | sizes))
