"""Metadata of a GGUF file: typed values, and what the file says about itself to `gguf-dump` and hubs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf.utility import model_weight_count_rounded_notation

from gguf import GGUFReader, GGUFValueType, Keys

Value = bool | int | float | str | list[Any]


@dataclass(frozen=True)
class Field:
    """One value. Args: the value, its type, and the type of an array's items."""

    value: Any
    type: GGUFValueType
    item_type: GGUFValueType | None = None


def typed(value: Value) -> Field:
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


def fields_of(reader: GGUFReader) -> dict[str, Field]:
    """The metadata of a file, as it is there."""
    return {
        key: Field(found.contents(), found.types[0], found.types[-1] if len(found.types) > 1 else None)
        for key, found in reader.fields.items()
        if not key.startswith("GGUF.")
    }


@dataclass(frozen=True)
class About:
    """Who made a model, from what, and where to read about it; what is not known stays out of the file.

    Args:
        name: of the model.
        author: who trained it.
        license: an SPDX identifier, such as apache-2.0; a GGUF base's own if None.
        url: of the model's card.
        base: name of the base model.
        base_url: where the base model is.
        description: one line.
    """

    name: str | None = None
    author: str | None = None
    license: str | None = None
    url: str | None = None
    base: str | None = None
    base_url: str | None = None
    description: str | None = None

    def fields(self, kind: str, parameters: int | None = None) -> dict[str, Field]:
        """The metadata that says so.

        Args:
            kind: of `gguf.GGUFType`.
            parameters: how many numbers the model has.
        """
        values = {
            Keys.General.TYPE: kind,
            Keys.General.NAME: self.name,
            Keys.General.AUTHOR: self.author,
            Keys.General.LICENSE: self.license,
            Keys.General.URL: self.url,
            Keys.General.DESCRIPTION: self.description,
            Keys.General.QUANTIZED_BY: "buleyean-rl",
            Keys.General.SIZE_LABEL: parameters and model_weight_count_rounded_notation(parameters, 1),
        }
        if self.base is not None:
            values |= {
                Keys.General.BASE_MODEL_COUNT: 1,
                Keys.General.BASE_MODEL_NAME.format(id=0): self.base,
                Keys.General.BASE_MODEL_REPO_URL.format(id=0): self.base_url,
            }
        return {key: typed(value) for key, value in values.items() if value is not None}


def overridden(metadata: Mapping[str, Field], own: Mapping[str, Field]) -> dict[str, Field]:
    """`metadata` with `own` before it and in place of the same keys."""
    return {**own, **{key: field for key, field in metadata.items() if key not in own}}
