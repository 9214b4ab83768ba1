"""Rows of Parquet and Arrow files, and of folders that `Dataset.save_to_disk` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from buleyean_rl.data.importers.json_files import NumberedRows
from buleyean_rl.errors import RecordError

ROWS_AT_ONCE = 256
BUFFER_BYTES = 1 << 20  # of each column; else the whole column of a row group is read


def is_arrow_file(head: bytes, path: str) -> bool:
    """Whether a file is Parquet or Arrow, by its first bytes or its name."""
    return head.startswith((b"PAR1", b"ARROW1")) or Path(path).suffix.lower() in (".parquet", ".arrow", ".feather")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def read_arrow(path: str) -> NumberedRows:
    """The rows of a Parquet or Arrow file, counted from 1."""
    import pyarrow

    try:
        yield from enumerate(_read_batches(path), start=1)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecordError(f"is no Parquet or Arrow file that can be read: {problem[:200]}", path=path) from error


def read_saved_dataset(folder: Path, split: str | None) -> NumberedRows:
    """The rows of a folder that `save_to_disk` wrote, counted from 1.

    Args:
        folder: of a data set, or of several splits.
        split: which of them; None takes `train`, or the only one.

    Raises:
        RecordError: a file of it is damaged or missing, or it has no such split.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if (path / "state.json").is_file())
        yield from read_saved_dataset(folder / choose_split(splits, split, folder), None)
        return
    names = [Path(str(name)).name for name in _data_files(folder)]
    number = 0
    for name in names:
        for _, row in read_arrow(str(folder / name)):
            number += 1
            yield number, row


def choose_split(names: list[str], split: str | None, source: Path | str) -> str:
    """The split that was asked for, else the one to train on, else the only one."""
    wanted = [split] if split is not None else ["train", "train_prefs"]
    chosen = next((name for name in wanted if name in names), None)
    if chosen is None and split is None and len(names) == 1:
        chosen = names[0]
    if chosen is None:
        raise RecordError(f"has the splits {', '.join(names)}: choose one with --split", path=source)
    return chosen


def _data_files(folder: Path) -> list[Any]:
    try:
        files = json.loads((folder / "state.json").read_bytes())["_data_files"]
        return [file["filename"] for file in files]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError("is no data set that save_to_disk wrote: state.json is damaged", path=folder) from error


def _read_batches(path: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    with pyarrow.OSFile(path) as source:  # mapped, all of it would count as this process's memory
        magic = source.read(6)
        source.seek(0)
        if magic.startswith(b"PAR1"):
            batches = pyarrow.parquet.ParquetFile(source, buffer_size=BUFFER_BYTES).iter_batches(
                batch_size=ROWS_AT_ONCE
            )
        elif magic.startswith(b"ARROW1"):
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(k) for k in range(reader.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(source)
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield from batch.slice(start, ROWS_AT_ONCE).to_pylist()
