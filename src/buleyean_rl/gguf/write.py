"""Write GGUF files: plan their tensors, stream them to temporary files, prove them, name them.

    blueprint --plan--> (name, type, shape) ... --stream--> .name.partial --gate--> name

Every tensor is read once, a block at a time, and each block goes into every file asked for: several
quantisations come from one merge, and memory holds a block whatever the model.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from torch import Tensor

import gguf
from buleyean_rl.errors import ExportError
from buleyean_rl.gguf.blueprint import Blueprint, of_model
from buleyean_rl.gguf.k_quants import K_QUANTS, check_installed, quantise_file
from buleyean_rl.gguf.metadata import About, overridden
from buleyean_rl.gguf.parity import check_blueprint
from buleyean_rl.gguf.parity_report import ParityReport
from buleyean_rl.gguf.quantise import QUANTS, quantise, storage_type, stored_bytes
from buleyean_rl.gguf.tensors import Rows
from buleyean_rl.inference.gguf_engines import DEFAULT
from gguf import GGMLQuantizationType, GGUFType, GGUFWriter

METADATA_ROOM = 32 << 20  # bytes allowed for the vocabulary when looking for free disk space


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
        seconds: of writing, without the gate; files made from one merge share it.
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
    about: About | None = None,
    progress: Callable[[int, int], None] | None = None,
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
        UnsupportedArchitecture: the model is of a kind that is not supported.
        ExportError: the tokenizer or a tensor cannot be written, or the disk is full.
        ParityError: the written file does not behave like the model.
    """
    check_request({quant: Path(path)})
    blueprint = of_model(model, tokenizer)
    return write_gguf(blueprint, {quant: Path(path)}, gate=gate, about=about, progress=progress)[0]


