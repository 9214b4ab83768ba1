"""What llama.cpp calls things: a transformers configuration as GGUF metadata, its tensors by GGUF names.

One `Architecture` per model type. Adding one means adding its row to `ARCHITECTURES`, and a tiny model of it
to the tests: the parity gate says whether the row is right. Tensor names come from the `gguf` package.

What is refused here is what llama.cpp would compute differently without saying so.
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
from buleyean_rl.gguf.tensors import Rows, in_memory, reordered, shifted
from gguf import MODEL_ARCH, get_tensor_name_map


@dataclass(frozen=True)
class Architecture:
    """How a transformers model type maps to a llama.cpp architecture.

    Args:
        gguf: what llama.cpp calls it, and the prefix of its metadata.
        names: the table of its tensor names.
        interleaved: llama.cpp rotates neighbouring elements of q and k, transformers the two halves: the
            rows of q and k are to be permuted.
        norm_shift: added to every norm's weight: where transformers multiplies by 1 + weight.
        activation: the one llama.cpp has for it.
        check: says what of a configuration llama.cpp lacks, or nothing.
        extra: metadata of this architecture alone, by key without the prefix.
    """

    gguf: str
    names: MODEL_ARCH
    interleaved: bool = False
    norm_shift: float = 0.0
    activation: str = "silu"
    check: Callable[[Any], str | None] = lambda _: None
    extra: Callable[[Any], dict[str, Value]] = lambda _: {}


@dataclass(frozen=True)
class Layout:
    """How a parameter is stored: under which name, its rows in which order, shifted by how much.

    Args:
        name: in GGUF.
        heads: whose rows are interleaved; None where rows stay in place.
        shift: added to every number.
    """

    name: str
    heads: int | None = None
    shift: float = 0.0

    def store(self, rows: Rows) -> Rows:
        """The parameter as the file has it."""
        if self.heads is not None:
            rows = reordered(rows, interleave(torch.arange(rows.shape[0]), self.heads))
        return shifted(rows, self.shift) if self.shift else rows

    def load(self, rows: Rows) -> Rows:
        """The file's tensor as the parameter."""
        if self.shift:
            rows = shifted(rows, -self.shift)
        return rows if self.heads is None else reordered(rows, deinterleave(torch.arange(rows.shape[0]), self.heads))


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
    arch = ARCHITECTURES[kind]
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != arch.activation:
        raise UnsupportedArchitecture(
            f"cannot export activation {activation!r}; llama.cpp has {arch.activation!r} here"
        )
    if (rope := rope_parameters(config)["rope_type"]) not in ("default", "linear", "llama3", "yarn", "longrope"):
        raise UnsupportedArchitecture(f"cannot export rope scaling {rope!r}; linear, llama3, longrope and yarn can be")
    if (lacking := arch.check(config)) is not None:
        raise UnsupportedArchitecture(f"cannot export a {kind} with {lacking}: llama.cpp has none for it")
    return arch


def hyperparameters(config: Any) -> tuple[dict[str, Value], list[str]]:
    """The GGUF metadata of a configuration, and remarks for the report.

    Returns:
        Metadata by full key; sentences about what llama.cpp does differently.
    """
    arch = architecture_of(config)
    head = head_dim(config)
    context, notes = config.max_position_embeddings, []
    window = getattr(config, "sliding_window", None) if config.model_type in ("mistral", "phi3") else None
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
        "rope.dimension_count": int(head * (rope_parameters(config).get("partial_rotary_factor") or 1.0)),
        "rope.freq_base": float(rope_parameters(config)["rope_theta"]),
        **_rope_scaling(config),
        **arch.extra(config),
    }
    return {f"{arch.gguf}.{key}": value for key, value in values.items()}, notes


def layouts(config: Any, parameters: list[str]) -> dict[str, Layout]:
    """Where each of a model's parameters goes.

    Args:
        config: of transformers.
        parameters: names of the transformers model's tensors.

    Raises:
        ExportError: a tensor that GGUF has no name for.
    """
    arch = architecture_of(config)
    table = get_tensor_name_map(arch.names, config.num_hidden_layers)
    found = {}
    for parameter in parameters:
        name = table.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(f"GGUF has no name for the tensor {parameter!r} of this model")
        shift = arch.norm_shift if parameter.endswith("norm.weight") else 0.0
        found[parameter] = Layout(name, _rotated_heads(config, arch, parameter), shift)
    return found


def computed(config: Any) -> dict[str, Rows]:
    """The tensors of a file that are no parameter: what the rotation's frequencies are divided by."""
    rope = rope_parameters(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": in_memory(_llama3_factors(config))}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{length}.weight": in_memory(torch.tensor(rope[f"{length}_factor"], dtype=torch.float32))
            for length in ("long", "short")
        }
    return {}


