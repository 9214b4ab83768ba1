"""The frozen base model's hidden states, on disk from the first epoch to the later ones.

Hidden states and not logits, 576 numbers a node instead of 49,152; and where the loss has a part that depends on them
alone, that too. The files are memory-mapped, so they take no more memory than the operating system has to spare, and
they outlive the run that wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from buleyean_rl.models.model import Model
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.objectives.vocabulary_softmax import ReferenceSoftmax, goes_in_tiles
from buleyean_rl.system.cache import cache_folder, cache_key, evict_lru
from buleyean_rl.training.config import BuleyeanConfig, micro_batch_limit
from buleyean_rl.training.dataset import Dataset

CACHE_BYTES = 4 << 30  # of disk, all runs together


class CachedReference(NamedTuple):
    """The base model at some nodes.

    Args:
        states: its last hidden states. Shape: (nodes, width).
        softmax: see `vocabulary_softmax.reference_softmax`.
    """

    states: Tensor
    softmax: ReferenceSoftmax | None


class EntryFormat(NamedTuple):
    """What is cached of a node.

    Args:
        width: of its hidden state.
        dtype: of that.
        with_softmax: whether `CachedReference.softmax` is cached too.
    """

    width: int
    dtype: torch.dtype
    with_softmax: bool

    @property
    def bytes(self) -> int:
        """On disk."""
        softmax = torch.float64.itemsize + self.width * torch.float32.itemsize
        return self.width * self.dtype.itemsize + self.with_softmax * softmax


def entry_format(head: OutputHead, objective: Objective) -> EntryFormat:
    """What is to be cached for an objective."""
    width, dtype = head.weight.shape[1], head.weight.dtype
    return EntryFormat(width, dtype, goes_in_tiles(head, dtype) and not objective.is_listwise)


class ReferenceCache:
    """The base model at the nodes of numbered records, on disk.

    Args:
        folder: of the cache; its files are used as they are, so its name must tell all that they were computed from.
        nodes: how many nodes each record has.
        entry: what is cached of a node.
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
        """The base model at some records' nodes, one after the other, or None if any is not cached."""
        if not all(self._is_cached[record] for record in records):
            return None
        states, *softmax = (torch.cat([file[self._nodes(record)] for record in records]) for file in self._files)
        return CachedReference(states, ReferenceSoftmax(softmax[0].flatten(), softmax[1]) if softmax else None)

    def write(self, records: Sequence[int], reference: CachedReference) -> None:
        """Cache the base model at some records' nodes, one after the other."""
        sizes = [self._starts[record + 1] - self._starts[record] for record in records]
        columns = [reference.states]
        if reference.softmax is not None:
            columns += [reference.softmax.lse.unsqueeze(1), reference.softmax.mean]
        for file, values in zip(self._files, columns, strict=True):
            for record, own in zip(records, values.split(sizes), strict=True):
                file[self._nodes(record)] = own.to(file.device)
        for record in records:
            self._is_cached[record] = True

    def _nodes(self, record: int) -> slice:
        return slice(self._starts[record], self._starts[record + 1])


def _map_file(path: Path, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix that lies in a file, which is created if it is not there."""
    file = torch.from_file(str(path), shared=True, size=max(rows * columns, 1), dtype=dtype)
    return file[: rows * columns].view(rows, columns)


def open_reference_cache(model: Model, dataset: Dataset, config: BuleyeanConfig) -> ReferenceCache | None:
    """A run's cache, if it meets its records more than once and there is disk for the states at least.

    The last bits depend on what they were computed with, so the folder's name depends on all that decides them.

    Args:
        model: with its adapter.
        dataset: to be trained on.
        config: the settings.
    """
    training = dataset.training
    steps_per_epoch = len(training) / (config.per_device_train_batch_size * config.gradient_accumulation_steps)
    epochs = config.max_steps / steps_per_epoch if config.max_steps > 0 else config.num_train_epochs
    if epochs <= 1 or not config.loss.uses_reference:
        return None
    complete, nodes = entry_format(model.head, config.loss), int(training.nodes.sum())
    choices = (complete, complete._replace(with_softmax=False))
    entry = next((choice for choice in choices if nodes * choice.bytes <= CACHE_BYTES), None)
    if entry is None:
        return None
    inputs = [
        *(*model.numerics, dataset.sha256, config.loss.is_listwise, micro_batch_limit(config, model.module)),
        *(config.max_length, config.held_out, config.seed, config.data_seed, config.per_device_train_batch_size),
        entry.with_softmax,
    ]
    references = cache_folder() / "reference"
    folder = references / cache_key(inputs)
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()
    evict_lru(references, CACHE_BYTES - nodes * entry.bytes)
    return ReferenceCache(folder, training.nodes.tolist(), entry)
