"""Device and dtype of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from buleyean_rl.kernels import abi, matmul
from buleyean_rl.kernels.precision import default_dtype
from buleyean_rl.models.fused_layers import fuse_layers
from buleyean_rl.models.run_folder import find_model, merge_run
from buleyean_rl.models.source import Source
from buleyean_rl.models.weights import load_base, load_config, loading


def default_device() -> torch.device:
    """An NVIDIA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_for_inference(name: str | Source, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Load a model on a device, with fused layers.

    Args:
        name: see `find_model`; a run's adapter is merged.
        device: to compute on.
        dtype: of its weights; None for the fastest on the device.

    Raises:
        ModelError: it cannot be resolved or loaded.
    """
    source = find_model(name)
    dtype = dtype or preferred_dtype(source, device)
    model = merge_run(source, dtype)[0] if source.run is not None else load_base(source, dtype)
    model.to(device)
    fuse_layers(model)
    return model


def preferred_dtype(name: str | Source, device: torch.device) -> torch.dtype:
    """The dtype that a model is fastest in on a device: on a CPU bf16, where `kernels` support the model.

    Args:
        name: see `find_model`.
        device: to compute on.

    Raises:
        ModelError: it cannot be resolved or loaded.
    """
    dtype = default_dtype(device)
    if (
        dtype == torch.float32
        and device.type == "cpu"
        and matmul.gemm_available(torch.empty(0, 0, dtype=torch.bfloat16))
    ):
        source = find_model(name)
        with loading(source):  # a configuration may ask for what transformers cannot build
            dtype = torch.bfloat16 if _fits_kernels(load_config(source)) else dtype
    return dtype


@torch.no_grad()
def _fits_kernels(config: Any) -> bool:
    """Whether `kernels` compute all layers of a model that are slow in torch's bf16."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    linear_layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    matrices = {weight for weight in model.parameters() if weight.dim() > 1}
    sizes = [size for layer in linear_layers for size in layer.weight.shape]
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    unsupported = ("final_logit_softcapping", "attn_logit_softcapping", "sliding_window")
    return (
        not matrices - embeddings - {layer.weight for layer in linear_layers}
        and not any(getattr(config, name, None) for name in unsupported)
        and model.get_output_embeddings().bias is None
        and not any(size % abi.BLOCK for size in (head_width, *sizes))
    )
