"""Files of prompts: a line each, or JSON Lines."""

from __future__ import annotations

from pathlib import Path

from buleyean_rl.data.records import Prompt, parse_prompt, pick, read_rows, reject_row
from buleyean_rl.errors import RecordError


def read_prompts(path: Path) -> list[Prompt]:
    """The distinct prompts of a file: a line each, or a JSON object with `prompt` or `messages` a line.

    Args:
        path: `.jsonl` for objects, anything else for lines.

    Raises:
        RecordError: it cannot be read, or holds no prompt.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        found = []
        for line, row in read_rows(path):
            try:
                found.append(parse_prompt(pick(row, "prompt", "messages")))
            except RecordError as error:
                reject_row(error, path, line, False)
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecordError("is not UTF-8 text: convert the file to UTF-8", path=path) from error
        except OSError as error:
            raise RecordError(f"cannot be read: {error.strerror or error}", path=path) from error
        found = [parse_prompt(line.strip()) for line in text.splitlines() if line.strip()]
    if not found:
        raise RecordError("holds no prompt: give one a line", path=path)
    return list(dict.fromkeys(found))
