"""A base model's weights, tokenizer and configuration, from safetensors or GGUF.

    Source --> folder or Hub commit, or a GGUF file's blocks --> transformers model --quantised, if asked--> the same

Of a GGUF file its configuration and tokenizer are converted once; its weights never are. Only safetensors and GGUF are
read, no pickle; no code of a model is run.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from buleyean_rl.errors import BuleyeanError, ModelError
from buleyean_rl.kernels.quantised import OF_BITS, QuantisedTensor, quantise
from buleyean_rl.models import gguf_weights, hub, pre_tokenizers, weight_checks
from buleyean_rl.models.gguf_header import check_model_header, check_numbers, read_header
from buleyean_rl.models.model_folder import check_folder, read_json, stored_tensors, weight_paths
from buleyean_rl.models.private_interfaces import quick_gguf_reading
from buleyean_rl.models.source import Source, resolve
from buleyean_rl.system.cache import cache_folder, make_cache_folder
from buleyean_rl.system.files import atomic_folder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
VOCABULARY_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
QUESTION = [{"role": "user", "content": "Hello, world!"}]
# What differs is reported rather than initialised at random; a model's own code is never run, nor asked about.
LOAD_OPTIONS: dict[str, Any] = {
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,
    "trust_remote_code": False,
}


def load_base(name: str | Source, dtype: torch.dtype = torch.float32, bits: int | None = 16) -> Any:
    """Load a causal language model, in evaluation mode.

    Args:
        name: see `resolve`.
        dtype: of its weights, or of the numbers that they are dequantised to.
        bits: 4 or 8: matrices stay in a GGUF file's blocks, others are quantised; None: they stay in those; 16: all are
            numbers.

    Raises:
        ModelError: it cannot be resolved or loaded, or its weights are not those of its configuration, or not finite.
    """
    source = resolve(name)
    model = _load(source, dtype=dtype, keep_blocks=bits != 16)
    numbers = {name: weight for name, weight in model.named_parameters() if not isinstance(weight, QuantisedTensor)}
    weight_checks.check_finite(source.name, numbers)
    if bits in OF_BITS:
        _quantise(model, bits)
    _keep_end_tokens(model, source)
    return model.eval()


def _quantise(model: Any, bits: int) -> None:
    """Quantise the matrices of a model's linear layers and embeddings, in place, one after the other."""
    replaced: dict[int, nn.Parameter] = {}  # by the matrix, which several modules may have
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)) or isinstance(module.weight, QuantisedTensor):
            continue
        if id(module.weight) not in replaced and (weight := quantise(module.weight, bits)) is not None:
            replaced[id(module.weight)] = nn.Parameter(weight, requires_grad=False)
        module.weight = replaced.get(id(module.weight), module.weight)


def _keep_end_tokens(model: Any, source: Source) -> None:
    """Forget a model's generation settings but for its end tokens: a penalty or a cache of its own is no sampling."""
    from transformers import GenerationConfig

    ends = getattr(model.generation_config, "eos_token_id", None)
    _as_token_ids(source, model.config, ends)
    model.generation_config = GenerationConfig(eos_token_id=ends)


def check_model(name: str | Source) -> None:
    """Check that a model's files hold the weights its configuration asks for, without reading their numbers.

    Args:
        name: see `resolve`.

    Raises:
        ModelError: it cannot be resolved, or what is wrong, with the tensor or key.
    """
    source = resolve(name)
    if source.gguf_path is not None:
        header = read_header(source.gguf_path)
        check_model_header(header)
        check_numbers(header)
        return
    if "quantization_config" in read_json(model_folder(source) / "config.json"):
        return  # packed weights are not those of the configuration before they are loaded
    model = _load(source, device_map="meta")
    weight_checks.check_tied(source.name, model, stored_tensors(model_folder(source)))


def check_trainable(name: str | Source) -> None:
    """Check a model on disk as training would: its files, its tokens, its numbers. One on the Hub is not downloaded.

    Args:
        name: see `resolve`.

    Raises:
        ModelError: what is wrong, with the tensor or key.
    """
    source = resolve(name)
    if source.revision is not None:
        return
    check_model(source)
    weight_checks.check_token_ids(source.name, load_tokenizer(source), load_config(source).get_text_config().vocab_size)
    if source.gguf is None:
        for tensor, stored in stored_tensors(model_folder(source)).items():
            with safe_open(stored.path, framework="pt") as file:
                weight_checks.check_finite(source.name, {tensor: file.get_tensor(tensor)})


