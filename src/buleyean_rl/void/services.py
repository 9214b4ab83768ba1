"""What the routes work on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request

from buleyean_rl.void.answering import Answering
from buleyean_rl.void.files import ModelFiles
from buleyean_rl.void.importing import Importer
from buleyean_rl.void.models import Models
from buleyean_rl.void.store import Store
from buleyean_rl.void.timing import LoadingClock
from buleyean_rl.void.training import Training


@dataclass(frozen=True)
class Void:
    """The parts of the server.

    Args:
        store: of everything that happened.
        models: who answers.
        answering: answers under way.
        training: the run under way, if any.
        files: what people take with them.
        importer: reads uploaded files.
        one_import: held by the file that is being read.
    """

    store: Store
    models: Models
    answering: Answering
    training: Training
    files: ModelFiles
    importer: Importer
    one_import: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    @property
    def folder(self) -> Path:
        """The folder of the store and the runs."""
        return self.store.database.path.parent


class Loading:
    """The parts of the server, once its models are loaded.

    Args:
        what: is being loaded.

    Attributes:
        clock: how far; None where nobody knows.
        void: None until it is loaded.
        closing: whether the server ends, so that streams end.
    """

    def __init__(self, what: str) -> None:
        self.what, self.closing = what, False
        self.clock: LoadingClock | None = None
        self.void: Void | None = None


def loading(request: Request) -> Loading:
    """What a request has come to, which may be loading still."""
    found = request.app.state.loading
    assert isinstance(found, Loading)
    return found


def services(request: Request) -> Void:
    """The parts of the server that a request has come to; 503 while they are loading."""
    found = loading(request)
    if found.void is None:
        raise HTTPException(503, f"{found.what} is being loaded: try again in a moment")
    return found.void


async def in_thread(work: Callable[..., Any], *values: Any, missing: str = "") -> Any:
    """Do what takes a while in another thread.

    Args:
        work: to do.
        values: for it.
        missing: what there is not, where it returns None or False: 404.
    """
    found = await run_in_threadpool(work, *values)
    if missing and (found is None or found is False):
        raise HTTPException(404, f"there is no such {missing}")
    return found
