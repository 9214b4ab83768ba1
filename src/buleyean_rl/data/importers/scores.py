"""Whether a score, a label or a word is a rejection, or no rating at all."""

from __future__ import annotations

import math
import re
from typing import Any

from buleyean_rl.data.records.values import describe, fail

# fmt: off
GOOD_WORDS = frozenset([
    "true", "yes", "y", "good", "great", "up", "like", "liked", "love", "positive", "pos", "accept", "accepted",
    "approve", "approved", "pass", "passed", "correct", "right", "helpful", "desirable", "chosen", "👍", "✅", "❤",
])
BAD_WORDS = frozenset([
    "false", "no", "n", "bad", "poor", "down", "dislike", "disliked", "hate", "negative", "neg", "reject",
    "rejected", "disapprove", "disapproved", "fail", "failed", "incorrect", "wrong", "unhelpful", "nothelpful",
    "undesirable", "👎", "❌",
])
NO_RATING = frozenset([
    "", "-", "--", "---", "—", "–", "?", "n/a", "na", "#n/a", "nan", "none", "null", "nil", "unrated", "notrated",
    "norating", "unknown", "skip", "skipped", "pending", "undefined",
])
# fmt: on
DEFAULT_BELOW = 0.5
# Skin tones, the selectors of an emoji's look, and the joiner between emoji.
_EMOJI_LOOK = re.compile("[\U0001f3fb-\U0001f3ff\ufe0e\ufe0f\u200d]")


def is_rejection(value: Any, below: float | None, name: str) -> bool | None:
    """Whether a score, a label or a word is a rejection; None where it stands for no rating.

    Args:
        value: a number, true or false, or a word such as `down`; numbers may be texts.
        below: a number below it rejects; None: numbers are labels between -1 and 1, and below 0.5 reject.
        name: what to call it in an error.

    Raises:
        RecordError: it is none of these; or a number of a scale, without `below`.
    """
    if value is None or isinstance(value, bool):
        return None if value is None else not value
    if isinstance(value, str):
        word = simplify_word(value)
        if word in NO_RATING:
            return None
        if word in GOOD_WORDS or word in BAD_WORDS:
            return word in BAD_WORDS
        value = _parse_number(value, name)
    if not isinstance(value, int | float):
        fail(f"{name} is {describe(value)}: it must be a number, true or false, or a word such as up or down")
    if isinstance(value, float) and math.isnan(value):  # how tables of numbers write an empty cell
        return None
    if isinstance(value, float) and math.isinf(value):
        fail(f"{name} is infinite: it must be a finite number")
    if below is None and not -1 <= value <= 1:
        fail(f"{name} is {describe(value)}: of a scale say which scores reject, such as --below 3 for 1 and 2")
    return value < (DEFAULT_BELOW if below is None else below)


def is_rating_word(value: Any) -> bool:
    """Whether a value is a word that rates."""
    return isinstance(value, str) and simplify_word(value) in GOOD_WORDS | BAD_WORDS


def simplify_word(value: str) -> str:
    """A rating's word without case, separators, an emoji's skin and what says only that it is a thumb."""
    word = _EMOJI_LOOK.sub("", value.strip()).casefold().strip(":")
    if word in NO_RATING:
        return word
    letters = re.sub(r"[\s_\-]", "", word)
    return re.sub(r"^thumbs?(?=up|down)", "", letters)


def _parse_number(text: str, name: str) -> float:
    try:
        return float(_EMOJI_LOOK.sub("", text.strip()).strip(":").replace(",", "."))
    except ValueError:
        fail(f"{name} is {text.strip()[:40]!r}: it must be a number, or a word such as up, down, good or bad")
