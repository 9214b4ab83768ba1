"""Tokens that several conversations share: a conversation waits until there is room for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TokenBudget:
    """Hands out tokens; what is held is given back at the end.

    Args:
        total: tokens.
    """

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, tokens: int) -> Iterator[None]:
        """Hold tokens, at most the total, while the context lasts; waits until they are free."""
        tokens = min(tokens, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= tokens)
            self._free -= tokens
        try:
            yield
        finally:
            with self._changed:
                self._free += tokens
                self._changed.notify_all()
