"""Settings: defaults, presets, a YAML file, options, and what is refused."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from buleyean_rl.cli import app
from buleyean_rl.errors import BuleyeanError, UsageError
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.training.config import PRESETS, BuleyeanConfig, Preset, config_yaml, load_config
from buleyean_rl.training.settings import OTHER_NAMES, SETTINGS


def config_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


# --- defaults


def test_the_defaults_are_the_cards_but_for_the_objective(tmp_path: Path) -> None:
    config = BuleyeanConfig(output_dir=str(tmp_path))
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (16, 32, 0.0)
    assert (config.learning_rate, config.per_device_train_batch_size, config.num_train_epochs) == (2e-4, 4, 1)
    assert (config.lr_scheduler_type, config.held_out) == ("cosine", 0.1)
    assert config.get_warmup_steps(1125) == 100
    assert config.loss == Objective()
    assert (config.alpha, config.min_p) == (0.9, 0.1)
    for name in ("listwise", "published"):
        assert BuleyeanConfig(output_dir=str(tmp_path), objective=name).loss == Objective(name, 0.7)  # type: ignore[arg-type]
    changed = BuleyeanConfig(output_dir=str(tmp_path), alpha=0.5, min_p=0.0)
    assert changed.loss == Objective(alpha=0.5, min_p=0.0)


def test_apple_gpus_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("transformers.training_args.is_torch_mps_available", lambda: True)
    assert BuleyeanConfig(output_dir=str(tmp_path)).device.type == "cpu"


def test_nothing_is_published_or_reported(tmp_path: Path) -> None:
    config = BuleyeanConfig(output_dir=str(tmp_path))
    assert not config.push_to_hub
    assert not config.report_to
    assert config.settings()["report_to"] == "none"


def test_a_log_for_tensorboard_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buleyean_rl.training.config.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        BuleyeanConfig(output_dir=str(tmp_path), report_to="tensorboard")
    monkeypatch.setattr("buleyean_rl.training.config.find_spec", lambda name: name)
    assert BuleyeanConfig(output_dir=str(tmp_path), report_to="tensorboard").settings()["report_to"] == "tensorboard"


@pytest.mark.parametrize("setting", [{"alpha": 0}, {"tau": -1}, {"objective": "kto"}, {"lora_rank": 0}])
def test_impossible_settings_are_refused(setting: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        BuleyeanConfig(output_dir=str(tmp_path), **setting)


def help_numbers(command: str) -> dict[str, float]:
    """The default that the help of a command's option ends with, in brackets, by the option's name."""
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    defaults = {p.name: re.search(r"\(([\d.e-]+)\)\.$", getattr(p, "help", None) or "") for p in parameters}
    return {name: float(number[1]) for name, number in defaults.items() if number}


def test_the_help_has_the_defaults(tmp_path: Path) -> None:
    settings = {"epochs": "num_train_epochs"}
    log, loops = BuleyeanConfig(output_dir=str(tmp_path)), PRESETS["loops"]
    defaults = help_numbers("train")
    assert {"held_out", "lora_rank", "adapter_scale", "seed"} <= defaults.keys()
    assert defaults == {name: getattr(log, settings.get(name, name)) for name in defaults}
    defaults = help_numbers("walk")
    assert {"learning_rate", "epochs", "adapter_scale"} == defaults.keys()
    assert defaults == {name: getattr(loops, settings.get(name, name)) for name in defaults}


# --- presets


def values(config: BuleyeanConfig) -> Preset:
    return Preset(*(config.settings()[name] for name in Preset._fields))


def test_the_default_preset_is_the_default_config(tmp_path: Path) -> None:
    assert values(BuleyeanConfig(output_dir=str(tmp_path))) == values(load_config(None, tmp_path, {})) == PRESETS["log"]
    for name, preset in PRESETS.items():
        assert values(load_config(None, tmp_path, {}, preset=name)) == preset


def test_options_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = config_file(tmp_path, "preset: few\nheld_out: 0.2\nlora_dropout: 0.1\n")
    expected = PRESETS["few"]._replace(held_out=0.2, lora_dropout=0.3)
    assert values(load_config(file, tmp_path / "run", {"lora_dropout": 0.3}, preset="loops")) == expected
    expected = PRESETS["loops"]._replace(held_out=0.2, lora_dropout=0.1)
    assert values(load_config(file, tmp_path / "run", {"preset": "loops"})) == expected
    plain = config_file(tmp_path, "held_out: 0.2")
    assert values(load_config(plain, tmp_path / "run", {}, preset="loops")) == PRESETS["loops"]._replace(held_out=0.2)


@pytest.mark.parametrize("text", ["preset: many", "preset: [log]", "preset: null"])
def test_an_unknown_preset_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.yaml: unknown preset .*: choose one of log, loops, few"):
        load_config(config_file(tmp_path, text), tmp_path / "run", {})


# --- the settings file


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("preset: few\nsave_strategy: no\nlora_targets: [q_proj, v_proj]\n", {"max_steps": 7, "learning_rate": 1e-9}),
        ("objective: published\nalpha: 0.5\nguard: no\nsave_steps: 20\n", {"adam_epsilon": 1e-12, "seed": 0}),
    ],
)
def test_the_printed_settings_are_read_back(text: str, options: dict[str, Any], tmp_path: Path) -> None:
    file = config_file(tmp_path, text)
    expected = load_config(file, tmp_path / "run", options).settings()
    printed = tmp_path / "printed.yaml"
    printed.write_text(config_yaml(file, options))
    assert load_config(printed, tmp_path / "run", {}).settings() == expected
    lines = printed.read_text().splitlines()
    assert [line.partition(":")[0] for line in lines if line and line[0] not in "#-"] == list(SETTINGS)
    assert all(lines[lines.index(line) - 1].startswith("# ") for line in lines if line and line[0] not in "#-")


@pytest.mark.parametrize("word", ["no", "No", "'no'", "off"])
def test_no_is_a_word_where_a_setting_has_it(word: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"save_strategy: {word}\nguard: no\n")
    config = load_config(tmp_path / "run.yaml", tmp_path, {})
    assert (config.save_strategy, config.guard) == ("no", False)


def test_options_override_the_settings_file(tmp_path: Path) -> None:
    text = "learning_rate: 5e-4\nlora_rank: 8\nweight_decay: 1e-2\ntau: 2\nalpha: 5e-1\nmicro_batch_tokens: null\n"
    file = config_file(tmp_path, text)
    config = load_config(file, tmp_path / "run", {"lora_rank": 4})
    assert (config.learning_rate, config.lora_rank, config.weight_decay, config.tau) == (5e-4, 4, 1e-2, 2)
    assert (config.alpha, config.micro_batch_tokens) == (0.5, None)
    assert config.output_dir == str(tmp_path / "run")
    assert load_config(config_file(tmp_path, ""), tmp_path / "run", {}).lora_rank == 16


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lora_rnak: 8", "run.yaml: not a setting: lora_rnak (did you mean lora_rank?)"),
        ("batch_size: 4", "batch_size (did you mean per_device_train_batch_size?)"),
        ("gradient_checkpointing: true", "did you mean activation_checkpointing?"),
        ("fp16: true\ntorch_compile: true", "run.yaml: not a setting: fp16, torch_compile; docs/config.md"),
        ("1: 2\nlr: 3", "run.yaml: not a setting: 1, lr (did you mean learning_rate?)"),
        ("output_dir: elsewhere", "run.yaml: not a setting: output_dir"),
        ("learning_rate: fast", "run.yaml: learning_rate cannot be 'fast': it must be a number from 1e-09 to 100"),
        ("lora_rank: many", "run.yaml: lora_rank cannot be 'many': it must be a whole number from 1 to"),
        ("lora_rank: 2.5", "run.yaml: lora_rank cannot be 2.5: it must be a whole number"),
        ("lora_rank: [8]", "run.yaml: lora_rank cannot be [8]"),
        ("weight_decay: some", "run.yaml: weight_decay cannot be 'some'"),
        ("max_steps: true", "run.yaml: max_steps cannot be True"),
        ("beta: null", "run.yaml: beta cannot be None"),
        ("prior_mean: 1.5", "prior_mean cannot be 1.5"),
        ("prior_rounds: 0", "prior_rounds cannot be 0"),
        ("lora_rank: 0", "lora_rank cannot be 0"),
        ("held_out: 1", "held_out cannot be 1"),
        ("max_length: 1", "max_length cannot be 1"),
        ("micro_batch_tokens: 0", "micro_batch_tokens cannot be 0"),
        ("learning_rate: -1", "learning_rate cannot be -1"),
        ("adapter_scale: 0", "adapter_scale cannot be 0"),
        ("adapter_scale: 1e-300", "adapter_scale cannot be 1e-300"),  # fp32 has no such factor
        ("adam_epsilon: 1e-46", "adam_epsilon cannot be 1e-46"),  # 0 / 0 for a gradient of 0
        ("lora_dropout: 1", "lora_dropout cannot be 1"),
        ("num_train_epochs: 0", "num_train_epochs cannot be 0"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size cannot be 0"),
        ("alpha: much", "run.yaml: alpha cannot be 'much'"),
        ("alpha: 2", "alpha cannot be 2"),
        ("tau: 0", "tau cannot be 0"),
        ("tau: .nan", "tau cannot be nan"),
        ("num_train_epochs: .inf", "num_train_epochs cannot be inf"),
        ("max_steps: 0", "max_steps cannot be 0"),
        ("max_steps: -1", "max_steps cannot be -1"),
        ("guard: 'no'", "guard cannot be 'no': it must be true or false"),
        ("lora_targets: q_proj", "lora_targets cannot be 'q_proj': it must be a list of names, or null"),
        ("lora_targets: []", "lora_targets cannot be []"),
        ("warmup_steps: 2.5", "warmup_steps cannot be 2.5"),
        ("seed: -1", "seed cannot be -1"),
        ("objective: [complement]", "objective cannot be ['complement']"),
        ("objective: ratio", "objective 'ratio' is called 'complement' now"),
        ("objective: dpo", "unknown objective 'dpo': choose one of complement, listwise, published"),
        ("lr_scheduler_type: sawtooth", "it must be one of cosine, linear"),
        ("- a\n- b", "run.yaml: expected `name: value` lines"),
        ("a: [", "run.yaml:1: cannot be read as YAML"),
        ("seed: 1\ntau: 2\nseed: 1", "run.yaml:3: cannot be read as YAML: 'seed' is there twice"),
        ('"a\\nb": 1\n"a\\nb": 1', "run.yaml:2: cannot be read as YAML"),
        ("seed: 1\n? [a]\n: 1", "run.yaml:2: cannot be read as YAML: found unhashable key"),
        ("!!map x", "run.yaml:1: cannot be read as YAML: expected a mapping"),
        ("optim: no", "run.yaml: optim cannot be False"),
    ],
)
def test_invalid_settings_are_refused(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(file := config_file(tmp_path, text), tmp_path / "run", {})
    assert str(caught.value).startswith(f"{file}:")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_binary_settings_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(UsageError, match="cannot be read"):
        load_config(path, tmp_path / "run", {})
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BuleyeanError, match="cannot be read"):
        load_config(path, tmp_path / "run", {})


@pytest.mark.parametrize(
    "text", ["!!float ''", "!!int ''", "? {a: b}\n: 1", "!!timestamp x", "seed: " + "9" * 5000, "a: " * 4000, "*x"]
)
def test_whatever_a_settings_file_has_is_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(config_file(tmp_path, text), tmp_path / "run", {})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


# --- those of transformers


def test_every_setting_of_transformers_has_an_effect_or_is_refused(tmp_path: Path) -> None:
    """Also from Python, where no file is read."""
    values = {bool: True, int: 3, float: 0.5, str: "other"}
    for setting in fields(TrainingArguments):
        if setting.name in SETTINGS or setting.name == "output_dir" or not setting.init:
            continue
        default = getattr(BuleyeanConfig(output_dir=str(tmp_path)), setting.name)
        value = not default if isinstance(default, bool) else values.get(type(default), "other")
        with pytest.raises(UsageError, match=f"without effect in this training: {setting.name}"):
            BuleyeanConfig(output_dir=str(tmp_path), **{setting.name: value})


def test_a_setting_that_is_named_nearest_is_a_setting() -> None:
    assert set(OTHER_NAMES.values()) <= SETTINGS.keys()
    assert not OTHER_NAMES.keys() & SETTINGS.keys()
    assert SETTINGS.keys() <= {setting.name for setting in fields(BuleyeanConfig)}


@given(st.sampled_from(sorted(SETTINGS)), st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()))
def test_a_value_is_taken_as_it_is_or_refused_with_its_name(name: str, value: Any) -> None:
    if SETTINGS[name].accepts.admits(value):
        config = load_config(None, Path("run"), {name: value})
        assert getattr(config, name) == value or value is None
    else:
        with pytest.raises(UsageError, match=name):
            load_config(None, Path("run"), {name: value})


# --- several processes


def test_under_a_launcher_settings_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would join the others, wrap the model and deal the records."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    config = load_config(None, Path("run"), {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2})
    assert (config.world_size, config.parallel_mode.name) == (1, "NOT_PARALLEL")
    assert (config.batch_records, config.step_records) == (3, 6)
    config.begun_processes = 4
    assert (config.batch_records, config.step_records) == (12, 24)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="each process has a whole model"):
        load_config(None, Path("run"), {})
