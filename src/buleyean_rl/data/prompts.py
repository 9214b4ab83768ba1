"""Files of prompts: a line each, or JSON Lines."""

from __future__ import annotations

from pathlib import Path

from buleyean_rl.data.records import Prompt, handle_bad_row, parse_prompt, pick, read_rows, read_text
from buleyean_rl.errors import RecordError


def read_prompts(path: Path) -> list[Prompt]:
    """The distinct prompts of a file: a line each, or a JSON object with `prompt` or `messages` a line.

    Args:
        path: `.jsonl` for objects, anything else for lines.

    Raises:
        RecordError: it cannot be read, or holds no prompt.
    """
    prompts = []
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        for line, row in read_rows(path):
            try:
                prompts.append(parse_prompt(pick(row, "prompt", "messages")))
            except RecordError as error:
                handle_bad_row(error, path, line, skip_bad=False)
    else:
        prompts = [parse_prompt(line.strip()) for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise RecordError("holds no prompt: give one a line", path=path)
    return list(dict.fromkeys(prompts))
