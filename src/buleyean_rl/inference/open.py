"""Open an engine for a model by its name."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.endpoint import API_KEY_VARIABLE, EndpointEngine
from buleyean_rl.inference.endpoint_client import is_same_host, parse_address
from buleyean_rl.inference.llama_server import LlamaCppEngine
from buleyean_rl.inference.protocol import Engine
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.models.run_folder import find_model
from buleyean_rl.models.source import Source, public_name_and_license

ENGINE_KINDS = ("auto", "transformers", "llama.cpp")
TRANSFORMERS_BATCH = 64  # conversations
SERVER_SLOTS = 8  # conversations at once

Location = Source | str  # a string is the URL of an endpoint


def locate(name: str | Source) -> Location:
    """Resolve a model's name, once per command.

    Args:
        name: a base model as for `train`, a run folder, or the URL of an OpenAI-compatible endpoint; or what it is.

    Raises:
        ModelError: nothing of that name can exist.
        UsageError: the URL is not valid.
    """
    if isinstance(name, Source) or not is_endpoint(name):
        return find_model(name)
    parse_address(name)
    return name


def open_engine(
    model: str | Source,
    kind: str = "auto",
    console: Console | None = None,
    *,
    context: int | None = None,
    key_url: str | None = None,
) -> Engine:
    """Open an engine for a model.

    Args:
        model: from `locate`, or its argument.
        kind: of engine. `auto` runs GGUF files in llama.cpp, and the others in transformers, which is faster for
            many answers at once.
        console: where a model in transformers is described; None for nowhere.
        context: maximum tokens of a conversation; None, and at most, for the model's own, as memory allows.
        key_url: the endpoint whose key is in BULEYEAN_API_KEY: another host does not get it; None for this one.

    Raises:
        UsageError: no such kind, or not for this model.
        ModelError: the model cannot be loaded.
        EngineError: the endpoint does not answer, or llama.cpp cannot run the file.
    """
    if kind not in ENGINE_KINDS:
        raise UsageError(f"no engine {kind!r}: there are {', '.join(ENGINE_KINDS)}")
    location = locate(model) if isinstance(model, str) else model
    if isinstance(location, str):
        if kind != "auto":
            raise UsageError(f"{location} is an endpoint: leave --engine out")
        if context is not None:
            raise UsageError(f"{location} is an endpoint, with a context of its own: leave --context out")
        key_variable = API_KEY_VARIABLE if key_url is None or is_same_host(key_url, location) else None
        return EndpointEngine(location, parallel=SERVER_SLOTS, key_variable=key_variable)
    if kind == "llama.cpp" or (kind == "auto" and is_gguf_file(location)):
        path = None if location.run is not None else location.gguf_path
        if path is None:
            name = location.name
            raise UsageError(f"llama.cpp runs GGUF files: make one with `buleyean export {name} -o model.gguf`")
        return LlamaCppEngine(path, parallel=SERVER_SLOTS, context=context)
    loaded = open_model(location)
    engine = engine_of(loaded, context)
    if console is not None:
        console.print(escape(loaded.describe()))
    return engine


def engine_of(model: Model, context: int | None = None) -> TransformersEngine:
    """The engine of a model in transformers, which is loaded if it is not.

    Args:
        model: of a base, or of a run.
        context: see `open_engine`.

    Raises:
        ModelError: the model cannot be loaded.
    """
    tokenizer = model.tokenizer  # checks the files, before their weights are read
    return TransformersEngine(model.plain, tokenizer, batch=TRANSFORMERS_BATCH, context=context)


def is_endpoint(name: str) -> bool:
    """Whether a model's name is the URL of an endpoint."""
    return name.startswith(("http://", "https://"))


def is_gguf_file(location: Location) -> bool:
    """Whether a model is a GGUF file that the user named."""
    return isinstance(location, Source) and location.run is None and Path(location.name).suffix == ".gguf"


def describe_policy(location: Location) -> dict[str, str]:
    """What draws the answers, as records name it: no path, and the adapter of a run."""
    if isinstance(location, str):
        return {"model": location}
    base = location.base or location
    name, _ = public_name_and_license(base.name)
    return {"model": name} | ({} if location.run is None else {"adapter": Path(location.run).name})


def answers_key(model: str | Source, kind: str = "auto") -> str:
    """A cache key that changes whenever a model's answers may change.

    Args:
        model: from `locate`, or its argument.
        kind: of engine.
    """
    location = locate(model) if isinstance(model, str) else model
    return location if isinstance(location, str) else f"{kind} {location.fingerprint}"
