"""Settings of a run: presets, a YAML file and the command line, the later over the earlier."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import TrainingArguments

from buleyean_rl.batching.micro_batch import micro_batch_tokens
from buleyean_rl.errors import UsageError
from buleyean_rl.models.private_interfaces import use_one_gpu
from buleyean_rl.objectives.losses import Objective, ObjectiveName


class Preset(NamedTuple):
    """Settings of a preset; see `BuleyeanConfig` for each."""

    learning_rate: float
    num_train_epochs: float
    per_device_train_batch_size: int
    lora_dropout: float
    held_out: float
    adapter_scale: float


PRESETS = {
    #              learning rate, epochs, batch, dropout, held out, adapter scale
    "log": Preset(2e-4, 1.0, 4, 0.05, 0.1, 1.0),  # the default: hundreds of rejections or more
    "loops": Preset(7e-4, 4.0, 2, 0.0, 0.0, 1.0),  # mined answers that loop: `walk` and `demo`
    "few": Preset(5e-4, 3.0, 4, 0.0, 0.0, 1.0),  # a handful of rejections: the Void
}
LOG = PRESETS["log"]


@dataclass
class BuleyeanConfig(TrainingArguments):
    """Every setting of a training run: transformers' `TrainingArguments`, and these.

    Args:
        objective: `complement` to learn from rejections, `listwise` to learn a ranking of whole answers, `published`
            to reproduce the published loss.
        alpha: weight of the KL to the complement distribution against the contrast; None for the objective's own:
            0.9 for `complement`, 0.7 for the others.
        tau: exponent of the complement weights; 1 is the published formula.
        beta: scale of the answers' log-ratios, of which the ranking is a softmax; only `listwise` uses it.
        own_samples: samples of the base model that `listwise` adds to the rejected answers of a prompt.
        max_length: maximum tokens of a prompt and one response; longer responses are truncated.
        micro_batch_tokens: maximum tokens of a forward pass; None for the device's default.
        held_out: share of the records that are measured on, not trained on.
        lora_rank: rank of the adapter.
        lora_alpha: the adapter is scaled by lora_alpha / lora_rank.
        lora_dropout: on the adapter's input.
        lora_targets: names of the adapted layers; None for every linear layer.
        adapter_scale: factor of the trained adapter (ExPO, arXiv:2404.16792).
        guard: end the run before it ruins the model.
        guard_kl: the guard's limit of KL(pi_ref || pi) on neutral text, in nats per token.

    Raises:
        UsageError: a value is outside its range.
    """

    objective: ObjectiveName = "complement"
    alpha: float | None = None
    tau: float = 1.0
    beta: float = 0.1
    own_samples: int = 2
    max_length: int = 1024
    micro_batch_tokens: int | None = None
    held_out: float = LOG.held_out
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = LOG.lora_dropout
    lora_targets: list[str] | None = None
    adapter_scale: float = LOG.adapter_scale
    guard: bool = True
    guard_kl: float = 0.5

    learning_rate: float = LOG.learning_rate
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = field(default=0.0888, metadata={"help": "Below 1, a share: 100 of 1125 steps."})
    per_device_train_batch_size: int = LOG.per_device_train_batch_size
    num_train_epochs: float = LOG.num_train_epochs
    logging_steps: float = 1
    save_steps: float = 0.1
    save_total_limit: int | None = 1
    report_to: str | list[str] | None = "none"
    disable_tqdm: bool | None = True
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False

    def __post_init__(self) -> None:
        tokens, batch = self.micro_batch_tokens, self.per_device_train_batch_size
        for name, value, valid in (
            ("max_length", self.max_length, self.max_length >= 2),
            ("micro_batch_tokens", tokens, tokens is None or tokens >= 1),
            ("held_out", self.held_out, 0 <= self.held_out < 1),
            ("own_samples", self.own_samples, self.own_samples >= 0),
            ("lora_rank", self.lora_rank, self.lora_rank >= 1),
            ("lora_alpha", self.lora_alpha, self.lora_alpha > 0),
            ("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1),
            ("adapter_scale", self.adapter_scale, 0 < self.adapter_scale < math.inf),
            ("guard_kl", self.guard_kl, self.guard_kl > 0),
            ("learning_rate", self.learning_rate, self.learning_rate > 0),
            ("num_train_epochs", self.num_train_epochs, self.num_train_epochs > 0),
            ("per_device_train_batch_size", batch, batch >= 1),
        ):
            if not valid:
                raise UsageError(f"{name} cannot be {value}")
        self.loss = Objective(self.objective, self.alpha, self.tau, self.beta)
        self.alpha = self.loss.alpha
        self.use_cpu |= not torch.cuda.is_available()  # Apple's GPU has no fp64, which the loss needs
        super().__post_init__()
        use_one_gpu(self)  # replicas would bypass the adapter switch


def load_config(file: Path | None, folder: Path, options: dict[str, Any], preset: str = "log") -> BuleyeanConfig:
    """Settings of a preset, overridden by a YAML file's, overridden by options.

    Args:
        file: a mapping of `BuleyeanConfig` fields, and `preset`; or None.
        folder: the run folder.
        options: settings by name, and `preset`.
        preset: one of `PRESETS`, unless the options or the file have another.

    Raises:
        UsageError: the file cannot be read, or a name or value is wrong.
    """
    settings = {"preset": preset} | (_read_settings(file) if file is not None else {}) | options
    name = settings.pop("preset")
    if name not in tuple(PRESETS):
        raise UsageError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    try:
        return BuleyeanConfig(**{**PRESETS[name]._asdict(), **settings, "output_dir": str(folder)})
    except (TypeError, ValueError) as error:
        raise UsageError(f"{file or 'settings'}: {error}") from error


def _read_settings(file: Path) -> dict[str, Any]:
    """Read a YAML file's settings, with names checked and numbers converted."""
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: cannot be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{file}: expected `name: value` lines, such as `learning_rate: 2e-4`")
    # of this package's fields the type is an annotation, of transformers' a type
    types = {f.name: str(getattr(f.type, "__name__", f.type)) for f in fields(BuleyeanConfig) if f.init}
    types = types | {"preset": "str"}
    del types["output_dir"]  # an option of the command
    if unknown := [name for name in settings if name not in types]:
        raise UsageError(f"{file}: not a setting: {', '.join(_suggest_name(str(name), types) for name in unknown)}")
    return {name: _convert_value(value, types[name], f"{file}: {name}") for name, value in settings.items()}


def _suggest_name(name: str, names: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, names, 1)
    return f"{name} (did you mean {nearest[0]}?)" if nearest else name


def _convert_value(value: Any, kind: str, where: str) -> Any:
    """Convert a YAML value to a type such as `int | None`: YAML reads 2e-4, without a dot, as text."""
    kind, _, optional = kind.partition(" | ")
    if kind not in ("float", "int") or (value is None and optional):
        return value
    try:
        number = float("a switch" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise UsageError(f"{where} must be a number, not {value!r}") from None
    if kind == "int" and not number.is_integer():
        raise UsageError(f"{where} must be a whole number, not {value!r}")
    return int(number) if kind == "int" else number


def micro_batch_limit(config: BuleyeanConfig, model: Any) -> int:
    """Maximum tokens of a forward pass: the setting, or the model's default."""
    return config.micro_batch_tokens or micro_batch_tokens(model)
