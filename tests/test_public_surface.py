"""What the package exports: a name comes or goes only on purpose."""

from __future__ import annotations

import pytest

import buleyean_rl

EXPORTED = [
    *("Boundary", "BuleyeanConfig", "BuleyeanError", "BuleyeanTrainer", "Comparison", "Conversation"),
    *("Counts", "Exported", "Mining", "NodeLosses", "Objective", "OutputHead", "Prior", "RejectionRecord"),
    *("attach_lora", "build_boundary", "chat", "check_parity", "complement_loss", "evaluate", "exact_target"),
    *("export", "export_gguf", "fused_loss", "listwise_loss", "load_base", "load_tokenizer", "make_record"),
    *("merge_run", "mine", "published_loss", "read_records", "target", "train", "write_records"),
]


def test_the_exported_names_are_these() -> None:
    assert buleyean_rl.__all__ == EXPORTED
    assert dir(buleyean_rl) == sorted([*EXPORTED, "__version__"])


@pytest.mark.parametrize("name", EXPORTED)
def test_every_exported_name_is_there_and_comes_from_one_module(name: str) -> None:
    exported = getattr(buleyean_rl, name)
    assert exported.__name__ == name
    assert exported.__module__.startswith("buleyean_rl.")


def test_a_name_that_is_not_exported_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'ratio_loss'"):
        _ = buleyean_rl.ratio_loss
