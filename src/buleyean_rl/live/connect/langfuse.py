"""Langfuse: the traces that were scored since the last visit, by its public API."""

from __future__ import annotations

import asyncio
import base64
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.endpoint_client import read_key
from buleyean_rl.live.connect.api import Api, Missing, Page
from buleyean_rl.live.connect.source import Cursor, Fetched, before, is_from, new_rows

VARIABLE, PUBLIC_VARIABLE = "LANGFUSE_SECRET_KEY", "LANGFUSE_PUBLIC_KEY"
SCORES = ("api/public/v2/scores", "api/public/scores")  # the newer first
PAGE_ITEMS = 100


class Langfuse:
    """A project of Langfuse.

    Args:
        url: of its server.
        key: the project's secret key; the public one is in the environment.
    """

    format = "traces"

    def __init__(self, url: str, key: str) -> None:
        public = read_key(PUBLIC_VARIABLE)
        if not public:
            raise UsageError(f"{url} needs two keys: set {PUBLIC_VARIABLE}, too")
        basic = base64.b64encode(f"{public}:{key}".encode()).decode()
        self._api = Api(url, key, VARIABLE, {"Authorization": f"Basic {basic}"})

    async def fetch(self, rows: Path, cursor: Cursor) -> Fetched:
        """See `Source.fetch`."""
        cursor = cursor if rows.exists() else {}
        try:
            scores = await self._scores(cursor.get("timestamp"))
            fresh = [score for score in scores if score["id"] not in cursor.get("ids", ())]
            if not fresh:
                return Fetched(None, rows)
            begin = before(max(score["timestamp"] for score in scores))
            ids = [score["id"] for score in scores if is_from(score["timestamp"], begin)]
            traces = list(dict.fromkeys(score["traceId"] for score in fresh if score.get("traceId")))
        except (LookupError, TypeError, ValueError):
            raise self._api.fail(SCORES[0], "a score has no id, timestamp or traceId") from None
        with new_rows(rows) as new:
            for first in range(0, len(traces), PAGE_ITEMS):
                page = traces[first : first + PAGE_ITEMS]
                for trace, row in zip(page, await asyncio.gather(*map(self._trace, page)), strict=True):
                    if row is not None:
                        new.add(trace, row)
            new.join(rows)
        return Fetched({"timestamp": begin, "ids": ids}, rows)

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    async def _trace(self, identity: str) -> Any:
        """A trace with its scores; None where it was deleted since."""
        path = f"api/public/traces/{quote(identity, safe='')}"
        try:
            return await self._api.get(path)
        except Page:
            raise self._api.fail(path, "its reply is a page") from None
        except Missing:
            return None

    async def _scores(self, since: str | None) -> list[dict[str, Any]]:
        """All scores from a time on."""
        for path in SCORES:
            scores: list[dict[str, Any]] = []
            try:
                for number in count(1):
                    query = {"page": number, "limit": PAGE_ITEMS} | ({"fromTimestamp": since} if since else {})
                    page = await self._api.get(path, query)
                    scores += page["data"]
                    if number >= page["meta"]["totalPages"] or not page["data"]:
                        return scores
            except Missing:
                continue
        raise self._api.fail(SCORES[0], "it lists no scores")
