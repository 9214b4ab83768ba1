"""Names of columns as people write them: `Prompt`, `ANSWER`, `Rating (1 to 5)`, with line ends in them."""

from __future__ import annotations

import re
from collections import Counter

from buleyean_rl.data.records import Row

_REMARK = re.compile(r"\s*[(\[][^()\[\]]*[)\]]\s*$")


def simplify_name(name: str) -> str:
    """A name in small letters, with `_` for spaces and hyphens, and without a remark in brackets at its end."""
    return re.sub(r"[\s\-]+", "_", _REMARK.sub("", name.strip()).rstrip(" :*").casefold())


def simplify_names(row: Row) -> Row:
    """A row with simplified names, but for those that would be the same."""
    numbers = Counter(map(simplify_name, row))
    return {name if numbers[simplify_name(name)] > 1 else simplify_name(name): value for name, value in row.items()}
