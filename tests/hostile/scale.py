"""How many attacks a test makes: all of them by `make hostile`, a twentieth otherwise."""

from __future__ import annotations

import os


def runs(number: int) -> int:
    """`number` at full scale, a twentieth of it (at least 1) otherwise."""
    return number if os.environ.get("BULEYEAN_HOSTILE") == "1" else max(1, number // 20)
