"""Base models: find, load, adapt, merge.

    name --resolve--> Source --load_base--> transformers model --attach_lora--> PEFT model --merge--> plain model

A name is `smollm2-135m` (bundled), `smollm2-360m`, a Hub id, a local folder or a GGUF file. A run folder
stands for its base model with the adapter merged in. Weights are read from safetensors or GGUF, never
from pickle, and no code that comes with a model is run.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from buleyean_rl.errors import ModelError
from buleyean_rl.models import pre_tokenizers
from buleyean_rl.models.source import Source, fingerprint, resolve
from buleyean_rl.system.cache import cache_folder


def load_base(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a causal language model, in evaluation mode.

    Args:
        name: see `resolve`.
        dtype: of its weights.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    from transformers import AutoModelForCausalLM

    source = resolve(name)
    with _loading(source):
        location = _converted(source) if source.gguf else source.location
        return AutoModelForCausalLM.from_pretrained(location, dtype=dtype, use_safetensors=True).eval()


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a base model.

    Args:
        name: see `resolve`.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    from transformers import AutoTokenizer

    source = resolve(name)
    with _loading(source):
        return AutoTokenizer.from_pretrained(_converted(source) if source.gguf else source.location)


def load_config(name: str) -> Any:
    """The transformers configuration of a model, without its weights.

    Args:
        name: see `resolve`.

    Raises:
        ModelError: it cannot be found or read.
    """
    from transformers import AutoConfig

    source = resolve(name)
    with _loading(source):
        if source.gguf and not _conversion(source).exists():
            return AutoConfig.from_pretrained(source.location, gguf_file=source.gguf)
        return AutoConfig.from_pretrained(_conversion(source) if source.gguf else source.location)


def eos_token_ids(name: str, config: Any) -> set[int]:
    """The tokens at which a model's generation stops, as far as it says so.

    Args:
        name: see `resolve`.
        config: from `load_config`.
    """
    from transformers import GenerationConfig

    source = resolve(name)
    try:
        found = config if source.gguf else GenerationConfig.from_pretrained(source.location)
    except OSError:  # it has no generation_config.json
        found = config
    ends = found.eos_token_id
    return set(ends if isinstance(ends, list) else [ends]) - {None}


def weight_files(name: str) -> list[Path]:
    """The safetensors files of a model that is not a GGUF, fetched from the Hub where it is there.

    Args:
        name: see `resolve`.

    Raises:
        ModelError: there are none.
    """
    from huggingface_hub import snapshot_download

    source = resolve(name)
    with _loading(source):
        folder = Path(source.location)
        if not folder.is_dir():
            folder = Path(snapshot_download(source.location, allow_patterns=["*.safetensors", "*.json"]))
        index = folder / "model.safetensors.index.json"
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        paths = [folder / shard for shard in sorted(shards)]
    if missing := [path for path in paths if not path.exists()]:
        raise ModelError(f"{missing[0]} is missing: only models saved as safetensors can be read")
    return paths


def _converted(source: Source) -> str:
    """A GGUF file as a transformers folder in fp32, made once: transformers takes long to read a GGUF."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = _conversion(source)
    if folder.exists():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        # left packed, its weights would be neither trainable nor mergeable
        model = AutoModelForCausalLM.from_pretrained(
            source.location,
            gguf_file=source.gguf,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer = AutoTokenizer.from_pretrained(source.location, gguf_file=source.gguf)
        _restore_split(tokenizer, Path(source.location) / str(source.gguf))
        for part in (model, tokenizer):
            part.save_pretrained(f"{unfinished}/model")
        if not folder.exists():  # another process may have been faster
            os.rename(f"{unfinished}/model", folder)
    return str(folder)


def _conversion(source: Source) -> Path:
    """Where a GGUF file's conversion is kept, once there is one."""
    from transformers import __version__

    return cache_folder() / "models" / f"{fingerprint(source.name)}-{__version__}"


def _restore_split(tokenizer: Any, gguf_path: Path) -> None:
    """transformers splits text like GPT-2 whatever the file says; SmolLM, for one, takes digits apart first."""
    from gguf import GGUFReader

    field = GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    split = pre_tokenizers.named(field.contents()) if field is not None else None
    if split is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = split


@contextmanager
def _loading(source: Source) -> Iterator[None]:
    """Turn the many ways in which loading fails into one error; keep progress bars out of the way."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    logging.disable_progress_bar()
    own_bar = vars(reader)["tqdm"]  # this one heeds no setting
    vars(reader)["tqdm"] = lambda items, **_: items
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot load model {source.name!r}: {reason}") from error
    finally:
        vars(reader)["tqdm"] = own_bar
        logging.enable_progress_bar()
