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

NAMES = "complement,listwise,published,dropout"


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
    """Runs of one, two and three processes, which have checked before what they share: see `together`."""
    folder = tmp_path_factory.mktemp("together")
    run_together("train_steps", "1,2,3", folder, NAMES)
    return folder


def results(folder: Path, size: int, name: str) -> list[tuple[torch.Tensor, list[dict[str, Any]]]]:
    """Weights and log of each process."""
    files = [folder / f"of-{size}" / f"{name}-{rank}" for rank in range(size)]
    return [(torch.load(f"{file}.pt"), json.loads(Path(f"{file}.json").read_text())) for file in files]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", NAMES.split(","))
def test_several_processes_train_as_one(name: str, size: int, trained: Path) -> None:
    ((weights, log),) = results(trained, 1, name)
    assert len(log) == 20
    for others, other_log in results(trained, size, name):
        assert ((others - weights).norm() / weights.norm()).item() < 1e-9
        for entry, other in zip(log, other_log, strict=True):
            assert other["tokens"] == entry["tokens"]  # no record twice
            for part in ("loss", "kl", "contrast", "floor", "grad_norm"):
                assert other[part] == pytest.approx(entry[part], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_each_process_has_the_same_bytes(size: int, trained: Path) -> None:
    for name in NAMES.split(","):
        first, *others = (weights for weights, _ in results(trained, size, name))
        assert all(weights.equal(first) for weights in others)
