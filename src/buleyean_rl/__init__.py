"""Fine-tune an open language model from rejections alone, and chat with the result.

The names below are the public surface; each is loaded from its module when it is first used, so that
importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from buleyean_rl.boundary import Boundary, build_boundary
    from buleyean_rl.complement import Counts, exact_target, target
    from buleyean_rl.errors import BuleyeanError
    from buleyean_rl.fused import fused_loss
    from buleyean_rl.gguf_export import check_parity, export_gguf
    from buleyean_rl.head import OutputHead
    from buleyean_rl.losses import Objective, complement_loss, published_loss, ratio_loss
    from buleyean_rl.models import attach_lora, load_base, load_tokenizer, merge_run
    from buleyean_rl.records import RejectionRecord, read_records, write_records
    from buleyean_rl.trainer import BuleyeanConfig, BuleyeanTrainer

__version__ = "0.1.0"

_HOMES = {
    "boundary": ("Boundary", "build_boundary"),
    "complement": ("Counts", "exact_target", "target"),
    "errors": ("BuleyeanError",),
    "fused": ("fused_loss",),
    "gguf_export": ("check_parity", "export_gguf"),
    "head": ("OutputHead",),
    "losses": ("Objective", "complement_loss", "published_loss", "ratio_loss"),
    "models": ("attach_lora", "load_base", "load_tokenizer", "merge_run"),
    "records": ("RejectionRecord", "read_records", "write_records"),
    "trainer": ("BuleyeanConfig", "BuleyeanTrainer"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Boundary",
    "BuleyeanConfig",
    "BuleyeanError",
    "BuleyeanTrainer",
    "Counts",
    "Objective",
    "OutputHead",
    "RejectionRecord",
    "attach_lora",
    "build_boundary",
    "check_parity",
    "complement_loss",
    "exact_target",
    "export_gguf",
    "fused_loss",
    "load_base",
    "load_tokenizer",
    "merge_run",
    "published_loss",
    "ratio_loss",
    "read_records",
    "target",
    "write_records",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
