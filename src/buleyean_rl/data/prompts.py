"""Files of prompts: a line each, or rows of JSON, a table or Parquet."""

from __future__ import annotations

from pathlib import Path

from buleyean_rl.data.importers.expand import FILE_SUFFIXES
from buleyean_rl.data.importers.names import simplify_names
from buleyean_rl.data.importers.protocol import Discards
from buleyean_rl.data.importers.rows import OTHER_PROMPT_KEYS, PROMPT_KEYS, pick_prompt
from buleyean_rl.data.importers.sources import open_rows
from buleyean_rl.data.records import Prompt, Row, handle_bad_row, parse_prompt, read_text
from buleyean_rl.data.records.values import fail
from buleyean_rl.errors import RecordError


def read_prompts(path: Path) -> list[Prompt]:
    """The distinct prompts of a file: a line each, or a row with `prompt` or `messages` each.

    Args:
        path: `.jsonl`, `.json`, `.csv`, `.parquet` and the like for rows, anything else for lines.

    Raises:
        RecordError: it cannot be read, or holds no prompt; or a prompt is more than text.
    """
    prompts = []
    if path.suffix.lower() in FILE_SUFFIXES and path.suffix.lower() != ".txt":
        for line, row in open_rows(str(path)):
            try:
                prompts.append(_read_row(row))
            except RecordError as error:
                handle_bad_row(error, path, line, skip_bad=False)
    else:
        prompts = [parse_prompt(line.strip()) for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise RecordError("holds no prompt: give one a line", path=path)
    return list(dict.fromkeys(prompts))


def _read_row(row: Row) -> Prompt:
    discards = Discards()
    if row.keys().isdisjoint((*PROMPT_KEYS, *OTHER_PROMPT_KEYS)):
        row = simplify_names(row)
    prompt = parse_prompt(pick_prompt(row, discards))
    if discards.context_dropped:
        keys = ", ".join(discards.context_dropped)
        fail(f"has {keys}, which no prompt can hold: remove it, or write it into the prompt")
    return prompt
