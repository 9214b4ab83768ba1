"""`buleyean export`: a run folder, or any model that trains, to GGUF files and a report.

run --blueprint, or llama.cpp's converter--> write_gguf --> files, Modelfile, notes
run --------------------------------------> write_adapter --> adapter file, notes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from buleyean_rl.errors import UnsupportedArchitecture, UsageError
from buleyean_rl.gguf.adapter_file import write_adapter
from buleyean_rl.gguf.blueprint import Blueprint, blueprint_from_run
from buleyean_rl.gguf.converter import VARIABLE, convert, find_converter
from buleyean_rl.gguf.k_quants import K_QUANTS
from buleyean_rl.gguf.metadata import About, is_ours
from buleyean_rl.gguf.ollama import make_modelfile
from buleyean_rl.gguf.quantise import QUANTS
from buleyean_rl.gguf.trained_model import compare_with_trained
from buleyean_rl.gguf.write import ExportReport, check_request, write_gguf
from buleyean_rl.inference.gguf_engines import DEFAULT_ENGINE
from buleyean_rl.models.run_folder import find_model
from buleyean_rl.models.source import HUB_ID, Source, public_name_and_license
from buleyean_rl.system.files import write_text
from buleyean_rl.system.outputs import check_output_file
from buleyean_rl.system.progress import working
from buleyean_rl.system.wording import counted, one_line

MODELFILE = "Modelfile"


def export(
    run: str,
    path: Path,
    quants: Sequence[str] = ("q8_0",),
    *,
    ollama: bool = False,
    overwrite: bool = True,
    engine: str = DEFAULT_ENGINE,
    about: About | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Merge a run, write it as GGUF and prove the files.

    Args:
        run: a run folder, or the name of a model.
        path: the .gguf file to write; with several quantisations each name gets its own, as in model-Q8_0.gguf.
        quants: of `QUANTS` and `K_QUANTS`.
        ollama: write a Modelfile beside the (first) file.
        overwrite: replace files that are there and are not GGUFs of ours, and a Modelfile that differs.
        engine: what the files are checked in, one of `gguf_engines.ENGINES`.
        about: what the files say about themselves; the run and its base fill in what is None.
        console: for progress; None for silence.

    Returns:
        What was written and what the parity gate measured, fit for JSON.

    Raises:
        ExportError: it cannot be written, or a file does not behave like the model.
        ModelError: the run or its base model cannot be loaded.
        UsageError: a file is there already and may not be replaced.
    """
    console = console or Console(quiet=True)
    paths = output_paths(path, quants)
    check_request(paths)  # before minutes of loading
    source = find_model(run)
    _check_outputs(paths.values(), source, overwrite)
    about = _complete(about or About(), source, path)
    notes: list[str] = []
    with ExitStack() as stack:
        with working(console, f"reading {run}"):
            blueprint = stack.enter_context(_make_blueprint(source, path, engine))
        if ollama:
            first, stops = next(iter(paths.values())), sorted(blueprint.end_tokens)
            modelfile, notes = make_modelfile(first, blueprint.tokenizer, stops, about.license)
            _check_modelfile(first, modelfile, overwrite)
        with working(console, f"writing {path}, and checking it in llama.cpp"):
            trained = compare_with_trained(source, blueprint) if source.run and blueprint.layouts else None
            reports = write_gguf(blueprint, paths, engine=engine, about=about)
    if trained is not None and trained.precision is not None:
        console.print(
            f"KL to the model as it was trained, with its base in {trained.precision}: {trained.divergence:.5f} nats"
        )
    notes = [note for report in reports for note in report.notes] + notes
    if ollama:
        target = first.with_name(MODELFILE)
        write_text(target, modelfile)
        console.print(f"{escape(str(target))}: for `ollama create NAME -f {escape(str(target))}`", soft_wrap=True)
    return {**_show(reports, notes, engine, console), "trained": None if trained is None else asdict(trained)}


