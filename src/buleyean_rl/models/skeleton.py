"""A transformers model without weights: the names and shapes of an architecture's parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch

LM_HEAD, EMBED_TOKENS = "lm_head.weight", "model.embed_tokens.weight"  # in transformers


def build_skeleton(config: Any, dtype: torch.dtype = torch.float32, attention: str | None = "eager") -> Any:
    """The transformers model of a configuration, its parameters on the meta device.

    Args:
        config: of transformers.
        dtype: of its parameters.
        attention: None for the model's default; eager attention is the only one that caps its logits.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    return model.eval()


def parameter_names(config: Any) -> list[str]:
    """The names of a model's tensors, in order."""
    return list(build_skeleton(config).state_dict())
