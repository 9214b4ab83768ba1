"""A model becomes GGUF files that are proven right before they get their names.

    model in memory --+                  +--write--> temporary files --parity--> the files
    run folder -------+--> blueprint ----+
    GGUF file --------+                  +--> k_quants, adapter_file, ollama

A blueprint says what a file will hold: `architectures` names and permutes the tensors, `tensors` reads them a block at
a time, `vocabulary` and `metadata` give the rest. `export_gguf` does all of it for a model in memory, `write_gguf` for
any blueprint, `export.export` for the command. `check_parity` is the proof alone; `trained_model` proves that what a
blueprint merged is what was trained.
"""

from __future__ import annotations

from buleyean_rl.gguf.adapter_file import ADAPTER_QUANTS, write_adapter
from buleyean_rl.gguf.blueprint import Blueprint, blueprint_from_model, blueprint_from_run
from buleyean_rl.gguf.k_quants import K_QUANTS
from buleyean_rl.gguf.metadata import About
from buleyean_rl.gguf.parity import check_blueprint, check_parity
from buleyean_rl.gguf.parity_report import ParityReport
from buleyean_rl.gguf.quantise import QUANTS
from buleyean_rl.gguf.write import ExportReport, export_gguf, write_gguf

__all__ = [
    "ADAPTER_QUANTS",
    "K_QUANTS",
    "QUANTS",
    "About",
    "Blueprint",
    "ExportReport",
    "ParityReport",
    "blueprint_from_model",
    "blueprint_from_run",
    "check_blueprint",
    "check_parity",
    "export_gguf",
    "write_adapter",
    "write_gguf",
]
