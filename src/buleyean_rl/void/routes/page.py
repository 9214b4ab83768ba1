"""The page itself: files that tell nothing, so that they need no token.

GET /, and the scripts and styles
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

PAGE = Path(__file__).parents[1] / "page"
FILES = sorted(path.name for path in PAGE.iterdir() if path.suffix in (".js", ".css", ".svg"))


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def serve(_request: Request) -> Response:
        return FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

    return serve


ROUTES = [
    Route("/", _file("index.html")),
    *(Route(f"/{name}", _file(name)) for name in FILES),
]
