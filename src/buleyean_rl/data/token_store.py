"""Records as token ids on disk: tokenised once, read by number, never all in memory.

    records --BATCH at a time--> boundaries --> tokens/<key>.arrow --BoundaryFile[i]--> Boundary

The key names everything the boundaries depend on, so the same data is not tokenised again. The file is
mapped, not loaded: what of it is in memory is the system's page cache, which gives way to anything else.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from buleyean_rl.data import trie as boundary
from buleyean_rl.data.records import RejectionRecord
from buleyean_rl.data.trie import Boundary, build_boundaries
from buleyean_rl.system.cache import cache_folder, key_of

BATCH = 256  # records: enough for a tokenizer's threads, some 100 MB where every answer is thousands of tokens
KEPT_BYTES = 4 << 30
LEFTOVER_SECONDS = 24 * 3600  # an unfinished file as old as this is nobody's

_IDS = pa.list_(pa.int32())
# The sizes repeat the lists' lengths, so that they can be read without touching the lists.
_SIZES = [pa.field("size", pa.int32()), pa.field("nodes", pa.int32())]
_SCHEMA = pa.schema(
    [
        *_SIZES,
        *(pa.field(name, _IDS) for name in ("prompt", "tokens", "runs", "parents")),
        *(pa.field(name, _IDS) for name in ("rejected_node", "rejected_token", "ends")),
        *(pa.field(name, pa.list_(pa.int64())) for name in ("rejected_count", "counts")),
        pa.field("rounds", pa.int64()),
        pa.field("truncated", pa.int32()),
    ],
)


class BoundaryFile(Sequence[Boundary]):
    """The boundaries of a file, each read when it is asked for.

    Args:
        path: a file that `write_boundaries` wrote.

    Attributes:
        data: how many records were read and dropped, and how many responses were cut, in the whole file.
        sizes: tokens of each boundary, prompt and trie. Shape: (boundaries,).
        nodes: nodes of each boundary. Shape: (boundaries,).

    Raises:
        OSError: there is no such file.
        ValueError: it is not whole.
    """

    def __init__(self, path: Path) -> None:
        only_sizes = pa.ipc.IpcReadOptions(included_fields=list(range(len(_SIZES))))
        with pa.OSFile(str(path)) as file:  # a mapped file would be paged in from end to end
            reader = pa.ipc.open_file(file, options=only_sizes)
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches - 1)]
            _, metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
        self.data: dict[str, int] = json.loads(metadata[b"data"])
        table = pa.Table.from_batches(batches, pa.schema(_SIZES))
        self.sizes, self.nodes = (table[field.name].to_numpy() for field in _SIZES)
        self._rows = np.arange(len(table))
        self._ends = np.cumsum([len(batch) for batch in batches])
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Boundary: ...
    @overload
    def __getitem__(self, place: slice) -> list[Boundary]: ...
    def __getitem__(self, place: int | slice) -> Boundary | list[Boundary]:
        if isinstance(place, slice):
            return [self._read(int(row)) for row in self._rows[place]]
        return self._read(int(self._rows[place]))

    def select(self, places: np.ndarray) -> BoundaryFile:
        """Some of the boundaries, under the numbers they have in the whole file.

        Args:
            places: which, in their new order. Shape: (selected,).
        """
        selection = copy(self)
        selection._rows, selection.sizes, selection.nodes = (
            column[places] for column in (self._rows, self.sizes, self.nodes)
        )
        return selection

    def _read(self, row: int) -> Boundary:
        number = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._reader.get_batch(number)
        place = row - int(self._ends[number]) + len(batch)

        def ids(name: str) -> list[int]:
            return batch.column(name)[place].values.to_numpy().tolist()

        return Boundary(
            prompt=ids("prompt"),
            tokens=ids("tokens"),
            runs=ids("runs"),
            parents=ids("parents"),
            rejections=list(zip(ids("rejected_node"), ids("rejected_token"), ids("rejected_count"), strict=True)),
            rounds=batch.column("rounds")[place].as_py(),
            truncated=batch.column("truncated")[place].as_py(),
            ends=ids("ends"),
            counts=ids("counts"),
            index=row,
        )


def tokenise(
    records: Iterable[RejectionRecord],
    source: str,
    tokenizer: Any,
    max_length: int,
    *,
    progress: Callable[[int], object] | None = None,
) -> BoundaryFile:
    """Turn records into boundaries in the user's cache, or find them there.

    Args:
        records: streamed once, or not at all if they are in the cache.
        source: names the records: other records must have another name. A hash of their file will do.
        tokenizer: of the base model.
        max_length: most tokens of prompt and response.
        progress: told the number of records read, now and then.
    """
    folder = cache_folder() / "tokens"
    path = folder / f"{_key(source, tokenizer, max_length)}.arrow"
    with suppress(OSError, ValueError):  # not there, or spoilt: it is made
        os.utime(path)  # used just now
        return BoundaryFile(path)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        write_boundaries(unfinished, _batches(records, tokenizer, max_length), progress)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    found = BoundaryFile(path)
    _drop_old(folder, path)
    return found


def write_boundaries(
    path: Path, batches: Iterable[Sequence[Boundary | None]], progress: Callable[[int], object] | None = None
) -> None:
    """Write boundaries to a file that `BoundaryFile` reads.

    Args:
        path: replaced if it exists; not whole until this returns.
        batches: streamed; None stands for a record that was dropped.
        progress: told the number of records after each batch.
    """
    data = {"read": 0, "dropped": 0, "truncated_responses": 0}
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for batch in batches:
            kept = [one for one in batch if one is not None]
            data["read"] += len(batch)
            data["dropped"] += len(batch) - len(kept)
            data["truncated_responses"] += sum(one.truncated for one in kept)
            writer.write_batch(_columns(kept))
            if progress is not None:
                progress(data["read"])
        # The schema stands first in the file and the counts are known last: an empty batch carries them.
        writer.write_batch(_columns([]), custom_metadata={"data": json.dumps(data)})


def _batches(
    records: Iterable[RejectionRecord], tokenizer: Any, max_length: int
) -> Iterator[Sequence[Boundary | None]]:
    stream = iter(records)
    while batch := list(islice(stream, BATCH)):
        yield build_boundaries(batch, tokenizer, max_length)


def _columns(boundaries: Sequence[Boundary]) -> pa.RecordBatch:
    rejections = [tuple(zip(*one.rejections, strict=True)) or ((), (), ()) for one in boundaries]
    nodes, tokens, counts = zip(*rejections, strict=True) if rejections else ((), (), ())
    columns = {
        "size": [len(one.prompt) + len(one.tokens) for one in boundaries],
        "rejected_node": nodes,
        "rejected_token": tokens,
        "rejected_count": counts,
    }
    own = [field.name for field in _SCHEMA if field.name not in columns]
    columns |= {name: [getattr(one, name) for one in boundaries] for name in own}
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in _SCHEMA], schema=_SCHEMA)


def _key(source: str, tokenizer: Any, max_length: int) -> str:
    """A hash of all that boundaries depend on: other data, another tokenizer or other code makes others."""
    with tempfile.TemporaryDirectory() as folder:  # its files are all a tokenizer is, chat template included
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        parts = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    code = [version("buleyean-rl"), inspect.getsource(boundary), _SCHEMA.to_string()]
    return key_of([source, max_length, parts, code])


def _drop_old(folder: Path, in_use: Path) -> None:
    """Delete what was used longest ago beyond `KEPT_BYTES`, and what killed runs left unfinished."""
    kept = 0
    by_use = sorted(((path.stat(), path) for path in folder.iterdir()), key=lambda pair: -pair[0].st_mtime_ns)
    for status, path in by_use:
        if path.suffix == ".tmp":
            expendable = status.st_mtime < time.time() - LEFTOVER_SECONDS
        else:
            kept += status.st_size
            expendable = kept > KEPT_BYTES and path != in_use
        if expendable:
            with suppress(OSError):  # another process was faster, or has it open where that forbids deleting
                path.unlink()
