"""Write a GGUF file: plan its tensors, stream them to a temporary file, prove it, name it.

    weights --plan--> (name, type, shape) ... --stream--> .name.partial --gate--> name

Tensors are quantised one by one, so besides the model only the one at hand is in memory.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType

from buleyean_rl.errors import ExportError
from buleyean_rl.gguf_export import architectures, vocabulary
from buleyean_rl.gguf_export.parity import ParityReport, answer_ends, check_parity
from buleyean_rl.gguf_export.quantise import QUANTS, quantise, storage_type, stored_bytes

METADATA_ROOM = 32 << 20  # bytes allowed for the vocabulary when looking for free disk space


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Args:
        path: the file.
        quant: the quantisation asked for.
        bytes: its size.
        tensors: how many.
        fallbacks: tensors whose width does not fit the quantisation's blocks, stored as F16.
        notes: what llama.cpp does differently from transformers, in sentences.
        seconds: of writing, without the gate.
        parity: the gate's findings; None where it was not asked for.
    """

    path: Path
    quant: str
    bytes: int
    tensors: int
    fallbacks: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    parity: ParityReport | None


def export_gguf(
    model: Any,
    tokenizer: Any,
    path: Path | str,
    quant: str = "q8_0",
    *,
    gate: bool = True,
    source_gguf: Path | None = None,
    general: dict[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write a merged model as GGUF and prove that it behaves like it.

    Args:
        model: a transformers causal language model without adapters, in memory.
        tokenizer: its tokenizer.
        path: the file to write; nothing is left there, or beside it, unless all went well.
        quant: one of `QUANTS`.
        gate: run `check_parity` before the file gets its name.
        source_gguf: the GGUF file the base model came from; its tokenizer metadata is carried over as it is.
        general: metadata under `general.`, such as name, author, license, description, url.
        progress: called with tensors written and tensors in all.

    Raises:
        UnsupportedArchitecture: the model is of a kind that is not supported.
        ExportError: the tokenizer or a tensor cannot be written, or the disk is full.
        ParityError: the written file does not behave like the model.
    """
    path = Path(path)
    if quant not in QUANTS:
        raise ExportError(f"unknown quantisation {quant!r}; there are {', '.join(QUANTS)}")
    if path.is_dir():
        raise ExportError(f"{path}: is a folder; name the .gguf file to write")
    started = time.monotonic()
    kind, file_type = QUANTS[quant]
    arch = architectures.architecture_of(model.config)
    metadata, notes = architectures.hyperparameters(model.config)
    rows = model.get_input_embeddings().weight.shape[0]
    metadata[f"{arch.gguf}.vocab_size"] = rows
    plan = [(weight, storage_type(weight, kind)) for weight in architectures.weights(model)]
    fallbacks = tuple(w.name for w, t in plan if t is GGMLQuantizationType.F16 and kind is not GGMLQuantizationType.F16)
    size = sum(stored_bytes(weight.shape, stored) for weight, stored in plan)
    with _temporary(path, size) as partial:
        writer = GGUFWriter(None, arch.gguf)
        _write_general(writer, general or {}, file_type)
        _add(writer, metadata)
        if source_gguf is not None:
            for key, (value, value_type, item_type) in vocabulary.carried_over(source_gguf).items():
                writer.add_key_value(key, value, value_type, item_type)
        else:
            _add(writer, vocabulary.vocabulary(tokenizer, rows) | _turn_end(model, tokenizer))
        for weight, stored in plan:
            writer.add_tensor_info(
                weight.name, weight.shape, np.dtype(np.float32), stored_bytes(weight.shape, stored), stored
            )
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, (weight, stored) in enumerate(plan, start=1):
                writer.write_tensor_data(quantise(weight.load(), stored))
                if progress is not None:
                    progress(done, len(plan))
        except OSError as error:
            raise ExportError(f"{path}: cannot be written: {error.strerror or error}") from error
        finally:
            writer.close()
        seconds = time.monotonic() - started
        parity = check_parity(model, tokenizer, partial) if gate else None
    return ExportReport(
        path=path,
        quant=quant,
        bytes=path.stat().st_size,
        tensors=len(plan),
        fallbacks=fallbacks,
        notes=tuple(notes) + (parity.notes if parity else ()),
        seconds=seconds,
        parity=parity,
    )


def _write_general(writer: GGUFWriter, general: dict[str, str], kind: LlamaFileType) -> None:
    """What the file says about itself."""
    writer.add_type("model")
    for key, value in general.items():
        writer.add_string(f"general.{key}", value)
    writer.add_file_type(kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add(writer: GGUFWriter, values: dict[str, architectures.Value]) -> None:
    """Add metadata, each value by its own type; integers are unsigned, as llama.cpp wants them."""
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_key_value(key, value, GGUFValueType.STRING)
        else:
            writer.add_array(key, value)


def _turn_end(model: Any, tokenizer: Any) -> dict[str, architectures.Value]:
    """A second token that ends an answer, where generation knows of one besides the tokenizer's EOS."""
    others = sorted(answer_ends(model, tokenizer) - {tokenizer.eos_token_id})
    return {"tokenizer.ggml.eot_token_id": others[0]} if others else {}


@contextmanager
def _temporary(path: Path, size: int) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` at the end, or vanishes."""
    folder = path.parent
    if not folder.is_dir():
        raise ExportError(f"{folder}: no such folder; create it first")
    free = shutil.disk_usage(folder).free
    if free < size + METADATA_ROOM:
        raise ExportError(
            f"{folder}: {free / 1e9:.2f} GB are free and {(size + METADATA_ROOM) / 1e9:.2f} GB are needed"
        )
    partial = folder / f".{path.name}.{os.getpid()}.partial"
    try:
        try:
            partial.touch()
        except OSError as error:
            raise ExportError(f"{folder}: cannot be written to: {error.strerror}") from error
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
