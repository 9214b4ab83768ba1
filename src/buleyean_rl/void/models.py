"""The models that answer: the base, and what runs have made of it, opened when they are asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from buleyean_rl.errors import ModelError, UsageError
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.void.store import Row, Store

BASE = "base"
PAIR = "pair"  # the setting
MAX_OPEN = 4  # models of runs in memory: each has an adapter of its own on the base's weights


@dataclass(frozen=True)
class ServedModel:
    """A model that answers.

    Args:
        key: "base" or "run-N".
        engine: what runs it.
        drawn: what records say of its answers: `policy`, and the `tokenizer` of their token ids.
    """

    key: str
    engine: TransformersEngine
    drawn: Row = field(default_factory=dict)


class Models:
    """The base model, and those of the runs.

    Args:
        store: of the runs.
        base: the base model.
        base_name: for people.
        open_run: opens the model of a run; raises BuleyeanError where it cannot be used.
        problem_of: why a run's model cannot be used; empty if it can.
    """

    def __init__(
        self,
        store: Store,
        base: ServedModel,
        base_name: str,
        open_run: Callable[[Row], ServedModel],
        problem_of: Callable[[Row], str],
    ) -> None:
        self._store, self._open_run, self._problem_of = store, open_run, problem_of
        self.base, self.base_name = base, base_name
        self._lock, self._opened = threading.Lock(), dict[str, ServedModel]()

    def get(self, key: str) -> ServedModel:
        """A model that is open, or is opened.

        Raises:
            ModelError: there is none of that key, or it cannot be used.
        """
        if key == BASE:
            return self.base
        with self._lock:
            if key not in self._opened:
                run = self._run(key)
                if run is None or (problem := self._problem_of(run)):
                    raise ModelError(f"the model {key} cannot be used: {problem if run else 'it was deleted'}")
                while len(self._opened) >= MAX_OPEN:
                    del self._opened[next(iter(self._opened))]
                self._opened[key] = self._open_run(run)
            self._opened[key] = self._opened.pop(key)  # the last to be closed
            return self._opened[key]

    def name(self, key: str) -> str:
        """A model's name, for people."""
        if key == BASE:
            return self.base_name
        run = self._run(key)
        return run["name"] if run else key

    def problem(self, run: Row) -> str:
        """Why a run's model cannot be used; empty if it can."""
        return self._problem_of(run)

    @property
    def pair(self) -> list[str]:
        """Who answers, left to right: one or two keys."""
        keys = self._store.settings.get(PAIR)
        if keys is None:  # of an earlier version: the newest that can be used
            newest = next((run for run in self._store.runs.list() if not self._problem_of(run)), None)
            keys = [BASE] if newest is None else [BASE, key_of(newest["id"])]
        usable = [key for key in keys if key == BASE or ((run := self._run(key)) and not self._problem_of(run))]
        return usable or [BASE]

    def set_pair(self, keys: Sequence[str]) -> None:
        """Choose who answers.

        Raises:
            ModelError: one of them cannot be used.
            UsageError: not one or two different ones.
        """
        if not 1 <= len(keys) <= 2 or len(set(keys)) != len(keys):
            raise UsageError("choose one model, or two different ones")
        for key in keys:
            self.get(key)
        self._store.settings.set(PAIR, list(keys))

    def slots(self, keys: Sequence[str]) -> list[tuple[str, str]]:
        """Models with their names."""
        return [(key, self.name(key)) for key in keys]

    def close(self, key: str) -> None:
        """Forget a run's model."""
        with self._lock:
            self._opened.pop(key, None)

    def _run(self, key: str) -> Row | None:
        number = key.removeprefix("run-")
        return self._store.runs.get(int(number)) if number.isdecimal() and len(number) < 10 else None


def key_of(run: int) -> str:
    """The key of a run's model."""
    return f"run-{run}"
