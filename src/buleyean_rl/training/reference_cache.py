"""The reference's hidden states, cached on disk for later epochs and runs.

Hidden states rather than logits: 576 numbers a node instead of 49,152; and the part of the loss that depends on them
alone, where there is one. A run's entry is one file, memory-mapped: it is there as a whole or not at all.

    lse | mean | states of all nodes | is_cached of all records, written after what it stands for
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from buleyean_rl.data.trie import Boundary
from buleyean_rl.models.model import Model
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.objectives.vocabulary_softmax import ReferenceSoftmax, streams_logits
from buleyean_rl.system.cache import cache_folder, cache_key, entry_bytes, evict_lru
from buleyean_rl.system.disk import allocate
from buleyean_rl.training.config import BuleyeanConfig, micro_batch_limit
from buleyean_rl.training.dataset import Dataset

MAX_CACHE_BYTES = 4 << 30  # of disk, all runs together
REFERENCE_FORMAT = 4  # of the files; below 4 they had no anchors
OF_LEARNING = (  # settings that decide nothing of the base model's states; any other may
    *(
        "alpha",
        "tau",
        "prior_mean",
        "prior_rounds",
        "min_p",
        "beta",
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "lora_targets",
        "adapter_scale",
    ),
    *("guard", "guard_kl", "guard_entropy"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("logging_steps", "save_strategy", "save_steps", "save_total_limit", "report_to"),
)
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
    return EntryFormat(width, dtype, streams_logits(head, dtype) and not (objective.is_listwise or objective.min_p))


def node_counts(dataset: Dataset, anchors: Sequence[Sequence[Boundary]]) -> list[int]:
    """Nodes of each record that a run trains on, and of its anchors."""
    return [*dataset.training.nodes.tolist(), *(boundary.nodes for group in anchors for boundary in group)]


def planned_entry(model: Model, dataset: Dataset, config: BuleyeanConfig, nodes: int) -> EntryFormat | None:
    """What a run caches for a node; None where it caches nothing.

    Args:
        model: the base model.
        dataset: what is trained on.
        config: the settings.
        nodes: of all that it trains on.
    """
    training = dataset.training
    steps_per_epoch = len(training) / config.step_records
    epochs = config.max_steps / steps_per_epoch if config.max_steps > 0 else config.num_train_epochs
    if epochs <= 1 or not config.loss.uses_reference:
        return None
    full_format = entry_format(model.head, config.loss)
    formats = (full_format, full_format._replace(with_softmax=False))
    return next((candidate for candidate in formats if nodes * candidate.bytes <= MAX_CACHE_BYTES), None)


class ReferenceCache:
    """The reference at the nodes of numbered records, on disk.

    Args:
        path: of the file; its name must be a key of all that decides the contents.
        nodes: number of nodes of each record.
        entry: what is cached for a node.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(self, path: Path, nodes: Sequence[int], entry: EntryFormat) -> None:
        self.with_softmax = entry.with_softmax
        self._starts = list(accumulate(nodes, initial=0))
        columns = [(entry.width, entry.dtype)]
        if entry.with_softmax:
            columns = [(1, torch.float64), (entry.width, torch.float32), *columns]
        rows = self._starts[-1]
        contents = _map_file(path, rows * entry.bytes + len(nodes))
        *parts, is_cached = contents.split([*(rows * width * dtype.itemsize for width, dtype in columns), len(nodes)])
        self._columns = [
            part.view(dtype).view(rows, width) for part, (width, dtype) in zip(parts, columns, strict=True)
        ]
        self._is_cached = is_cached.view(torch.bool)

    def read(self, records: Sequence[int]) -> CachedReference | None:
        """The reference at the nodes of records, concatenated; None if any record is not cached."""
        if not all(self._is_cached[record] for record in records):
            return None
        *softmax, states = (torch.cat([column[self._nodes(record)] for record in records]) for column in self._columns)
        return CachedReference(states, ReferenceSoftmax(softmax[0].flatten(), softmax[1]) if softmax else None)

    def write(self, records: Sequence[int], reference: CachedReference) -> None:
        """Cache the reference at the nodes of records, concatenated."""
        sizes = [self._starts[record + 1] - self._starts[record] for record in records]
        columns = [reference.states]
        if reference.softmax is not None:
            columns = [reference.softmax.lse.unsqueeze(1), reference.softmax.mean, *columns]
        for column, values in zip(self._columns, columns, strict=True):
            for record, part in zip(records, values.split(sizes), strict=True):
                column[self._nodes(record)] = part.to(column.device)
        for record in records:
            self._is_cached[record] = True

    def _nodes(self, record: int) -> slice:
        return slice(self._starts[record], self._starts[record + 1])


def _map_file(path: Path, size: int) -> Tensor:
    """Map a file's bytes, created if it does not exist; all of it has its room on the disk."""
    with path.open("a+b") as file:
        allocate(file, size)
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)  # of this file, whoever deletes it


def open_reference_cache(
    model: Model,
    dataset: Dataset,
    config: BuleyeanConfig,
    anchors: Sequence[Sequence[Boundary]] = (),
    console: Console | None = None,
) -> ReferenceCache | None:
    """Open a run's cache; None for a single epoch, or where it would exceed MAX_CACHE_BYTES or the disk.

    The file is keyed by all that decides the last bits.

    Args:
        model: with its adapter.
        dataset: of the run.
        config: the settings.
        anchors: in groups, numbered behind the records of the data set.
        console: is told that the disk has no room for it; None for no output.
    """
    training = dataset.training
    sizes, texts = node_counts(dataset, anchors), [boundary for group in anchors for boundary in group]
    nodes, entry = sum(sizes), planned_entry(model, dataset, config, sum(sizes))
    if entry is None:
        return None
    key_inputs = [
        *(REFERENCE_FORMAT, *model.training_numerics.values(), training.key, micro_batch_limit(config, model.module)),
        *(config.processes.shard, config.batch_records),
        *(value for name, value in config.settings().items() if name not in OF_LEARNING),
        *(entry.with_softmax, [boundary.prompt + boundary.tokens for boundary in texts]),
    ]
    references = cache_folder() / "reference"
    path = references / cache_key(key_inputs)
    try:
        references.mkdir(parents=True, exist_ok=True)
        path.touch()
        evict_lru(references, MAX_CACHE_BYTES - nodes * entry.bytes)
        if shutil.disk_usage(references).free + entry_bytes(path) < nodes * entry.bytes + FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return ReferenceCache(path, sizes, entry)
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        if console is not None:
            console.print(
                f"[yellow]{escape(str(references))}: {error.strerror}:[/] "
                "the reference is computed anew in each epoch, which is slower"
            )
        return None
