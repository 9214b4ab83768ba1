"""Settings of a run from a YAML file and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from buleyean_rl.batching.rows import micro_batch_tokens
from buleyean_rl.errors import UsageError
from buleyean_rl.objectives.losses import Objective, ObjectiveName


def load_config(file: Path | None, folder: Path, given: dict[str, Any]) -> BuleyeanConfig:
    """Settings from a YAML file, with those given on the command line on top.

    Args:
        file: a mapping of `BuleyeanConfig` fields, or None.
        folder: the run folder.
        given: fields that win over the file's.

    Raises:
        UsageError: the file cannot be read, or names or values do not fit.
    """
    settings: Any = {}
    if file is not None:
        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{file}: cannot be read as YAML: {str(error).splitlines()[0]}") from error
        if not isinstance(settings, dict):
            raise UsageError(f"{file}: expected `name: value` lines, such as `learning_rate: 2e-4`")
    unknown = set(settings) - {f.name for f in fields(BuleyeanConfig) if f.init} | {"output_dir"} & set(settings)
    if unknown:
        raise UsageError(f"{file}: not a setting: {', '.join(sorted(map(str, unknown)))}")
    for setting in fields(BuleyeanConfig):
        # ours are annotations, transformers' are types
        kind, _, or_none = str(getattr(setting.type, "__name__", setting.type)).partition(" | ")
        value = settings.get(setting.name)
        if setting.name in settings and kind in ("float", "int") and not (value is None and or_none):
            settings[setting.name] = _number(f"{file}: {setting.name}", value, kind == "int")
    try:
        return BuleyeanConfig(**{**settings, **given, "output_dir": str(folder)})
    except (TypeError, ValueError) as error:
        raise UsageError(f"{file or 'settings'}: {error}") from error


def _number(what: str, value: Any, whole: bool) -> float:
    try:  # YAML reads 2e-4, without a dot, as text
        number = float("a switch" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise UsageError(f"{what} must be a number, not {value!r}") from None
    if whole and not number.is_integer():
        raise UsageError(f"{what} must be a whole number, not {value!r}")
    return int(number) if whole else number


@dataclass
class BuleyeanConfig(TrainingArguments):
    """Every setting of a training run: transformers' `TrainingArguments`, and these.

    Args:
        objective: `complement` to learn from rejections, `listwise` to learn a ranking of whole answers, `published`
            to reproduce the published loss.
        alpha: weight of the KL to the complement distribution, the contrast has the rest; None for what the
            objective does best with: 0.9 for `complement`, 0.7 for the others.
        tau: strength of the complement weights; 1 is the published formula.
        beta: how far a ranking may move the answers' likelihoods; only `listwise` has it.
        own_samples: answers of the base model's own that `listwise` puts beside the rejected ones of a prompt.
        max_length: most tokens of a prompt and one response; longer responses are cut.
        micro_batch_tokens: most tokens that go through the model at a time; None for what suits the device.
        held_out: share of the records kept from training, to measure on.
        lora_rank: rank of the adapter.
        lora_alpha: the adapter is scaled by lora_alpha / lora_rank.
        lora_dropout: on the adapter's input.
        lora_targets: names of the adapted layers; None for every linear layer.
        strength: what the adapter adds to the weights is multiplied by it once it is trained (ExPO, arXiv:2404.16792).
        guard: end the run before it ruins the model.
        guard_kl: how far neutral text may move, KL(pi_ref || pi) in nats per token.
    """

    objective: ObjectiveName = "complement"
    alpha: float | None = None
    tau: float = 1.0
    beta: float = 0.1
    own_samples: int = 2
    max_length: int = 1024
    micro_batch_tokens: int | None = None
    held_out: float = 0.1
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: list[str] | None = None
    strength: float = 1.0
    guard: bool = True
    guard_kl: float = 0.5

    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = field(default=0.0888, metadata={"help": "Below 1, a share: 100 of 1125 steps."})
    per_device_train_batch_size: int = 4
    num_train_epochs: float = 1.0
    logging_steps: float = 1
    save_steps: float = 0.1
    save_total_limit: int | None = 1
    report_to: str | list[str] | None = "none"
    disable_tqdm: bool | None = True
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False

    def __post_init__(self) -> None:
        for name, value, fits in (
            ("max_length", self.max_length, self.max_length >= 2),
            (
                "micro_batch_tokens",
                self.micro_batch_tokens,
                self.micro_batch_tokens is None or self.micro_batch_tokens >= 1,
            ),
            ("held_out", self.held_out, 0 <= self.held_out < 1),
            ("own_samples", self.own_samples, self.own_samples >= 0),
            ("lora_rank", self.lora_rank, self.lora_rank >= 1),
            ("lora_alpha", self.lora_alpha, self.lora_alpha > 0),
            ("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1),
            ("strength", self.strength, 0 < self.strength < math.inf),
            ("guard_kl", self.guard_kl, self.guard_kl > 0),
            ("learning_rate", self.learning_rate, self.learning_rate > 0),
            ("num_train_epochs", self.num_train_epochs, self.num_train_epochs > 0),
            (
                "per_device_train_batch_size",
                self.per_device_train_batch_size,
                self.per_device_train_batch_size >= 1,
            ),
        ):
            if not fits:
                raise UsageError(f"{name} cannot be {value}")
        self.loss = Objective(self.objective, self.alpha, self.tau, self.beta)
        self.alpha = self.loss.alpha
        self.use_cpu |= not torch.cuda.is_available()  # Apple's GPU has no fp64, which the loss and its floor need
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # one device: replicas would bypass the adapter switch


def micro_batch_limit(config: BuleyeanConfig, model: Any) -> int:
    """Tokens of a row of training: as asked for, or what suits the model."""
    return config.micro_batch_tokens or micro_batch_tokens(model)
