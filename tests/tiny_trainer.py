"""A trainer of tiny models, and what it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from buleyean_rl.data.trie import Boundary, merge_responses
from buleyean_rl.models.model import Model
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.reference_cache import ReferenceCache
from buleyean_rl.training.trainer import BuleyeanTrainer

RECORDS = [
    merge_responses([5, 6, number], [([20, 21, 22], [True] * 3), ([20, 30], [True, False])], [9, 2], [9, 9])
    for number in range(40, 48)
]


def trainer(
    model: Any,
    folder: Path,
    records: list[Boundary] = RECORDS,
    references: ReferenceCache | None = None,
    anchors: Sequence[Sequence[Boundary]] = (),
    **settings: Any,
) -> BuleyeanTrainer:
    defaults: dict[str, Any] = {"output_dir": str(folder), "save_strategy": "no", "lora_dropout": 0.0}
    config = BuleyeanConfig(**(defaults | settings))
    return BuleyeanTrainer(Model.from_module(model), config, records, references=references, anchors=anchors)
