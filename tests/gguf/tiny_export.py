"""A tiny model written as GGUF, what a file says, and what a machine needs for some of the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from buleyean_rl.gguf import export_gguf
from buleyean_rl.inference import llama_cpp_python
from gguf import GGUFReader
from tiny import tiny_llama, tiny_tokenizer

needs_llama_cpp_python = pytest.mark.skipif(
    not llama_cpp_python.is_installed(), reason=f"needs llama-cpp-python: {llama_cpp_python.INSTALL_HINT}"
)


def write_unchecked(
    folder: Path, *, tokenizer: PreTrainedTokenizerFast | None = None, quant: str = "q8_0"
) -> tuple[Path, PreTrainedModel, PreTrainedTokenizerFast]:
    """A tiny Llama written without its gate, with `tokenizer` in the file: (file, model, the model's tokenizer)."""
    right = tiny_tokenizer()
    model = tiny_llama(right)
    path = export_gguf(model, tokenizer or right, folder / "m.gguf", quant, gate=False).path
    return path, model, right


def read_metadata(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}
