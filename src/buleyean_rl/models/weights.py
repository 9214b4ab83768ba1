"""A base model's weights, tokenizer and configuration, from safetensors or GGUF.

    Source --GGUF: converted once--> folder or Hub commit --> transformers model

Only safetensors and GGUF are read, no pickle; no code of a model is run.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
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
        ModelError: it cannot be resolved or loaded.
    """
    from transformers import AutoModelForCausalLM

    source = resolve(name)
    with loading(source):
        return AutoModelForCausalLM.from_pretrained(
            _pretrained_location(source), **_revision_argument(source), dtype=dtype, use_safetensors=True
        ).eval()


def load_tokenizer(name: str | Source) -> Any:
    """Load the tokenizer of a base model.

    Args:
        name: see `resolve`.

    Raises:
        ModelError: it cannot be resolved or loaded.
    """
    from transformers import AutoTokenizer

    source = resolve(name)
    with loading(source):
        return AutoTokenizer.from_pretrained(_pretrained_location(source), **_revision_argument(source))


def load_config(name: str | Source) -> Any:
    """Load the transformers configuration of a model, without its weights.

    Args:
        name: see `resolve`.

    Raises:
        ModelError: it cannot be resolved or read.
    """
    from transformers import AutoConfig

    source = resolve(name)
    with loading(source):
        if source.gguf and not _conversion_folder(source).exists():
            return AutoConfig.from_pretrained(source.location, gguf_file=source.gguf)
        return AutoConfig.from_pretrained(_pretrained_location(source), **_revision_argument(source))


def eos_token_ids(name: str | Source, config: Any) -> set[int]:
    """Ids of the end tokens in a model's generation settings.

    Args:
        name: see `resolve`.
        config: from `load_config`.
    """
    from transformers import GenerationConfig

    source = resolve(name)
    generation = config
    if not source.gguf:
        with suppress(OSError):  # it has no generation_config.json
            generation = GenerationConfig.from_pretrained(_pretrained_location(source), **_revision_argument(source))
    ids = generation.eos_token_id
    return set(ids if isinstance(ids, list) else [ids]) - {None}


def weight_files(name: str | Source) -> list[Path]:
    """The safetensors files of a model that is not a GGUF, downloaded for a Hub model.

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


def _pretrained_location(source: Source) -> str:
    """The argument of `from_pretrained`: a folder or a Hub id."""
    return str(_convert_gguf(source)) if source.gguf else source.location


def _revision_argument(source: Source) -> dict[str, Any]:
    """The commit of a Hub model as a keyword argument of `from_pretrained`."""
    return {} if source.revision is None else {"revision": source.revision}


def _convert_gguf(source: Source) -> Path:
    """Convert a GGUF file to a transformers folder in fp32, once: reading a GGUF is slow."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = _conversion_folder(source)
    if not folder.exists():
        # transformers' reader draws a bar of its own, whatever its settings
        with atomic_folder(folder) as unfinished, redirect_stderr(io.StringIO()):
            # quantised weights could be neither trained nor merged
            model = AutoModelForCausalLM.from_pretrained(
                source.location,
                gguf_file=source.gguf,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            tokenizer = AutoTokenizer.from_pretrained(source.location, gguf_file=source.gguf)
            _restore_pre_tokenizer(tokenizer, Path(source.location) / str(source.gguf))
            for part in (model, tokenizer):
                part.save_pretrained(unfinished)
    return folder


def _conversion_folder(source: Source) -> Path:
    """The cached folder of a GGUF file's conversion."""
    from transformers import __version__

    return cache_folder() / "models" / f"{source.fingerprint}-{__version__}"


def _restore_pre_tokenizer(tokenizer: Any, gguf_path: Path) -> None:
    """Replace the pre-tokenizer by the file's: transformers reads every GGUF as GPT-2's."""
    from gguf import GGUFReader

    field = GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    split = pre_tokenizers.make_pre_tokenizer(field.contents()) if field is not None else None
    if split is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = split


@contextmanager
def loading(source: Source) -> Iterator[None]:
    """Turn any failure to load into a `ModelError`, and hide progress bars."""
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
