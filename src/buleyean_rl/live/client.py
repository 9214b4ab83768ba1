"""What is said to a running server from the command line."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from buleyean_rl.errors import EngineError, UsageError
from buleyean_rl.inference.endpoint_client import EndpointClient, TransientError, parse_address
from buleyean_rl.inference.endpoint_reply import error_message
from buleyean_rl.system.wording import one_line
from buleyean_rl.web.access import LOOPBACK_HOSTS

MAX_REPLY = 64 << 10
SECONDS = 3600.0  # a base model may have to be written first


def swap(url: str, key: str, run: str | None) -> dict[str, Any]:
    """Let a run answer at a running server.

    Args:
        url: of the server.
        key: of the server; "" for none.
        run: a run folder, a model or a GGUF file; None for what was there before the last swap.

    Returns:
        What answers now, and what the gate measured.

    Raises:
        UsageError: the URL is none, or the server takes no such request.
        EngineError: the server does not answer, or has not swapped it in; it says why.
    """
    if run is None:
        request: dict[str, Any] = {"rollback": True}
    else:
        path = Path(os.path.expanduser(run))
        request = {"run": str(path.absolute()) if path.exists() else run}
    address = parse_address(url).url.removesuffix("/v1")
    return asyncio.run(_post(address, key, request))


async def _post(url: str, key: str, request: dict[str, Any]) -> dict[str, Any]:
    # a proxy of the environment is not for this machine
    client = EndpointClient(url, key, 1, is_own=urlsplit(url).hostname in LOOPBACK_HOSTS)
    try:
        reply = await client.send("POST", "buleyean/swap", request, MAX_REPLY, SECONDS)
    except TransientError as problem:
        raise EngineError(f"{url}: {problem}: is `buleyean serve` there?") from None
    finally:
        await client.close()
    if reply.status == 200:
        with suppress(ValueError, RecursionError):
            answer = json.loads(reply.body)
            if isinstance(answer, dict) and {"run", "models", "gate"} <= answer.keys():
                return answer
        raise EngineError(f"{url}: its reply is none of `buleyean serve`: name its address with --url")
    said = one_line(client.redact(error_message(reply.body))) or f"{url}: status {reply.status}"
    if reply.status in (401, 404):
        raise UsageError(f"{url}: {said}")
    raise EngineError(said)
