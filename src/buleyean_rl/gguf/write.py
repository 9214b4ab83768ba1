"""Write GGUF files: stream the tensors to temporary files, prove these, give them their names.

    blueprint --stream--> .name.tmp, one per quantisation --gate--> name

Every tensor is read once, a block at a time, and each block goes into every file: several quantisations come from one
merge, and memory holds a block whatever the model.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import gguf
from buleyean_rl.errors import ExportError
from buleyean_rl.gguf import private_interfaces
from buleyean_rl.gguf.blueprint import Blueprint, blueprint_from_model
from buleyean_rl.gguf.k_quants import K_QUANTS, check_installed, quantise_file
from buleyean_rl.gguf.metadata import About, override_fields
from buleyean_rl.gguf.parity import check_blueprint
from buleyean_rl.gguf.parity_report import ParityReport
from buleyean_rl.gguf.quantise import QUANTS, quantise, storage_type, stored_bytes
from buleyean_rl.gguf.vocabulary import name_for_llama_cpp
from buleyean_rl.inference.gguf_engines import DEFAULT_ENGINE
from buleyean_rl.models.weight_checks import is_finite
from buleyean_rl.system.files import atomic_path, sweep_temporary, temporary_folder
from buleyean_rl.system.outputs import check_output_file, check_utf8
from gguf import GGMLQuantizationType, GGUFType, GGUFWriter

METADATA_BYTES = 32 << 20  # allowed for the vocabulary when free disk space is checked

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Args:
        path: the file.
        quant: the quantisation asked for.
        bytes: its size.
        tensors: how many.
        fallbacks: tensors whose width does not fit the quantisation's blocks, stored in another type.
        notes: what llama.cpp does differently from transformers, in sentences.
        seconds: of writing, without the gate; the same for all files of one export.
        parity: what the gate measured; None where it was not asked for.
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
    about: About | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a merged model as GGUF and prove that it behaves like it.

    Args:
        model: a transformers causal language model without adapters, in memory.
        tokenizer: its tokenizer.
        path: the file to write; nothing is left there, or beside it, unless all went well.
        quant: one of `QUANTS` or `K_QUANTS`.
        gate: run the parity gate before the file gets its name.
        about: what the file says about itself.
        progress: called with tensors written and tensors in all.

    Raises:
        UnsupportedArchitecture: a model type that is not supported.
        ExportError: the tokenizer or a tensor cannot be written, or the disk is full.
        ParityError: the written file does not behave like the model.
    """
    check_request({quant: Path(path)})
    blueprint = blueprint_from_model(model, tokenizer)
    return write_gguf(blueprint, {quant: Path(path)}, gate=gate, about=about, progress=progress)[0]


def write_gguf(
    blueprint: Blueprint,
    paths: Mapping[str, Path],
    *,
    gate: bool = True,
    engine: str = DEFAULT_ENGINE,
    about: About | None = None,
    progress: Progress | None = None,
) -> list[ExportReport]:
    """Write one file per quantisation, all from one reading of the tensors; all of them or none.

    Args:
        blueprint: what to write.
        paths: the file of each quantisation.
        gate: run the parity gate on each before any gets its name.
        engine: what the gate runs the files in.
        about: what the files say about themselves.
        progress: called with tensors written and tensors in all.

    Raises:
        ExportError: a request, tensor or disk that does not fit.
        ParityError: a written file does not behave like the model.
    """
    parameters = sum(tensor.numel for tensor in blueprint.tensors.values())
    about, notes = _name_for_llama_cpp(about or About(), blueprint)
    metadata = override_fields(blueprint.metadata, about.fields(GGUFType.MODEL, parameters))
    blueprint = replace(blueprint, metadata=metadata, notes=(*blueprint.notes, *notes))

    def prove(path: Path) -> ParityReport:
        return check_blueprint(blueprint, path, engine=engine)

    return write_files(blueprint, paths, prove if gate else None, progress)


def _name_for_llama_cpp(about: About, blueprint: Blueprint) -> tuple[About, list[str]]:
    """What a file says about itself, by a name from which llama.cpp concludes what is true; and a note on a change."""
    stored = blueprint.metadata.get("general.name")
    name = about.name or (None if stored is None else str(stored.value))
    true_name = name_for_llama_cpp(name, blueprint.tokenizer)
    if true_name == name:
        return about, []
    note = f"the name in the file is {true_name!r}: by the name llama.cpp tells how control tokens are read"
    return replace(about, name=true_name), [note]


def write_files(
    blueprint: Blueprint,
    paths: Mapping[str, Path],
    prove: Callable[[Path], ParityReport] | None,
    progress: Progress | None = None,
) -> list[ExportReport]:
    """Write one file per quantisation and prove each before any gets its name.

    Args:
        blueprint: what to write.
        paths: the file of each quantisation.
        prove: raises ParityError for a file that is not right.
        progress: called with tensors written and tensors in all.

    Raises:
        ExportError: a request, tensor or disk that does not fit.
    """
    check_request(paths)
    started = time.monotonic()
    k_quants = [quant for quant in paths if quant in K_QUANTS]
    with _write_errors(paths), ExitStack() as stack:
        for path in paths.values():
            sweep_temporary(path.parent, path.name)  # gigabytes, in a folder of the user's
        written = {quant: stack.enter_context(atomic_path(path)) for quant, path in paths.items()}
        # llama.cpp quantises from a file in full precision, which is temporary unless it was asked for
        if k_quants and "f32" not in written:
            written["f32"] = stack.enter_context(temporary_folder(next(iter(paths.values())))) / "model.gguf"
        _check_disk(blueprint, {quant: paths.get(quant, path) for quant, path in written.items()})
        _stream(blueprint, {quant: path for quant, path in written.items() if quant in QUANTS}, progress)
        for quant in k_quants:
            quantise_file(written["f32"], written[quant], quant)
        if "f32" not in paths and "f32" in written:
            written["f32"].unlink()
        seconds = time.monotonic() - started
        parities = {quant: prove(written[quant]) if prove else None for quant in paths}
    return [_report(blueprint, quant, path, seconds, parities[quant]) for quant, path in paths.items()]


