"""What is set for the whole page: small values by their names."""

from __future__ import annotations

import json
from typing import Any

from buleyean_rl.void.store.database import Database


class Settings:
    """The table `settings`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, name: str, default: Any = None) -> Any:
        """A value; the default where it was never set."""
        row = self._database.one("SELECT value FROM settings WHERE name = ?", name)
        return default if row is None else json.loads(row["value"])

    def set(self, name: str, value: Any) -> None:
        """Set a value, fit for JSON."""
        with self._database.writing() as db:
            db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, json.dumps(value)))
