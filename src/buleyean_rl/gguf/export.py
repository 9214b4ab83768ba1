"""A run folder, or any model that trains, to GGUF files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from buleyean_rl.errors import ExportError, UnsupportedArchitecture, UsageError
from buleyean_rl.gguf import (
    K_QUANTS,
    QUANTS,
    About,
    Blueprint,
    ExportReport,
    check_request,
    checkout,
    converted,
    modelfile,
    of_run,
    write_adapter,
    write_gguf,
)
from buleyean_rl.inference.gguf_engines import DEFAULT
from buleyean_rl.models.run_folder import is_run, run_base
from buleyean_rl.models.source import HUB_ID, base_of


def export(
    run: str,
    path: Path,
    quants: Sequence[str] = ("q8_0",),
    *,
    ollama: bool = False,
    engine: str = DEFAULT,
    about: About | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Merge, write, prove.

    Args:
        run: a run folder, or the name of a model.
        path: the .gguf file to write; with several quantisations each name gets its own, as in model-Q8_0.gguf.
        quants: of `gguf_export.QUANTS` and `K_QUANTS`.
        ollama: write a Modelfile beside the (first) file.
        engine: what the files are checked in, one of `engines.ENGINES`.
        about: what the files say about themselves; what it leaves out comes from the run and its base.
        console: where progress goes; None for nowhere.

    Returns:
        What was written and what the parity gate found, fit for JSON.

    Raises:
        ExportError: it cannot be written, or a file does not behave like the model.
        ModelError: the run or its base model cannot be loaded.
    """
    console = console or Console(quiet=True)
    paths = named(path, quants)
    check_request(paths)  # before minutes of loading
    about = _completed(about or About(), run, path)
    with console.status(f"looking into {run}") as status, _blueprint(run, path.parent, engine) as blueprint:
        status.update(f"writing {path}, and checking it in llama.cpp")
        reports = write_gguf(blueprint, paths, engine=engine, about=about)
    notes = [note for report in reports for note in report.notes]
    if ollama:
        notes += _write_modelfile(blueprint, reports[0].path, about.license)
    return _told(reports, notes, engine, console)


def export_adapter(
    run: str,
    path: Path,
    quant: str = "f16",
    *,
    engine: str = DEFAULT,
    about: About | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write a run's adapter as a file of its own, for llama.cpp to apply to the base model.

    Args:
        run: a run folder.
        path: the .gguf file to write.
        quant: one of `gguf_export.ADAPTER_QUANTS`.
        engine: what base and file are checked in, one of `engines.ENGINES`.
        about: what the file says about itself; what it leaves out comes from the run and its base.
        console: where progress goes; None for nowhere.

    Returns:
        What was written and what the parity gate found, fit for JSON.

    Raises:
        ExportError: there is no adapter, it does what such a file cannot say, or it cannot be written.
        ModelError: the base model cannot be loaded.
    """
    console = console or Console(quiet=True)
    if not is_run(run):
        raise ExportError(f"{run}: has no adapter; name a run folder")
    with console.status(f"writing {path}, and checking it in llama.cpp with its base"):
        report = write_adapter(Path(run), path, quant, engine=engine, about=_completed(about or About(), run, path))
    return _told([report], report.notes, engine, console)


@contextmanager
def _blueprint(run: str, folder: Path, engine: str) -> Iterator[Blueprint]:
    """What is to be written: by this package's own tables, else by the converter the user has."""
    script = checkout()
    try:
        blueprint = of_run(run)
    except UnsupportedArchitecture as error:
        if script is None:
            raise UnsupportedArchitecture(
                f"{error}; for others set LLAMA_CPP_DIR to a checkout of llama.cpp, whose converter is used then"
            ) from error
    else:
        yield blueprint
        return
    with converted(run, script, folder, engine) as blueprint:
        yield blueprint


def named(path: Path, quants: Sequence[str]) -> dict[str, Path]:
    """The file of each quantisation: the one asked for, or one beside it for each of several.

    Raises:
        UsageError: a quantisation is named twice, or none is.
    """
    chosen = [quant.strip().lower() for quant in quants if quant.strip()]
    if not chosen or len(set(chosen)) < len(chosen):
        raise UsageError(f"--quant wants different quantisations of {', '.join((*QUANTS, *K_QUANTS))}")
    if len(chosen) == 1:
        return {chosen[0]: path}
    return {quant: path.with_name(f"{path.stem}-{quant.upper()}.gguf") for quant in chosen}


def _completed(about: About, run: str, path: Path) -> About:
    """What is known of a run without being told."""
    base = run_base(Path(run)) if is_run(run) else run
    name, license = base_of(base)
    public = HUB_ID.fullmatch(name) is not None
    known = {
        "name": path.stem,
        "base": name.rsplit("/", 1)[-1].removesuffix(".gguf"),
        "base_url": f"https://huggingface.co/{name}" if public else None,
        "license": license,
    }
    return About(**{**known, **{key: value for key, value in asdict(about).items() if value is not None}})


def _write_modelfile(blueprint: Blueprint, model: Path, license: str | None) -> list[str]:
    """The Modelfile beside a file; returns what it leaves out, in sentences."""
    text, notes = modelfile(model, blueprint.tokenizer, sorted(blueprint.ends), license)
    target = model.with_name("Modelfile")
    temporary = target.with_name(".Modelfile.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)
    return notes


def _told(reports: Sequence[ExportReport], notes: Sequence[str], engine: str, console: Console) -> dict[str, Any]:
    """Reports for a person on the console, and for a program."""
    for note in dict.fromkeys(notes):
        console.print(f"[yellow]note:[/] {escape(note)}")
    for report in reports:
        console.print(f"{report.path}: {report.bytes / 1e6:,.1f} MB, {report.tensors} tensors, checked in {engine}")
    return {"files": [{**asdict(report), "path": str(report.path)} for report in reports]}
