"""The application: routes, access control, and what an error is answered with.

State that must not be lost is the store's, never a route's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from buleyean_rl.errors import BuleyeanError
from buleyean_rl.system.disk import full_disk
from buleyean_rl.void.routes import batches, conversations, files, imports, models, page, rejections, runs, state, turns
from buleyean_rl.void.services import Loading
from buleyean_rl.web.access import AccessControl, Header

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors "
)
PARTS = (page, state, conversations, turns, rejections, batches, imports, runs, models, files)
ROUTES = [route for part in PARTS for route in part.ROUTES]


def make_app(
    loading: Loading, *, token: str | None, hosts: frozenset[str] | None, on_shutdown: Callable[[], None]
) -> Any:
    """The application, guarded.

    Args:
        loading: what it works on.
        token: must be shown to `/api`; None for nobody but this machine.
        hosts: names under which the page may be asked for; None for any.
        on_shutdown: called at the end.
    """
    app = Starlette(
        routes=ROUTES,
        exception_handlers={
            HTTPException: _refuse,
            BuleyeanError: _say,
            OSError: _say_full_disk,
            sqlite3.OperationalError: _say_busy,
            ClientDisconnect: _say,
        },
    )
    app.router.redirect_slashes = False  # it would decode whatever stands in the query
    app.state.loading = loading
    return guard(app, token=token, hosts=hosts, on_shutdown=on_shutdown)


def guard(app: Any, *, token: str | None, hosts: frozenset[str] | None, on_shutdown: Callable[[], None]) -> Any:
    """An application with the page's access control. See `make_app`."""
    ancestors = "'none'" if token is None else "'self' https://huggingface.co"  # a Space lives in a frame there
    headers: list[Header] = [(b"content-security-policy", (POLICY + ancestors).encode())]
    return AccessControl(app, token=token, hosts=hosts, guards=_is_interface, headers=headers, on_shutdown=on_shutdown)


def _is_interface(path: str) -> bool:
    return path.startswith("/api/")


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


async def _say(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


async def _say_full_disk(_request: Request, error: Exception) -> Response:
    if full_disk(error) is None:
        raise error
    problem = "the server's disk is full: nothing was changed; free some space, then try again"
    return JSONResponse({"error": problem}, status_code=507)


async def _say_busy(_request: Request, error: Exception) -> Response:
    problem = f"the store cannot be used now ({error}): nothing was changed; try again"
    return JSONResponse({"error": problem}, status_code=503)
