"""Inference engines: one small protocol, and what implements it.

An engine turns text into token ids, messages into a prompt, prompts into answers, and token ids into
log-probabilities; everything above it (chat, demo, parity gate, evaluation) is written against `Engine`
alone. `LlamaCppEngine` runs a GGUF file in llama.cpp, inside this process, and `LlamaCppPythonEngine` does so
through llama-cpp-python; `TransformersEngine` runs a model that is already in memory; `EndpointEngine` asks a
server elsewhere for answers and nothing more. All but the last answer greedily with the same text where the
weights are the same.

    messages --render--> text --tokenize--> ids --> generate, complete_many, answer_many, top_logprobs, logprobs

An engine is not a tokenizer or a model loader: it is handed a file, or a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from buleyean_rl.engines.endpoint import EndpointEngine
from buleyean_rl.engines.gguf_file import check_gguf
from buleyean_rl.engines.in_memory import TransformersEngine
from buleyean_rl.engines.llama_cpp_python import LlamaCppPythonEngine
from buleyean_rl.engines.llama_server import LlamaCppEngine
from buleyean_rl.engines.protocol import (
    CONTEXT,
    GREEDY,
    Adapter,
    Answer,
    Completer,
    Engine,
    GgufEngine,
    Messages,
    Sampling,
    neutral_nll,
)
from buleyean_rl.errors import UsageError

ENGINES: dict[str, type[LlamaCppEngine] | type[LlamaCppPythonEngine]] = {
    "xllamacpp": LlamaCppEngine,
    "llama-cpp-python": LlamaCppPythonEngine,
}
DEFAULT = "xllamacpp"

__all__ = [
    "CONTEXT",
    "DEFAULT",
    "ENGINES",
    "GREEDY",
    "Adapter",
    "Answer",
    "Completer",
    "EndpointEngine",
    "Engine",
    "GgufEngine",
    "LlamaCppEngine",
    "LlamaCppPythonEngine",
    "Messages",
    "Sampling",
    "TransformersEngine",
    "check_gguf",
    "neutral_nll",
    "open_gguf",
]


def open_gguf(path: Path | str, engine: str = DEFAULT, **settings: Any) -> GgufEngine:
    """A GGUF file in an engine, by the engine's name.

    Args:
        path: the file.
        engine: one of `ENGINES`.
        settings: of the engine: parallel, context, threads, exact, adapter.

    Raises:
        UsageError: no engine of that name.
        EngineError: the engine is not installed, or cannot run the file.
    """
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}; there are {' and '.join(ENGINES)}")
    return ENGINES[engine](path, **settings)
