"""Where a model computes and in which type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from buleyean_rl.kernels import abi, matmul
from buleyean_rl.kernels.precision import default_dtype
from buleyean_rl.models.fused_layers import fuse_layers
from buleyean_rl.models.run_folder import _of_run, is_run, run_base
from buleyean_rl.models.weights import load_base, load_config


def default_device() -> torch.device:
    """An NVIDIA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_for_inference(name: str, device: torch.device) -> Any:
    """A model on a device, in the type that it is quickest in there, its layers fused.

    Args:
        name: see `resolve`; or a run folder, whose adapter is merged in.
        device: where it goes.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    dtype = preferred_dtype(name, device)
    model = _of_run(Path(name)).merge_and_unload().eval().to(dtype) if is_run(name) else load_base(name, dtype)
    model.to(device)
    fuse_layers(model)
    return model


def preferred_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that a model is quickest in on a device: on a CPU bf16 too where `kernels` compute all that takes long.

    Args:
        name: see `resolve`; or a run folder.
        device: it is to be on.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    dtype = default_dtype(device)
    if dtype == torch.float32 and device.type == "cpu" and matmul.multiplies(torch.empty(0, 0, dtype=torch.bfloat16)):
        config = load_config(run_base(Path(name)) if is_run(name) else name)
        dtype = torch.bfloat16 if _fits_kernels(config) else dtype
    return dtype


@torch.no_grad()
def _fits_kernels(config: Any) -> bool:
    """Whether `kernels` compute all that takes long of a model: in bf16, on a CPU on which torch is slow in it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    by_index = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    others = {weight for weight in model.parameters() if weight.dim() > 1} - by_index - {each.weight for each in linear}
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    asks = ("final_logit_softcapping", "attn_logit_softcapping", "sliding_window")
    return (
        not others
        and not any(getattr(config, name, None) for name in asks)
        and model.get_output_embeddings().bias is None
        and not any(size % abi.STEP for size in (head_width, *(n for each in linear for n in each.weight.shape)))
    )