def head_dim(config: Any) -> int:
    """The width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_parameters(config: Any, layer: str = "full_attention") -> dict[str, Any]:
    """The rotary embedding's settings, with `rope_type` and `rope_theta` always there.

    Args:
        config: of transformers.
        layer: which kind of layer's, in models that rotate by kind.
    """
    settings: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return {"rope_type": "default", "rope_theta": 10000.0} | dict(settings.get(layer, settings))


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


def _rope_scaling(config: Any) -> dict[str, Value]:
    """Metadata of linear, YaRN and LongRoPE scaling; the factors of Llama 3's and LongRoPE's are tensors."""
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
        _, attention = _rope_init("longrope")(config, torch.device("cpu"))
        return {
            "rope.scaling.original_context_length": original_context(config),
            "rope.scaling.attn_factor": float(attention),
        }
    return {}


def original_context(config: Any) -> int:
    """The context before its rotation was stretched."""
    return int(
        rope_parameters(config).get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )


def _llama3_factors(config: Any) -> Tensor:
    """What llama.cpp divides each rotation frequency by, for Llama 3's scaling. Shape: (head_dim / 2,)."""
    scaled, _ = _rope_init("llama3")(config, torch.device("cpu"))
    width = head_dim(config)
    plain = float(rope_parameters(config)["rope_theta"]) ** -(np.arange(0, width, 2) / width)
    return torch.from_numpy(plain).float() / scaled.float()


def _rope_init(kind: str) -> Any:
    """transformers' own computation of a rotation's frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[kind]


def _no_window(config: Any) -> str | None:
    return "a sliding window" if getattr(config, "use_sliding_window", False) else None


def _no_biases(config: Any) -> str | None:
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    return "biases" if biased else _no_window(config)


def _smollm3(config: Any) -> str | None:
    every_fourth = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if list(config.no_rope_layers)[: config.num_hidden_layers] != every_fourth:
        return "layers without rotation other than every fourth"
    return _no_biases(config)


def _gemma(config: Any) -> str | None:
    # llama.cpp tells the 27B models, whose scale is another, by their number of layers
    largest = config.num_hidden_layers == (46 if config.model_type == "gemma2" else 62)
    expected = config.hidden_size // config.num_attention_heads if largest else head_dim(config)
    if config.query_pre_attn_scalar != expected:
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar} rather than {expected}"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention in both directions"
    if config.model_type == "gemma3_text" and config.attn_logit_softcapping:
        return "capped attention"
    period = 2 if config.model_type == "gemma2" else 6
    usual = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(config.layer_types))]
    return (
        _no_biases(config)
        if config.layer_types == usual
        else f"full attention other than in layer {period} of {period}"
    )


def _gemma2_extra(config: Any) -> dict[str, Value]:
    return {
        "attention.sliding_window": config.sliding_window,
        # llama.cpp caps at 50 and 30 unless told otherwise; a cap this high is none
        "attn_logit_softcapping": float(config.attn_logit_softcapping or 1e6),
        "final_logit_softcapping": float(config.final_logit_softcapping or 1e6),
    }


def _gemma3_extra(config: Any) -> dict[str, Value]:
    values: dict[str, Value] = {
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base_swa": float(rope_parameters(config, "sliding_attention")["rope_theta"]),
    }
    if config.final_logit_softcapping:
        values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return values


_GELU = "gelu_pytorch_tanh"
ARCHITECTURES = {
    "llama": Architecture("llama", MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Architecture("llama", MODEL_ARCH.LLAMA, interleaved=True),
    "smollm3": Architecture("smollm3", MODEL_ARCH.SMOLLM3, interleaved=True, check=_smollm3),
    "qwen2": Architecture("qwen2", MODEL_ARCH.QWEN2, check=_no_window),
    "qwen3": Architecture("qwen3", MODEL_ARCH.QWEN3, check=_no_biases),
    "gemma2": Architecture(
        "gemma2", MODEL_ARCH.GEMMA2, norm_shift=1.0, activation=_GELU, check=_gemma, extra=_gemma2_extra
    ),
    "gemma3_text": Architecture(
        "gemma3", MODEL_ARCH.GEMMA3, norm_shift=1.0, activation=_GELU, check=_gemma, extra=_gemma3_extra
    ),
    "phi3": Architecture("phi3", MODEL_ARCH.PHI3),
}
SUPPORTED = (
    "Llama (SmolLM2, Llama 2 and 3, TinyLlama), Mistral, SmolLM3, Qwen2, Qwen2.5 and Qwen3, Gemma 2 and 3, Phi-3"
)
