"""A PEFT adapter folder as low-rank pairs that are read when they are needed.

`read_adapter` says what an adapter does and what it does beyond low-rank updates: those `extras` decide
whether it can be merged tensor by tensor, and whether llama.cpp can apply it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from buleyean_rl.errors import ExportError
from buleyean_rl.gguf.tensors import Rows, in_safetensors, with_lora

WEIGHTS = "adapter_model.safetensors"
_APART = "they do not belong together"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Pair:
    """The low-rank update `scaling b a` of one weight. Shape: a (rank, in), b (out, rank)."""

    a: Rows
    b: Rows
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Args:
        pairs: updates by the module they belong to, as transformers names it.
        saved: whole tensors that replace the base model's, by name.
        alpha: as configured.
        extras: what else it has, in words; empty for an adapter that is low-rank updates and whole tensors only.
    """

    pairs: Mapping[str, Pair]
    saved: Mapping[str, Rows]
    alpha: float
    extras: tuple[str, ...]

    @property
    def changes(self) -> list[str]:
        """The names of the tensors it changes."""
        return [*self.saved, *(f"{module}.weight" for module in self.pairs)]

    def merged(self, tensors: Mapping[str, Rows]) -> dict[str, Rows]:
        """A base model's tensors with this adapter in them, tensor by tensor.

        Raises:
            ExportError: the adapter belongs to another model.
        """
        if unknown := sorted(set(self.changes) - set(tensors)):
            raise ExportError(f"the adapter changes {unknown[0]}, which the base model lacks: {_APART}")
        result = {**tensors, **self.saved}
        for module, pair in self.pairs.items():
            name, shape = f"{module}.weight", (pair.b.shape[0], pair.a.shape[1])
            if tensors[name].shape != shape:
                found = tensors[name].shape
                raise ExportError(
                    f"the adapter changes {name} as {shape}, and the base model has it as {found}: {_APART}"
                )
            result[name] = with_lora(tensors[name], pair.a, pair.b, pair.scaling)
        return result


def read_adapter(folder: Path, config: Mapping[str, Any]) -> Adapter:
    """DriftCheck into an adapter without reading its numbers.

    Args:
        folder: with `adapter_model.safetensors`.
        config: what its `adapter_config.json` says.

    Raises:
        ExportError: the file is missing, damaged, or of another kind than LoRA.
    """
    if config.get("peft_type") != "LORA":
        raise ExportError(f"{folder}: is an adapter of type {config.get('peft_type')!r}; only LoRA can be exported")
    try:
        stored = in_safetensors(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{folder / WEIGHTS}: cannot be read: {error}") from error
    tensors = {name.removeprefix(_PREFIX): rows for name, rows in stored.items()}
    pairs, used = {}, set()
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            other = f"{module}.lora_B.weight"
            if other not in tensors:
                raise ExportError(f"{folder / WEIGHTS}: {name} has no {other}")
            used |= {name, other}
            rank = tensors[name].shape[0]
            pairs[module] = Pair(tensors[name], tensors[other], _scaling(config, module, rank))
    rest = {name: rows for name, rows in tensors.items() if name not in used}
    saved = {name: rows for name, rows in rest.items() if ".lora_" not in name}
    extras = tuple(_extras(config)) or tuple(f"the tensor {name}" for name in sorted(set(rest) - set(saved)))
    return Adapter(pairs, saved, float(config["lora_alpha"]), extras)


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What an update is multiplied by: alpha / rank, or alpha / sqrt(rank) for rsLoRA; alpha may differ by module."""
    patterns = config.get("alpha_pattern") or {}
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = float(config["lora_alpha"] if key is None else patterns[key])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _extras(config: Mapping[str, Any]) -> list[str]:
    """What an adapter does beyond adding low-rank updates to linear layers, in words."""
    found = {
        "DoRA, which rescales every row of a weight": config.get("use_dora"),
        "trained biases": config.get("bias", "none") != "none",
        "a bias on its updates": config.get("lora_bias"),
        "single trained tokens": config.get("trainable_token_indices"),
        "updates of bare parameters": config.get("target_parameters"),
        "transposed weights": config.get("fan_in_fan_out"),
        "repeated layers": config.get("layer_replication"),
        "an invocation prompt (aLoRA)": config.get("alora_invocation_tokens"),
        "quantisation-aware groups (QALoRA)": config.get("use_qalora"),
        "blocks of its own (BD-LoRA)": config.get("use_bdlora"),
        "a routing of its own (Arrow)": config.get("arrow_config"),
        "a base it changed when it was made (PiSSA, OLoRA, CorDA, LoftQ)": _changed_base(config),
    }
    return [what for what, there in found.items() if there]


def _changed_base(config: Mapping[str, Any]) -> bool:
    """Whether the adapter was initialised by taking something out of the base weights."""
    how = config.get("init_lora_weights", True)
    return isinstance(how, str) and how.lower() not in ("gaussian", "eva", "orthogonal", "true", "false")
