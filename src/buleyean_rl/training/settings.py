"""The settings of a run, one by one: what each accepts and does. `docs/config.md` is written from this table.

A setting that is not in the table has no effect here, so it is refused, with the nearest that has.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import yaml

from buleyean_rl.errors import UsageError


class Accepts(Protocol):
    """The values that a setting accepts; as a text, what they are."""

    def admits(self, value: Any) -> bool:
        """Whether a value is one of them."""
        ...


@dataclass(frozen=True)
class Number:
    """A finite number in a range.

    Args:
        low: the least.
        high: the largest.
        without: the ends that do not belong to the range: "", "low", "high" or "both".
        optional: whether None is accepted too.
    """

    low: float
    high: float
    without: str = ""
    optional: bool = False

    def admits(self, value: Any) -> bool:
        """See `Accepts`."""
        if value is None or isinstance(value, bool) or not isinstance(value, int | float):
            return value is None and self.optional
        above = value > self.low if self.without in ("low", "both") else value >= self.low
        below = value < self.high if self.without in ("high", "both") else value <= self.high
        return above and below  # false for NaN

    def __str__(self) -> str:
        low, high = f"{self.low:,.10g}", f"{self.high:,.10g}"
        above = f"above {low}" if self.without in ("low", "both") else f"from {low}"
        below = f"to below {high}" if self.without in ("high", "both") else f"to {high}"
        return f"a number {above} {below}{', or null' * self.optional}"


@dataclass(frozen=True)
class Whole(Number):
    """A whole number in a range. See `Number`."""

    def admits(self, value: Any) -> bool:
        """See `Accepts`."""
        return super().admits(value) and (value is None or isinstance(value, int))

    def __str__(self) -> str:
        return super().__str__().replace("a number", "a whole number")


@dataclass(frozen=True)
class StepCount(Number):
    """A number of steps, or below 1 a share of the run's. See `Number`."""

    def admits(self, value: Any) -> bool:
        """See `Accepts`."""
        return super().admits(value) and (value < 1 or float(value).is_integer())

    def __str__(self) -> str:
        return f"whole steps, {super().__str__().removeprefix('a number ')}, or a share below 1"


@dataclass(frozen=True)
class Switch:
    """True or false."""

    def admits(self, value: Any) -> bool:
        """See `Accepts`."""
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Choice:
    """One of some words.

    Args:
        words: which.
    """

    words: tuple[str, ...]

    def admits(self, value: Any) -> bool:
        """See `Accepts`."""
        return isinstance(value, str) and value in self.words

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


@dataclass(frozen=True)
class OneOf:
    """One of some whole numbers, or None.

    Args:
        numbers: which.
    """

    numbers: tuple[int, ...]

    def admits(self, value: Any) -> bool:
        """See `Accepts`."""
        return value is None or (type(value) is int and value in self.numbers)

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.numbers))}, or null"


@dataclass(frozen=True)
class LayerNames:
    """Names of layers, or None for all."""

    def admits(self, value: Any) -> bool:
        """See `Accepts`."""
        is_list = isinstance(value, list) and len(value) > 0
        return value is None or (is_list and all(isinstance(name, str) and name for name in value))

    def __str__(self) -> str:
        return "a list of names, or null"


class Setting(NamedTuple):
    """A setting of a run."""

    accepts: Accepts
    effect: str


