"""What is known of the frozen base model, kept on disk from the first epoch to the later ones.

Hidden states and not logits, 576 numbers a node instead of 49,152; and what the loss makes of them alone, where it can
be told apart, so that it is not made again. The files are memory-mapped, so they take no more memory than the operating
system has to spare, and they outlive the run that wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from buleyean_rl.data.token_store import BoundaryFile
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.models.source import fingerprint
from buleyean_rl.models.views import output_head
from buleyean_rl.objectives.losses import Objective
from buleyean_rl.objectives.vocabulary_softmax import ReferenceSoftmax, goes_in_tiles
from buleyean_rl.system.cache import cache_folder, evict_lru, key_of
from buleyean_rl.system.host import library_versions
from buleyean_rl.training.config import BuleyeanConfig, micro_batch_limit


class CachedReference(NamedTuple):
    """The base model at some nodes.

    Args:
        states: its last hidden states. Shape: (nodes, width).
        rest: see `softmax.reference_softmax`.
    """

    states: Tensor
    rest: ReferenceSoftmax | None


class EntryFormat(NamedTuple):
    """What is kept of a node.

    Args:
        width: of its hidden state.
        dtype: of that.
        with_rest: whether there is more, see `CachedReference`.
    """

    width: int
    dtype: torch.dtype
    with_rest: bool

    @property
    def bytes(self) -> int:
        """On disk."""
        rest = torch.float64.itemsize + self.width * torch.float32.itemsize
        return self.width * self.dtype.itemsize + self.with_rest * rest


def entry_format(head: OutputHead, objective: Objective) -> EntryFormat:
    """What is to be kept for an objective."""
    width, dtype = head.weight.shape[1], head.weight.dtype
    return EntryFormat(width, dtype, goes_in_tiles(head, dtype) and not objective.is_listwise)


class ReferenceCache:
    """What is known at the nodes of numbered records, on disk.

    Args:
        folder: of the cache; what is in it is used, so its name must say what it was made from.
        nodes: how many nodes each record has.
        kept: of a node.
    """

    def __init__(self, folder: Path, nodes: Sequence[int], kept: EntryFormat) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.with_rest = kept.with_rest
        self._starts = list(accumulate(nodes, initial=0))
        columns = [("states", kept.width, kept.dtype)]
        if kept.with_rest:
            columns += [("lse", 1, torch.float64), ("mean", kept.width, torch.float32)]
        self._files = [_mapped(folder / name, self._starts[-1], width, dtype) for name, width, dtype in columns]
        self._known = _mapped(folder / "known", len(nodes), 1, torch.bool)

    def read(self, records: Sequence[int]) -> CachedReference | None:
        """Of some records, one after the other, or None if any is not known."""
        if not all(self._known[record] for record in records):
            return None
        states, *rest = (torch.cat([file[self._rows(record)] for record in records]) for file in self._files)
        return CachedReference(states, ReferenceSoftmax(rest[0].flatten(), rest[1]) if rest else None)

    def write(self, records: Sequence[int], known: CachedReference) -> None:
        """Keep what is known of some records, one after the other."""
        sizes = [self._starts[record + 1] - self._starts[record] for record in records]
        found = [known.states] if known.rest is None else [known.states, known.rest.lse.unsqueeze(1), known.rest.mean]
        for file, values in zip(self._files, found, strict=True):
            for record, own in zip(records, values.split(sizes), strict=True):
                file[self._rows(record)] = own.to(file.device)
        for record in records:
            self._known[record] = True

    def _rows(self, record: int) -> slice:
        return slice(self._starts[record], self._starts[record + 1])


def _mapped(path: Path, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix that lies in a file, which is made if it is not there."""
    file = torch.from_file(str(path), shared=True, size=max(rows * columns, 1), dtype=dtype)
    return file[: rows * columns].view(rows, columns)


REFERENCES_BYTES = 4 << 30  # of disk, all runs together


def numerics_key(config: BuleyeanConfig, model: Any, model_name: str) -> list[Any]:
    """All that decides, to the last bit, what is computed with a base model here."""
    return [
        *(fingerprint(model_name), str(model.dtype), sorted(library_versions().items())),
        *(str(config.device), torch.get_num_threads()),
    ]


def _references(
    numerics: Sequence[Any], sha256: str, config: BuleyeanConfig, model: Any, training: BoundaryFile
) -> ReferenceCache | None:
    """What is kept of the reference, if records are met more than once and there is room: all there is, or its states.

    It depends, in its last bits, on what was computed with it; so its folder's name depends on all that decides it.
    """
    steps_an_epoch = len(training) / (config.per_device_train_batch_size * config.gradient_accumulation_steps)
    epochs = config.max_steps / steps_an_epoch if config.max_steps > 0 else config.num_train_epochs
    if epochs <= 1 or not config.loss.uses_reference:
        return None
    all_there_is, nodes = entry_format(output_head(model), config.loss), int(training.nodes.sum())
    choices = (all_there_is, all_there_is._replace(with_rest=False))
    kept = next((kept for kept in choices if nodes * kept.bytes <= REFERENCES_BYTES), None)
    if kept is None:
        return None
    made_from = [
        *(*numerics, sha256, config.loss.is_listwise, micro_batch_limit(config, model)),
        *(config.max_length, config.held_out, config.seed, config.data_seed, config.per_device_train_batch_size),
        kept.with_rest,
    ]
    references = cache_folder() / "reference"
    folder = references / key_of(made_from)
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()
    evict_lru(references, REFERENCES_BYTES - nodes * kept.bytes)
    return ReferenceCache(folder, training.nodes.tolist(), kept)
