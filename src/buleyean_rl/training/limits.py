"""Settings against the model and the data: what makes no sense is refused before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn
from transformers.pytorch_utils import Conv1D

from buleyean_rl.data.trie import Boundary
from buleyean_rl.errors import ModelError, UsageError
from buleyean_rl.models.model import Model
from buleyean_rl.models.weights import load_config
from buleyean_rl.system.wording import counted
from buleyean_rl.training.config import BuleyeanConfig, total_steps

MAX_EXPONENT = 80.0  # e^-80 is near the smallest number of fp32
MAX_ROUNDS = 2**31  # more than a record has


def check_tau(tau: float, boundaries: Iterable[Boundary], prior_rounds: float = 1.0) -> None:
    """Refuse a tau whose targets are smaller than any number.

    Args:
        tau: exponent of the complement weights.
        boundaries: of the records.
        prior_rounds: k of equation (1).

    Raises:
        UsageError: says the largest that works.
    """
    if tau <= MAX_EXPONENT / math.log1p(MAX_ROUNDS / prior_rounds):
        return
    rounds = max(int(np.max(boundary.rounds)) for boundary in boundaries)
    largest = MAX_EXPONENT / math.log1p(rounds / prior_rounds)
    if tau > largest:
        raise UsageError(
            f"tau {tau:g} is too large for answers that were judged in {counted(rounds, 'round')}: it divides their "
            f"odds by more than a float can hold; at most {math.floor(largest * 10) / 10:g} works"
        )


def check_warmup(config: BuleyeanConfig, records: int) -> None:
    """Refuse a warmup after whose end there is no step.

    Args:
        config: the settings.
        records: number of training records.

    Raises:
        UsageError: says how many steps there are.
    """
    steps = total_steps(config, records)
    warmup = config.get_warmup_steps(steps + 1)  # see `BuleyeanTrainer.create_scheduler`
    if warmup > steps:
        raise UsageError(
            f"warmup_steps {config.warmup_steps:g} is a warmup of {counted(warmup, 'step')} and the run has {steps:,}: "
            f"the learning rate would never reach {config.learning_rate:g}; lower it, or name a share such as 0.1"
        )


def check_layers(model: Any, config: BuleyeanConfig) -> None:
    """Refuse what a model lacks: layers of a name, linear ones, of sizes above the rank, activation checkpointing.

    Args:
        model: the base model.
        config: the settings.

    Raises:
        UsageError: names the layer.
    """
    if config.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise UsageError(f"activation_checkpointing: {type(model).__name__} does not have it")
    head, targets, rank = model.get_output_embeddings(), config.lora_targets, config.lora_rank
    names = [name for name, _ in model.named_modules()]
    for target in targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UsageError(f"lora_targets: {target[:60]!r} is no layer of the model")
    for name, module in model.named_modules():
        if targets is not None and not any(name == target or name.endswith(f".{target}") for target in targets):
            continue
        is_linear = isinstance(module, nn.Linear | Conv1D) and module is not head
        if targets is not None and not is_linear:
            raise UsageError(f"lora_targets: {name} is not a linear layer of the decoder: it cannot be adapted")
        if is_linear and rank > min(module.weight.shape):
            rows, columns = module.weight.shape
            raise UsageError(
                f"lora_rank {rank:,} is above the sizes of {name}, {rows:,} x {columns:,}: "
                f"at most {min(rows, columns):,} has an effect"
            )


def fit_length(config: BuleyeanConfig, model: Model) -> str | None:
    """Lower `max_length` to the longest context of a model; returns what to say of it.

    Args:
        config: the settings; changed in place.
        model: the base model.
    """
    longest = getattr(load_config(model.source).get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and 2 <= longest < config.max_length:
        config.max_length = longest
        return f"records are cut at {longest:,} tokens: the model has no longer context"
    return None


def check_losses(before: Mapping[str, float], name: str) -> None:
    """Refuse a model whose losses are not numbers before it is trained.

    Args:
        before: measurements of the base model, by name.
        name: of the model.

    Raises:
        ModelError: which of them.
    """
    wrong = [figure for figure, value in before.items() if not math.isfinite(value)]
    if wrong:
        raise ModelError(
            f"{name} cannot be trained: before training, {' and '.join(wrong)} on the records are not numbers"
        )
