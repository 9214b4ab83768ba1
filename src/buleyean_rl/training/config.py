"""Settings of a run: presets, a YAML file and the command line, the later over the earlier."""

from __future__ import annotations

import enum
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import TrainingArguments

from buleyean_rl.batching.micro_batch import micro_batch_tokens
from buleyean_rl.errors import UsageError
from buleyean_rl.models.private_interfaces import current_gpu_kept, no_word_of_groups, use_current_gpu
from buleyean_rl.objectives.complement import Prior
from buleyean_rl.objectives.losses import Objective, ObjectiveName
from buleyean_rl.system.launcher import check_whole_model, hidden
from buleyean_rl.training.processes import current
from buleyean_rl.training.settings import (
    SETTINGS,
    Choice,
    Number,
    Whole,
    check_settings,
    settings_yaml,
    unknown_setting,
)


class Preset(NamedTuple):
    """Settings of a preset; see `BuleyeanConfig` for each."""

    learning_rate: float | None
    num_train_epochs: float | None
    per_device_train_batch_size: int | None
    lora_dropout: float
    held_out: float
    anchors: int
    max_rejected: int | None
    adapter_scale: float


PRESETS = {
    #              learning rate, epochs, batch, dropout, held out, anchors, max rejected, adapter scale
    "log": Preset(None, None, None, 0.0, 0.1, 2, None, 1.0),  # the default: hundreds of rejections or more
    "loops": Preset(7e-4, 1.5, 2, 0.0, 0.0, 1, 48, 1.0),  # mined answers that loop: `walk` and `demo`
    "few": Preset(None, 3.0, 4, 0.0, 0.0, 2, None, 1.0),  # a handful of rejections: the Void
}
LOG = PRESETS["log"]
# Where nobody sets them, and the answers are not the model's own; for those see `firmness`.
STEPS = {"learning_rate": 2e-4, "num_train_epochs": 1.0, "per_device_train_batch_size": 4}
MAX_FILE_BYTES = 1 << 20
NO_MAX_STEPS = -1  # transformers' word for it
TENSORBOARD = ("tensorboard", "tensorboardX")  # packages, of which transformers takes one


