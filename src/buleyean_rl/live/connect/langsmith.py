"""LangSmith: the runs that got feedback since the last visit, each with all of its feedback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag

from buleyean_rl.errors import UsageError
from buleyean_rl.live.connect.api import Api, Missing
from buleyean_rl.live.connect.source import Cursor, Fetched, before, is_from, new_rows

VARIABLE = "LANGSMITH_API_KEY"
FEEDBACK, RUNS, PROJECTS = "api/v1/feedback", "api/v1/runs/query", "api/v1/sessions"
PAGE_ITEMS = 100
Feedback = dict[str, Any]


class LangSmith:
    """A project of LangSmith.

    Args:
        url: of its server; `#name` at its end names the project, without it all of them.
        key: of the workspace.
    """

    format = "traces"

    def __init__(self, url: str, key: str) -> None:
        url, self._project = urldefrag(url)
        self._api = Api(url, key, VARIABLE, {"X-Api-Key": key})

    async def fetch(self, rows: Path, cursor: Cursor) -> Fetched:
        """See `Source.fetch`."""
        query: list[tuple[str, str | int]] = [("has_score", "true")]
        cursor = cursor if rows.exists() else {}
        if cursor:
            query.append(("min_created_at", cursor["created_at"]))
        try:
            if self._project:
                query.append(("session", await self._find_project()))
            feedback = await self._list(query)
            fresh = [item for item in feedback if item["id"] not in cursor.get("ids", ())]
            if not fresh:
                return Fetched(None, rows)
            begin = before(max(item["created_at"] for item in feedback))
            ids = [item["id"] for item in feedback if is_from(item["created_at"], begin)]
            runs = list(dict.fromkeys(item["run_id"] for item in fresh if item.get("run_id")))
            with new_rows(rows) as new:
                for first in range(0, len(runs), PAGE_ITEMS):
                    for run in await self._runs(runs[first : first + PAGE_ITEMS]):
                        new.add(run["id"], run)
                new.join(rows)
        except Missing as missing:
            raise self._api.fail(str(missing).partition("?")[0], "it has no such path") from None
        except (LookupError, TypeError, ValueError):
            raise self._api.fail(FEEDBACK, "feedback has no id, created_at or run_id") from None
        return Fetched({"created_at": begin, "ids": ids}, rows)

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    async def _find_project(self) -> str:
        projects = await self._api.get(PROJECTS, {"name": self._project})
        if not projects:
            raise UsageError(f"{self._api.url} has no project {self._project!r}")
        return str(projects[0]["id"])

    async def _list(self, query: Sequence[tuple[str, str | int]]) -> list[Feedback]:
        items: list[Feedback] = []
        while True:
            page = await self._api.get(FEEDBACK, [*query, ("limit", PAGE_ITEMS), ("offset", len(items))])
            if page and items and page[-1]["id"] == items[-1]["id"]:
                raise self._api.fail(FEEDBACK, "its pages are all the same")
            items += page
            if len(page) < PAGE_ITEMS:
                return items

    async def _runs(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Runs, each with its feedback in place of the statistics of it."""
        runs = (await self._api.post(RUNS, {"id": list(ids), "limit": PAGE_ITEMS}))["runs"]
        feedback = await self._list([("run", run["id"]) for run in runs])
        return [
            {name: value for name, value in run.items() if name != "feedback_stats"}
            | {"feedback": [item for item in feedback if item["run_id"] == run["id"]]}
            for run in runs
        ]
