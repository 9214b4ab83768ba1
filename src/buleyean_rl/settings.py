"""Settings of a run from a YAML file and the command line."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from buleyean_rl.errors import UsageError
from buleyean_rl.trainer import BuleyeanConfig


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
