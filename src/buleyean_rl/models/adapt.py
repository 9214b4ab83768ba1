"""Attach a LoRA adapter to a base model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from buleyean_rl.errors import ModelError
from buleyean_rl.kernels.quantised import QuantisedTensor
from buleyean_rl.models.fused_decoder import fuse_decoder
from buleyean_rl.models.fused_layers import fuse_layers
from buleyean_rl.models.lora import group_layers
from buleyean_rl.models.views import backbone, eval_mode
from buleyean_rl.system.memory import return_free_memory


def attach_lora(model: Any, config: Any) -> Any:
    """Attach a new adapter to a base model, which is frozen and changed in place.

    The base's dropout is removed: the reference has none, so it would add to the loss.

    Args:
        model: from `load_base`.
        config: from `lora.lora_config`.

    Returns:
        The PEFT model.

    Raises:
        ModelError: the model has no such layers.
    """
    from peft import get_peft_model

    for weight in model.parameters():
        if not isinstance(weight, QuantisedTensor):
            weight.data = weight.data.clone()  # or the mapped file would stay in memory beside the concatenated weights
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)
    fuse_layers(model)
    with quiet_peft():
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"cannot attach an adapter to {type(model).__name__}: {error}") from error
    group_layers(adapted)
    with eval_mode(adapted):  # it computes no dropout
        fuse_decoder(backbone(adapted))
    return_free_memory()
    return adapted


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide PEFT's warnings about its own calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)  # untied when merged
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)  # GPT-2: PEFT corrects it
        yield
