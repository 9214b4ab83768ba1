"""The cache of the reference: what was written is read, for the loss to the bit what it would compute."""

from __future__ import annotations

import os
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from runs import adapter_bytes, start

from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.objectives.complement import Counts
from buleyean_rl.objectives.fused import fused_loss
from buleyean_rl.objectives.losses import NodeLosses, Objective
from buleyean_rl.objectives.vocabulary_softmax import ReferenceSoftmax, reference_softmax
from buleyean_rl.training import reference_cache
from buleyean_rl.training.config import load_config
from buleyean_rl.training.reference_cache import CachedReference, EntryFormat, ReferenceCache, entry_format
from hostile.disk import files_at_most


def make_reference(nodes: int, width: int, dtype: torch.dtype, with_softmax: bool) -> CachedReference:
    softmax = ReferenceSoftmax(torch.randn(nodes).double() / 3, torch.randn(nodes, width))
    return CachedReference(torch.randn(nodes, width).to(dtype), softmax if with_softmax else None)


def select(reference: CachedReference, nodes: list[int]) -> CachedReference:
    softmax = None if reference.softmax is None else ReferenceSoftmax(*(x[nodes] for x in reference.softmax))
    return CachedReference(reference.states[nodes], softmax)


def are_equal(got: CachedReference | None, expected: CachedReference) -> bool:
    if got is None or not got.states.equal(expected.states) or (got.softmax is None) != (expected.softmax is None):
        return False
    return got.softmax is None or all(a.equal(b) for a, b in zip(got.softmax, expected.softmax or (), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_softmax", [False, True])
def test_written_references_are_read(tmp_path: Path, dtype: torch.dtype, with_softmax: bool) -> None:
    written, entry = make_reference(7, 3, dtype, with_softmax), EntryFormat(3, dtype, with_softmax)
    cache = ReferenceCache(tmp_path / "new", [2, 4, 1], entry)
    assert cache.read([1]) is None
    cache.write([2, 0], select(written, [0, 1, 2]))
    assert cache.read([0, 1]) is None
    assert are_equal(cache.read([0, 2]), select(written, [1, 2, 0]))
    cache.write([1], select(written, [3, 4, 5, 6]))
    for again in (cache, ReferenceCache(tmp_path / "new", [2, 4, 1], entry)):
        assert are_equal(again.read([0, 1, 2]), select(written, [1, 2, 3, 4, 5, 6, 0]))
    assert (tmp_path / "new").stat().st_size == 7 * entry.bytes + 3


def test_an_empty_cache(tmp_path: Path) -> None:
    assert ReferenceCache(tmp_path / "new", [1], EntryFormat(3, torch.float32, True)).read([0]) is None


@pytest.mark.parametrize("size", range(0, 7 * 12 + 3, 5))
def test_of_a_file_cut_short_no_lost_state_is_read(tmp_path: Path, size: int) -> None:
    written, entry = make_reference(7, 3, torch.float32, False), EntryFormat(3, torch.float32, False)
    ReferenceCache(tmp_path / "cut", [2, 4, 1], entry).write([0, 1, 2], written)
    os.truncate(tmp_path / "cut", size)
    read = ReferenceCache(tmp_path / "cut", [2, 4, 1], entry).read([0])
    assert read is None or are_equal(read, select(written, [0, 1]))


def test_a_file_that_another_run_deletes_stays_this_ones(tmp_path: Path) -> None:
    written, entry = make_reference(2, 3, torch.float32, True), EntryFormat(3, torch.float32, True)
    first = ReferenceCache(tmp_path / "same", [2], entry)
    (tmp_path / "same").unlink()
    second = ReferenceCache(tmp_path / "same", [2], entry)
    first.write([0], written)
    assert are_equal(first.read([0]), written)
    assert second.read([0]) is None


@pytest.mark.usefixtures("kernels")
def test_a_cached_softmax_gives_the_same_loss_to_the_bit() -> None:
    torch.manual_seed(0)
    head = OutputHead(torch.randn(512, 64).bfloat16() / 8)
    objective = Objective(min_p=0.0)
    hidden, reference = torch.randn(2, 530, 64).bfloat16().unbind()
    node = torch.arange(0, 530, 3)
    counts = Counts(node, 2 * node % 512, torch.full_like(node, 3).float(), torch.full(node.shape, 5.0), 530)
    assert entry_format(head, objective) == (64, torch.bfloat16, True)
    assert not any(entry_format(head, other).with_softmax for other in (Objective(), Objective("listwise")))
    outcomes: list[tuple[NodeLosses, torch.Tensor | None]] = []
    for softmax in (None, reference_softmax(head, reference, counts)):
        h = hidden.clone().requires_grad_()
        losses = fused_loss(h, head, counts, objective, reference, softmax)
        losses.loss.sum().backward()
        outcomes.append((losses, h.grad))
    (plain, grad), (cached, again) = outcomes
    assert all(a.equal(b) for a, b in zip(plain, cached, strict=True))
    assert grad is not None
    assert again is not None
    assert grad.equal(again)


@pytest.mark.parametrize(
    "head", [OutputHead(torch.randn(31, 5)), OutputHead(torch.randn(64, 32).bfloat16(), softcap=3)]
)
def test_no_softmax_is_cached_for_losses_of_logits(head: OutputHead) -> None:
    empty = torch.zeros(0, dtype=torch.long)
    counts = Counts(empty, empty, empty.float(), empty.float(), 2)
    assert not entry_format(head, Objective(min_p=0.0)).with_softmax
    assert reference_softmax(head, torch.randn(2, head.weight.shape[1]).to(head.weight.dtype), counts) is None


# --- in a run


def test_the_reference_is_cached_for_the_same_answers_only(
    base: Path,
    rejections: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    use_cache: Callable[[Path], None],
) -> None:
    """Listwise adds answers to the same records: a cache of another objective must not change its result."""
    monkeypatch.setattr("buleyean_rl.training.own_samples.MAX_SAMPLE_TOKENS", 8)
    settings: dict[str, Any] = {"max_steps": 10, "objective": "listwise"}
    for cache, before in (("used", ["complement"]), ("new", [])):
        use_cache(tmp_path / cache)
        for objective in before:
            start(base, rejections, tmp_path / objective, **settings | {"objective": objective})
        start(base, rejections, tmp_path / f"listwise-{cache}", **settings)
    assert adapter_bytes(tmp_path / "listwise-used") == adapter_bytes(tmp_path / "listwise-new")


class TenRecords:
    """Ten records of ten nodes each."""

    nodes = np.full(10, 10)
    key = ""

    def __len__(self) -> int:
        return len(self.nodes)


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(4000, [4000 + 10]), (3999, [1600 + 10]), (1599, [])],
    ids=str,
)
def test_the_reference_is_cached_as_far_as_it_fits_on_disk(
    limit: int, sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(reference_cache, "MAX_CACHE_BYTES", limit)
    monkeypatch.setattr(reference_cache, "entry_format", lambda *_: EntryFormat(4, torch.float32, True))
    config = load_config(None, tmp_path / "run", {"num_train_epochs": 2, "micro_batch_tokens": 64})
    model: Any = SimpleNamespace(head=None, module=None, training_numerics={})
    data: Any = SimpleNamespace(training=TenRecords(), sha256="")
    references = reference_cache.open_reference_cache(model, data, config)
    assert (references is None) == (not sizes)
    assert [path.stat().st_size for path in tmp_path.rglob("reference/*")] == sizes
    config.num_train_epochs = 1
    assert reference_cache.open_reference_cache(model, data, config) is None


def test_a_run_goes_on_without_a_cache_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(reference_cache, "entry_format", lambda *_: EntryFormat(1 << 12, torch.float32, False))
    config = load_config(None, tmp_path / "run", {"num_train_epochs": 2, "micro_batch_tokens": 64})
    model: Any = SimpleNamespace(head=None, module=None, training_numerics={})
    data: Any = SimpleNamespace(training=TenRecords(), sha256="")
    console = Console(file=StringIO(), width=1000)
    with files_at_most(1 << 16):
        assert reference_cache.open_reference_cache(model, data, config, console=console) is None
    assert str(tmp_path / "buleyean-rl" / "reference") in console.file.getvalue()  # type: ignore[attr-defined]
    assert not list(tmp_path.rglob("reference/*"))
    assert reference_cache.open_reference_cache(model, data, config, console=console) is not None
    (states,) = tmp_path.rglob("reference/*")
    assert states.stat().st_blocks * 512 >= states.stat().st_size > 1 << 20
    monkeypatch.setattr(reference_cache, "FREE_BYTES", 1 << 60)
    assert reference_cache.open_reference_cache(model, data, config) is None
