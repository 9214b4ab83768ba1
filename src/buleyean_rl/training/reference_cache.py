"""The reference's hidden states, cached on disk for later epochs and runs.

Hidden states rather than logits: 576 numbers a node instead of 49,152; and the part of the loss that depends on them
alone, where there is one. The files are memory-mapped.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from buleyean_rl.models.model import Model
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.objectives.vocabulary_softmax import ReferenceSoftmax, streams_logits
from buleyean_rl.system.cache import cache_folder, cache_key, entry_bytes, evict_lru
from buleyean_rl.system.disk import allocate
from buleyean_rl.training.config import BuleyeanConfig, micro_batch_limit
from buleyean_rl.training.dataset import Dataset

MAX_CACHE_BYTES = 4 << 30  # of disk, all runs together
FREE_BYTES = 256 << 20  # of disk that stay free, for checkpoints


class CachedReference(NamedTuple):
    """The cached reference at some nodes.

    Args:
        states: last hidden states. Shape: (nodes, width).
        softmax: see `vocabulary_softmax.reference_softmax`.
    """

    states: Tensor
    softmax: ReferenceSoftmax | None


class EntryFormat(NamedTuple):
    """What is cached for a node.

    Args:
        width: of its hidden state.
        dtype: of its hidden state.
        with_softmax: whether `CachedReference.softmax` is cached too.
    """

    width: int
    dtype: torch.dtype
    with_softmax: bool

    @property
    def bytes(self) -> int:
        """Bytes per node on disk."""
        softmax = torch.float64.itemsize + self.width * torch.float32.itemsize
        return self.width * self.dtype.itemsize + self.with_softmax * softmax


def entry_format(head: OutputHead, objective: Objective) -> EntryFormat:
    """What to cache for an objective."""
    width, dtype = head.weight.shape[1], head.weight.dtype
    return EntryFormat(width, dtype, streams_logits(head, dtype) and not objective.is_listwise)


class ReferenceCache:
    """The reference at the nodes of numbered records, on disk.

    Args:
        folder: of the cache; its name must be a key of all that decides the contents.
        nodes: number of nodes of each record.
        entry: what is cached for a node.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(self, folder: Path, nodes: Sequence[int], entry: EntryFormat) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.with_softmax = entry.with_softmax
        self._starts = list(accumulate(nodes, initial=0))
        columns = [("states", entry.width, entry.dtype)]
        if entry.with_softmax:
            columns += [("lse", 1, torch.float64), ("mean", entry.width, torch.float32)]
        self._files = [_map_file(folder / name, self._starts[-1], width, dtype) for name, width, dtype in columns]
        self._is_cached = _map_file(folder / "is_cached", len(nodes), 1, torch.bool)

    def read(self, records: Sequence[int]) -> CachedReference | None:
        """The reference at the nodes of records, concatenated; None if any record is not cached."""
        if not all(self._is_cached[record] for record in records):
            return None
        states, *softmax = (torch.cat([file[self._nodes(record)] for record in records]) for file in self._files)
        return CachedReference(states, ReferenceSoftmax(softmax[0].flatten(), softmax[1]) if softmax else None)

    def write(self, records: Sequence[int], reference: CachedReference) -> None:
        """Cache the reference at the nodes of records, concatenated."""
        sizes = [self._starts[record + 1] - self._starts[record] for record in records]
        columns = [reference.states]
        if reference.softmax is not None:
            columns += [reference.softmax.lse.unsqueeze(1), reference.softmax.mean]
        for file, values in zip(self._files, columns, strict=True):
            for record, part in zip(records, values.split(sizes), strict=True):
                file[self._nodes(record)] = part.to(file.device)
        for record in records:
            self._is_cached[record] = True

    def _nodes(self, record: int) -> slice:
        return slice(self._starts[record], self._starts[record + 1])


def _map_file(path: Path, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Map a file, created if it does not exist, as a matrix; all of it has its room on the disk."""
    with path.open("a+b") as room:
        allocate(room, max(rows * columns, 1) * dtype.itemsize)
    file = torch.from_file(str(path), shared=True, size=max(rows * columns, 1), dtype=dtype)
    return file[: rows * columns].view(rows, columns)


def open_reference_cache(
    model: Model, dataset: Dataset, config: BuleyeanConfig, console: Console | None = None
) -> ReferenceCache | None:
    """Open a run's cache; None for a single epoch, or where it would exceed MAX_CACHE_BYTES or the disk.

    The folder is keyed by all that decides the last bits.

    Args:
        model: with its adapter.
        dataset: of the run.
        config: the settings.
        console: is told that the disk has no room for it; None for no output.
    """
    training = dataset.training
    steps_per_epoch = len(training) / (config.per_device_train_batch_size * config.gradient_accumulation_steps)
    epochs = config.max_steps / steps_per_epoch if config.max_steps > 0 else config.num_train_epochs
    if epochs <= 1 or not config.loss.uses_reference:
        return None
    full_format, nodes = entry_format(model.head, config.loss), int(training.nodes.sum())
    formats = (full_format, full_format._replace(with_softmax=False))
    entry = next((candidate for candidate in formats if nodes * candidate.bytes <= MAX_CACHE_BYTES), None)
    if entry is None:
        return None
    key_inputs = [
        *(*model.numerics_key, dataset.sha256, config.loss.is_listwise, micro_batch_limit(config, model.module)),
        *(config.max_length, config.held_out, config.seed, config.data_seed, config.per_device_train_batch_size),
        entry.with_softmax,
    ]
    references = cache_folder() / "reference"
    folder = references / cache_key(key_inputs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.touch()
        evict_lru(references, MAX_CACHE_BYTES - nodes * entry.bytes)
        if shutil.disk_usage(folder).free + entry_bytes(folder) < nodes * entry.bytes + FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return ReferenceCache(folder, training.nodes.tolist(), entry)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if console is not None:
            console.print(
                f"[yellow]{escape(str(references))}: {error.strerror}:[/] "
                "the reference is computed anew in each epoch, which is slower"
            )
        return None
