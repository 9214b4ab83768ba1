"""Fine-tune an open language model from rejections alone, and chat with the result.

The names below are the public surface; each is loaded from its module when it is first used, so that
importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from buleyean_rl.api.calls import chat, evaluate, export, mine
    from buleyean_rl.api.results import Comparison, Conversation, Exported, Mining
    from buleyean_rl.data.records import RejectionRecord, make_record, read_records, write_records
    from buleyean_rl.data.trie import Boundary, build_boundary
    from buleyean_rl.errors import BuleyeanError
    from buleyean_rl.gguf import check_parity, export_gguf
    from buleyean_rl.models.adapt import attach_lora
    from buleyean_rl.models.output_head import OutputHead
    from buleyean_rl.models.run_folder import merge_run
    from buleyean_rl.models.weights import load_base, load_tokenizer
    from buleyean_rl.objectives.complement import Counts, Prior, exact_target, target
    from buleyean_rl.objectives.fused import fused_loss
    from buleyean_rl.objectives.losses import NodeLosses, Objective, complement_loss, listwise_loss, published_loss
    from buleyean_rl.training.config import BuleyeanConfig
    from buleyean_rl.training.run import train
    from buleyean_rl.training.trainer import BuleyeanTrainer

__version__ = "0.1.0"

_EXPORTS = {
    "api.calls": (
        "chat",
        "evaluate",
        "export",
        "mine",
    ),
    "api.results": (
        "Comparison",
        "Conversation",
        "Exported",
        "Mining",
    ),
    "data.records": (
        "RejectionRecord",
        "make_record",
        "read_records",
        "write_records",
    ),
    "data.trie": (
        "Boundary",
        "build_boundary",
    ),
    "errors": ("BuleyeanError",),
    "gguf": (
        "check_parity",
        "export_gguf",
    ),
    "models.adapt": ("attach_lora",),
    "models.output_head": ("OutputHead",),
    "models.run_folder": ("merge_run",),
    "models.weights": (
        "load_base",
        "load_tokenizer",
    ),
    "objectives.complement": (
        "Counts",
        "Prior",
        "exact_target",
        "target",
    ),
    "objectives.fused": ("fused_loss",),
    "objectives.losses": (
        "NodeLosses",
        "Objective",
        "complement_loss",
        "listwise_loss",
        "published_loss",
    ),
    "training.config": ("BuleyeanConfig",),
    "training.run": ("train",),
    "training.trainer": ("BuleyeanTrainer",),
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "Boundary",
    "BuleyeanConfig",
    "BuleyeanError",
    "BuleyeanTrainer",
    "Comparison",
    "Conversation",
    "Counts",
    "Exported",
    "Mining",
    "NodeLosses",
    "Objective",
    "OutputHead",
    "Prior",
    "RejectionRecord",
    "attach_lora",
    "build_boundary",
    "chat",
    "check_parity",
    "complement_loss",
    "evaluate",
    "exact_target",
    "export",
    "export_gguf",
    "fused_loss",
    "listwise_loss",
    "load_base",
    "load_tokenizer",
    "make_record",
    "merge_run",
    "mine",
    "published_loss",
    "read_records",
    "target",
    "train",
    "write_records",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
