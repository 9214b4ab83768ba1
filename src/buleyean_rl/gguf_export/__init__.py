"""A model in memory becomes a GGUF file that is proven right before it gets its name.

    model --architectures--> metadata, named tensors --+
                                                       +--write--> temporary file --parity--> the file
    tokenizer --vocabulary--> metadata ----------------+

`export_gguf` does all of it. `check_parity` is the proof alone, and works on any file and model.
"""

from __future__ import annotations

from buleyean_rl.gguf_export.architectures import supported
from buleyean_rl.gguf_export.parity import ParityReport, check_parity
from buleyean_rl.gguf_export.quantise import QUANTS
from buleyean_rl.gguf_export.write import ExportReport, export_gguf

__all__ = ["QUANTS", "ExportReport", "ParityReport", "check_parity", "export_gguf", "supported"]
