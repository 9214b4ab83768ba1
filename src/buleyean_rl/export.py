"""A run folder, or any model that trains, to a GGUF file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from buleyean_rl.errors import ExportError
from buleyean_rl.gguf_export import QUANTS, export_gguf
from buleyean_rl.models import is_run, load_base, load_tokenizer, merge_run, resolve, run_base


def export(run: str, path: Path, quant: str = "q8_0", *, console: Console | None = None) -> dict[str, Any]:
    """Merge, write, prove.

    Args:
        run: a run folder, or the name of a model.
        path: the .gguf file to write.
        quant: one of `gguf_export.QUANTS`.
        console: where progress goes; None for nowhere.

    Returns:
        What was written and what the parity gate found, fit for JSON.

    Raises:
        ExportError: it cannot be written, or the file does not behave like the model.
        ModelError: the run or its base model cannot be loaded.
    """
    console = console or Console(quiet=True)
    if quant not in QUANTS:  # before minutes of loading
        raise ExportError(f"unknown quantisation {quant!r}; there are {', '.join(QUANTS)}")
    base = run_base(Path(run)) if is_run(run) else run
    with console.status(f"loading {run}"):
        if is_run(run):
            model, tokenizer = merge_run(Path(run))
        else:
            model, tokenizer = load_base(run, torch.float32), load_tokenizer(run)
    with console.status(f"writing {path}, and checking it in llama.cpp"):
        report = export_gguf(model, tokenizer, path, quant, source_gguf=resolve(base).gguf_path)
    for note in report.notes:
        console.print(f"[yellow]note:[/] {note}")
    console.print(f"{path}: {report.bytes / 1e6:,.0f} MB, {report.tensors} tensors, checked in llama.cpp")
    return {**asdict(report), "path": str(path)}
