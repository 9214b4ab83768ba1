"""Records as token ids on disk: tokenised once, by all cores, read by number, never all in memory.

    records --a batch at a time, token_batches--> columns --> tokens/<key>.arrow --BoundaryFile[i]--> Boundary

The key names everything the boundaries depend on, so the same data is not tokenised again. The file is memory-mapped:
what of it is in memory is the system's page cache.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from copy import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from buleyean_rl.data.records import RejectionRecord
from buleyean_rl.data.token_batches import (
    BATCH_COUNTS,
    JUDGEMENTS,
    SCHEMA,
    SIZES,
    Encoding,
    TokenBatch,
    encode_all,
    pack,
)
from buleyean_rl.data.trie import Boundary, Judgement
from buleyean_rl.system.cache import cache_folder, cache_key, evict_lru, make_cache_folder
from buleyean_rl.system.files import atomic_write, file_sha256
from buleyean_rl.system.locks import FileLock

BATCH_RECORDS = 256  # enough for a tokenizer's threads, some 100 MB where every answer is thousands of tokens
CACHE_BYTES = 4 << 30

_DATA = Path(__file__).parent  # all of its code decides the boundaries, and these libraries do
_LIBRARIES = ("buleyean-rl", "transformers", "tokenizers", "jinja2")


class BoundaryFile(Sequence[Boundary]):
    """The boundaries of a file, each read when it is asked for.

    Args:
        path: a file that `write_boundaries` wrote.

    Attributes:
        key: the file's name: in the cache a key of all that the boundaries depend on.
        data: counts for the whole file: records read and dropped, responses cut, and what the encoder counted.
        sizes: tokens of each boundary, prompt and trie. Shape: (boundaries,).
        nodes: nodes of each boundary. Shape: (boundaries,).
        rejected_answers: of each boundary; one without any only anchors. Shape: (boundaries,).
        accepted_answers: of each boundary. Shape: (boundaries,).

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        sizes_only = pa.ipc.IpcReadOptions(included_fields=list(range(len(SIZES))))
        with pa.OSFile(str(path)) as file:  # a mapped file would be paged in from end to end
            reader = pa.ipc.open_file(file, options=sizes_only)
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches - 1)]
            _, metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
        self.data: dict[str, int] = json.loads(metadata[b"data"])
        table = pa.Table.from_batches(batches, pa.schema(SIZES))
        self.sizes, self.nodes, self.rejected_answers, self.accepted_answers = (
            table[field.name].to_numpy() for field in SIZES
        )
        self.key = path.stem
        self._rows = np.arange(len(table))
        self._batch_ends = np.cumsum([len(batch) for batch in batches])
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Boundary: ...
    @overload
    def __getitem__(self, index: slice) -> list[Boundary]: ...
    def __getitem__(self, index: int | slice) -> Boundary | list[Boundary]:
        if isinstance(index, slice):
            return [self._read(int(row)) for row in self._rows[index]]
        return self._read(int(self._rows[index]))

    def select(self, indices: np.ndarray) -> BoundaryFile:
        """Some of the boundaries, under the numbers they have in the whole file.

        Args:
            indices: which, in their new order. Shape: (selected,).
        """
        selection = copy(self)
        for name in ("_rows", "sizes", "nodes", "rejected_answers", "accepted_answers"):
            setattr(selection, name, getattr(self, name)[indices])
        return selection

    def _read(self, row: int) -> Boundary:
        number = int(np.searchsorted(self._batch_ends, row, side="right"))
        batch = self._reader.get_batch(number)
        row_in_batch = row - int(self._batch_ends[number]) + len(batch)

        def integers(name: str) -> list[int]:
            return batch.column(name)[row_in_batch].values.to_numpy().tolist()

        return Boundary(
            prompt=integers("prompt"),
            tokens=integers("tokens"),
            runs=integers("runs"),
            parents=integers("parents"),
            judgements=list(map(Judgement, *map(integers, JUDGEMENTS))),
            truncated=batch.column("truncated")[row_in_batch].as_py(),
            ends=integers("ends"),
            counts=integers("counts"),
            rounds=integers("rounds"),
            index=row,
        )


