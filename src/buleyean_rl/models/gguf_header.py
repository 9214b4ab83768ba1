"""The header of a GGUF file, read within the file's bounds, and what must be right of it before an engine sees it.

    file --read_header--> Header: metadata, tensors --check_model_header--> a model that llama.cpp can be given

llama.cpp and the `gguf` package trust a header: lengths of 2^60, lists of different lengths or tensors beyond the end
are read out of bounds, abort the process, or ask for all memory. Nothing here allocates more than the file holds.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from buleyean_rl.errors import ModelError
from buleyean_rl.system.wording import counted

VERSIONS = (2, 3)
ALIGNMENT = 32  # where the file names none
MAX_DIMENSIONS = 4  # of llama.cpp
MAX_NAME_BYTES = 63  # of a tensor, in llama.cpp
MAX_LAYERS = 512  # of llama.cpp
EMBEDDING = "token_embd.weight"
SIZES = (
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("feed_forward_length", "rope.dimension_count"),
)
STRING, ARRAY, BOOL, FLOAT32, INT32, UINT64 = 8, 9, 7, 6, 5, 10
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
BLOCKS = 1 << 16  # read at a time
# Where a block of a type has its scales, in fp16; and the bits of an exponent, all set in NaN and infinity.
SCALES = {
    **dict.fromkeys(("F32", "F64", "F16", "BF16"), (0,)),
    **dict.fromkeys(
        ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)
    ),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)},
}
EXPONENTS: dict[str, tuple[Any, Any]] = {
    "F64": (np.dtype("<u8"), np.uint64(0x7FF0000000000000)),
    "F32": (np.dtype("<u4"), np.uint32(0x7F800000)),
    "BF16": (np.dtype("<u2"), np.uint16(0x7F80)),
    "F16": (np.dtype("<u2"), np.uint16(0x7C00)),
}
DAMAGED = "the file is cut short or damaged: copy or export it again"


@dataclass(frozen=True)
class Array:
    """An array in the metadata.

    Args:
        item_type: as GGUF numbers it.
        items: texts, or a numpy array.
    """

    item_type: int
    items: Any

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place in a file.

    Args:
        shape: in torch's order, rows first.
        type: as ggml numbers it.
        start: of its bytes in the file.
        size: in bytes.
    """

    shape: tuple[int, ...]
    type: int
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """All of a GGUF file but its tensors' numbers.

    Args:
        path: of the file.
        metadata: by key; numbers, texts, `Array`.
        types: of the values, as GGUF numbers them.
        tensors: by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    types: Mapping[str, int]
    tensors: Mapping[str, TensorInfo]

    @cached_property
    def architecture(self) -> str:
        """llama.cpp's name of it, the prefix of its metadata.

        Raises:
            ModelError: it has none.
        """
        return str(self.value("general.architecture", str))

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata.

        Raises:
            ModelError: it is of another type, or missing where there is no default.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelError(f"{self.path}: its header has no {key}")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelError(f"{self.path}: {key} in its header is of another type than it must be")
        return value


class _Reader:
    """Reads a mapped file from its start, and never beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> int:
        """Where the next `count` bytes begin."""
        start = self.at
        if count > len(self.data) - start:
            raise ModelError(DAMAGED)
        self.at += count
        return start

    def number(self, kind: int) -> int | float | bool:
        form = FORMATS[kind]
        value = struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]
        return bool(value) if kind == BOOL else value

    def text(self) -> str:
        length = int(self.number(UINT64))
        start = self.take(length)
        return self.data[start : start + length].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array()
        if kind not in FORMATS:
            raise ModelError(f"its header has a value of the unknown type {kind}: {DAMAGED}")
        return self.number(kind)

    def array(self) -> Array:
        kind, count = int(self.number(4)), int(self.number(UINT64))
        if kind == STRING:
            if count > (len(self.data) - self.at) // 8:
                raise ModelError(DAMAGED)
            return Array(kind, [self.text() for _ in range(count)])
        if kind not in FORMATS:
            raise ModelError(f"its header has an array of the type {kind}: {DAMAGED}")
        dtype = np.dtype(FORMATS[kind])
        start = self.take(count * dtype.itemsize)
        return Array(kind, np.frombuffer(self.data[start : self.at], dtype))


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        ModelError: it is not a whole GGUF file of a known version.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: make one with `buleyean export`")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read(path, data)
            except ModelError as error:
                raise ModelError(f"{path}: {error}") from None
            except UnicodeDecodeError:
                raise ModelError(f"{path}: a text in its header is not UTF-8: {DAMAGED}") from None


