"""Who answers in a walk: each round's model in this process, in llama.cpp, or behind servers of vLLM.

round r - 1 is answering --train--> adapter of round r --open--> its engine, beside the earlier one --> close that
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.markup import escape

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.endpoint import EndpointEngine
from buleyean_rl.inference.endpoint_adapters import AdapterEngine
from buleyean_rl.inference.endpoint_server import Endpoint
from buleyean_rl.inference.llama_server import LlamaCppEngine
from buleyean_rl.inference.open import SERVER_SLOTS, engine_of
from buleyean_rl.inference.protocol import Adapter, Completer
from buleyean_rl.models.model import Model
from buleyean_rl.models.source import Source

ADAPTER_FILE = "adapter.gguf"  # beside the run


class RoundEngines(Protocol):
    """Opens the engine of each round.

    Args:
        kind: of engine: what decides the answers besides the model.
        stays: whether an engine answers on while the next round is trained and opened; else its memory is needed.
    """

    @property
    def kind(self) -> str:
        """See above."""

    @property
    def stays(self) -> bool:
        """See above."""

    def open(self, source: Source) -> Completer:
        """The engine of the base model, or of a round's run."""


class InProcess:
    """In transformers, which runs an adapter on the base without an export.

    Args:
        find_model: the model of a source, in memory.
        context: maximum tokens of a conversation; None for the model's own.
        console: where the model is described.
    """

    kind, stays = "transformers", False

    def __init__(self, find_model: Callable[[Source], Model], context: int | None, console: Console) -> None:
        self._find_model, self._context, self._console = find_model, context, console

    def open(self, source: Source) -> Completer:
        """See `RoundEngines.open`."""
        model = self._find_model(source)
        own = model.with_source(model.source)  # scoring packs, answering does not
        engine = engine_of(own, self._context)
        self._console.print(escape(model.describe()))
        return engine


class LlamaCpp:
    """In llama.cpp's server: as it takes adapters only at its start, the next one starts beside the one before.

    Args:
        base: a GGUF file, or a model that comes as one.
        export_adapter: writes a run's adapter as a GGUF file.
        context: see `InProcess`.

    Raises:
        UsageError: the base is no GGUF file.
    """

    kind, stays = "llama.cpp", True

    def __init__(self, base: Source, export_adapter: Callable[[Path, Path], object], context: int | None) -> None:
        if base.gguf_path is None:
            raise UsageError(f"llama.cpp runs GGUF files, and {base.name} is none: leave --engine out")
        self._path, self._export_adapter, self._context = base.gguf_path, export_adapter, context

    def open(self, source: Source) -> Completer:
        """See `RoundEngines.open`."""
        adapter = None
        if source.run is not None:
            adapter = Adapter(Path(source.run).parent / ADAPTER_FILE)
            self._export_adapter(Path(source.run), adapter.path)
        return LlamaCppEngine(self._path, parallel=SERVER_SLOTS, context=self._context, adapter=adapter)


class VllmServers:
    """Behind servers of vLLM that serve the base: each loads a round's adapter while it runs.

    Args:
        endpoints: where they are.
    """

    kind, stays = "vllm", True

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = endpoints

    def open(self, source: Source) -> Completer:
        """See `RoundEngines.open`."""
        if source.run is None:
            return EndpointEngine(self._endpoints)
        digest = source.fingerprint.rpartition("+")[2]  # so that a name means one adapter, and a killed walk finds it
        run = Path(source.run).absolute()
        return AdapterEngine(self._endpoints, f"{run.parent.name}-{digest}", str(run))
