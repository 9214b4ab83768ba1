"""Checks of a GGUF file before an engine is given it."""

from __future__ import annotations

from pathlib import Path

from buleyean_rl.errors import EngineError, ModelError
from buleyean_rl.models.gguf_header import Header, check_model_header, check_numbers, read_header

LOAD_FAILURE = "an architecture or tensor it does not support, or too little free memory"


def check_gguf(path: Path | str, *, model: bool = True) -> Header:
    """The header of a file that llama.cpp can be given: it aborts on a damaged one.

    Args:
        path: of the file.
        model: it must hold a whole model; otherwise an adapter is right too.

    Raises:
        EngineError: it does not exist, is not a file, not GGUF, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise EngineError(f"{path}: no such file")
    if not path.is_file():
        raise EngineError(f"{path}: is not a file; name the .gguf inside it")
    try:
        header = read_header(path)
        if model:
            check_model_header(header)
        check_numbers(header)
        return header
    except ModelError as error:
        raise EngineError(str(error)) from error
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}") from error
