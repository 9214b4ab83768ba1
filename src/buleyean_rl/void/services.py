"""What the routes work on."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request

from buleyean_rl.void.answering import Answering
from buleyean_rl.void.importing import Importer
from buleyean_rl.void.store import Store
from buleyean_rl.void.training import Training


@dataclass(frozen=True)
class Void:
    """The parts of the server.

    Args:
        store: of everything that happened.
        answering: the models.
        training: the run under way, if any.
        importer: reads uploaded files.
        one_import: held by the import that is being read.
    """

    store: Store
    answering: Answering
    training: Training
    importer: Importer
    one_import: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    @property
    def folder(self) -> Path:
        """The folder of the store and the runs."""
        return self.store.database.path.parent


def services(request: Request) -> Void:
    """The parts of the server that a request has come to."""
    void = request.app.state.void
    assert isinstance(void, Void)
    return void