def load_tokenizer(name: str | Source) -> Any:
    """Load the tokenizer of a base model.

    Args:
        name: see `resolve`.

    Raises:
        ModelError: it cannot be resolved or loaded.
    """
    source = resolve(name)
    with loading(source):
        folder = _describe_gguf(source) if source.gguf else _configuration_folder(source)
        return read_tokenizer(folder)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, tried on a text and a question.

    Raises:
        ModelError: a file of it is damaged, or it does not turn a text into tokens.
    """
    from transformers import AutoTokenizer

    for file in TOKENIZER_FILES:
        if (folder / file).exists():
            read_json(folder / file)
    if not any((folder / file).exists() for file in (*TOKENIZER_FILES, *VOCABULARY_FILES)):
        raise ModelError(f"{folder}: has no tokenizer.json; copy the tokenizer's files there")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    ids = tokenizer("Hello, world!", verbose=False)["input_ids"]
    if not ids:
        raise ModelError(f"{folder}: its tokenizer makes no token of a text")
    tokenizer.decode(ids)
    if tokenizer.chat_template:
        try:
            tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program
            raise ModelError(f"{folder}: its chat template does not render a question: {error}") from error
    return tokenizer


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
        if source.gguf_path is not None and not os.path.isdir(_conversion_folder(source)):
            check_model_header(read_header(source.gguf_path))
            return AutoConfig.from_pretrained(source.location, gguf_file=source.gguf, trust_remote_code=False)
        return AutoConfig.from_pretrained(str(model_folder(source)), trust_remote_code=False)


def eos_token_ids(name: str | Source, config: Any) -> set[int]:
    """Ids of the end tokens in a model's generation settings.

    Args:
        name: see `resolve`.
        config: from `load_config`.

    Raises:
        ModelError: one of them is no token.
    """
    from transformers import GenerationConfig

    source = resolve(name)
    generation = config
    if not source.gguf and (_configuration_folder(source) / "generation_config.json").exists():
        with loading(source):
            read_json(_configuration_folder(source) / "generation_config.json")
            generation = GenerationConfig.from_pretrained(str(_configuration_folder(source)), trust_remote_code=False)
    return _as_token_ids(source, config, generation.eos_token_id)


def _as_token_ids(source: Source, config: Any, value: Any) -> set[int]:
    """The ids in an `eos_token_id`: one, a list, or none."""
    ends = set(value if isinstance(value, list) else [value]) - {None}
    size = config.get_text_config().vocab_size
    if wrong := [end for end in ends if not isinstance(end, int) or not 0 <= end < size]:
        raise ModelError(f"{source.name}: eos_token_id {wrong[0]!r} is none of its {size} tokens")
    return ends


def weight_files(name: str | Source) -> list[Path]:
    """The safetensors files of a model that is not a GGUF, downloaded for a Hub model.

    Args:
        name: see `resolve`.

    Raises:
        ModelError: there are none.
    """
    return weight_paths(model_folder(resolve(name)))


def model_folder(source: Source) -> Path:
    """The folder that transformers loads a model from: its own, a download, or a GGUF file's description; checked.

    Raises:
        ModelError: it cannot be loaded.
    """
    if source.gguf:
        return _describe_gguf(source)
    folder = _configuration_folder(source)
    if source.revision is not None:
        folder = hub.download(source.location, source.revision, (*hub.CONFIGURATION_FILES, *hub.WEIGHT_FILES))
    check_folder(folder)
    return folder


def _configuration_folder(source: Source) -> Path:
    """The folder with the configuration and tokenizer of a model that is not a GGUF."""
    if source.revision is None:
        return Path(source.location)
    return hub.download(source.location, source.revision, hub.CONFIGURATION_FILES)


def _load(source: Source, *, keep_blocks: bool = False, **options: Any) -> Any:
    """A transformers model, with all the weights its configuration asks for and no others."""
    from transformers import AutoModelForCausalLM

    with loading(source):
        if source.gguf_path is not None:
            return _load_gguf(source, source.gguf_path, keep_blocks=keep_blocks, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(model_folder(source)), **LOAD_OPTIONS, **options, use_safetensors=True
        )
        model, report = loaded
        weight_checks.check_report(source.name, report)
        return model


def _load_gguf(source: Source, path: Path, *, dtype: torch.dtype, keep_blocks: bool) -> Any:
    """The transformers model in a GGUF file."""
    from transformers import AutoModelForCausalLM, GgufConfig

    check_model_header(read_header(path))
    if gguf_weights.is_known(path):
        _describe_gguf(source)  # whose configuration is quicker to load
        return gguf_weights.load_gguf(path, load_config(source), dtype, keep_blocks=keep_blocks)
    # transformers' reader draws a bar of its own, whatever its settings
    with redirect_stderr(io.StringIO()), quick_gguf_reading():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location,
            gguf_file=source.gguf,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            **LOAD_OPTIONS,
        )
    model, report = loaded
    weight_checks.check_report(source.name, report)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _describe_gguf(source: Source) -> Path:
    """A folder with a GGUF file's configuration and tokenizer, made once: reading a large vocabulary is slow."""
    from transformers import AutoConfig, AutoTokenizer

    folder, path = _conversion_folder(source), Path(source.location) / str(source.gguf)
    if os.path.isdir(folder):
        return folder
    make_cache_folder("models")
    check_model_header(read_header(path))
    with loading(source), atomic_folder(folder) as unfinished, redirect_stderr(io.StringIO()), quick_gguf_reading():
        config = AutoConfig.from_pretrained(source.location, gguf_file=source.gguf, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        tokenizer = AutoTokenizer.from_pretrained(source.location, gguf_file=source.gguf, trust_remote_code=False)
        _restore_pre_tokenizer(tokenizer, path)
        for part in (config, tokenizer):
            part.save_pretrained(unfinished)
    return folder


def _conversion_folder(source: Source) -> Path:
    """The cached folder of a GGUF file's description."""
    from transformers import __version__

    return cache_folder() / "models" / f"{source.fingerprint}-{__version__}"


def _restore_pre_tokenizer(tokenizer: Any, gguf_path: Path) -> None:
    """Replace the pre-tokenizer by the file's: transformers reads every GGUF as GPT-2's."""
    name = read_header(gguf_path).metadata.get("tokenizer.ggml.pre")
    split = pre_tokenizers.make_pre_tokenizer(name) if name is not None else None
    if split is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = split


@contextmanager
def loading(source: Source) -> Iterator[None]:
    """Turn any failure to load into a `ModelError`, and hide progress bars and reports."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except BuleyeanError:
        raise
    except BaseException as error:  # of files that anybody made, by libraries that raise anything
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):  # what transformers recommends
            reason = "it needs the model's own code, which is never run: take one of a type that transformers has"
        raise ModelError(f"cannot load model {source.name!r}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
