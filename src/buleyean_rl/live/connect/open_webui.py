"""Open WebUI: the feedback that its page collects, with the chats as they were then; of old versions, rated chats.

All of it is fetched where anything has changed: a rating that was taken back is not in it any more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from buleyean_rl.live.connect.api import Api, Missing
from buleyean_rl.live.connect.source import Cursor, Fetched
from buleyean_rl.system.files import atomic_path

VARIABLE = "OPENWEBUI_API_KEY"
FEEDBACK = "api/v1/evaluations/feedbacks"
EXPORTS = (f"{FEEDBACK}/all/export", "api/v1/chats/all/db", "api/v1/chats/all")  # the last: chats of the key's owner


class OpenWebUI:
    """A server of Open WebUI.

    Args:
        url: of its page.
        key: of an administrator.
    """

    format = "openwebui"

    def __init__(self, url: str, key: str) -> None:
        self._api = Api(url, key, VARIABLE)

    async def fetch(self, rows: Path, cursor: Cursor) -> Fetched:
        """See `Source.fetch`."""
        newest = await self._newest()
        if newest is not None and newest == cursor and rows.exists():
            return Fetched(None, rows)
        with atomic_path(rows) as unfinished:
            for path in EXPORTS:
                try:
                    await self._api.download(path, unfinished)
                    return Fetched(newest or {"export": path}, rows)
                except Missing:
                    continue
            raise self._api.fail(EXPORTS[0], "it exports neither feedback nor chats")

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    async def _newest(self) -> Cursor | None:
        """By what a change shows: the latest feedback, and how many there are; None where an old version tells not."""
        path = f"{FEEDBACK}/list"
        try:
            page: Any = await self._api.get(path, {"order_by": "updated_at", "direction": "desc", "page": 1})
        except Missing:
            return None
        try:
            latest = max((item["updated_at"] for item in page["items"]), default=0)
            return {"updated_at": latest, "total": page["total"]}
        except (LookupError, TypeError):
            raise self._api.fail(path, "its page of feedback has no items with updated_at, or no total") from None
