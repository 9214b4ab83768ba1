"""Which engine answers, and how another takes its place.

    swap --start--> engine beside the old one --gate--> new requests go there --the old one's last request--> it ends

Every request stays with the engine that it began with. The base model answers beside the trained one: by the same
engine without its adapter, or by the first engine where what was swapped in is a whole model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from buleyean_rl.errors import BuleyeanError, UsageError
from buleyean_rl.live.engine import ServedEngine
from buleyean_rl.live.target import Target

MAX_DRAINING = 2  # engines: each has its cache in memory
DRAIN_SECONDS = 1800  # then the last requests of an engine are given up
MAX_RESTARTS = 3  # of an engine whose process ended, in a row
STABLE_SECONDS = 60  # after which a restart is forgotten

Start = Callable[[Target], Awaitable[ServedEngine]]
Gate = Callable[["Choice", "Choice"], Awaitable[Mapping[str, Any]]]


class Busy(BuleyeanError):
    """Another swap is under way."""


@dataclass(frozen=True)
class Choice:
    """Who answers a request.

    Args:
        engine: that computes it.
        fields: of the request, that choose the base or the trained model.
        model: its name in the list of models.
        run: what answers, for people.
    """

    engine: ServedEngine
    fields: Mapping[str, Any]
    model: str
    run: str


class Serving:
    """The engines of a server.

    Args:
        name: of the model in the list of models, whatever run answers for it; its base has `-base` after it.
        first: the engine that answers at the beginning.
        start: starts an engine.
        gate: raises where a trained model answers worse than its base may; returns what it measured.

    Attributes:
        failed: set with the reason once there is no engine any more.
    """

    def __init__(self, name: str, first: ServedEngine, start: Start, gate: Gate) -> None:
        self.name, self.base_name = name, f"{name}-base"
        self._start, self._gate = start, gate
        self._base = self._trained = first
        self._history: list[Target] = []
        self._swapping, self._is_ending = asyncio.Lock(), False
        self._draining: set[asyncio.Task[None]] = set()
        self._watching: set[asyncio.Task[None]] = set()
        self.failed: asyncio.Future[BuleyeanError] = asyncio.get_running_loop().create_future()
        self._watch(first)

    @property
    def target(self) -> Target:
        """What answers as the trained model."""
        return self._trained.target

    @property
    def base(self) -> Target:
        """What answers as the base model."""
        return self._base.target

    @property
    def is_trained(self) -> bool:
        """Whether base and trained model differ."""
        return self.target.adapter is not None or self._trained is not self._base

    @property
    def requests(self) -> int:
        """Under way and waiting, of the engines that take new ones."""
        return sum(engine.requests for engine in {self._base, self._trained})

    def choose(self, name: str | None) -> Choice | None:
        """Who answers for a name; None where nobody does.

        Args:
            name: None for the trained model.
        """
        if name in (None, "", self.name):
            return _choice(self._trained, 1.0, self.name)
        return _choice(self._base, 0.0, self.base_name) if name == self.base_name else None

    async def swap(self, target: Target) -> Mapping[str, Any]:
        """Let a target answer as the trained model.

        Returns:
            What the gate measured.

        Raises:
            Busy: another swap is under way.
            EngineError: it does not load, or does not pass the gate; nothing has changed.
        """
        async with self._alone():
            engine = await self._start_beside(target)
            try:
                base = engine if engine.target.gguf == self._base.target.gguf else self._base
                measured = await self._gate(_choice(base, 0.0, self.base_name), _choice(engine, 1.0, target.name))
            except BaseException:
                await engine.stop()
                raise
            self._history.append(self.target)
            self._take(engine)
            return measured

    async def roll_back(self) -> Target:
        """Let what was there before the last swap answer again.

        Returns:
            What answers now.

        Raises:
            Busy: a swap is under way.
            UsageError: there was nothing before.
            EngineError: it does not load any more; nothing has changed.
        """
        async with self._alone():
            if not self._history:
                raise UsageError(f"nothing was there before {self.target.name}")
            engine = await self._start_beside(self._history[-1])
            self._history.pop()
            self._take(engine)
            return self.target

    def kill(self) -> None:
        """End the engines at once; the requests under way are told."""
        self._is_ending = True
        for engine in {self._base, self._trained}:
            engine.kill()

    async def close(self) -> None:
        """End all engines, and with them the requests under way."""
        for task in (*self._watching, *self._draining):
            task.cancel()
        await asyncio.gather(*self._watching, *self._draining, return_exceptions=True)
        for engine in {self._base, self._trained}:
            await engine.stop()

    def _alone(self) -> asyncio.Lock:
        if self._swapping.locked():
            raise Busy("another swap is under way: try again when it has ended")
        return self._swapping

    async def _start_beside(self, target: Target) -> ServedEngine:
        while len(self._draining) >= MAX_DRAINING:
            await asyncio.wait(self._draining, return_when=asyncio.FIRST_COMPLETED)
        return await self._start(target)

    def _take(self, engine: ServedEngine) -> None:
        """Let an engine answer from now on; those that no name leads to drain."""
        before = {self._base, self._trained}
        self._trained = engine
        if engine.target.gguf == self._base.target.gguf:
            self._base = engine
        self._watch(engine)
        for old in before - {self._base, self._trained}:
            _keep(self._draining, _drain(old))

    def _watch(self, engine: ServedEngine) -> None:
        _keep(self._watching, self._restart_when_ended(engine))

    async def _restart_when_ended(self, engine: ServedEngine) -> None:
        """Start an engine again whose process ended by itself, such as one that the system killed for memory."""
        restarts, clock = 0, asyncio.get_running_loop()
        while True:
            started = clock.time()
            await engine.wait_ended()
            restarts = 1 if clock.time() - started > STABLE_SECONDS else restarts + 1
            if self._is_ending or engine not in (self._base, self._trained):
                return
            try:
                if restarts > MAX_RESTARTS:
                    raise UsageError(f"{engine.target.name}: its engine ended {restarts} times in a row: see above")
                restarted = await self._start(engine.target)
            except BuleyeanError as error:
                if not self.failed.done():
                    self.failed.set_result(error)
                return
            if engine not in (self._base, self._trained):  # a swap was faster
                await restarted.stop()
                return
            self._base = restarted if self._base is engine else self._base
            self._trained = restarted if self._trained is engine else self._trained
            _keep(self._draining, _drain(engine))
            engine = restarted


async def _drain(engine: ServedEngine) -> None:
    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(engine.wait_idle(), DRAIN_SECONDS)
    finally:
        await engine.stop()


def _choice(engine: ServedEngine, scale: float, model: str) -> Choice:
    fields = {} if engine.target.adapter is None else {"lora": [{"id": 0, "scale": scale}]}
    return Choice(engine, fields, model, "base" if scale == 0 else engine.target.name)


def _keep(tasks: set[asyncio.Task[None]], work: Any) -> None:
    """Run a task, which nobody else holds on to."""
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
