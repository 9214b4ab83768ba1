"""Conversations, answers, rejections, batches, imports and runs, in one SQLite file.

Every method that writes returns after the write is on disk. What clients send carries a name of theirs (`uid`), so
that sending it again after a broken connection changes nothing.
"""

from __future__ import annotations

from pathlib import Path

from buleyean_rl.void.store.batches import Batches
from buleyean_rl.void.store.conversations import Conversations, TurnSettings
from buleyean_rl.void.store.database import MAX_INTEGER, Database, Row
from buleyean_rl.void.store.imports import ImportedFile, Imports
from buleyean_rl.void.store.rejections import Rejections
from buleyean_rl.void.store.runs import Runs
from buleyean_rl.void.store.settings import Settings

__all__ = [
    "MAX_INTEGER",
    "Batches",
    "Conversations",
    "Database",
    "ImportedFile",
    "Imports",
    "Rejections",
    "Row",
    "Runs",
    "Settings",
    "Store",
    "TurnSettings",
]


class Store:
    """The file, for any number of threads.

    Args:
        path: made if it does not exist; see `Database`.

    Attributes:
        database: the file itself.
        conversations: see `Conversations`.
        rejections: see `Rejections`.
        batches: see `Batches`.
        imports: see `Imports`.
        runs: see `Runs`.
        settings: see `Settings`.
    """

    def __init__(self, path: Path) -> None:
        self.database = Database(path)
        self.conversations = Conversations(self.database)
        self.rejections = Rejections(self.database)
        self.batches = Batches(self.database, self.conversations, self.rejections)
        self.imports = Imports(self.database)
        self.runs = Runs(self.database)
        self.settings = Settings(self.database)

    @property
    def changes(self) -> int:
        """Counts writes: pages poll it."""
        return self.database.changes

    def close(self) -> None:
        """Close the file."""
        self.database.close()
