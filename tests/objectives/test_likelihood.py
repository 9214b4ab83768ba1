"""Likelihoods, divergences and entropies by tiles against plain log-softmaxes."""

from __future__ import annotations

import math

import pytest
import torch

from buleyean_rl.kernels import abi
from buleyean_rl.models import output_head
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.objectives.likelihood import TextFigures, compare_distributions, token_nlls

PRECISIONS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}  # and their tolerances
SHAPE = (3 * 47, 31, 123)  # nodes, width, vocabulary
CAPPED = {"scale": 0.5, "softcap": 3.0}
CASES: list[tuple[torch.dtype, tuple[int, int, int], dict[str, object], bool]] = [
    *((dtype, SHAPE, {}, compiled) for dtype in PRECISIONS for compiled in (True, False)),
    *((torch.float64, shape, {}, True) for shape in [(1, 1, 2), (130, 16, 257)]),
    *((torch.float64, SHAPE, head, True) for head in (CAPPED, {"bias": True})),
    (torch.bfloat16, (130, 16, 257), CAPPED, True),
]


def plain(log_pi: torch.Tensor, log_ref: torch.Tensor, tokens: torch.Tensor) -> TextFigures:
    """The definitions, over log-probabilities of shape (nodes, vocabulary)."""
    nll, base = (-log_p.gather(1, tokens[:, None]).squeeze(1) for log_p in (log_pi, log_ref))
    kl = (log_ref.exp() * (log_ref - log_pi)).sum(1)
    entropy, reference_entropy = (-(log_p.exp() * log_p).sum(1) for log_p in (log_pi, log_ref))
    return TextFigures(nll, base, kl, entropy, reference_entropy)


@pytest.mark.parametrize(("dtype", "shape", "head", "compiled"), CASES)
def test_the_figures_are_the_plain_ones(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    head: dict[str, object],
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(output_head, "TILE", 10)  # several tiles, the last one ragged
    monkeypatch.setattr(output_head, "CHUNK", 64)
    if not compiled:
        monkeypatch.setattr(abi, "available", lambda *_: False)
    torch.manual_seed(0)
    tolerance, (nodes, width, vocabulary) = PRECISIONS[dtype], shape
    if "bias" in head:
        head = {"bias": torch.randn(vocabulary).to(dtype)}
    hidden = (3 * torch.randn(nodes, width)).to(dtype)
    reference = (hidden + torch.randn(nodes, width)).to(dtype)
    output = OutputHead((torch.randn(vocabulary, width) / width**0.5).to(dtype), **head)  # type: ignore[arg-type]
    tokens = torch.randint(vocabulary, (nodes,))
    got = compare_distributions(hidden, reference, output, tokens)
    # in bf16 the head's own logits are rounded: the plain figures start from the same ones
    expected = plain(output(hidden).log_softmax(1), output(reference).log_softmax(1), tokens)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    alone = compare_distributions(hidden, None, output, tokens)
    assert alone.reference_nll is None
    assert alone.kl is None
    assert alone.reference_entropy is None
    torch.testing.assert_close(alone.nll, got.nll, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(alone.entropy, got.entropy, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(token_nlls(hidden, output, tokens), got.nll, rtol=tolerance, atol=tolerance)


def test_by_hand() -> None:
    """Two tokens: pi is 3/4 and 1/4, pi_ref is even."""
    head = OutputHead(torch.eye(2, dtype=torch.float64))
    pi = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    figures = compare_distributions(pi, torch.zeros_like(pi), head, torch.tensor([1]))
    nll, base, kl, entropy, base_entropy = (part.item() for part in figures if part is not None)
    assert base_entropy == pytest.approx(math.log(2))
    assert nll == pytest.approx(math.log(4))
    assert base == pytest.approx(math.log(2))
    assert kl == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_a_model_is_at_no_distance_from_itself() -> None:
    torch.manual_seed(0)
    head = OutputHead(torch.randn(500, 8))
    hidden = 4 * torch.randn(70, 8)
    figures = compare_distributions(hidden, hidden, head, torch.randint(500, (70,)))
    assert figures.kl is not None
    assert torch.equal(figures.nll, figures.reference_nll)
    assert figures.kl.max() < 1e-5
    assert (figures.entropy >= 0).all()
    assert (figures.entropy <= math.log(500)).all()