MANY = 1e6
SETTINGS: dict[str, Setting] = {
    "objective": Setting(
        Choice(("complement", "listwise", "published")), "Which loss; see [objectives](training.md#which-objective)."
    ),
    "alpha": Setting(Number(0, 1, "low", optional=True), "Weight of the KL; null: 0.9 for complement, else 0.7."),
    "tau": Setting(
        Number(0, 100, "low", optional=True),
        "Exponent of the complement weights, 1 in the published formula; null: from the data, see "
        "[how firm](training.md#how-firm-a-rejection-is).",
    ),
    "prior_mean": Setting(
        Number(0, 1, "low", optional=True),
        "How often an answer is presumed not to be rejected; null: the share that the records accept.",
    ),
    "prior_rounds": Setting(Number(0, MANY, "low"), "How many rounds of judgement that is worth."),
    "min_p": Setting(
        Number(0, 1, optional=True),
        "From this share of the likeliest token's probability on, a token takes what a rejection frees; null: 0.1 for "
        "complement, else 0: all take it.",
    ),
    "beta": Setting(Number(0, 1000, "low"), "Scale of the log-ratios that `listwise` ranks by."),
    "own_samples": Setting(Whole(0, 1000), "Samples of the base model that `listwise` adds to a prompt's answers."),
    "max_length": Setting(Whole(2, MANY), "Maximum tokens of a prompt and one answer."),
    "max_rejected": Setting(
        Whole(1, MANY, optional=True),
        "An answer of which parts are rejected ends after so many rejected tokens; null: all of it is learnt from.",
    ),
    "micro_batch_tokens": Setting(
        Whole(1, 1e9, optional=True), "Maximum tokens of a forward pass; null: 1,280, in fp32 640, on a GPU 32,000."
    ),
    "held_out": Setting(Number(0, 1, "high"), "Share of the records that are measured on, not trained on."),
    "anchors": Setting(
        Whole(0, 1000), "Texts that were not rejected, for each record; see [anchors](training.md#anchors)."
    ),
    "base_bits": Setting(
        OneOf((4, 8, 16)),
        "Of a number of the frozen base: 4 or 8 quantise it in memory; null: as a large GGUF file has it, else 16; see "
        "[memory](models.md#memory).",
    ),
    "lora_rank": Setting(Whole(1, 65536), "Rank of the adapter, at most a layer's smaller side."),
    "lora_alpha": Setting(Whole(1, MANY), "The adapter is scaled by lora_alpha / lora_rank."),
    "lora_dropout": Setting(Number(0, 1, "high"), "Dropout on the adapter's input."),
    "lora_targets": Setting(LayerNames(), "The adapted linear layers; null: all but the output head."),
    "adapter_scale": Setting(
        Number(0.001, 1000), "Factor of the trained adapter; see [why](training.md#adapter-scale)."
    ),
    "guard": Setting(Switch(), "End the run before it ruins the model; see [guard](training.md#the-guard)."),
    "guard_kl": Setting(
        Number(0, 1000, "low"),
        "The guard's limit of KL(base, model), nats per token, on the base's own passages and on bundled texts.",
    ),
    "guard_entropy": Setting(
        Number(0, 1000, "low"), "Its limit of the change of the entropy there, as a share of the base's."
    ),
    "learning_rate": Setting(
        Number(1e-9, 100, optional=True),
        "The highest learning rate; null, here and below: by the data, see [presets](training.md#presets).",
    ),
    "lr_scheduler_type": Setting(
        Choice(("cosine", "linear", "constant_with_warmup", "inverse_sqrt")),
        "How the learning rate falls after the warmup; no step has 0.",
    ),
    "warmup_steps": Setting(StepCount(0, 1e9), "Steps in which the learning rate rises."),
    "num_train_epochs": Setting(Number(0, MANY, "low", optional=True), "Passes over the records."),
    "max_steps": Setting(Whole(1, 1e9, optional=True), "Number of steps, in place of the epochs; null: by the epochs."),
    "per_device_train_batch_size": Setting(
        Whole(1, MANY, optional=True), "Records of a step, in each process; see [scaling](scaling.md)."
    ),
    "gradient_accumulation_steps": Setting(Whole(1, MANY), "The records of a step are multiplied by it."),
    "optim": Setting(
        Choice(("adamw_torch_fused", "adamw_torch", "adafactor", "sgd")), "The optimiser, by transformers' name."
    ),
    "weight_decay": Setting(Number(0, 10), "Of AdamW."),
    "adam_beta1": Setting(Number(0, 1, "high"), "Of AdamW."),
    "adam_beta2": Setting(Number(0, 1, "high"), "Of AdamW."),
    "adam_epsilon": Setting(Number(1e-30, 1), "Of AdamW; less is 0 in fp32."),
    "max_grad_norm": Setting(Number(0, MANY), "Gradients are clipped to this norm; 0: not at all."),
    "activation_checkpointing": Setting(
        Switch(), "Compute activations again in the backward pass: less memory, a third more time."
    ),
    "seed": Setting(Whole(0, 2**32 - 1), "Same seed, same bytes."),
    "data_seed": Setting(Whole(0, 2**32 - 1, optional=True), "Seed of the records' order; null: `seed`."),
    "use_cpu": Setting(Switch(), "Train on the CPU where there is a GPU."),
    "logging_steps": Setting(
        StepCount(0, 1e9, "low"), "Steps between two entries of the log; checkpoints have one too."
    ),
    "save_strategy": Setting(Choice(("steps", "epoch", "no")), "When checkpoints are written; `no`: never."),
    "save_steps": Setting(StepCount(0, 1e9, "low"), "Steps between two checkpoints; five minutes at most."),
    "save_total_limit": Setting(
        Whole(1, MANY, optional=True), "Number of checkpoints that are kept; one that is damaged needs the one before."
    ),
    "report_to": Setting(
        Choice(("none", "tensorboard")),
        "Where the log goes besides the run folder: `tensorboard` writes events into `runs/` in it.",
    ),
}

