"""What llama.cpp calls things: a transformers configuration as GGUF metadata, parameters as GGUF tensors.

    configuration --ARCHITECTURES--> Architecture --hyperparameters--> metadata
                                                  --tensor_layouts---> name, row order and shift of each tensor

A new architecture is a row of `ARCHITECTURES`, and a tiny model of it in tests/gguf/test_architectures.py: the parity
gate says whether the row is right. Tensor names come from the `gguf` package. What llama.cpp would compute
differently without saying so is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from buleyean_rl.errors import ExportError, UnsupportedArchitecture
from buleyean_rl.gguf.metadata import Value
from buleyean_rl.gguf.private_interfaces import rope_frequencies
from buleyean_rl.gguf.tensors import LazyTensor, permute_rows, shift, wrap_tensor
from gguf import MODEL_ARCH, get_tensor_name_map

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Architecture:
    """How a transformers model type maps to a llama.cpp architecture.

    Args:
        name: what llama.cpp calls it, and the prefix of its metadata.
        tensor_names: the gguf package's table of its tensor names.
        interleaved: llama.cpp rotates neighbouring elements of q and k, transformers the two halves: the rows of q
            and k are permuted.
        norm_shift: added to every norm's weight, where transformers multiplies by 1 + weight.
        activation: the one llama.cpp has for it.
        limit_context: llama.cpp ignores its sliding window: the context length is at most one window.
        unsupported: names a feature of a configuration that llama.cpp lacks, or returns None.
        metadata: of this architecture alone, by key without the prefix.
    """

    name: str
    tensor_names: MODEL_ARCH
    interleaved: bool = False
    norm_shift: float = 0.0
    activation: str = "silu"
    limit_context: bool = False
    unsupported: Callable[[Any], str | None] = lambda _: None
    metadata: Callable[[Any], dict[str, Value]] = lambda _: {}


@dataclass(frozen=True)
class TensorLayout:
    """How a parameter is stored in GGUF.

    Args:
        name: of the tensor.
        heads: the number of heads whose rows are interleaved; None where rows stay in place.
        shift: added to every number.
    """

    name: str
    heads: int | None = None
    shift: float = 0.0

    def to_gguf(self, parameter: LazyTensor) -> LazyTensor:
        """The parameter as the file stores it."""
        if self.heads is not None:
            parameter = permute_rows(parameter, interleave(torch.arange(parameter.shape[0]), self.heads))
        return shift(parameter, self.shift) if self.shift else parameter

    def from_gguf(self, tensor: LazyTensor) -> LazyTensor:
        """The file's tensor as the parameter."""
        if self.shift:
            tensor = shift(tensor, -self.shift)
        if self.heads is None:
            return tensor
        return permute_rows(tensor, deinterleave(torch.arange(tensor.shape[0]), self.heads))


def find_architecture(config: Any) -> Architecture:
    """The architecture of a transformers configuration.

    Raises:
        UnsupportedArchitecture: it is none of the supported ones, or uses a feature llama.cpp lacks.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        raise UnsupportedArchitecture(f"cannot export a model of type {model_type!r}; supported are {SUPPORTED}")
    architecture = ARCHITECTURES[model_type]
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != architecture.activation:
        raise UnsupportedArchitecture(
            f"cannot export activation {activation!r}; llama.cpp has {architecture.activation!r} here"
        )
    if (rope_type := rope_parameters(config)["rope_type"]) not in ROPE_TYPES:
        raise UnsupportedArchitecture(
            f"cannot export rope scaling {rope_type!r}; linear, llama3, longrope and yarn can be"
        )
    if (feature := architecture.unsupported(config)) is not None:
        raise UnsupportedArchitecture(f"cannot export a {model_type} with {feature}: llama.cpp has none for it")
    return architecture


def hyperparameters(config: Any) -> tuple[dict[str, Value], list[str]]:
    """The GGUF metadata of a configuration, and notes for the report.

    Returns:
        Metadata by full key; sentences about what llama.cpp does differently.
    """
    architecture = find_architecture(config)
    width = head_dim(config)
    context, notes = config.max_position_embeddings, []
    window = getattr(config, "sliding_window", None) if architecture.limit_context else None
    if window and window < context:
        context = window
        notes.append(f"context length {context}, the sliding window: llama.cpp would attend to more")
    rope = rope_parameters(config)
    values: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": int(width * (rope.get("partial_rotary_factor") or 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        **_rope_scaling(config),
        **architecture.metadata(config),
    }
    return {f"{architecture.name}.{key}": value for key, value in values.items()}, notes


def tensor_layouts(config: Any, parameters: list[str]) -> dict[str, TensorLayout]:
    """How each of a model's parameters is stored.

    Args:
        config: of transformers.
        parameters: names of the transformers model's tensors.

    Raises:
        ExportError: a tensor that GGUF has no name for.
    """
    architecture = find_architecture(config)
    table = get_tensor_name_map(architecture.tensor_names, config.num_hidden_layers)
    layouts = {}
    for parameter in parameters:
        name = table.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(f"GGUF has no name for the tensor {parameter!r} of this model")
        norm_shift = architecture.norm_shift if parameter.endswith("norm.weight") else 0.0
        layouts[parameter] = TensorLayout(name, _interleaved_heads(config, architecture, parameter), norm_shift)
    return layouts


def rope_factors(config: Any) -> dict[str, LazyTensor]:
    """The tensors of a file that are no parameter: what llama.cpp divides the rotary frequencies by."""
    rope = rope_parameters(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": wrap_tensor(_llama3_factors(config))}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{length}.weight": wrap_tensor(torch.tensor(rope[f"{length}_factor"], dtype=torch.float32))
            for length in ("long", "short")
        }
    return {}


def head_dim(config: Any) -> int:
    """The width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_parameters(config: Any, layer_type: str = "full_attention") -> dict[str, Any]:
    """The rotary embedding's settings, `rope_type` and `rope_theta` always among them.

    Args:
        config: of transformers.
        layer_type: whose settings, in models with different ones by type of layer.
    """
    settings: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return {"rope_type": "default", "rope_theta": 10000.0} | dict(settings.get(layer_type, settings))


