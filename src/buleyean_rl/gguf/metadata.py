"""Metadata of a GGUF file: typed values by key, and what the file says about its author, licence and base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buleyean_rl.errors import UsageError
from buleyean_rl.gguf.private_interfaces import size_label
from buleyean_rl.system.wording import one_line
from gguf import GGUFReader, GGUFValueType, Keys

PROGRAM = "buleyean-rl"

Value = bool | int | float | str | list[Any]


@dataclass(frozen=True)
class Field:
    """A metadata value.

    Args:
        value: as Python has it.
        type: in GGUF.
        item_type: of an array's items.
    """

    value: Any
    type: GGUFValueType
    item_type: GGUFValueType | None = None


def make_field(value: Value) -> Field:
    """A value with its type in GGUF; integers are unsigned, as llama.cpp wants them."""
    if isinstance(value, bool):
        return Field(value, GGUFValueType.BOOL)
    if isinstance(value, int):
        return Field(value, GGUFValueType.UINT32)
    if isinstance(value, float):
        return Field(value, GGUFValueType.FLOAT32)
    if isinstance(value, str):
        return Field(value, GGUFValueType.STRING)
    return Field(value, GGUFValueType.ARRAY)


def read_fields(reader: GGUFReader) -> dict[str, Field]:
    """The metadata of a file, without the header's own fields."""
    return {
        key: Field(field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }


def is_ours(path: Path) -> bool:
    """Whether a file is a GGUF that this package wrote."""
    try:
        field = GGUFReader(path).fields.get(Keys.General.QUANTIZED_BY)
        return field is not None and field.contents() == PROGRAM
    except (OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError):  # another file, or a damaged one
        return False


@dataclass(frozen=True)
class About:
    """Who made a model, from what, and where to read about it; None stays out of the file.

    Args:
        name: of the model.
        author: who trained it.
        license: an SPDX identifier, such as apache-2.0; a GGUF base's own if None.
        url: of the model's card.
        base: name of the base model.
        base_url: where the base model is.
        description: of the model.

    Raises:
        UsageError: one of them is more than a line.
    """

    name: str | None = None
    author: str | None = None
    license: str | None = None
    url: str | None = None
    base: str | None = None
    base_url: str | None = None
    description: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value != one_line(value):
                raise UsageError(f"{name} {value!r} holds a line break or another control character: leave it out")

    def fields(self, file_type: str, parameters: int | None = None) -> dict[str, Field]:
        """The `general.*` metadata.

        Args:
            file_type: one of `gguf.GGUFType`.
            parameters: how many numbers the model has.
        """
        values = {
            Keys.General.TYPE: file_type,
            Keys.General.NAME: self.name,
            Keys.General.AUTHOR: self.author,
            Keys.General.LICENSE: self.license,
            Keys.General.URL: self.url,
            Keys.General.DESCRIPTION: self.description,
            Keys.General.QUANTIZED_BY: PROGRAM,
            Keys.General.SIZE_LABEL: size_label(parameters) if parameters else None,
        }
        if self.base is not None:
            values |= {
                Keys.General.BASE_MODEL_COUNT: 1,
                Keys.General.BASE_MODEL_NAME.format(id=0): self.base,
                Keys.General.BASE_MODEL_REPO_URL.format(id=0): self.base_url,
            }
        return {
            key: make_field(value.encode(errors="replace").decode() if isinstance(value, str) else value)  # of any path
            for key, value in values.items()
            if value is not None
        }


def override_fields(metadata: Mapping[str, Field], fields: Mapping[str, Field]) -> dict[str, Field]:
    """Metadata with other fields before it and in place of the same keys."""
    return {**fields, **{key: field for key, field in metadata.items() if key not in fields}}
