"""An engine as the front sees it: a process that is started, asked, left by its last request, and ended."""

from __future__ import annotations

import asyncio
import json
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from buleyean_rl.errors import EngineError
from buleyean_rl.inference.endpoint_client import EndpointClient
from buleyean_rl.live.target import Target
from buleyean_rl.system.module_process import module_command, module_environment

LOAD_SECONDS = 600
END_SECONDS = 5


@dataclass(frozen=True)
class Size:
    """How much an engine may take.

    Args:
        context: tokens of a conversation.
        slots: conversations at once.
        threads: None for the available cores.
    """

    context: int
    slots: int
    threads: int | None = None


class ServedEngine:
    """A running engine. Made by `start`.

    Args:
        target: what it runs.
        process: its process.
        url: where it answers.
        key: a bearer token.
        slots: conversations at once; others wait.

    Attributes:
        client: asks it.
        requests: under way and waiting.
    """

    def __init__(self, target: Target, process: Process, url: str, key: str, slots: int) -> None:
        self.target, self.requests = target, 0
        self.client = EndpointClient(url, key, slots, is_own=True)
        self._process, self._idle = process, asyncio.Event()
        self._idle.set()

    @classmethod
    async def start(cls, target: Target, size: Size) -> ServedEngine:
        """Start an engine, and wait until it answers.

        Raises:
            EngineError: its process ended, or llama.cpp cannot run the file.
        """
        process = await asyncio.create_subprocess_exec(
            *module_command("buleyean_rl.live.engine_process"),
            stdin=PIPE, stdout=PIPE, start_new_session=True, env=module_environment(),
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        wanted = {"gguf": target.gguf, "adapter": target.adapter, "context": size.context, "slots": size.slots}
        try:
            process.stdin.write(f"{json.dumps(wanted | {'threads': size.threads})}\n".encode())
            line = await asyncio.wait_for(process.stdout.readline(), LOAD_SECONDS)
            reply: dict[str, Any] = json.loads(line)
        except (ValueError, OSError):
            await _kill(process)
            raise EngineError(f"{target.name}: llama.cpp ended while it loaded {target.gguf}: see above") from None
        except TimeoutError:
            await _kill(process)
            raise EngineError(f"{target.name}: not loaded within {LOAD_SECONDS} seconds") from None
        except BaseException:
            await _kill(process)
            raise
        if "error" in reply:
            await _kill(process)
            raise EngineError(reply["error"])
        return cls(target, process, reply["url"], reply["key"], size.slots)

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Keep the engine while a request needs it."""
        self.requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.requests -= 1
            if not self.requests:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no request needs it."""
        await self._idle.wait()

    async def wait_ended(self) -> int:
        """Wait until its process ends; its exit code."""
        return await self._process.wait()

    def kill(self) -> None:
        """End the process at once."""
        with suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self) -> None:
        """End the process."""
        await self.client.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), END_SECONDS)
        await _kill(self._process)


async def _kill(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()
