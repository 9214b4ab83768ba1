"""Tokens are drawn from the nucleus, at a temperature, by one number between 0 and 1."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from buleyean_rl.kernels.decode import Decoder, DecoderWeights, Draws, LayerWeights, LinearWeights, Rows
from marks import needs_c

pytestmark = needs_c
WIDTH, VOCABULARY = 64, 512


def drawn(head: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> tuple[torch.Tensor, ...]:
    """Tokens, log-probabilities, and the logits of the one row that all are drawn after."""
    ones = torch.ones(WIDTH, dtype=torch.bfloat16)
    square = LinearWeights(torch.zeros(WIDTH, WIDTH, dtype=torch.bfloat16))
    layer = LayerWeights([square] * 7, (ones, ones), (None, None), (1e-5, 1e-5), 1.0)
    decoder = Decoder(DecoderWeights([layer], 32, ones, 1e-5, head))
    x = torch.linspace(-1, 1, WIDTH).bfloat16().repeat(1, 1)
    block, zero = torch.zeros(decoder.block_numbers, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.long)
    rotations = torch.ones(1, 32, dtype=torch.bfloat16)
    count = len(uniform)
    draws = Draws(zero.repeat(count), torch.full((count,), temperature), torch.full((count,), top_p), uniform)
    rows = Rows(x, rotations, rotations, zero, zero, torch.tensor([[block.data_ptr()]]))
    return *decoder.step(rows, draws), decoder.logits[0].clone()


@pytest.fixture
def head() -> torch.Tensor:
    """Of an output head whose distribution is neither flat nor sharp."""
    return (torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.25).bfloat16()


def test_the_likeliest_at_temperature_0(head: torch.Tensor, instruction_set: str) -> None:
    tokens, logprobs, logits = drawn(head, torch.tensor([0.0, 0.99]), 0.0, 0.5)
    assert tokens.tolist() == [int(logits.argmax())] * 2
    assert logprobs.tolist() == pytest.approx([float(logits.log_softmax(-1).max())] * 2, abs=1e-5)
    assert instruction_set


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (1.5, 0.5), (1.0, 1e-6)])
def test_each_token_is_drawn_by_its_share(head: torch.Tensor, temperature: float, top_p: float) -> None:
    count = 1 << 14
    uniform = (torch.arange(count) + 0.5) / count  # every number between 0 and 1, as it were
    tokens, logprobs, logits = drawn(head, uniform, temperature, top_p)
    probabilities = logits.softmax(-1).double()
    sorted_probabilities, order = probabilities.sort(descending=True)
    nucleus = order[(sorted_probabilities.cumsum(0) - sorted_probabilities) < top_p]
    expected = torch.zeros_like(probabilities)
    expected[nucleus] = probabilities[nucleus] ** (1 / temperature)
    expected /= expected.sum()
    shares = Counter(tokens.tolist())
    assert set(shares) <= set(nucleus.tolist())
    actual = torch.tensor([shares[i] / count for i in range(VOCABULARY)], dtype=torch.float64)
    assert (actual - expected).abs().max() < 1e-3
    assert torch.allclose(logprobs, logits.log_softmax(-1)[tokens], atol=1e-4)


def test_logits_that_are_no_numbers_are_seen(head: torch.Tensor) -> None:
    head[3] = torch.nan
    _, logprobs, _ = drawn(head, torch.tensor([0.5]), 0.0, 1.0)
    assert logprobs.isnan().all()
