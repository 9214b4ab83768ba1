"""The frozen base model's hidden states, kept on disk from the first epoch to the later ones.

Hidden states and not logits: 576 numbers a node instead of 49,152. The file is memory-mapped, so it takes no more
memory than the operating system has to spare, and it outlives the run that wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor


class ReferenceCache:
    """Hidden states at the nodes of numbered records, on disk.

    Args:
        folder: of the cache; what is in it is used, so its name must say what it was made from.
        nodes: how many nodes each record has.
        width: of a hidden state.
        dtype: of a hidden state.
    """

    def __init__(self, folder: Path, nodes: Sequence[int], width: int, dtype: torch.dtype) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._starts = list(accumulate(nodes, initial=0))
        size = max(self._starts[-1] * width, 1)
        self._states = torch.from_file(str(folder / "states"), shared=True, size=size, dtype=dtype)
        self._states = self._states[: self._starts[-1] * width].view(-1, width)
        self._known = torch.from_file(str(folder / "known"), shared=True, size=max(len(nodes), 1), dtype=torch.bool)

    def read(self, records: Sequence[int]) -> Tensor | None:
        """The states of some records, one after the other, or None if any is not known. Shape: (nodes, width)."""
        if not all(self._known[record] for record in records):
            return None
        return torch.cat([self._states[self._rows(record)] for record in records])

    def write(self, records: Sequence[int], states: Tensor) -> None:
        """Keep the states of some records. Shape: (nodes, width)."""
        sizes = [self._starts[record + 1] - self._starts[record] for record in records]
        for record, own in zip(records, states.split(sizes), strict=True):
            self._states[self._rows(record)] = own.to(self._states.device)
            self._known[record] = True

    def _rows(self, record: int) -> slice:
        return slice(self._starts[record], self._starts[record + 1])
