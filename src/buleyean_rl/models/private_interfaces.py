"""Every use of a private name of transformers and PEFT, in one place, with the versions it was read in.

A release that moves one of them breaks this file and no other; pyproject bounds the versions from above. What is
private in torch is asked for in `kernels.precision`. Overridden, not called: `Trainer._clip_grad_norm`, in
`training.trainer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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


def use_one_gpu(arguments: Any) -> None:
    """Keep transformers' `TrainingArguments` from replicating a model over all GPUs. transformers 5.24."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
