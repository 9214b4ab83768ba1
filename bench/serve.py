"""Swaps at real scale: clients that stream without pause while two runs take turns.

    python bench/serve.py RUN OTHER [SWAPS] [CLIENTS]      runs of the bundled model

Prints how many answers came, how soon their first token, how long a swap took. A request that fails, or an answer that
is neither run's own, ends it.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from buleyean_rl.live.target import Target, TargetQuery, find_target  # noqa: E402
from served import Served, served  # noqa: E402

PROMPT = "Give me two tips for sleeping better."
TOKENS = 48


async def hear(server: Served) -> tuple[str, str, float]:
    """A greedy answer: its text, its run, seconds to its first token."""
    body = {"messages": [{"role": "user", "content": PROMPT}], "stream": True, "max_tokens": TOKENS, "temperature": 0}
    started, first, text = time.perf_counter(), 0.0, ""
    async with server.client.stream("POST", "/v1/chat/completions", json=body, timeout=600) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                first = first or (time.perf_counter() - started if piece else 0.0)
                text += piece
        return text, reply.headers["X-Buleyean-Run"], first


def agreement(text: str, expected: str) -> float:
    """Share of a text that is as expected, from its beginning: in a batch the last digits of numbers are others."""
    pairs = zip(text, expected, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(expected)) / len(expected)


async def run(targets: list[Target], swaps: int, clients: int) -> None:
    """Measure, and print."""
    async with served(targets[1]) as server:
        quiet, expected = [], {}
        for target in targets:
            await server.serving.swap(target)
            text, name, first = await hear(server)
            expected[name] = text
            quiet.append(first)
        print(f"quiet: first token after {min(quiet):.2f} s")
        is_over, firsts, ends, seconds = False, list[float](), list[float](), list[float]()

        async def stream_on() -> None:
            while not is_over:
                text, name, first = await hear(server)
                firsts.append(first)
                ends.append(agreement(text, expected[name]))

        streams = [asyncio.ensure_future(stream_on()) for _ in range(clients)]
        for number in range(swaps):
            started = time.perf_counter()
            await server.serving.swap(targets[number % 2])
            seconds.append(time.perf_counter() - started)
            print(f"swap {number + 1}: {seconds[-1]:.1f} s, {len(firsts)} answers so far", flush=True)
        is_over = True
        await asyncio.gather(*streams)
    print(f"{len(firsts)} answers by {clients} clients during {swaps} swaps: none failed")
    print(f"first token: median {statistics.median(firsts):.2f} s, most {max(firsts):.2f} s")
    print(f"a swap: median {statistics.median(seconds):.1f} s, most {max(seconds):.1f} s")
    print(f"as the run alone: {sum(end == 1 for end in ends)} answers; of the others {min(ends):.0%} at least")


async def main(names: list[str], swaps: int = 20, clients: int = 8) -> None:
    """Find the runs' files, and measure."""
    await run([await find_target(TargetQuery(name)) for name in names], swaps, clients)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:3], *map(int, sys.argv[3:5])))