def export_adapter(
    run: str,
    path: Path,
    quant: str = "f16",
    *,
    overwrite: bool = True,
    engine: str = DEFAULT_ENGINE,
    about: About | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write a run's adapter as a file of its own, for llama.cpp to apply to the base model.

    Args:
        run: a run folder.
        path: the .gguf file to write.
        quant: one of `ADAPTER_QUANTS`.
        overwrite: replace a file that is there and is not a GGUF of ours.
        engine: what base and file are checked in, one of `gguf_engines.ENGINES`.
        about: what the file says about itself; the run and its base fill in what is None.
        console: for progress; None for silence.

    Returns:
        What was written and what the parity gate measured, fit for JSON.

    Raises:
        ExportError: there is no adapter, it does what such a file cannot say, or it cannot be written.
        ModelError: the base model cannot be loaded.
        UsageError: the file is there already and may not be replaced.
    """
    console = console or Console(quiet=True)
    source = find_model(run)
    _check_outputs([path], source, overwrite)
    about = _complete(about or About(), source, path)
    with working(console, f"writing {path}, and checking it in llama.cpp with its base"):
        report = write_adapter(source, path, quant, engine=engine, about=about)
    return _show([report], report.notes, engine, console)


def output_paths(path: Path, quants: Sequence[str]) -> dict[str, Path]:
    """The file of each quantisation: `path` for one, a file beside it for each of several.

    Raises:
        UsageError: a quantisation stands there twice, or there is none.
    """
    names = [quant.strip().lower() for quant in quants if quant.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--quant wants different quantisations of {', '.join((*QUANTS, *K_QUANTS))}")
    if len(names) == 1:
        return {names[0]: path}
    return {quant: path.with_name(f"{path.stem}-{quant.upper()}.gguf") for quant in names}


def _check_outputs(paths: Iterable[Path], source: Source, overwrite: bool) -> None:
    """Refuse to replace what is not ours, and a file that the model itself is read from."""
    models = [model for model in (source, source.base) if model is not None]
    inputs = [model.gguf_path for model in models if model.gguf_path is not None]
    folders = [model.run or model.location for model in models if model.run is not None or model.gguf is None]
    files = [file for folder in map(Path, folders) if folder.is_dir() for file in folder.iterdir() if file.is_file()]
    inputs += [file for file in files if file.suffix != ".gguf"]  # which may be an earlier export
    for path in paths:
        if path.exists() and any(path.samefile(file) for file in inputs):
            raise UsageError(f"{path} is the model that is read: name another file")
        check_output_file(path, overwrite=overwrite, is_ours=is_ours, streams=False)


def _check_modelfile(model: Path, text: str, overwrite: bool) -> None:
    """Refuse to replace the Modelfile of another model, or one that somebody has changed."""
    path = model.with_name(MODELFILE)
    try:
        check_output_file(path, overwrite=overwrite, is_ours=lambda file: file.read_bytes() == text.encode())
    except UsageError:
        raise UsageError(
            f"{path} is there already, of another model or changed: export into another folder, "
            "or replace it with --overwrite"
        ) from None


@contextmanager
def _make_blueprint(source: Source, target: Path, engine: str) -> Iterator[Blueprint]:
    """A blueprint by this package's own tables, else by the converter of the user's checkout."""
    script = find_converter()
    try:
        blueprint = blueprint_from_run(source)
    except UnsupportedArchitecture as error:
        if script is None:
            raise UnsupportedArchitecture(
                f"{error}; for others set {VARIABLE} to a checkout of llama.cpp, whose converter is used then"
            ) from error
    else:
        yield blueprint
        return
    with convert(source, script, target, engine) as blueprint:
        yield blueprint


def _complete(about: About, source: Source, path: Path) -> About:
    """Fill in what the model's source and the file's name say."""
    name, license = public_name_and_license((source.base or source).name)
    is_public = HUB_ID.fullmatch(name) is not None
    defaults = {
        "name": one_line(path.stem),
        "base": name.rsplit("/", 1)[-1].removesuffix(".gguf"),
        "base_url": f"https://huggingface.co/{name}" if is_public else None,
        "license": license,
    }
    return About(**{**defaults, **{key: value for key, value in asdict(about).items() if value is not None}})


def _show(reports: Sequence[ExportReport], notes: Sequence[str], engine: str, console: Console) -> dict[str, Any]:
    """Print reports for a person, and return them for a program."""
    for note in dict.fromkeys(notes):
        console.print(f"[yellow]note:[/] {escape(note)}")
    for report in reports:
        size = f"{report.bytes / 1e6:,.1f} MB, {counted(report.tensors, 'tensor')}"
        console.print(f"{escape(str(report.path))}: {size}, checked in {engine}", soft_wrap=True)
    return {"files": [{**asdict(report), "path": str(report.path)} for report in reports]}