@dataclass
class BuleyeanConfig(TrainingArguments):
    """The settings of a training run: these, and of transformers' `TrainingArguments` those in `settings.SETTINGS`.

    Args:
        objective: `complement` to learn from rejections, `listwise` to learn a ranking of whole answers, `published`
            to reproduce the published loss.
        alpha: weight of the KL to the complement distribution against the contrast; None for the objective's own:
            0.9 for `complement`, 0.7 for the others.
        tau: exponent of the complement weights, how firmly a rejection is meant; 1 is the published formula. None: by
            whose answers were rejected, see `firmness`.
        prior_mean: m, how often an answer is presumed not to be rejected; None: the share accepted in the records.
        prior_rounds: k, how many rounds of judgement that is worth.
        min_p: share of the likeliest token's probability from which a token takes what a rejection frees; 0: all take
            it; None for the objective's own: 0.1 for `complement`.
        beta: scale of the answers' log-ratios, of which the ranking is a softmax; only `listwise` uses it.
        own_samples: samples of the base model that `listwise` adds to the rejected answers of a prompt.
        max_length: maximum tokens of a prompt and one response; longer responses are truncated.
        max_rejected: where a response ends of which parts are rejected: after so many rejected tokens; None: all of it.
        micro_batch_tokens: maximum tokens of a forward pass; None for the device's default.
        held_out: share of the records that are measured on, not trained on.
        anchors: texts that were not rejected, in a step for each of its records; see `anchors`.
        base_bits: of a number of the frozen base: 4 and 8 quantise it in memory, 16 do not; None for a large GGUF
            file's own blocks, and 16 for all else.
        lora_rank: rank of the adapter.
        lora_alpha: the adapter is scaled by lora_alpha / lora_rank.
        lora_dropout: on the adapter's input.
        lora_targets: names of the adapted layers; None for every linear layer.
        adapter_scale: factor of the trained adapter (ExPO, arXiv:2404.16792).
        guard: end the run before it ruins the model.
        guard_kl: the guard's limit of KL(pi_ref || pi) on each kind of text, in nats per token.
        guard_entropy: its limit of the change of the entropy there, as a share of the base's.

    Attributes:
        loss: the objective.
        open_steps: those of `STEPS` that nobody set and the data has not decided yet; see `firmness`.
        processes: that train together.
        begun_processes: their number when the run began, by which `per_device_train_batch_size` is multiplied.

    Raises:
        UsageError: a value is outside its range, a setting has no effect here, or a launcher asks to shard the model.
    """

    objective: ObjectiveName = "complement"
    alpha: float | None = None
    tau: float | None = None
    prior_mean: float | None = 1.0
    prior_rounds: float = 1.0
    min_p: float | None = None
    beta: float = 0.1
    own_samples: int = 2
    max_length: int = 1024
    max_rejected: int | None = LOG.max_rejected
    micro_batch_tokens: int | None = None
    held_out: float = LOG.held_out
    anchors: int = LOG.anchors
    base_bits: int | None = None
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = LOG.lora_dropout
    lora_targets: list[str] | None = None
    adapter_scale: float = LOG.adapter_scale
    guard: bool = True
    guard_kl: float = 0.05
    guard_entropy: float = 0.1

    # Open until the data is read where it is None: see `STEPS`.
    learning_rate: float = LOG.learning_rate  # type: ignore[assignment]
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = field(default=0.0888, metadata={"help": "Below 1, a share: 100 of 1125 steps."})
    per_device_train_batch_size: int = LOG.per_device_train_batch_size  # type: ignore[assignment]
    num_train_epochs: float = LOG.num_train_epochs  # type: ignore[assignment]
    logging_steps: float = 1
    save_steps: float = 0.1
    save_total_limit: int | None = 2
    activation_checkpointing: bool = False
    report_to: str | list[str] | None = "none"
    disable_tqdm: bool | None = True
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False

    def __post_init__(self) -> None:
        check_whole_model()
        self.processes = current()
        self.begun_processes = self.processes.size
        if self.report_to == "tensorboard" and not any(map(find_spec, TENSORBOARD)):
            raise UsageError("report_to tensorboard needs a package that is missing: pip install tensorboard")
        self.open_steps = [name for name in STEPS if getattr(self, name) is None]
        for name in self.open_steps:
            setattr(self, name, STEPS[name])
        if self.max_steps is None:
            self.max_steps = NO_MAX_STEPS
        if without_effect := [f.name for f in fields(self) if f.name not in SETTINGS and self._is_changed(f)]:
            raise UsageError(f"without effect in this training: {_list_unknown(without_effect)}")
        values = self.settings()
        if self.max_steps == NO_MAX_STEPS:
            del values["max_steps"]
        if isinstance(self.objective, str):
            del values["objective"]  # `Objective` knows more of it
        check_settings(values)
        self.set_loss()
        self.use_cpu |= not torch.cuda.is_available()  # Apple's GPU has no fp64, which the loss needs
        with hidden(), no_word_of_groups(), current_gpu_kept():  # or transformers would join the others
            super().__post_init__()
        self.mixed_precision = "no"  # which transformers may have from a launcher: the model has its dtype
        use_current_gpu(self)  # replicas would bypass the adapter switch

    @property
    def batch_records(self) -> int:
        """Records of a batch, in all processes together."""
        return self.per_device_train_batch_size * self.begun_processes

    @property
    def step_records(self) -> int:
        """Records of a step, in all processes together."""
        return self.batch_records * self.gradient_accumulation_steps

    def set_loss(self) -> None:
        """Make the loss anew, after its settings have changed; tau and m are 1 while they are open."""
        prior = Prior(self.prior_mean or 1.0, self.prior_rounds)
        self.loss = Objective(self.objective, self.alpha, self.tau or 1.0, self.beta, prior, self.min_p)
        self.alpha, self.min_p = self.loss.alpha, self.loss.min_p

    def settings(self) -> dict[str, Any]:
        """The values of `SETTINGS`, as JSON has them."""
        values = {name: None if name in self.open_steps else getattr(self, name) for name in SETTINGS}
        if isinstance(self.report_to, list):  # which transformers makes of the word
            values["report_to"] = next(iter(self.report_to), "none")
        return {name: value.value if isinstance(value, enum.Enum) else value for name, value in values.items()}

    def _is_changed(self, setting: Any) -> bool:
        if setting.name == "output_dir" or not setting.init:
            return False
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        return getattr(self, setting.name) not in (default, None, [], "", [default])


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
    settings = _merge_settings(file, options, preset)
    if "max_steps" in settings:
        check_settings({"max_steps": settings["max_steps"]})
    try:
        return BuleyeanConfig(**{**settings, "output_dir": str(folder)})
    except (TypeError, ValueError) as error:
        raise UsageError(f"{file or 'settings'}: {str(error).splitlines()[0]}") from error


