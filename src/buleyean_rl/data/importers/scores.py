"""Whether a score, a label or a word is a rejection."""

from __future__ import annotations

import math
from typing import Any

from buleyean_rl.data.records.values import describe, fail

GOOD_WORDS = {"true", "yes", "good", "up", "like", "liked", "positive", "accept", "accepted", "pass", "👍", "correct"}
BAD_WORDS = {
    *("false", "no", "bad", "down", "dislike", "disliked", "negative", "reject", "rejected", "fail", "👎"),
    "incorrect",
}


def is_rejection(value: Any, below: float, name: str) -> bool:
    """Whether a score, a label or a word is a rejection.

    Args:
        value: a number, true or false, or a word such as `down`; numbers may be texts.
        below: a number below it rejects.
        name: what to call it in an error.

    Raises:
        RecordError: it is none of these.
    """
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        word = value.strip().lower().replace("thumbs_", "").replace("thumbs ", "").replace("thumbs-", "")
        if word in GOOD_WORDS | BAD_WORDS:
            return word in BAD_WORDS
        try:
            value = float(word)
        except ValueError:
            fail(f"{name} is {value.strip()[:40]!r}: it must be a number, or a word such as up, down, good or bad")
    if not isinstance(value, int | float) or not math.isfinite(value):
        fail(f"{name} is {describe(value)}: it must be a finite number, true or false, or a word such as up or down")
    return value < below
