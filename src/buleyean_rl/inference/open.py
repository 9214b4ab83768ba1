"""Open an engine for a model by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.endpoint import API_KEY_VARIABLE, EndpointEngine
from buleyean_rl.inference.endpoint_client import is_same_host, parse_address
from buleyean_rl.inference.endpoint_server import PARALLEL, Endpoint
from buleyean_rl.inference.llama_server import LlamaCppEngine
from buleyean_rl.inference.protocol import Engine
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.models.run_folder import find_model
from buleyean_rl.models.source import Source, public_name_and_license

TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"
ENGINE_KINDS = ("auto", TRANSFORMERS, LLAMA_CPP)
TRANSFORMERS_BATCH = 64  # conversations
SERVER_SLOTS = 8  # conversations at once
SERVERS = "servers"  # the model of servers that are asked for no name
HEAD_CHARACTERS = 4096  # of a file, to tell whether it names endpoints


@dataclass(frozen=True)
class Servers:
    """Several endpoints that serve the same model.

    Args:
        endpoints: where they are.
        model: its name there; "" where some endpoint takes the first that it lists.
    """

    endpoints: tuple[Endpoint, ...]
    model: str

    @property
    def name(self) -> str:
        """Their addresses."""
        return ", ".join(endpoint.url for endpoint in self.endpoints)


Location = Source | str | Servers  # a string is the URL of an endpoint


def locate(name: str | Location | Sequence[str]) -> Location:
    """Resolve a model's name, once per command.

    Args:
        name: a base model as for `train`, a run folder, the URL of an OpenAI-compatible endpoint, or a file of such,
            see `read_endpoints`; or several of these, of the same model; or what it is.

    Raises:
        ModelError: nothing of that name can exist.
        UsageError: a URL is not valid, or several names are not endpoints of one model.
    """
    if isinstance(name, Source | Servers):
        return name
    names = [name] if isinstance(name, str) else list(name)
    if len(names) == 1 and is_endpoint(names[0]):
        parse_address(names[0])
        return names[0]
    if len(names) == 1 and not _is_endpoints_file(names[0]):
        return find_model(names[0])
    return find_endpoints(names)


def find_endpoints(names: Sequence[str]) -> Servers:
    """Endpoints of one model.

    Args:
        names: URLs, and files of them, see `read_endpoints`. The first one's key goes to others on its host alone.

    Raises:
        UsageError: a name is neither, stands there twice, or asks for another model.
    """
    endpoints = [endpoint for each in names for endpoint in _read_name(each)]
    addresses = [parse_address(endpoint.url) for endpoint in endpoints]
    urls = [address.url for address in addresses]
    if twice := next((url for url in urls if urls.count(url) > 1), None):
        raise UsageError(f"{twice} is named twice: name each server once")
    models = {address.model for address in addresses}
    if len(models - {""}) > 1:
        raise UsageError(f"the servers are asked for several models, {', '.join(sorted(models))}: mine one at a time")
    with_keys = [
        replace(endpoint, key_variable=endpoint.key_variable or _key_variable(endpoint.url, endpoints[0].url))
        for endpoint in endpoints
    ]
    return Servers(tuple(with_keys), "" if "" in models else models.pop())


def read_endpoints(file: Path) -> list[Endpoint]:
    """The endpoints of a file: a line each, `URL [parallel=N] [key=VARIABLE]`; a line that begins with # is a comment.

    Args:
        file: of UTF-8 text.

    Raises:
        UsageError: a line is something else.
    """
    endpoints = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        url, *words = line.split()
        options = dict(word.partition("=")[::2] for word in words)
        parallel = options.pop("parallel", str(PARALLEL))
        if not is_endpoint(url) or options.keys() - {"key"} or not parallel.isdecimal() or int(parallel) < 1:
            raise UsageError(f"{file}:{number}: give an endpoint a line: URL [parallel=N] [key=VARIABLE]")
        endpoints.append(Endpoint(url, int(parallel), options.get("key")))
    return endpoints


def _is_endpoints_file(name: str) -> bool:
    """Whether a name is that of a text file whose first line that says something is a URL."""
    path = Path(name)
    if path.suffix == ".gguf" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = (line for line in file.read(HEAD_CHARACTERS).splitlines() if line.strip() and not line.startswith("#"))
        return is_endpoint(next(lines, ""))


def _read_name(name: str) -> list[Endpoint]:
    if is_endpoint(name):
        return [Endpoint(name)]
    if _is_endpoints_file(name):
        return read_endpoints(Path(name))
    raise UsageError(f"{name} is no endpoint: of several models each must be one, or a file of them")


def _key_variable(url: str, key_url: str | None) -> str | None:
    """The variable of an endpoint's key: another host does not get it."""
    return API_KEY_VARIABLE if key_url is None or is_same_host(key_url, url) else None


def open_engine(
    model: str | Location,
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
    if isinstance(location, str | Servers):
        name = location if isinstance(location, str) else location.name
        if kind != "auto":
            raise UsageError(f"{name} is an endpoint: leave --engine out")
        if context is not None:
            raise UsageError(f"{name} is an endpoint, with a context of its own: leave --context out")
        if isinstance(location, Servers):
            return EndpointEngine(location.endpoints)
        return EndpointEngine(location, key_variable=_key_variable(location, key_url))
    if kind == LLAMA_CPP or (kind == "auto" and is_gguf_file(location)):
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
    if not isinstance(location, Source):
        return {"model": location if isinstance(location, str) else location.model or SERVERS}
    base = location.base or location
    name, _ = public_name_and_license(base.name)
    return {"model": name} | ({} if location.run is None else {"adapter": Path(location.run).name})


def answers_key(model: str | Location, kind: str = "auto") -> str:
    """A cache key that changes whenever a model's answers may change; of servers their model: others may go on.

    Args:
        model: from `locate`, or its argument.
        kind: of engine.
    """
    location = locate(model) if isinstance(model, str) else model
    if isinstance(location, Servers):
        return f"{SERVERS}#{location.model}"
    return location if isinstance(location, str) else f"{kind} {location.fingerprint}"