def config_yaml(file: Path | None, options: dict[str, Any], preset: str = "log") -> str:
    """All settings as a YAML file, from which `load_config` makes the same settings on any machine.

    Args:
        file: see `load_config`.
        options: see `load_config`.
        preset: see `load_config`.

    Raises:
        UsageError: as `load_config`.
    """
    load_config(file, Path("run"), options, preset)  # which checks them
    return settings_yaml(default_settings() | _merge_settings(file, options, preset))


def default_settings() -> dict[str, Any]:
    """The default of every setting, as JSON has it."""
    defaults = {field.name: field.default for field in fields(BuleyeanConfig)} | {"max_steps": None}
    plain = {name: defaults[name] for name in SETTINGS}
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in plain.items()}


def _merge_settings(file: Path | None, options: dict[str, Any], preset: str) -> dict[str, Any]:
    """A preset's settings, overridden by a file's, overridden by options."""
    settings = {"preset": preset} | (_read_settings(file) if file is not None else {}) | options
    _check_names(settings)
    return PRESETS[settings.pop("preset")]._asdict() | settings


def _read_settings(file: Path) -> dict[str, Any]:
    """Read a YAML file's settings, with names checked and numbers converted."""
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_FILE_BYTES)
        settings = yaml.load(text, _Loader) if len(text) < MAX_FILE_BYTES else f"{MAX_FILE_BYTES:,} bytes"
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{file}{line}: cannot be read as YAML: {error.problem}") from error
    except Exception as error:  # yaml raises any error of the conversions it calls
        problem = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{file}: cannot be read as YAML: {problem}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError(f"{file}: expected `name: value` lines, such as `learning_rate: 2e-4`")
    if unknown := [str(name) for name in settings if name not in (*SETTINGS, "preset")]:
        raise UsageError(f"{file}: not a setting: {_list_unknown(unknown)}")
    converted = {name: _convert_value(name, value) for name, value in settings.items()}
    try:
        _check_names(converted)
        check_settings({name: value for name, value in converted.items() if name != "preset"})
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    return converted


def _check_names(settings: Mapping[str, Any]) -> None:
    """Refuse a preset or an objective that there is not."""
    if "preset" in settings and settings["preset"] not in tuple(PRESETS):
        raise UsageError(f"unknown preset {reprlib.repr(settings['preset'])}: choose one of {', '.join(PRESETS)}")
    if isinstance(settings.get("objective"), str):
        Objective(settings["objective"])


class _Loader(yaml.SafeLoader):
    """Refuses a name that is there twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in names:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value[:60]!r} is there twice", key.start_mark
                )
            names.add(key.value)
        return super().construct_mapping(node, deep)


def _list_unknown(names: Sequence[str]) -> str:
    listed = [unknown_setting(name[:60]) for name in names[:5]]
    more = f", and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"{', '.join(listed)}{more}; docs/config.md has all settings"


def _convert_value(name: str, value: Any) -> Any:
    """Convert what YAML reads otherwise to a setting's value: 2e-4, without a dot, as text, and `no` as false."""
    accepts = SETTINGS[name].accepts if name in SETTINGS else None
    if value is False and isinstance(accepts, Choice) and accepts.admits("no"):
        return "no"
    if not isinstance(accepts, Number) or isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return value
    if isinstance(accepts, Whole):
        return int(number) if number.is_integer() else number
    return number


def total_steps(config: BuleyeanConfig, records: int) -> int:
    """Number of steps of a run.

    Args:
        config: the settings.
        records: number of training records.
    """
    if config.max_steps > 0:
        return config.max_steps
    batches = math.ceil(records / config.batch_records)
    return math.ceil(math.ceil(batches / config.gradient_accumulation_steps) * config.num_train_epochs)


def micro_batch_limit(config: BuleyeanConfig, model: Any) -> int:
    """Maximum tokens of a forward pass: the setting, or the model's default."""
    return config.micro_batch_tokens or micro_batch_tokens(model)
