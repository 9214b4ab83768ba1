"""A model's name, and an engine that runs it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.endpoint import EndpointEngine
from buleyean_rl.inference.llama_server import LlamaCppEngine
from buleyean_rl.inference.protocol import Engine
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.model import open_model
from buleyean_rl.models.run_folder import find_model
from buleyean_rl.models.source import Source

KINDS = ("auto", "transformers", "llama.cpp")
BATCH = 64  # conversations at once, in memory
PARALLEL = 8  # in a server

Location = Source | str  # where a model is; a string is the URL of an endpoint


def locate(name: str) -> Location:
    """Where the model of a name is, determined once for all that a command does with it.

    Args:
        name: whatever `train` takes, a run folder, or the URL of an OpenAI-compatible endpoint.

    Raises:
        ModelError: nothing of that name can exist.
    """
    return name if is_endpoint(name) else find_model(name)


def open_engine(model: str | Source, kind: str = "auto", console: Console | None = None) -> Engine:
    """An engine for a model.

    Args:
        model: from `locate`, or a name for it.
        kind: of engine. `auto` runs GGUF files in llama.cpp and everything else in transformers, which is
            much the quicker of the two for many answers at once.
        console: where a model in transformers says what it computes with; None for nowhere.

    Raises:
        UsageError: no such kind, or it does not run such a model.
        ModelError: the model cannot be loaded.
        EngineError: the endpoint does not answer, or llama.cpp cannot run the file.
    """
    if kind not in KINDS:
        raise UsageError(f"no engine {kind!r}: there are {', '.join(KINDS)}")
    location = locate(model) if isinstance(model, str) else model
    if isinstance(location, str):
        if kind != "auto":
            raise UsageError(f"{location} is an endpoint: leave --engine out")
        return EndpointEngine(location, parallel=PARALLEL)
    if kind == "llama.cpp" or (kind == "auto" and is_gguf_file(location)):
        path = None if location.run is not None else location.gguf_path
        if path is None:
            name = location.name
            raise UsageError(f"llama.cpp runs GGUF files: make one with `buleyean export {name} -o model.gguf`")
        return LlamaCppEngine(path, parallel=PARALLEL)
    opened = open_model(location)
    engine = TransformersEngine(opened.module, opened.tokenizer, batch=BATCH)
    if console is not None:
        console.print(opened.describe())
    return engine


def is_endpoint(name: str) -> bool:
    """Whether a model's name is the URL of an endpoint."""
    return name.startswith(("http://", "https://"))


def is_gguf_file(location: Location) -> bool:
    """Whether a model was named by its GGUF file."""
    return isinstance(location, Source) and location.run is None and Path(location.name).suffix == ".gguf"


def identity(model: str | Source, kind: str = "auto") -> str:
    """A text that changes when the answers of a model may: for keying its answers.

    Args:
        model: from `locate`, or a name for it.
        kind: of engine.
    """
    location = locate(model) if isinstance(model, str) else model
    return location if isinstance(location, str) else f"{kind} {location.fingerprint}"
