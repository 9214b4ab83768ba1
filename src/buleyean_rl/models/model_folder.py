"""A model's folder, checked before anything in it is loaded: plain JSON, safetensors, sizes that the files bear out.

    folder --check_folder--> it is safe to give to transformers; --stored_tensors--> names, shapes, dtypes

transformers takes default sizes where a configuration has none, allocates by those it has, falls back to pickles, and
offers to run a model's own code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import safe_open

from buleyean_rl.errors import ModelError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "model_dim")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SIZES = {
    *WIDTHS,
    *("intermediate_size", "n_inner", "vocab_size", "head_dim", "n_positions"),
    *("num_attention_heads", "num_key_value_heads", "n_head"),
}
MAX_JSON_BYTES = 512 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file.

    Args:
        path: of the file.
        shape: rows first.
        dtype: as safetensors writes it, such as BF16.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that somebody else wrote.

    Raises:
        ModelError: it is missing, or is no JSON object in UTF-8 with finite numbers.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: is larger than a file of its kind can be")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ModelError(f"{path}: is no JSON file: {reason}; copy or download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: is no JSON object; copy or download it again")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def check_folder(folder: Path) -> None:
    """Check what can be checked of a model's folder without its weights' numbers.

    Raises:
        ModelError: what is wrong, with the file and the key.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / 'config.json'}: has no model_type: it is not the configuration of a model")
    _check_code(folder, config)
    tensors = stored_tensors(folder)
    if not tensors:
        raise ModelError(f"{folder}: its weights hold no tensors")
    _check_sizes(folder / "config.json", config, tensors)


def _check_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model that transformers does not have itself."""
    from transformers import CONFIG_MAPPING

    if "auto_map" in config and config["model_type"] not in CONFIG_MAPPING:
        raise ModelError(
            f"{folder}: {config['model_type']!r} needs the model's own code (auto_map in config.json), which is never "
            "run: take a model of a type that transformers has"
        )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder's safetensors files, by name, from the files' headers.

    Raises:
        ModelError: there are no such files, or one is missing or damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_paths(folder):
        tensors |= open_headers(path)
    return tensors


def weight_paths(folder: Path) -> list[Path]:
    """A folder's safetensors files.

    Raises:
        ModelError: there are none, or one that the index names is missing.
    """
    names = [WEIGHTS]
    if (folder / INDEX).exists():
        weights = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
            raise ModelError(f"{folder / INDEX}: has no weight_map of file names; copy or download it again")
        names = sorted(set(weights.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ModelError(f"{folder / INDEX}: names {outside[0]!r}, which is no file of this folder")
    if missing := [folder / name for name in names if not (folder / name).is_file()]:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickled and names == [WEIGHTS]:
            refuse_pickle(folder / pickled[0])
        raise ModelError(f"{missing[0]} is missing: only models saved as safetensors can be read")
    return [folder / name for name in names]


def refuse_pickle(path: Path) -> NoReturn:
    """Refuse weights whose file may run code when it is read.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        f"{path} is a pickle, which can run any code when it is read: take the weights as safetensors, or convert "
        "them where you trust them (save_pretrained writes safetensors)"
    )


def open_headers(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        ModelError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            return {
                name: StoredTensor(path, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
    except Exception as error:  # of the library in Rust
        raise ModelError(f"{path}: cannot be read: {error}; copy or download it again") from error


def _check_sizes(path: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse sizes that no tensor of the files has, before anything is allocated by them."""
    settings = config.get("text_config", config)
    if not isinstance(settings, dict):
        raise ModelError(f"{path}: text_config is no object")
    for names in (WIDTHS, DEPTHS):
        if not any(settings.get(name) is not None for name in names):
            raise ModelError(f"{path}: has no {names[0]}: its model cannot be told from it")
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for name, value in settings.items():
        is_depth = name in DEPTHS
        if value is None or isinstance(value, list) or not (is_depth or name in SIZES):
            continue
        limit = len(tensors) if is_depth else largest
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            unit = "tensors are in its files" if is_depth else "is the largest size of a tensor in its files"
            raise ModelError(f"{path}: {name} is {str(value)[:40]}, and {limit} {unit}")
