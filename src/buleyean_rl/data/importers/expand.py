"""What people name as sources, as the files in it: one list, whatever the order in which they are named."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path

from buleyean_rl.data.importers.arrow_files import is_saved_dataset
from buleyean_rl.errors import RecordError

PACKED_SUFFIXES = (".gz", ".zst")
TABLE_SUFFIXES = (".csv", ".tsv", ".tab")
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", *TABLE_SUFFIXES, ".parquet", ".arrow", ".feather")
FILE_SUFFIXES = (*DATA_SUFFIXES, *PACKED_SUFFIXES, ".txt")


def expand_sources(names: Sequence[str]) -> list[str]:
    """The files, data sets and folders of bad answers that are meant, each once, in the order of their paths.

    Args:
        names: of files, folders, data sets on the Hub; or patterns such as `logs/*.jsonl.gz`, `**` for any folder.

    Raises:
        RecordError: a pattern matches nothing.
    """
    paths = {os.path.realpath(path) if os.path.exists(path) else path: path for path in _expand_all(names)}
    return [paths[real] for real in sorted(paths)]


def is_hub_id(source: str) -> bool:
    """Whether a source means owner/name on the Hub: it looks like one, and there is no folder `owner`."""
    is_owner_and_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) is not None
    return is_owner_and_name and Path(source).suffix.lower() not in FILE_SUFFIXES and not Path(source).parent.exists()


def _expand_all(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if has_magic(name) and not os.path.exists(name):
            matches = glob(name, recursive=True)
            if not matches:
                raise RecordError("matches no file: check the pattern", path=name)
            yield from _expand_all(matches)
        elif os.path.isdir(name) and not is_saved_dataset(Path(name)):
            yield from list(_find_data(Path(name), set())) or [name]  # a folder of bad answers
        else:
            yield name


def _find_data(folder: Path, visited: set[str]) -> Iterator[str]:
    """The files of data in a folder, and what `save_to_disk` wrote there, however deep; nothing that is hidden.

    A folder is visited once: links may lead in a circle.
    """
    real = os.path.realpath(folder)
    if real in visited:
        return
    visited.add(real)
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from [str(path)] if is_saved_dataset(path) else _find_data(path, visited)
        elif _is_data_file(path):
            yield str(path)


def _is_data_file(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in DATA_SUFFIXES