def count_answers(boundaries: Sequence[Boundary]) -> tuple[np.ndarray, np.ndarray]:
    """How many answers of each boundary were rejected, and how many never were. Shape of each: (boundaries,)."""
    if isinstance(boundaries, BoundaryFile):
        return boundaries.rejected_answers, boundaries.accepted_answers
    pairs = ((boundary.rejected_answers, boundary.accepted_answers) for boundary in boundaries)
    rejected, accepted = np.array(list(pairs), dtype=np.int64).reshape(-1, 2).T
    return rejected, accepted


def boundary_sizes(boundaries: Sequence[Boundary]) -> list[int]:
    """Tokens of each boundary, prompt and trie."""
    if isinstance(boundaries, BoundaryFile):
        return [int(size) for size in boundaries.sizes]
    return [boundary.size for boundary in boundaries]


def tokenise(
    records: Iterable[RejectionRecord],
    source: str,
    tokenizer: Any,
    max_length: int,
    *,
    max_rejected: int | None = None,
    skip_refused: bool = False,
    progress: Callable[[int], object] | None = None,
) -> BoundaryFile:
    """The boundaries of records, from the user's cache if the same were tokenised before.

    Args:
        records: streamed once, or not at all if they are in the cache.
        source: names the records: other records must have another name, such as a hash of their file.
        tokenizer: of the base model.
        max_length: tokens of prompt and response together; what is longer is cut.
        max_rejected: see `build_boundaries`.
        skip_refused: drop records that the chat template refuses instead of raising.
        progress: told the number of records read, after each batch.

    Raises:
        TemplateRefusal: of the first record that the chat template refuses.
        UsageError: the cache cannot be written.
    """
    folder = cache_folder() / "tokens"
    path = folder / f"{_store_key(source, tokenizer, max_length, max_rejected, skip_refused)}.arrow"
    with suppress(OSError, ValueError):  # missing or damaged: it is written again
        return _open(path)
    make_cache_folder("tokens")
    with FileLock(path.with_suffix(".lock"), wait=True):  # of several processes one tokenises, for all of them
        with suppress(OSError, ValueError):
            return _open(path)
        encoding = Encoding(tokenizer, max_length, max_rejected, skip_refused)
        _write(path, encode_all(records, encoding, BATCH_RECORDS), progress)
        boundaries = BoundaryFile(path)
        evict_lru(folder, CACHE_BYTES)
    return boundaries


def _open(path: Path) -> BoundaryFile:
    os.utime(path)  # for evict_lru
    return BoundaryFile(path)


def write_boundaries(path: Path, batches: Iterable[Sequence[Boundary | None]]) -> None:
    """Write boundaries to a file that `BoundaryFile` reads, whole or not at all.

    Args:
        path: replaced if it exists.
        batches: streamed; None stands for a record that was dropped.
    """
    _write(path, map(pack, batches))


def _write(path: Path, batches: Iterable[TokenBatch], progress: Callable[[int], object] | None = None) -> None:
    data = Counter[str]()
    with atomic_write(path) as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for batch in batches:
            data.update(batch.counts)
            writer.write_batch(batch.columns)
            if progress is not None:
                progress(data["read"])
        # The schema stands first in the file and the counts are known last: an empty batch carries them.
        counts = {key: data[key] for key in (*BATCH_COUNTS, *data) if data[key] or key in BATCH_COUNTS}
        writer.write_batch(pack([]).columns, custom_metadata={"data": json.dumps(counts)})


def _store_key(
    source: str, tokenizer: Any, max_length: int, max_rejected: int | None = None, skip_refused: bool = False
) -> str:
    """A hash of all that boundaries depend on: other data, another tokenizer or other code makes others."""
    with tempfile.TemporaryDirectory() as folder:  # its files are all a tokenizer is, chat template included
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        hashes = [[path.name, file_sha256(path)] for path in files]
    sources = {str(path.relative_to(_DATA)): file_sha256(path) for path in sorted(_DATA.rglob("*.py"))}
    versions = {name: version(name) for name in _LIBRARIES}
    return cache_key([source, max_length, max_rejected, skip_refused, hashes, sources, versions, SCHEMA.to_string()])
