"""Damage to model files, drawn by a random generator: bytes, JSON values, tensors, GGUF fields."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from gguf import GGUFReader

ABSURD: tuple[Any, ...] = (
    None,
    -1,
    0,
    1,
    2**31,
    2**40,
    2**63,
    1e300,
    -0.5,
    float("nan"),
    "",
    "text",
    [],
    {},
    True,
    "\ud800",
)
NUMBERS = (0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)


def damage_bytes(path: Path, random: Random) -> str:
    """Cut a file short, empty it, turn bits over in it, or write text that is not UTF-8."""
    data = bytearray(path.read_bytes())
    kind = random.choice(("cut", "flip", "flip", "empty", "latin"))
    if kind == "cut":
        del data[random.randrange(len(data)) :]
    elif kind == "empty":
        data.clear()
    elif kind == "latin":
        at = random.randrange(min(len(data), 4096))
        data[at:at] = b"\xff\xfe"
    else:
        for _ in range(random.choice((1, 3, 30))):
            at = random.randrange(min(len(data), random.choice((64, 4096, len(data)))))
            data[at] ^= 1 << random.randrange(8)
    path.write_bytes(data)
    return f"{path.name}: {kind}"


def damage_json(path: Path, random: Random) -> str:
    """Take a value out of a JSON file, put an absurd one in its place, or add a key."""
    value = json.loads(path.read_text())
    holder = value
    for _ in range(random.randrange(3)):
        inner = [child for child in holder.values() if isinstance(child, dict) and child]
        holder = random.choice(inner) if inner else holder
    key = random.choice(list(holder))
    if random.random() < 0.3:
        del holder[key]
        text = "taken out"
    else:
        holder[key] = random.choice(ABSURD)
        text = repr(holder[key])
    path.write_text(json.dumps(value))
    return f"{path.name}: {key} {text}"


def damage_tensors(path: Path, random: Random) -> str:
    """Take a tensor out of a safetensors file, add or rename one, give it another shape, or a number that is none."""
    tensors = load_file(path)
    name = random.choice(sorted(tensors))
    kind = random.choice(("missing", "surplus", "renamed", "reshaped", "nan", "inf", "integers", "empty"))
    tensor = tensors[name]
    if kind == "missing":
        del tensors[name]
    elif kind == "surplus":
        tensors[name.replace(".0.", ".7.") + random.choice(("", ".weight"))] = tensor
    elif kind == "renamed":
        tensors[f"other.{name}"] = tensors.pop(name)
    elif kind == "reshaped":
        tensors[name] = np.ascontiguousarray(random.choice((tensor[:-1], tensor[..., :-1], tensor[None])))
    elif kind == "integers":
        tensors[name] = tensor.astype(np.int64)
    elif kind == "empty":
        tensors[name] = tensor[:0]
    else:
        tensor.reshape(-1)[random.randrange(tensor.size)] = np.nan if kind == "nan" else np.inf
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{path.name}: {name} {kind}"


def damage_gguf(path: Path, random: Random) -> str:
    """Overwrite a part of a field or a tensor's entry in a GGUF file's header, or numbers of a tensor."""
    reader = GGUFReader(path)
    data = bytearray(path.read_bytes())
    kind = random.choice(("field", "field", "field", "tensor", "numbers", "counts"))
    name, at = kind, random.choice((4, 8, 16))
    if kind == "field":
        field = random.choice(list(reader.fields.values())[3:])
        name = field.name
        parts = [field.offset]
        for part in field.parts[:-1]:
            parts.append(parts[-1] + part.nbytes)
        at = random.choice(parts[-40:] if random.random() < 0.5 else parts[:6])
    elif kind == "tensor":
        tensor = random.choice(reader.tensors)
        name = tensor.name
        at = tensor.field.offset + random.randrange(8 + len(name) + 4 + 16 + 4 + 8)
    elif kind == "numbers":
        tensor = random.choice(reader.tensors)
        name, at = tensor.name, tensor.data_offset + 2 * random.randrange(max(1, tensor.n_bytes // 2))
    del reader
    form = random.choice(("B", "H", "I", "I", "Q", "f"))
    value = random.choice((float("nan"), float("inf"), -1.0, 0.0, 1e30) if form == "f" else NUMBERS)
    if form != "f":
        value %= 1 << 8 * struct.calcsize(form)
    packed = struct.pack(f"<{form}", value)
    data[at : at + len(packed)] = packed
    path.write_bytes(data)
    return f"{path.name}: {name} at {at} = {value} ({form})"
