"""What llama.cpp calls things: a transformers configuration as GGUF metadata, its tensors by GGUF names.

One `Architecture` per family. Adding one means adding its row to `ARCHITECTURES`, and a tiny model of
it to the tests: the parity gate says whether the row is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, get_tensor_name_map
from torch import Tensor

from buleyean_rl.errors import ExportError, UnsupportedArchitecture

Value = bool | int | float | str | list[Any]


@dataclass(frozen=True)
class Architecture:
    """How a transformers model type maps to a llama.cpp architecture.

    Args:
        gguf: what llama.cpp calls it, and the prefix of its metadata.
        names: the table of its tensor names.
        interleaved: llama.cpp rotates neighbouring elements of q and k, transformers the two halves: the
            rows of q and k are to be permuted.
    """

    gguf: str
    names: MODEL_ARCH
    interleaved: bool


ARCHITECTURES = {
    "llama": Architecture("llama", MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Architecture("llama", MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Architecture("qwen2", MODEL_ARCH.QWEN2, interleaved=False),
}

SUPPORTED = "Llama (SmolLM2, Llama 2 and 3, TinyLlama), Mistral, Qwen2 and Qwen2.5"


@dataclass(frozen=True)
class Weight:
    """One tensor of the file and where it comes from.

    Args:
        name: in GGUF.
        shape: in torch's order, rows first.
        load: makes it, in any dtype; called when it is needed.
        parameter: its name in the transformers model; None for a tensor computed from the configuration.
        restore: turns the stored tensor back into the parameter.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    parameter: str | None
    restore: Callable[[Tensor], Tensor]


def supported(config: Any) -> bool:
    """Whether a transformers configuration is of an architecture that can be exported."""
    return getattr(config, "model_type", None) in ARCHITECTURES


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers configuration.

    Raises:
        UnsupportedArchitecture: it is none of the supported ones, or uses a feature llama.cpp lacks.
    """
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise UnsupportedArchitecture(f"cannot export a model of type {kind!r}; supported are {SUPPORTED}")
    if config.hidden_act != "silu":
        raise UnsupportedArchitecture(f"cannot export activation {config.hidden_act!r}; llama.cpp has 'silu' here")
    if kind == "qwen2" and config.use_sliding_window:
        raise UnsupportedArchitecture("cannot export a Qwen2 with a sliding window: llama.cpp has none for it")
    rope = rope_parameters(config)["rope_type"]
    if rope not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedArchitecture(f"cannot export rope scaling {rope!r}; linear, llama3 and yarn can be")
    return ARCHITECTURES[kind]


def hyperparameters(config: Any) -> tuple[dict[str, Value], list[str]]:
    """The GGUF metadata of a configuration, and remarks for the report.

    Returns:
        Metadata by full key; sentences about what llama.cpp does differently.
    """
    prefix = architecture_of(config).gguf
    head = head_dim(config)
    context, notes = config.max_position_embeddings, []
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    if window and window < context:
        # llama.cpp attends to everything here; within one window that is the same.
        context = window
        notes.append(f"context length {context}, the sliding window: llama.cpp would attend to more")
    values: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(rope_parameters(config)["rope_theta"]),
        **_rope_scaling(config),
    }
    return {f"{prefix}.{key}": value for key, value in values.items()}, notes


def weights(model: Any) -> Iterator[Weight]:
    """The tensors of a model by their GGUF names, in the model's order; nothing is copied until `load`.

    Raises:
        ExportError: the model has an adapter, or a tensor that GGUF has no name for.
    """
    if hasattr(model, "peft_config"):
        raise ExportError("the model still has an adapter beside its weights; merge the adapter first")
    config = model.config
    arch = architecture_of(config)
    table = get_tensor_name_map(arch.names, config.num_hidden_layers)
    tied = _tied(model)
    for parameter, tensor in model.state_dict(keep_vars=True).items():
        if tied and parameter == "lm_head.weight":
            continue  # llama.cpp uses the embedding where there is no output matrix
        name = table.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(f"GGUF has no name for the tensor {parameter!r} of this model")
        heads = _rotated_heads(config, arch, parameter)
        yield Weight(
            name,
            tuple(tensor.shape),
            _loader(tensor, heads),
            parameter,
            _identity if heads is None else _restorer(heads),
        )
    factors = _rope_factors(config)
    if factors is not None:
        yield Weight("rope_freqs.weight", tuple(factors.shape), lambda: factors, None, _identity)


def head_dim(config: Any) -> int:
    """The width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_parameters(config: Any) -> dict[str, Any]:
    """The rotary embedding's settings, with `rope_type` and `rope_theta` always there."""
    return {"rope_type": "default", "rope_theta": 10000.0} | dict(config.rope_parameters or {})


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k from "two halves per head" to "pairs side by side": what llama.cpp rotates.

    Shape: (heads * head_dim, ...), the same out.
    """
    rows = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


def deinterleave(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`. Shape: (heads * head_dim, ...), the same out."""
    rows = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


def _rotated_heads(config: Any, arch: Architecture, parameter: str) -> int | None:
    """How many heads to permute in a parameter; None where it stays as it is."""
    if not arch.interleaved:
        return None
    if ".q_proj." in parameter:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in parameter else None


def _loader(tensor: Tensor, heads: int | None) -> Callable[[], Tensor]:
    return lambda: tensor.detach() if heads is None else interleave(tensor.detach(), heads)


def _restorer(heads: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: deinterleave(tensor, heads)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _tied(model: Any) -> bool:
    """Whether input and output embeddings are one tensor, whatever the configuration says."""
    output = model.get_output_embeddings()
    return output is None or output.weight is model.get_input_embeddings().weight


def _rope_scaling(config: Any) -> dict[str, Value]:
    """Metadata of linear and YaRN scaling; Llama 3's is a tensor, see `_rope_factors`."""
    rope = rope_parameters(config)
    if rope["rope_type"] == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(original),
        }
    return {}


def _rope_factors(config: Any) -> Tensor | None:
    """What llama.cpp divides each rotation frequency by, for Llama 3's scaling. Shape: (head_dim / 2,)."""
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = head_dim(config)
    plain = float(rope["rope_theta"]) ** -(np.arange(0, width, 2) / width)
    return torch.from_numpy(plain).float() / scaled.float()
