"""Files of neutral texts: a line each, or JSON Lines."""

from __future__ import annotations

from pathlib import Path

from buleyean_rl.data.records import handle_bad_row, parse_text, read_rows, read_text
from buleyean_rl.errors import RecordError


def read_texts(path: Path, limit: int | None = None) -> tuple[str, ...]:
    """Read the texts of a file.

    Args:
        path: `.jsonl` has objects with `text` (or `content`), any other file a text a line.
        limit: maximum number of texts.

    Raises:
        RecordError: it cannot be read, or has no text.
    """
    texts: list[str] = []
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        for line, row in read_rows(path):
            try:
                texts.append(parse_text(row.get("text", row.get("content")), "text"))
            except RecordError as error:
                handle_bad_row(error, path, line, False)
    else:
        texts = read_text(path).splitlines()
    stripped = tuple(text.strip() for text in texts if text.strip())
    if not stripped:
        raise RecordError("has no text: give one a line, or objects with `text`", path=path)
    return stripped[:limit]
