"""A PEFT adapter folder as lazy low-rank pairs.

    adapter_config.json, adapter_model.safetensors --read_adapter--> LoraAdapter --merge_into--> a base model's tensors

An adapter's `other_features` decide whether it can be merged tensor by tensor, and whether llama.cpp can apply it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from buleyean_rl.errors import ExportError
from buleyean_rl.gguf.tensors import LazyTensor, add_lora, open_safetensors
from buleyean_rl.models.adapter_folder import read_adapter_config
from buleyean_rl.models.skeleton import EMBED_TOKENS, LM_HEAD

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraPair:
    """The low-rank update `scaling b a` of one weight.

    Args:
        a: Shape: (rank, in).
        b: Shape: (out, rank).
        scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """

    a: LazyTensor
    b: LazyTensor
    scaling: float


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter on disk.

    Args:
        pairs: updates by the module they belong to, as transformers names it.
        whole_tensors: that replace the base model's (`modules_to_save`), by name.
        alpha: as configured.
        other_features: what it does beyond low-rank updates and whole tensors, in words.
    """

    pairs: Mapping[str, LoraPair]
    whole_tensors: Mapping[str, LazyTensor]
    alpha: float
    other_features: tuple[str, ...]

    @property
    def changed_tensors(self) -> list[str]:
        """The names of the base model's tensors that it changes."""
        return [*self.whole_tensors, *(f"{module}.weight" for module in self.pairs)]

    @property
    def unties(self) -> bool:
        """Whether it changes one of output head and embedding, so that a model that has them in one needs two."""
        return not {LM_HEAD, EMBED_TOKENS}.isdisjoint(self.changed_tensors)

    def merge_into(self, parameters: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """A base model's parameters with this adapter merged in, tensor by tensor.

        Raises:
            ExportError: the adapter belongs to another model.
        """
        if unknown := sorted(set(self.changed_tensors) - set(parameters)):
            raise ExportError(
                f"the adapter changes {unknown[0]}, which the base model lacks: they do not belong together"
            )
        merged = {**parameters, **self.whole_tensors}
        for module, pair in self.pairs.items():
            name, shape = f"{module}.weight", (pair.b.shape[0], pair.a.shape[1])
            if merged[name].shape != shape:
                raise ExportError(
                    f"the adapter changes {name} as {shape}, and the base model has it as {merged[name].shape}: "
                    "they do not belong together"
                )
            merged[name] = add_lora(merged[name], pair.a, pair.b, pair.scaling)
        return merged


def read_adapter(folder: Path) -> LoraAdapter:
    """Read what an adapter is, without reading its numbers.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ExportError: the weights are missing, damaged, or of another method than LoRA.
    """
    config = read_adapter_config(folder)
    if config.get("peft_type") != "LORA":
        raise ExportError(f"{folder}: is an adapter of type {config.get('peft_type')!r}; only LoRA can be exported")
    try:
        stored = open_safetensors(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{folder / WEIGHTS}: cannot be read: {error}") from error
    # an embedding or head is saved as it was, beside the update of it
    tensors = {name.removeprefix(_PREFIX).replace(".base_layer.", "."): tensor for name, tensor in stored.items()}
    pairs, paired = {}, set()
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            b_name = f"{module}.lora_B.weight"
            if b_name not in tensors:
                raise ExportError(f"{folder / WEIGHTS}: {name} has no {b_name}")
            paired |= {name, b_name}
            if 0 in (*tensors[name].shape, *tensors[b_name].shape):
                raise ExportError(f"{folder / WEIGHTS}: {name} or {b_name} is empty: the file is damaged")
            rank = tensors[name].shape[0]
            pairs[module] = LoraPair(tensors[name], tensors[b_name], _scaling(config, module, rank))
    unpaired = {name: tensor for name, tensor in tensors.items() if name not in paired}
    whole_tensors = {name: tensor for name, tensor in unpaired.items() if ".lora_" not in name}
    features = _other_features(config) or [f"the tensor {name}" for name in sorted(set(unpaired) - set(whole_tensors))]
    return LoraAdapter(pairs, whole_tensors, float(config["lora_alpha"]), tuple(features))


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = float(config["lora_alpha"] if key is None else patterns[key])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _other_features(config: Mapping[str, Any]) -> list[str]:
    features = {
        "DoRA, which rescales every row of a weight": config.get("use_dora"),
        "trained biases": config.get("bias", "none") != "none",
        "a bias on its updates": config.get("lora_bias"),
        "single trained tokens": config.get("trainable_token_indices"),
        "updates of bare parameters": config.get("target_parameters"),
        "transposed weights": config.get("fan_in_fan_out"),
        "repeated layers": config.get("layer_replication"),
        "an invocation prompt (aLoRA)": config.get("alora_invocation_tokens"),
        "quantisation-aware groups (QALoRA)": config.get("use_qalora"),
        "block-diagonal updates (BD-LoRA)": config.get("use_bdlora"),
        "routing between adapters (Arrow)": config.get("arrow_config"),
        "a base that its initialisation changed (PiSSA, OLoRA, CorDA, LoftQ)": _changes_base(config),
    }
    return [feature for feature, is_used in features.items() if is_used]


def _changes_base(config: Mapping[str, Any]) -> bool:
    """Whether the adapter's initialisation took something out of the base weights."""
    method = config.get("init_lora_weights", True)
    return isinstance(method, str) and method.lower() not in ("gaussian", "eva", "orthogonal", "true", "false")
