"""An adapter's folder, checked against the model it belongs to before either is loaded; and untied where it is merged.

    adapter_config.json, base's configuration --PEFT, without weights--> names and shapes == those of the file

PEFT initialises what a file lacks, ignores what is left over, and takes a pickle where there is no safetensors file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from buleyean_rl.errors import ModelError
from buleyean_rl.models.adapt import quiet_peft
from buleyean_rl.models.model_folder import open_headers, read_json, refuse_pickle
from buleyean_rl.models.skeleton import build_skeleton
from buleyean_rl.models.weight_checks import check_finite, list_names

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# PEFT saves embedding and head as they were where one of them is a target
_SAVED_BESIDE = tuple(
    f"{module}{layer}.weight" for module in ("embed_tokens", "lm_head") for layer in ("", ".base_layer")
)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter's configuration.

    Raises:
        ModelError: it is damaged, or does not name its method and its base model.
    """
    config = read_json(folder / CONFIG)
    for key in ("peft_type", "base_model_name_or_path"):
        if not isinstance(config.get(key), str) or not config[key]:
            raise ModelError(f"{folder / CONFIG}: has no {key}: it is not an adapter's configuration")
    for key in ("alpha_pattern", "rank_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(isinstance(value, (int, float)) for value in pattern.values()):
            raise ModelError(f"{folder / CONFIG}: {key} is not a number for each module")
    if config["peft_type"] == "LORA" and not isinstance(config.get("lora_alpha"), (int, float)):
        raise ModelError(f"{folder / CONFIG}: lora_alpha is not a number")
    return config


def adapter_weights(folder: Path) -> Path:
    """The file with an adapter's weights.

    Raises:
        ModelError: there is none, or only a pickle.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLE).exists():
            refuse_pickle(folder / PICKLE)
        raise ModelError(f"{path} is missing: copy the adapter's folder again")
    return path


def check_adapter(folder: Path, base_config: Any) -> None:
    """Check that an adapter's file holds the tensors that its configuration asks for on its base model, all finite.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        base_config: the base model's, of transformers.

    Raises:
        ModelError: what is missing, left over, of another shape or not finite.
    """
    read_adapter_config(folder)
    path = adapter_weights(folder)
    from peft import get_peft_model_state_dict

    stored = {name: tensor.shape for name, tensor in open_headers(path).items()}
    state = get_peft_model_state_dict(build_adapted_skeleton(folder, base_config), save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if missing := expected.keys() - stored.keys():
        raise ModelError(f"{path}: lacks {list_names(missing)}, which its configuration asks for: copy it again")
    if surplus := {name for name in stored.keys() - expected.keys() if not name.endswith(_SAVED_BESIDE)}:
        raise ModelError(f"{path}: holds {list_names(surplus)}, which its configuration has no place for")
    for name, shape in sorted(expected.items()):
        if stored[name] != shape:
            raise ModelError(
                f"{path}: {name} is {stored[name]}, and {shape} on its base model: they do not belong together"
            )
    with safe_open(path, framework="pt") as file:
        for name in stored:
            check_finite(str(path), {name: file.get_tensor(name)})


def build_adapted_skeleton(folder: Path, base_config: Any) -> Any:
    """The PEFT model of an adapter's folder on its base model, without the weights of either."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # PEFT would compare it with the skeleton's
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # some ways to initialise compute with the base's weights
    skeleton = build_skeleton(base_config)
    with torch.device("meta"), quiet_peft():
        return get_peft_model(skeleton, config)


def untie_head(adapted: Any) -> None:
    """Give a PEFT model its own output head where its adapter changes head or embedding alone, before it is merged.

    The adapter was trained on one of the two; merged into their one matrix, it would change the other as well.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    plain = adapted.get_base_model()
    head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    if not any(isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) for module in (head, embedding)):
        return
    head, embedding = _base_layer(head), _base_layer(embedding)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    plain.config.tie_word_embeddings = False


def _base_layer(module: Any) -> Any:
    module = getattr(module, "original_module", module)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module