def write_gguf(
    blueprint: Blueprint,
    paths: Mapping[str, Path],
    *,
    gate: bool = True,
    engine: str = DEFAULT,
    about: About | None = None,
    progress: Callable[[int, int], None] | None = None,
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
    parameters = sum(rows.numel for rows in blueprint.tensors.values())
    own = (about or About()).fields(GGUFType.MODEL, parameters)
    blueprint = replace(blueprint, metadata=overridden(blueprint.metadata, own))

    def prove(path: Path) -> ParityReport:
        return check_blueprint(blueprint, path, engine=engine)

    return write_files(blueprint, paths, prove if gate else None, progress)


def write_files(
    blueprint: Blueprint,
    paths: Mapping[str, Path],
    prove: Callable[[Path], ParityReport] | None,
    progress: Callable[[int, int], None] | None = None,
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
    llama_cpps = [quant for quant in paths if quant in K_QUANTS]
    # llama.cpp quantises from a file: one in full precision, which goes again unless it was asked for.
    full = {} if "f32" in paths or not llama_cpps else {"f32": next(iter(paths.values())).with_suffix(".f32.gguf")}
    with _partials({**paths, **full}, keep=set(paths)) as partials:
        _check_disk(blueprint, {quant: paths.get(quant) or full[quant] for quant in partials})
        _stream(blueprint, {q: path for q, path in partials.items() if q in QUANTS}, progress)
        for quant in llama_cpps:
            quantise_file(partials["f32"], partials[quant], quant)
        if full:
            partials["f32"].unlink()
        seconds = time.monotonic() - started
        parities = {quant: prove(partials[quant]) if prove else None for quant in paths}
    return [_report(blueprint, quant, path, seconds, parities[quant]) for quant, path in paths.items()]


def check_request(paths: Mapping[str, Path]) -> None:
    """Refuse what cannot be written, before minutes of work.

    Raises:
        ExportError: an unknown quantisation, one that needs an extra, a folder in place of a file.
    """
    for quant, path in paths.items():
        if quant not in QUANTS and quant not in K_QUANTS:
            raise ExportError(f"unknown quantisation {quant!r}; there are {', '.join((*QUANTS, *K_QUANTS))}")
        if quant in K_QUANTS:
            check_installed(quant)
        if path.is_dir():
            raise ExportError(f"{path}: is a folder; name the .gguf file to write")
        if not path.parent.is_dir():
            raise ExportError(f"{path.parent}: no such folder; create it first")


def _report(blueprint: Blueprint, quant: str, path: Path, seconds: float, parity: ParityReport | None) -> ExportReport:
    block = _block(quant)
    return ExportReport(
        path=path,
        quant=quant,
        bytes=path.stat().st_size,
        tensors=len(blueprint.tensors),
        fallbacks=tuple(n for n, rows in blueprint.tensors.items() if len(rows.shape) > 1 and rows.shape[-1] % block),
        notes=blueprint.notes + (parity.notes if parity else ()),
        seconds=seconds,
        parity=parity,
    )


def _stream(
    blueprint: Blueprint,
    paths: Mapping[str, Path],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write every file at once, each block of each tensor into all of them."""
    tensors = blueprint.tensors
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(_opened(blueprint, quant, path)) for quant, path in paths.items()]
            for done, (name, rows) in enumerate(tensors.items(), start=1):
                for block in rows.blocks():
                    for file in files:
                        file.append(name, rows, block)
                for file in files:
                    file.finish()
                if progress is not None:
                    progress(done, len(tensors))
        except OSError as error:
            raise ExportError(f"{_names(paths)}: cannot be written: {error.strerror or error}") from error


@dataclass
class _File:
    """A GGUF file whose header is written and whose tensors are being appended."""

    writer: GGUFWriter
    kind: GGMLQuantizationType

    def append(self, name: str, rows: Rows, block: Tensor) -> None:
        """Some rows of a tensor, after those before them."""
        stored = storage_type(name, rows.shape, self.kind)
        try:
            data = quantise(block, stored)
        except ExportError as error:
            raise ExportError(f"{name}: {error}") from error
        data.tofile(self.writer.fout[0])

    def finish(self) -> None:
        """The last rows of a tensor were written: fill up to where the next one begins."""
        output = self.writer.fout[0]
        self.writer.write_padding(output, output.tell())


@contextmanager
def _opened(blueprint: Blueprint, quant: str, path: Path) -> Iterator[_File]:
    """A file with everything in it but the tensors' numbers."""
    kind, file_type = QUANTS[quant]
    writer = GGUFWriter(None, blueprint.architecture)
    for key, field in blueprint.metadata.items():
        writer.add_key_value(key, field.value, field.type, field.item_type)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, rows in blueprint.tensors.items():
        stored = storage_type(name, rows.shape, kind)
        writer.add_tensor_info(name, rows.shape, np.dtype(np.float32), stored_bytes(rows.shape, stored), stored)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        output = writer.fout[0]
        writer.write_padding(output, output.tell())
        yield _File(writer, kind)
    finally:
        writer.close()


def _block(quant: str) -> int:
    """How many neighbouring numbers a quantisation stores together: a tensor's width must be a multiple."""
    kind = QUANTS[quant][0] if quant in QUANTS else GGMLQuantizationType.Q4_K
    return gguf.GGML_QUANT_SIZES[kind][0]


def _check_disk(blueprint: Blueprint, paths: Mapping[str, Path]) -> None:
    """Refuse to begin what the disk has no room for."""
    needed: dict[Path, int] = {}
    for quant, path in paths.items():
        # of llama.cpp's own mixtures only a bound is known beforehand: none is coarser than Q6_K in any tensor
        kind = QUANTS["q8_0" if quant in K_QUANTS else quant][0]
        size = sum(
            stored_bytes(rows.shape, storage_type(name, rows.shape, kind)) for name, rows in blueprint.tensors.items()
        )
        needed[path.parent] = needed.get(path.parent, 0) + size + METADATA_ROOM
    for folder, size in needed.items():
        free = shutil.disk_usage(folder).free
        if free < size:
            raise ExportError(f"{folder}: {free / 1e9:.2f} GB are free and {size / 1e9:.2f} GB are needed")


@contextmanager
def _partials(paths: Mapping[str, Path], keep: set[str]) -> Iterator[dict[str, Path]]:
    """Names beside the files to write to, which become the files at the end, or vanish.

    Args:
        paths: the files.
        keep: which of them to name at the end.
    """
    partials = {key: path.with_name(f".{path.name}.{os.getpid()}.partial") for key, path in paths.items()}
    try:
        for path, partial in zip(paths.values(), partials.values(), strict=True):
            _sweep(path)
            try:
                partial.touch()
            except OSError as error:
                raise ExportError(f"{path.parent}: cannot be written to: {error.strerror}") from error
        yield partials
        for key in keep:
            os.replace(partials[key], paths[key])
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what an export that was killed left beside a file."""
    for left in path.parent.glob(f".{path.name}.*.partial"):
        owner = left.name.split(".")[-2]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            left.unlink(missing_ok=True)


def _names(paths: Mapping[str, Path]) -> str:
    return ", ".join(str(path.parent) for path in paths.values())
