"""A model without weights: the names and shapes that an architecture's parameters have."""

from __future__ import annotations

import copy
from typing import Any

import torch

HEAD = "lm_head.weight"  # in transformers


def skeleton(config: Any) -> Any:
    """The transformers model of a configuration without any numbers: what the gate fills in as it computes."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        # eager attention is the only one that caps its logits
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def skeleton_parameters(config: Any) -> list[str]:
    """The names of a model's tensors."""
    return list(skeleton(config).state_dict())
