"""Every use of a private name of transformers, PEFT and gguf, in one place, with the versions it was read in.

A release that moves one of them breaks this file and no other; pyproject bounds the versions from above. What is
private in torch is asked for in `kernels.precision`. In `training.trainer`: `Trainer._clip_grad_norm` is
overridden, `Trainer._train_batch_size` set.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def attention_implementation(config: Any) -> str | None:
    """The name of the attention function that a model of this configuration calls. transformers 5.24."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def fits_static_cache(model: Any) -> bool:
    """Whether a transformers model can generate with room for all keys and values from the start. transformers 5.24."""
    return bool(model._can_compile_fullgraph)


@contextmanager
def adapters_disabled(model: Any) -> Iterator[None]:
    """Switch a PEFT model's adapters off within. PEFT 0.21.

    Its own switch visits every parameter, which takes as long as a short forward pass.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    states = [vars(layer) for layer in layers if not layer.disable_adapters]
    for state in states:
        state["_disable_adapters"] = True
    try:
        yield
    finally:
        for state in states:
            state["_disable_adapters"] = False


@contextmanager
def quick_gguf_reading() -> Iterator[None]:
    """Let gguf's reader slice a plain array within, and build each table of names once. gguf 0.19, transformers 5.24.

    It slices a `numpy.memmap` for every token of the vocabulary, and transformers asks for the table in every module:
    a small model's file took three times as long.
    """
    import gguf

    def get_data(reader: Any) -> Any:
        return vars(reader)["data"]

    def set_data(reader: Any, data: Any) -> None:
        vars(reader)["data"] = np.asarray(data)

    name_map = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = cache(name_map)
    gguf.GGUFReader.data = property(get_data, set_data)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = name_map
        with suppress(AttributeError):  # another thread has ended first
            del gguf.GGUFReader.data


def gguf_names(model: Any, architecture: str) -> tuple[dict[str, str], Callable[[np.ndarray, str], np.ndarray]]:
    """A GGUF file's names for a transformers model's parameters, and how their rows get the model's order.

    Of transformers 5.24: the table that its own reader goes by, which has no place for weights that stay quantised.

    Args:
        model: its parameters may be on the meta device.
        architecture: of the file.

    Returns:
        The parameters' names by the file's; a function of a tensor, fp32 numbers or packed rows, and its name there.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    names: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    return names, lambda weights, name: processor.process(weights=weights, name=name).weights


def use_current_gpu(arguments: Any) -> None:
    """Keep transformers' `TrainingArguments` from replicating a model over all GPUs, on the current one.

    transformers 5.24.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if arguments.device.type == "cuda":
        vars(arguments)["_setup_devices"] = torch.device("cuda", torch.cuda.current_device())


@contextmanager
def current_gpu_kept() -> Iterator[None]:
    """Keep `TrainingArguments` from making the first GPU the current one, within. transformers 5.24."""
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
    yield
    if gpu is not None:
        torch.cuda.set_device(gpu)


@contextmanager
def no_word_of_groups() -> Iterator[None]:
    """Keep `TrainingArguments` from warning of a process group that is not its own, within. transformers 5.24."""
    logger = logging.getLogger("transformers.training_args")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def set_attention_implementation(config: Any, name: str) -> None:
    """Let a model call the attention function that transformers has registered under a name. transformers 5.24.

    `PreTrainedModel.set_attn_implementation`, which is public, takes a whole model, and tries to load kernels by name.
    """
    config._attn_implementation = name


@contextmanager
def attending(config: Any, name: str) -> Iterator[None]:
    """Call another registered attention function within. transformers 5.24."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def checkpoint_layer(layer: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call a function by the way that a layer's activations are checkpointed. transformers 5.24."""
    output: Tensor = layer._gradient_checkpointing_func(function, *inputs)
    return output


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes what a module returns. torch 2.13."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def register_lora_layers(config: Any, layers: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Let PEFT put layers of ours on modules of some types: documented, and marked experimental. PEFT 0.21."""
    config._register_custom_module(layers)


def scaled_copy(targets: Sequence[Tensor], sources: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Copy each source, times its factor, in one launch for all of them. torch 2.13, and as old as `torch.optim`."""
    torch._foreach_copy_(list(targets), torch._foreach_mul(list(sources), list(factors)))
