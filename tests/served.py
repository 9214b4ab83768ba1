"""A server in the test's own event loop, with tiny models, and clients of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from buleyean_rl.live.app import make_app
from buleyean_rl.live.engine import ServedEngine, Size
from buleyean_rl.live.gate import check
from buleyean_rl.live.serving import Choice, Serving
from buleyean_rl.live.target import Target
from buleyean_rl.web.access import LOOPBACK
from buleyean_rl.web.listener import Server, listen

SIZE = Size(context=256, slots=4, threads=1)
TOKENS = 12
GREEDY = {"max_tokens": TOKENS, "temperature": 0, "grammar": "root ::= [a-zA-Z ]+"}  # letters, whatever the weights say
Row = dict[str, Any]


@dataclass
class Served:
    """A running server.

    Args:
        serving: who answers.
        client: asks it.
        started: the targets of all engines that were started.
        gate: decides what may be swapped in.
    """

    serving: Serving
    client: httpx2.AsyncClient
    started: list[Target] = field(default_factory=list)

    async def ask(self, prompt: str, **fields: Any) -> httpx2.Response:
        body = {"messages": [{"role": "user", "content": prompt}]} | GREEDY | fields
        return await self.client.post("/v1/chat/completions", json=body)

    async def hear(self, prompt: str, **fields: Any) -> tuple[str, str, list[Row]]:
        """The answer as a stream: its text, which run gave it, and its events."""
        body = {"messages": [{"role": "user", "content": prompt}], "stream": True} | GREEDY | fields
        events = []
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            assert reply.status_code == 200, await reply.aread()
            async for line in reply.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    events.append(json.loads(line.removeprefix("data: ")))
        assert not [event for event in events if "error" in event], events
        deltas = [choice["delta"] for event in events for choice in event["choices"]]
        return "".join(delta.get("content") or "" for delta in deltas), reply.headers["X-Buleyean-Run"], events


async def no_gate(_base: Choice, _trained: Choice) -> Mapping[str, Any]:
    return {}


@asynccontextmanager
async def served(first: Target, *, gate: Any = check, token: str | None = None, **parts: Any) -> AsyncIterator[Served]:
    """A server; its engines are gone at the end."""
    started: list[Target] = []

    async def start(target: Target) -> ServedEngine:
        started.append(target)
        return await ServedEngine.start(target, SIZE)

    serving = Serving("tiny", await start(first), start, gate)
    app = make_app(serving, token=token, hosts=LOOPBACK if token is None else None, **parts)
    front = Server(app, 1, lambda: None)
    with listen("127.0.0.1", 0) as listener:
        running = asyncio.ensure_future(front._serve([listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
                yield Served(serving, client, started)
        finally:
            front.should_exit = True
            await running
            await serving.close()


def tiny_target(folder: Path, name: str, **lora: Any) -> Target:
    """A tiny model with a random adapter, as files; without its adapter where there are no settings of one."""
    from buleyean_rl.gguf import export_gguf, write_adapter
    from tiny import tiny_llama, tiny_run, tiny_tokenizer

    base = folder / "tiny.gguf"
    if not base.exists():
        export_gguf(tiny_llama(tiny_tokenizer()), tiny_tokenizer(), base, "f32", gate=False)
    if not lora:
        return Target(name, "tiny", str(base))
    adapter = folder / f"{name}.gguf"
    write_adapter(tiny_run(folder / name, base, **lora), adapter, "f32", gate=False)
    return Target(name, "tiny", str(base), str(adapter))