def original_context(config: Any) -> int:
    """The context length before rope scaling."""
    return int(
        rope_parameters(config).get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )


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


def _interleaved_heads(config: Any, architecture: Architecture, parameter: str) -> int | None:
    if not architecture.interleaved:
        return None
    if ".q_proj." in parameter:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in parameter else None


def _rope_scaling(config: Any) -> dict[str, Value]:
    """Metadata of linear, YaRN and LongRoPE scaling; the factors of Llama 3 and LongRoPE are tensors."""
    rope = rope_parameters(config)
    if rope["rope_type"] == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": original_context(config),
        }
    if rope["rope_type"] == "longrope":
        return {
            "rope.scaling.original_context_length": original_context(config),
            "rope.scaling.attn_factor": rope_frequencies(config, "longrope")[1],
        }
    return {}


def _llama3_factors(config: Any) -> Tensor:
    """Unscaled over scaled rotary frequencies. Shape: (head_dim / 2,)."""
    scaled, _ = rope_frequencies(config, "llama3")
    width = head_dim(config)
    unscaled = float(rope_parameters(config)["rope_theta"]) ** -(np.arange(0, width, 2) / width)
    return torch.from_numpy(unscaled).float() / scaled.float()


# --- what llama.cpp lacks ----------------------------------------------------------------------------------


def _sliding_window(config: Any) -> str | None:
    return "a sliding window" if getattr(config, "use_sliding_window", False) else None


def _biases_or_window(config: Any) -> str | None:
    has_biases = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    return "biases" if has_biases else _sliding_window(config)


def _smollm3_unsupported(config: Any) -> str | None:
    every_fourth = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if list(config.no_rope_layers)[: config.num_hidden_layers] != every_fourth:
        return "layers without rotation other than every fourth"
    return _biases_or_window(config)


def _gemma_unsupported(config: Any) -> str | None:
    # llama.cpp tells the 27B models, whose scale is another, by their number of layers
    is_27b = config.num_hidden_layers == (46 if config.model_type == "gemma2" else 62)
    scalar = config.hidden_size // config.num_attention_heads if is_27b else head_dim(config)
    if config.query_pre_attn_scalar != scalar:
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar} rather than {scalar}"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention in both directions"
    if config.model_type == "gemma3_text" and config.attn_logit_softcapping:
        return "capped attention"
    period = 2 if config.model_type == "gemma2" else 6
    for layer, layer_type in enumerate(config.layer_types, start=1):
        if layer_type != ("sliding_attention" if layer % period else "full_attention"):
            return f"full attention other than in layer {period} of {period}"
    return _biases_or_window(config)


# --- metadata of one architecture --------------------------------------------------------------------------


def _gemma2_metadata(config: Any) -> dict[str, Value]:
    return {
        "attention.sliding_window": config.sliding_window,
        # llama.cpp caps at 50 and 30 unless told otherwise; a cap this high is none
        "attn_logit_softcapping": float(config.attn_logit_softcapping or 1e6),
        "final_logit_softcapping": float(config.final_logit_softcapping or 1e6),
    }


def _gemma3_metadata(config: Any) -> dict[str, Value]:
    values: dict[str, Value] = {
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base_swa": float(rope_parameters(config, "sliding_attention")["rope_theta"]),
    }
    if config.final_logit_softcapping:
        values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return values


ARCHITECTURES = {  # by transformers' model type
    "llama": Architecture("llama", MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Architecture("llama", MODEL_ARCH.LLAMA, interleaved=True, limit_context=True),
    "smollm3": Architecture("smollm3", MODEL_ARCH.SMOLLM3, interleaved=True, unsupported=_smollm3_unsupported),
    "qwen2": Architecture("qwen2", MODEL_ARCH.QWEN2, unsupported=_sliding_window),
    "qwen3": Architecture("qwen3", MODEL_ARCH.QWEN3, unsupported=_biases_or_window),
    "gemma2": Architecture(
        "gemma2",
        MODEL_ARCH.GEMMA2,
        norm_shift=1.0,
        activation="gelu_pytorch_tanh",
        unsupported=_gemma_unsupported,
        metadata=_gemma2_metadata,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        MODEL_ARCH.GEMMA3,
        norm_shift=1.0,
        activation="gelu_pytorch_tanh",
        unsupported=_gemma_unsupported,
        metadata=_gemma3_metadata,
    ),
    "phi3": Architecture("phi3", MODEL_ARCH.PHI3, limit_context=True),
}
SUPPORTED = (
    "Llama (SmolLM2, Llama 2 and 3, TinyLlama), Mistral, SmolLM3, Qwen2, Qwen2.5 and Qwen3, Gemma 2 and 3, Phi-3"
)