OTHER_NAMES = {  # of the command's options, of other tools and of earlier versions of transformers
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "auto_find_batch_size": "micro_batch_tokens",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "warmup_ratio": "warmup_steps",
    "lr_scheduler": "lr_scheduler_type",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_accumulation": "gradient_accumulation_steps",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "optimizer": "optim",
    "load_in_4bit": "base_bits",
    "load_in_8bit": "base_bits",
    "rank": "lora_rank",
    "lora_r": "lora_rank",
    "r": "lora_rank",
    "dropout": "lora_dropout",
    "target_modules": "lora_targets",
    "lora_target": "lora_targets",
    "lora_target_modules": "lora_targets",
    "val_size": "held_out",
    "val_set_size": "held_out",
    "no_cuda": "use_cpu",
    "loss_type": "objective",
    "random_seed": "seed",
}


NEAR = 0.75  # of two names' letters are the same


def unknown_setting(name: str) -> str:
    """A name that is no setting, and the nearest that is one, for an error message."""
    plain = name.lower().replace("-", "_").strip("_")
    matches = [OTHER_NAMES.get(plain, ""), *difflib.get_close_matches(plain, [*SETTINGS, "preset"], 1, NEAR)]
    nearest = next(filter(None, matches), None)
    return f"{name} (did you mean {nearest}?)" if nearest else name


def check_settings(values: Mapping[str, Any]) -> None:
    """Refuse values that settings do not accept.

    Args:
        values: by the settings' names.

    Raises:
        UsageError: says what the setting accepts.
    """
    for name, value in values.items():
        if not SETTINGS[name].accepts.admits(value):
            raise UsageError(f"{name} cannot be {reprlib.repr(value)}: it must be {SETTINGS[name].accepts}")


def settings_yaml(values: Mapping[str, Any]) -> str:
    """Settings as a YAML file that `--config` reads, each below what it does and accepts.

    Args:
        values: by the settings' names, as JSON has them.
    """
    lines = ["# Settings of `buleyean train`, for --config; docs/config.md explains them."]
    for name, setting in SETTINGS.items():
        effect = re.sub(r"\[([^]]*)\]\(([^)#]*)[^)]*\)", r"\1 (docs/\2)", setting.effect)
        value = yaml.safe_dump({name: values[name]}, default_flow_style=False, allow_unicode=True, width=10_000)
        lines += ["", f"# {effect}", f"# {setting.accepts}", value.rstrip("\n")]
    return "\n".join(lines) + "\n"


def settings_table(defaults: Mapping[str, Any]) -> str:
    """The table of settings as Markdown.

    Args:
        defaults: by the settings' names.
    """
    lines = ["| setting | default | accepts | effect |", "|---|---|---|---|"]
    for name, setting in SETTINGS.items():
        default = "null" if defaults[name] is None else f"{defaults[name]!s}"
        default = default.lower() if isinstance(defaults[name], bool) else default
        lines.append(f"| `{name}` | {default} | {setting.accepts} | {setting.effect} |")
    return "\n".join(lines)
