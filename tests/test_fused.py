"""The fused losses against the dense ones: value and gradient, odd shapes, every precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buleyean_rl import fused
from buleyean_rl.complement import Counts
from buleyean_rl.fused import OutputHead, fused_loss
from buleyean_rl.losses import NodeLosses, Objective, complement_loss, published_loss

OBJECTIVES = [
    Objective("published"),
    Objective("complement"),
    Objective("published", alpha=1.0, tau=0.5),
    Objective("complement", alpha=0.3, tau=2.0),
]
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
SHAPES = [(1, 1, 2), (3, 47, 31), (47, 31, 123), (130, 16, 257)]  # nodes, width, vocabulary


def random_counts(nodes: int, vocabulary: int, entries: int, rounds: int = 10) -> Counts:
    """Up to `entries` rejections per node, some nodes with none, counts beyond T included."""
    rows = []
    for node in range(nodes):
        for token in torch.randperm(vocabulary)[: torch.randint(0, entries + 1, ()).item()].tolist():
            rows.append((node, token, torch.randint(1, rounds + 3, ()).item()))
    node, option, count = (
        (torch.tensor(column) for column in zip(*rows, strict=True))
        if rows
        else (torch.zeros(0, dtype=torch.long),) * 3
    )
    return Counts(node, option, count.float(), torch.full((nodes,), float(rounds)))


def dense_loss(
    hidden: Tensor, head: OutputHead, counts: Counts, objective: Objective, reference: Tensor | None
) -> NodeLosses:
    logits = head(hidden)
    counts = counts.astype(logits.dtype)
    if reference is None:
        return published_loss(logits, counts, objective)
    return complement_loss(logits, head(reference), counts, objective)


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, objective: Objective, **head: object
) -> tuple[Tensor, OutputHead, Counts, Tensor | None]:
    nodes, width, vocabulary = shape
    hidden = torch.randn(nodes, width).to(dtype)
    weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype)
    reference = (hidden + torch.randn(nodes, width) / 4).to(dtype) if objective.uses_reference else None
    return hidden, OutputHead(weight, **head), random_counts(nodes, vocabulary, 3), reference  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head", [{}, {"scale": 0.5, "softcap": 3.0}, {"bias": True}])
def test_fused_equals_dense(
    objective: Objective,
    dtype: torch.dtype,
    tolerance: float,
    shape: tuple[int, int, int],
    head: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(fused, "TILE_ELEMENTS", 1000)  # several tiles, the last one ragged
    if "bias" in head:
        head = {"bias": torch.randn(shape[2]).to(dtype)}
    hidden, output, counts, reference = inputs(shape, dtype, objective, **head)
    results = []
    for loss in (fused_loss, dense_loss):
        h = hidden.clone().requires_grad_()
        losses = loss(h, output, counts, objective, reference)
        (losses.loss * torch.linspace(0.5, 2, len(h))).sum().backward()
        results.append((losses, h.grad))
    (got, got_grad), (expected, expected_grad) = results
    for name in NodeLosses._fields:
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(expected, name).double(), rtol=tolerance, atol=tolerance
        )
    scale = expected_grad.double().abs().max().clamp_min(1e-3)
    torch.testing.assert_close(
        got_grad.double() / scale, expected_grad.double() / scale, rtol=tolerance, atol=tolerance
    )
