"""Servers of vLLM with a LoRA adapter that they are given while they run, by its documented calls.

They need `--enable-lora`, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and the adapter's folder under the same path as here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from buleyean_rl.errors import EngineError
from buleyean_rl.inference.endpoint import EndpointEngine
from buleyean_rl.inference.endpoint_server import Endpoint, EndpointServer, Patience


class AdapterEngine(EndpointEngine):
    """Answers with an adapter, which the servers hold until this is closed. A server that cannot load it is given up.

    Args:
        endpoints: of the base model.
        name: of the adapter there; another adapter needs another name.
        path: of its PEFT folder.
        patience: None for the default.

    Raises:
        EngineError: no server can load it.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], name: str, path: str, *, patience: Patience | None = None
    ) -> None:
        super().__init__(endpoints, patience=patience)
        self._name = name
        try:
            errors = self._call_all(lambda server: server.load_adapter(name, path))
            if not any(server.is_alive for server in self._servers):
                raise errors[0]
        except BaseException:
            super().close()
            raise

    def close(self) -> None:
        """Have the servers forget the adapter, and close the connections."""
        with suppress(EngineError):  # as far as they can still be reached
            self._call_all(lambda server: server.unload_adapter(self._name))
        super().close()

    def _call_all(self, call: Callable[[EndpointServer], Coroutine[Any, Any, None]]) -> list[EngineError]:
        """Call every server that is left; those that fail are given up."""

        async def gather() -> list[EngineError]:
            alive = [server for server in self._servers if server.is_alive]
            results = await asyncio.gather(*map(call, alive), return_exceptions=True)
            errors = []
            for server, error in zip(alive, results, strict=True):
                if isinstance(error, EngineError):
                    server.give_up(str(error))
                    errors.append(error)
                elif error is not None:
                    raise error
            return errors

        return self._loop.run(gather())
