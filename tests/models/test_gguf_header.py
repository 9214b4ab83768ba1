"""Headers of GGUF files that an engine must not be given."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from buleyean_rl.errors import EngineError, ModelError
from buleyean_rl.gguf import export_gguf
from buleyean_rl.inference.gguf_file import check_gguf
from buleyean_rl.models.gguf_header import check_model_header, check_numbers, read_header
from buleyean_rl.models.weights import check_model, load_config
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A tiny model's file."""
    tokenizer = tiny_tokenizer()
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return export_gguf(tiny_llama(tokenizer), tokenizer, path, "q8_0", gate=False).path.read_bytes()


@pytest.fixture
def path(whole: bytes, tmp_path: Path) -> Path:
    """A copy to damage."""
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    return path


def field_end(path: Path, key: str) -> int:
    """Where the last part of a field ends in a file."""
    field = GGUFReader(path).fields[key]
    return int(field.offset) + sum(part.nbytes for part in field.parts)


def overwrite(path: Path, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


def rewrite(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Write metadata and tensors again, with other values."""
    reader = GGUFReader(path)
    values: dict[str, object] = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    types = {key: field.types for key, field in reader.fields.items()}
    change(values)
    writer = GGUFWriter(path.with_suffix(".new"), str(values.pop("general.architecture", "llama")))
    for key, value in values.items():
        kind = types[key]
        writer.add_key_value(key, value, kind[0], kind[-1] if len(kind) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").rename(path)


def test_a_whole_file_is_read_as_the_gguf_package_reads_it(path: Path) -> None:
    header, reader = read_header(path), GGUFReader(path)
    check_model_header(header)
    check_numbers(header)
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert (info.shape, info.start, info.size) == (
            tuple(int(size) for size in reversed(tensor.shape)),
            tensor.data_offset,
            tensor.n_bytes,
        )
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert header.metadata["tokenizer.ggml.tokens"].items == tokens


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_file_cut_short_is_refused(share: float, path: Path) -> None:
    path.write_bytes(path.read_bytes()[: int(len(path.read_bytes()) * share)])
    with pytest.raises(EngineError, match=rf"{path.name}.*(cut short|not a GGUF file)"):
        check_gguf(path)


@pytest.mark.parametrize("count", [2**60, 2**63, 2**64 - 1])
@pytest.mark.parametrize("at", [8, 16, 24])  # tensors, values, the first key's length
def test_a_length_that_no_file_has_allocates_nothing(at: int, count: int, path: Path) -> None:
    overwrite(path, at, struct.pack("<Q", count))
    with pytest.raises(ModelError, match="cut short or damaged"):
        read_header(path)


@pytest.mark.parametrize("length", [2**60, 399])
def test_an_array_of_another_length_is_refused(length: int, path: Path) -> None:
    types = GGUFReader(path).fields["tokenizer.ggml.token_type"]
    at = types.offset + sum(part.nbytes for part in types.parts[:4])
    overwrite(path, at, struct.pack("<Q", length))
    with pytest.raises(EngineError, match="damaged"):
        check_gguf(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda v: v.update({"general.alignment": 0}), "alignment is 0"),
        (lambda v: v.update({"llama.block_count": 3}), None),  # the last may be of another kind
        (lambda v: v.update({"llama.block_count": 40}), "block_count is 40, and its tensors are of 2 layers"),
        (lambda v: v.pop("llama.embedding_length"), "has no llama.embedding_length"),
        (lambda v: v.update({"llama.embedding_length": 4096}), "embedding has 64 columns"),
        (lambda v: v.update({"llama.attention.head_count": 0}), "head_count is 0"),
        (lambda v: v.update({"llama.attention.head_count_kv": 3}), "no multiple"),
        (lambda v: v.update({"llama.attention.layer_norm_rms_epsilon": float("nan")}), "is not finite"),
        (lambda v: v["tokenizer.ggml.tokens"].pop(), "has 399 items, and its embedding 400 rows"),
        (lambda v: v["tokenizer.ggml.merges"].append("alone"), "two parts with a space"),
        (lambda v: v.update({"tokenizer.ggml.eos_token_id": 400}), "eos_token_id is 400"),
        (lambda v: v.update({"general.type": "adapter"}), "is an adapter: name the run folder"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    change: Callable[[dict[str, object]], object], problem: str | None, path: Path
) -> None:
    types = {"general.alignment": [4]}
    if problem == "alignment is 0":  # the writer refuses it
        data = path.read_bytes()
        key = b"general.alignment"
        entry = struct.pack("<Q", len(key)) + key + struct.pack("<II", *types["general.alignment"], 0)
        count = struct.unpack_from("<Q", data, 16)[0]
        path.write_bytes(data[:16] + struct.pack("<Q", count + 1) + entry + data[24:])
    else:
        rewrite(path, change)
    if problem is None:
        check_gguf(path)
        return
    with pytest.raises(EngineError, match=problem):
        check_gguf(path)
    for load in (check_model, load_config):
        with pytest.raises(ModelError, match=problem):
            load(str(path))


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_seen_in_every_type(quant: str, number: float, tmp_path: Path) -> None:
    kind = GGMLQuantizationType[quant]
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    for name, row in (("sound", None), ("damaged", 2)):
        changed = values.copy()
        if row is not None:
            changed[row, 40] = number
        with np.errstate(all="ignore"):
            writer.add_tensor(name, quants.quantize(changed, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="tensor damaged holds NaN or infinity"):
        check_numbers(read_header(tmp_path / "m.gguf"))