def check_request(paths: Mapping[str, Path]) -> None:
    """Refuse what cannot be written, before minutes of work.

    Raises:
        ExportError: an unknown quantisation, or one that needs an extra.
        UsageError: as `check_output_file`.
    """
    for quant, path in paths.items():
        if quant not in QUANTS and quant not in K_QUANTS:
            raise ExportError(f"unknown quantisation {quant!r}; there are {', '.join((*QUANTS, *K_QUANTS))}")
        if quant in K_QUANTS:
            check_installed(quant)
        check_utf8(path)
        check_output_file(path, overwrite=True, streams=False)


def _report(blueprint: Blueprint, quant: str, path: Path, seconds: float, parity: ParityReport | None) -> ExportReport:
    file_type = QUANTS[quant][0] if quant in QUANTS else GGMLQuantizationType.Q4_K
    block, _ = gguf.GGML_QUANT_SIZES[file_type]
    shapes = {name: tensor.shape for name, tensor in blueprint.tensors.items()}
    return ExportReport(
        path=path,
        quant=quant,
        bytes=path.stat().st_size,
        tensors=len(shapes),
        fallbacks=tuple(name for name, shape in shapes.items() if len(shape) > 1 and shape[-1] % block),
        notes=blueprint.notes + (parity.notes if parity else ()),
        seconds=seconds,
        parity=parity,
    )


def _stream(blueprint: Blueprint, paths: Mapping[str, Path], progress: Progress | None) -> None:
    """Write every file at once, each block of each tensor into all of them."""
    tensors = blueprint.tensors
    with ExitStack() as stack:
        files = [stack.enter_context(_create(blueprint, quant, path)) for quant, path in paths.items()]
        for done, (name, tensor) in enumerate(tensors.items(), start=1):
            for block in tensor.blocks():
                if not is_finite(block):
                    raise ExportError(f"{name} holds NaN or infinity: the base model or the adapter is damaged")
                for file in files:
                    file.append(name, tensor.shape, block)
            for file in files:
                private_interfaces.pad(file.writer)
            if progress is not None:
                progress(done, len(tensors))


@dataclass
class _OpenFile:
    """A GGUF file whose head is written and whose tensors are being appended."""

    writer: GGUFWriter
    file_type: GGMLQuantizationType

    def append(self, name: str, shape: tuple[int, ...], block: Tensor) -> None:
        try:
            data = quantise(block, storage_type(name, shape, self.file_type))
        except ExportError as error:
            raise ExportError(f"{name}: {error}") from error
        private_interfaces.append(self.writer, data)


@contextmanager
def _create(blueprint: Blueprint, quant: str, path: Path) -> Iterator[_OpenFile]:
    """A file with everything in it but the tensors' numbers."""
    file_type, general_file_type = QUANTS[quant]
    writer = GGUFWriter(None, blueprint.architecture)
    for key, field in blueprint.metadata.items():
        writer.add_key_value(key, field.value, field.type, field.item_type)
    writer.add_file_type(general_file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in blueprint.tensors.items():
        tensor_type = storage_type(name, tensor.shape, file_type)
        size = stored_bytes(tensor.shape, tensor_type)
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, tensor_type)
    try:
        private_interfaces.write_head(writer, path)
        yield _OpenFile(writer, file_type)
    finally:
        writer.close()


def _check_disk(blueprint: Blueprint, paths: Mapping[str, Path]) -> None:
    """Refuse to begin what the disk has no room for."""
    required: dict[Path, int] = {}
    for quant, path in paths.items():
        # a bound for llama.cpp's own mixtures: none is finer than Q6_K in any tensor
        file_type = QUANTS["q8_0" if quant in K_QUANTS else quant][0]
        size = sum(
            stored_bytes(tensor.shape, storage_type(name, tensor.shape, file_type))
            for name, tensor in blueprint.tensors.items()
        )
        required[path.parent] = required.get(path.parent, 0) + size + METADATA_BYTES
    for folder, size in required.items():
        free = shutil.disk_usage(folder).free
        if free < size:
            raise ExportError(f"{folder}: {free / 1e9:.2f} GB are free and {size / 1e9:.2f} GB are needed")


@contextmanager
def _write_errors(paths: Mapping[str, Path]) -> Iterator[None]:
    """Turn an OSError into an ExportError that names the file, or the folders."""
    try:
        yield
    except OSError as error:
        folders = ", ".join(sorted({str(path.parent) for path in paths.values()}))
        raise ExportError(f"{error.filename or folders}: cannot be written: {error.strerror or error}") from error
