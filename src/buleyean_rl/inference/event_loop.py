"""An asyncio event loop in a thread of its own, for callers that are not asynchronous."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any, TypeVar

from buleyean_rl.errors import EngineError

T = TypeVar("T")


class EventLoop:
    """Runs coroutines; an exception in the caller, such as Ctrl-C, cancels what runs for it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="event loop", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine.

        Raises:
            EngineError: the loop is closed, or was closed meanwhile.
        """
        if self._loop.is_closed():
            coroutine.close()
            raise EngineError("this engine is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise EngineError("this engine was closed") from None
        except BaseException:
            future.cancel()
            raise

    def iterate(self, items: AsyncGenerator[T]) -> Generator[T]:
        """The items of an asynchronous generator, which runs on only while an item is asked for."""

        async def next_item() -> tuple[T] | None:
            async for item in items:
                return (item,)
            return None

        try:
            while (item := self.run(next_item())) is not None:
                yield item[0]
        except GeneratorExit:
            self.run(items.aclose())
            raise

    def close(self, last: Coroutine[Any, Any, Any]) -> None:
        """Cancel what runs, run one last coroutine, and end the thread."""
        if self._loop.is_closed():
            last.close()
            return

        async def finish() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await last
            await self._loop.shutdown_asyncgens()

        asyncio.run_coroutine_threadsafe(finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
