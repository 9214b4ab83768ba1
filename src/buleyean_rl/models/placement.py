"""Device and dtype of a model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from buleyean_rl.errors import ModelError
from buleyean_rl.kernels import abi, matmul
from buleyean_rl.kernels.precision import default_dtype
from buleyean_rl.models import gguf_weights
from buleyean_rl.models.fused_layers import fuse_layers
from buleyean_rl.models.gguf_header import read_header
from buleyean_rl.models.run_files import is_finished, read_run
from buleyean_rl.models.run_folder import find_model, merge_run
from buleyean_rl.models.source import Source
from buleyean_rl.models.weights import load_base, load_config, loading

LARGE = 500_000_000  # numbers of a model that stays in its blocks: 1 GB in bf16


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


def preferred_bits(source: Source, device: torch.device, dtype: torch.dtype, wanted: int | None) -> int | None:
    """The bits of a number of a base model's matrices; None for a GGUF file's blocks as they lie.

    Blocks save memory, and time where weights are read; a small model is quicker without them.

    Args:
        source: of the model, or of a run of it, which has the bits that it was trained with.
        device: to compute on.
        dtype: that it computes in.
        wanted: 4, 8 or 16; None for the best.

    Raises:
        ModelError: the model cannot be quantised there.
    """
    if wanted is None and source.run is not None and is_finished(source.run):
        wanted = read_run(source.run).get("config", {}).get("base_bits")
    if wanted == 16:
        return 16
    if device.type != "cpu":
        if wanted is not None:
            raise ModelError(f"{source.name}: only a CPU computes with {wanted} bits: use base_bits 16, or the CPU")
        return 16
    if wanted is not None:
        return wanted
    path = (source.base or source).gguf_path
    if path is None or not matmul.gemm_available(torch.empty(0, 0, dtype=dtype)) or not gguf_weights.is_known(path):
        return 16
    numbers = sum(math.prod(tensor.shape) for tensor in read_header(path).tensors.values())
    return None if numbers > LARGE else 16


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
