"""A model's name, and an engine that runs it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.endpoint import EndpointEngine
from buleyean_rl.inference.llama_server import LlamaCppEngine
from buleyean_rl.inference.protocol import Engine
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.compute import default_device, load_for_inference
from buleyean_rl.models.run_folder import is_run, run_base, run_tokenizer
from buleyean_rl.models.source import fingerprint, resolve
from buleyean_rl.models.weights import load_tokenizer

KINDS = ("auto", "transformers", "llama.cpp")
BATCH = 64  # conversations at once, in memory
PARALLEL = 8  # in a server


def open_engine(name: str, kind: str = "auto") -> Engine:
    """An engine for a model.

    Args:
        name: whatever `train` takes, a run folder, or the URL of an OpenAI-compatible endpoint.
        kind: of engine. `auto` runs GGUF files in llama.cpp and everything else in transformers, which is
            much the quicker of the two for many answers at once.

    Raises:
        UsageError: no such kind, or it does not run such a model.
        ModelError: the model cannot be loaded.
        EngineError: the endpoint does not answer, or llama.cpp cannot run the file.
    """
    if kind not in KINDS:
        raise UsageError(f"no engine {kind!r}: there are {', '.join(KINDS)}")
    if is_endpoint(name):
        if kind != "auto":
            raise UsageError(f"{name} is an endpoint: leave --engine out")
        return EndpointEngine(name, parallel=PARALLEL)
    is_gguf_file = not is_run(name) and Path(name).suffix == ".gguf"
    if kind == "llama.cpp" or (kind == "auto" and is_gguf_file):
        path = None if is_run(name) else resolve(name).gguf_path
        if path is None:
            raise UsageError(f"llama.cpp runs GGUF files: make one with `buleyean export {name} -o model.gguf`")
        return LlamaCppEngine(path, parallel=PARALLEL)
    tokenizer = run_tokenizer(Path(name)) if is_run(name) else load_tokenizer(name)
    return TransformersEngine(load_for_inference(name, default_device()), tokenizer, batch=BATCH)


def is_endpoint(name: str) -> bool:
    """Whether a model's name is the URL of an endpoint."""
    return name.startswith(("http://", "https://"))


def identity(name: str, kind: str = "auto") -> str:
    """A text that changes when the answers of a model may: for keying what it said.

    Args:
        name: as for `open_engine`.
        kind: of engine.
    """
    if is_endpoint(name):
        return name
    if is_run(name):
        with (Path(name) / "adapter_model.safetensors").open("rb") as file:
            adapter = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return f"{kind} {fingerprint(run_base(Path(name)))}+{adapter}"
    return f"{kind} {fingerprint(name)}"