def _read(path: Path, data: mmap.mmap) -> Header:
    reader = _Reader(data)
    reader.take(4)
    version = int(reader.number(4))
    if version not in VERSIONS:
        raise ModelError(f"GGUF version {version} is not 2 or 3")
    tensor_count, value_count = int(reader.number(UINT64)), int(reader.number(UINT64))
    metadata: dict[str, Any] = {}
    types: dict[str, int] = {}
    for _ in range(value_count):
        key = reader.text()
        if not key or key in metadata:
            raise ModelError(f"its header has the key {key!r} twice: {DAMAGED}" if key else DAMAGED)
        types[key] = int(reader.number(4))
        metadata[key] = reader.value(types[key])
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if types.get("general.alignment", 4) != 4 or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise ModelError(f"its alignment is {alignment!r}, not a power of two: {DAMAGED}")
    infos = [_tensor_info(reader) for _ in range(tensor_count)]
    data_start = -(-reader.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset, size in infos:
        start = data_start + offset
        if name in tensors or offset % alignment or start + size > len(data):
            raise ModelError(f"tensor {name} is there twice, or not wholly within the file: {DAMAGED}")
        tensors[name] = TensorInfo(shape, kind, start, size)
    _check_disjoint(tensors)
    return Header(path, metadata, types, tensors)


def _tensor_info(reader: _Reader) -> tuple[str, tuple[int, ...], int, int, int]:
    """A tensor's name, shape, type, offset and size in bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, dimensions = reader.text(), int(reader.number(4))
    if not 0 < dimensions <= MAX_DIMENSIONS or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise ModelError(f"tensor {name[:80]!r} has {dimensions} dimensions: {DAMAGED}")
    sizes = [int(reader.number(UINT64)) for _ in range(dimensions)]
    kind, offset = int(reader.number(4)), int(reader.number(UINT64))
    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except ValueError:
        raise ModelError(f"tensor {name} is of type {kind}, which is not known: {DAMAGED}") from None
    if min(sizes) < 1 or math.prod(sizes) > 1 << 48 or sizes[0] % block:
        raise ModelError(f"tensor {name} has the sizes {sizes}: {DAMAGED}")
    return name, tuple(reversed(sizes)), kind, offset, math.prod(sizes) // block * block_bytes


def _check_disjoint(tensors: Mapping[str, TensorInfo]) -> None:
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise ModelError(f"tensor {name} lies over another: {DAMAGED}")
        end = tensor.start + tensor.size


# --- what a model's header must say ------------------------------------------------------------------------


def check_model_header(header: Header) -> None:
    """Check that a file holds a language model whose header llama.cpp and transformers can be given.

    Raises:
        ModelError: what is wrong, with the key or tensor.
    """
    if header.metadata.get("general.type", "model") == "adapter" or "adapter.type" in header.metadata:
        raise ModelError(f"{header.path} is an adapter: name the run folder it was exported from, or a whole model")
    for check in (_shape_problems, _hyperparameter_problems, _vocabulary_problems):
        for problem in check(header):
            raise ModelError(f"{header.path}: {problem}: {DAMAGED}")


def _shape_problems(header: Header) -> Iterator[str]:
    """What the header says of the model's size, against the tensors that are there."""
    prefix = f"{header.architecture}."
    if EMBEDDING not in header.tensors:
        yield f"it has no tensor {EMBEDDING}"
    shape, layers = header.tensors[EMBEDDING].shape, _layer_count(header)
    count, width = header.value(f"{prefix}block_count", int), header.value(f"{prefix}embedding_length", int)
    # the last may be a layer of another kind, which predicts several tokens
    if not 0 < count <= MAX_LAYERS or (layers and not 0 <= count - layers <= 1):
        yield f"{prefix}block_count is {count}, and its tensors are of {counted(layers, 'layer')}"
    if len(shape) != 2 or width != shape[1]:
        yield f"{prefix}embedding_length is {width}, and its embedding has {counted(shape[-1], 'column')}"
    if not 0 < (context := header.value(f"{prefix}context_length", int)) <= 1 << 31:
        yield f"{prefix}context_length is {context}"


def _layer_count(header: Header) -> int:
    numbers = [name.split(".")[1] for name in header.tensors if name.startswith("blk.")]
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1


def _hyperparameter_problems(header: Header) -> Iterator[str]:
    """Numbers that llama.cpp divides by, allocates by, or computes with."""
    prefix, largest = f"{header.architecture}.", max(max(tensor.shape) for tensor in header.tensors.values())
    for key, value in header.metadata.items():
        numbers = value.items if isinstance(value, Array) else np.array([value])
        is_number = isinstance(numbers, np.ndarray) and numbers.dtype.kind in "iuf"  # not texts, not booleans
        if not is_number or not key.startswith(prefix):
            continue
        if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
            yield f"{key} is not finite"
        name = key.removeprefix(prefix)
        if name in SIZES and (numbers.dtype.kind not in "iu" or (numbers < 0).any() or (numbers > largest).any()):
            yield f"{key} is {value if not isinstance(value, Array) else 'no list of sizes'}"
        if numbers.dtype.kind in "iu" and any(
            not -(1 << 31) <= int(number) < 1 << 32 for number in numbers[:MAX_LAYERS]
        ):
            yield f"{key} is {numbers[0]}"
        if name.endswith("epsilon") and not (isinstance(value, float) and 0 <= value < 1):
            yield f"{key} is {value}"
        if name in ("rope.freq_base", "rope.scaling.factor") and not (isinstance(value, float) and value > 0):
            yield f"{key} is {value}"
    if any(".attn_q" in name for name in header.tensors):
        heads = header.metadata.get(f"{prefix}attention.head_count")
        kv_heads = header.metadata.get(f"{prefix}attention.head_count_kv", heads)
        if heads is None or heads == 0 or kv_heads == 0:
            yield f"{prefix}attention.head_count is {heads}, and head_count_kv {kv_heads}"
        if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
            yield f"{prefix}attention.head_count {heads} is no multiple of {prefix}attention.head_count_kv {kv_heads}"


def _vocabulary_problems(header: Header) -> Iterator[str]:
    """Lists that llama.cpp reads in step, and ids it takes for indices."""
    prefix, rows = "tokenizer.ggml.", header.tensors[EMBEDDING].shape[0]
    header.value(f"{prefix}model", str)
    tokens = header.value(f"{prefix}tokens", Array)
    if tokens.item_type != STRING or len(tokens) != rows:
        yield f"{prefix}tokens has {counted(len(tokens), 'item')}, and its embedding {counted(rows, 'row')}"
    for name, item_type in (("scores", FLOAT32), ("token_type", INT32)):
        values = header.metadata.get(prefix + name)
        if values is None:
            continue
        if not isinstance(values, Array) or values.item_type != item_type or len(values) != len(tokens):
            yield f"{prefix}{name} is not a number for each token"
        if name == "token_type" and not ((values.items >= 0) & (values.items <= 6)).all():
            yield f"{prefix}{name} holds types that are not known"
    merges = header.metadata.get(f"{prefix}merges")
    if merges is not None:
        is_texts = isinstance(merges, Array) and merges.item_type == STRING
        if not is_texts or not all(0 < merge.find(" ", 1) < len(merge) - 1 for merge in merges.items):
            yield f"{prefix}merges holds something other than two parts with a space between"
    for key, value in header.metadata.items():
        if key.startswith(prefix) and key.endswith("token_id"):
            if isinstance(value, bool) or not isinstance(value, int):
                yield f"{key} is not a whole number"
            # llama.cpp passes over others that are out of range
            elif not 0 <= value < len(tokens) and key.removeprefix(prefix) in ("bos_token_id", "eos_token_id"):
                yield f"{key} is {value}, of {counted(len(tokens), 'token')}"
    if not isinstance(header.metadata.get("tokenizer.chat_template", ""), str):
        yield "tokenizer.chat_template is not a text"


# --- numbers -----------------------------------------------------------------------------------------------


def check_numbers(header: Header) -> None:
    """Check that no tensor holds NaN or infinity; of quantised ones the scales of their blocks are read.

    Raises:
        ModelError: one does, with its name.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    data = np.memmap(header.path, np.uint8, "r")
    for name, tensor in header.tensors.items():
        kind = GGMLQuantizationType(tensor.type)
        word, exponent = EXPONENTS.get(kind.name, EXPONENTS["F16"])
        _, block = GGML_QUANT_SIZES[kind]
        for offset in SCALES.get(kind.name, ()):
            for start in range(0, tensor.size, block * BLOCKS):
                count = min(BLOCKS, (tensor.size - start) // block)
                numbers = np.ndarray((count,), word, data, tensor.start + start + offset, (block,))
                if (numbers & exponent).max() == exponent:
                    raise ModelError(f"{header.path}: tensor {name} holds NaN or infinity: copy or export it again")
