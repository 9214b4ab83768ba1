"""The cache of what is known of the reference: what is written is read, what is not known is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.objectives.complement import Counts
from buleyean_rl.objectives.fused import fused_loss
from buleyean_rl.objectives.losses import NodeLosses, Objective
from buleyean_rl.objectives.vocabulary_softmax import ReferenceSoftmax, reference_softmax
from buleyean_rl.training.reference_cache import CachedReference, EntryFormat, ReferenceCache, entry_format


def some(nodes: int, width: int, dtype: torch.dtype, with_rest: bool) -> CachedReference:
    rest = ReferenceSoftmax(torch.randn(nodes).double() / 3, torch.randn(nodes, width))
    return CachedReference(torch.randn(nodes, width).to(dtype), rest if with_rest else None)


def of(known: CachedReference, nodes: list[int]) -> CachedReference:
    rest = None if known.rest is None else ReferenceSoftmax(*(x[nodes] for x in known.rest))
    return CachedReference(known.states[nodes], rest)


def equal(got: CachedReference | None, expected: CachedReference) -> bool:
    if got is None or not got.states.equal(expected.states) or (got.rest is None) != (expected.rest is None):
        return False
    return got.rest is None or all(a.equal(b) for a, b in zip(got.rest, expected.rest or (), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_rest", [False, True])
def test_what_was_written_is_read_again(tmp_path: Path, dtype: torch.dtype, with_rest: bool) -> None:
    known, kept = some(7, 3, dtype, with_rest), EntryFormat(3, dtype, with_rest)
    cache = ReferenceCache(tmp_path / "new", [2, 4, 1], kept)
    assert cache.read([1]) is None
    cache.write([2, 0], of(known, [0, 1, 2]))
    assert cache.read([0, 1]) is None
    assert equal(cache.read([0, 2]), of(known, [1, 2, 0]))
    cache.write([1], of(known, [3, 4, 5, 6]))
    for again in (cache, ReferenceCache(tmp_path / "new", [2, 4, 1], kept)):
        assert equal(again.read([0, 1, 2]), of(known, [1, 2, 3, 4, 5, 6, 0]))
    files = {path.name: path.stat().st_size for path in (tmp_path / "new").iterdir()}
    assert sum(files.values()) == 7 * kept.bytes + files["known"]


def test_a_cache_of_nothing(tmp_path: Path) -> None:
    assert ReferenceCache(tmp_path, [1], EntryFormat(3, torch.float32, True)).read([0]) is None


@pytest.mark.usefixtures("tiles")
def test_a_loss_is_to_the_bit_what_it_is_when_its_reference_is_looked_at_before() -> None:
    torch.manual_seed(0)
    head = OutputHead(torch.randn(512, 64).bfloat16() / 8)
    objective = Objective()
    hidden, reference = torch.randn(2, 530, 64).bfloat16().unbind()
    node = torch.arange(0, 530, 3)
    counts = Counts(node, 2 * node % 512, torch.full_like(node, 3).float(), torch.full((530,), 5.0))
    assert entry_format(head, objective) == (64, torch.bfloat16, True)
    assert not entry_format(head, Objective("listwise")).with_rest
    outcomes: list[tuple[NodeLosses, torch.Tensor | None]] = []
    for rest in (None, reference_softmax(head, reference, counts)):
        h = hidden.clone().requires_grad_()
        losses = fused_loss(h, head, counts, objective, reference, rest)
        losses.loss.sum().backward()
        outcomes.append((losses, h.grad))
    (plain, grad), (known, again) = outcomes
    assert all(a.equal(b) for a, b in zip(plain, known, strict=True))
    assert grad is not None
    assert again is not None
    assert grad.equal(again)


@pytest.mark.parametrize(
    "head", [OutputHead(torch.randn(31, 5)), OutputHead(torch.randn(64, 32).bfloat16(), softcap=3)]
)
def test_where_a_loss_goes_by_logits_there_is_nothing_more_to_keep(head: OutputHead) -> None:
    nothing = torch.zeros(0, dtype=torch.long)
    counts = Counts(nothing, nothing, nothing.float(), torch.ones(2))
    assert not entry_format(head, Objective()).with_rest
    assert reference_softmax(head, torch.randn(2, head.weight.shape[1]).to(head.weight.dtype), counts) is None
