"""Several processes make the run of one: the same gradient, whoever computes which record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from buleyean_rl.training.processes import ALONE, deal
from together import run_together

NAMES = ("complement", "listwise", "published", "dropout")


@given(st.lists(st.integers(1, 1000)), st.integers(1, 9), st.data())
def test_every_item_is_dealt_once_and_evenly(sizes: list[int], hands: int, data: st.DataObject) -> None:
    loads = data.draw(st.one_of(st.none(), st.lists(st.integers(0, 1000), min_size=hands, max_size=hands)))
    dealt = deal(sizes, hands, loads)
    assert sorted(i for hand in dealt for i in hand) == [*range(len(sizes))]
    totals = [load + sum(sizes[i] for i in hand) for load, hand in zip(loads or [0] * hands, dealt, strict=True)]
    if sizes and loads is None:
        assert max(totals) - min(totals) <= max(sizes)


def test_one_process_shares_with_itself(tmp_path: Path) -> None:
    assert ALONE.sum(torch.ones(2)).tolist() == [1, 1]
    assert ALONE.once(lambda: (1, 2)) == (1, 2)
    assert ALONE.all("a") == ["a"]
    assert ALONE.receive(tmp_path, tmp_path / "copy") == tmp_path
    ALONE.check_same("settings", {"a": 1})
    ALONE.barrier()
    assert ALONE.describe() == {"processes": 1, "hosts": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two, which have checked before what they share: see `together`."""
    folder = tmp_path_factory.mktemp("together")
    run_together("train_steps", "1,2", folder, "complement")
    return folder


def results(folder: Path, size: int, name: str) -> list[tuple[torch.Tensor, list[dict[str, Any]]]]:
    """Weights and log of each process."""
    files = [folder / f"of-{size}" / f"{name}-{rank}" for rank in range(size)]
    return [(torch.load(f"{file}.pt"), json.loads(Path(f"{file}.json").read_text())) for file in files]


def check_same(folder: Path, size: int, name: str) -> None:
    """Several processes are one, to 1e-9 after twenty steps; and all of them have the same bytes."""
    ((weights, log),) = results(folder, 1, name)
    assert len(log) == 20
    together = results(folder, size, name)
    for others, other_log in together:
        assert others.equal(together[0][0])
        assert ((others - weights).norm() / weights.norm()).item() < 1e-9
        for entry, other in zip(log, other_log, strict=True):
            assert other["tokens"] == entry["tokens"]  # no record twice
            for part in ("loss", "kl", "contrast", "floor", "grad_norm"):
                assert other[part] == pytest.approx(entry[part], rel=1e-9, abs=1e-12)


def test_two_processes_train_as_one(trained: Path) -> None:
    check_same(trained, 2, "complement")


@pytest.mark.slow
def test_three_processes_train_as_one_with_every_objective_and_dropout(tmp_path: Path) -> None:
    run_together("train_steps", "1,2,3", tmp_path, ",".join(NAMES))
    for name in NAMES:
        for size in (2, 3):
            check_same(tmp_path, size, name)
