"""The engines that run a GGUF file, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.llama_cpp_python import LlamaCppPythonEngine
from buleyean_rl.inference.llama_server import LlamaCppEngine
from buleyean_rl.inference.protocol import GgufEngine

ENGINES: dict[str, type[LlamaCppEngine] | type[LlamaCppPythonEngine]] = {
    "xllamacpp": LlamaCppEngine,
    "llama-cpp-python": LlamaCppPythonEngine,
}
DEFAULT_ENGINE = "xllamacpp"


def open_gguf(path: Path | str, engine: str = DEFAULT_ENGINE, **settings: Any) -> GgufEngine:
    """Open a GGUF file in an engine.

    Args:
        path: of the file.
        engine: a name in `ENGINES`.
        settings: the engine's: parallel, context, threads, exact, adapter.

    Raises:
        UsageError: no engine of that name.
        EngineError: the engine is not installed, or cannot run the file.
    """
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}; there are {' and '.join(ENGINES)}")
    return ENGINES[engine](path, **settings)
