"""A base model's weights, tokenizer and configuration, from safetensors or GGUF.

    Source --GGUF: converted once--> folder or Hub commit --> transformers model

Nothing is read from pickle, and no code that comes with a model is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from buleyean_rl.errors import ModelError
from buleyean_rl.models import pre_tokenizers
from buleyean_rl.models.source import Source, resolve
from buleyean_rl.system.cache import cache_folder
from buleyean_rl.system.files import atomic_folder


def load_base(name: str | Source, dtype: torch.dtype = torch.float32) -> Any:
    """Load a causal language model, in evaluation mode.

    Args:
        name: see `resolve`.
        dtype: of its weights.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    from transformers import AutoModelForCausalLM

    source = resolve(name)
    with loading(source):
        return AutoModelForCausalLM.from_pretrained(
            _location(source), **_revision(source), dtype=dtype, use_safetensors=True
        ).eval()


def load_tokenizer(name: str | Source) -> Any:
    """Load the tokenizer of a base model.

    Args:
        name: see `resolve`.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    from transformers import AutoTokenizer

    source = resolve(name)
    with loading(source):
        return AutoTokenizer.from_pretrained(_location(source), **_revision(source))


def load_config(name: str | Source) -> Any:
    """The transformers configuration of a model, without its weights.

    Args:
        name: see `resolve`.

    Raises:
        ModelError: it cannot be found or read.
    """
    from transformers import AutoConfig

    source = resolve(name)
    with loading(source):
        if source.gguf and not _conversion(source).exists():
            return AutoConfig.from_pretrained(source.location, gguf_file=source.gguf)
        return AutoConfig.from_pretrained(_location(source), **_revision(source))


def eos_token_ids(name: str | Source, config: Any) -> set[int]:
    """The tokens at which a model's generation stops, as far as it says so.

    Args:
        name: see `resolve`.
        config: from `load_config`.
    """
    from transformers import GenerationConfig

    source = resolve(name)
    generation = config
    if not source.gguf:
        with suppress(OSError):  # it has no generation_config.json
            generation = GenerationConfig.from_pretrained(_location(source), **_revision(source))
    ids = generation.eos_token_id
    return set(ids if isinstance(ids, list) else [ids]) - {None}


def weight_files(name: str | Source) -> list[Path]:
    """The safetensors files of a model that is not a GGUF, fetched from the Hub where it is there.

    Args:
        name: see `resolve`.

    Raises:
        ModelError: there are none.
    """
    from huggingface_hub import snapshot_download

    source = resolve(name)
    with loading(source):
        folder = Path(source.location)
        if not folder.is_dir():
            patterns = ["*.safetensors", "*.json"]
            folder = Path(snapshot_download(source.location, revision=source.revision, allow_patterns=patterns))
        index = folder / "model.safetensors.index.json"
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        paths = [folder / shard for shard in sorted(shards)]
    if missing := [path for path in paths if not path.exists()]:
        raise ModelError(f"{missing[0]} is missing: only models saved as safetensors can be read")
    return paths


def _location(source: Source) -> str:
    """What `from_pretrained` reads: a folder, or a name on the Hub."""
    return str(_converted(source)) if source.gguf else source.location


def _revision(source: Source) -> dict[str, Any]:
    """The commit of a name on the Hub, as an argument of `from_pretrained`."""
    return {} if source.revision is None else {"revision": source.revision}


def _converted(source: Source) -> Path:
    """A GGUF file as a transformers folder in fp32, made once: transformers takes long to read a GGUF."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = _conversion(source)
    if not folder.exists():
        with atomic_folder(folder) as unfinished:
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
                part.save_pretrained(unfinished)
    return folder


def _conversion(source: Source) -> Path:
    """Where a GGUF file's conversion is, once there is one."""
    from transformers import __version__

    return cache_folder() / "models" / f"{source.fingerprint}-{__version__}"


def _restore_split(tokenizer: Any, gguf_path: Path) -> None:
    """transformers splits text like GPT-2 whatever the file says; SmolLM, for one, takes digits apart first."""
    from gguf import GGUFReader

    field = GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    split = pre_tokenizers.named(field.contents()) if field is not None else None
    if split is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = split


@contextmanager
def loading(source: Source) -> Iterator[None]:
    """Turn the many ways in which loading fails into one error; keep progress bars out of the way."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot load model {source.name!r}: {reason}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
