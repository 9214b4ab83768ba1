"""Where a model computes and in which type."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from buleyean_rl.kernels import abi, matmul
from buleyean_rl.kernels.precision import default_dtype
from buleyean_rl.models.fused_layers import fuse_layers
from buleyean_rl.models.run_folder import find_model, merge_run
from buleyean_rl.models.source import Source
from buleyean_rl.models.weights import load_base, load_config


def default_device() -> torch.device:
    """An NVIDIA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_for_inference(name: str | Source, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A model on a device, its layers fused.

    Args:
        name: see `find_model`; a run's adapter is merged in.
        device: where it goes.
        dtype: of its weights; None for the quickest there.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    source = find_model(name)
    dtype = dtype or preferred_dtype(source, device)
    model = merge_run(source, dtype)[0] if source.run is not None else load_base(source, dtype)
    model.to(device)
    fuse_layers(model)
    return model


def preferred_dtype(name: str | Source, device: torch.device) -> torch.dtype:
    """The type that a model is quickest in on a device: on a CPU bf16 too where `kernels` compute all that takes long.

    Args:
        name: see `find_model`.
        device: it is to be on.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    dtype = default_dtype(device)
    if (
        dtype == torch.float32
        and device.type == "cpu"
        and matmul.gemm_available(torch.empty(0, 0, dtype=torch.bfloat16))
    ):
        dtype = torch.bfloat16 if _fits_kernels(load_config(find_model(name))) else dtype
    return dtype


@torch.no_grad()
def _fits_kernels(config: Any) -> bool:
    """Whether `kernels` compute all that takes long of a model: in bf16, on a CPU on which torch is slow in it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    matrices = {weight for weight in model.parameters() if weight.dim() > 1}
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    unsupported = ("final_logit_softcapping", "attn_logit_softcapping", "sliding_window")
    return (
        not matrices - embeddings - {each.weight for each in linear}
        and not any(getattr(config, name, None) for name in unsupported)
        and model.get_output_embeddings().bias is None
        and not any(size % abi.BLOCK for size in (head_width, *(n for each in linear for n in each.weight.shape)))
    )
