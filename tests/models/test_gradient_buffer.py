"""Gradients in one tensor: autograd adds to them where they are, and so do the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapted import SEQUENCE, biased_outputs, packed_model, wide_heads
from buleyean_rl.batching.forward import forward_hidden
from buleyean_rl.models.gradient_buffer import GradientBuffer
from buleyean_rl.models.lora import cached_weights, linear_groups
from buleyean_rl.models.segments import segments_in_use
from buleyean_rl.models.views import backbone


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def test_gradients_are_in_one_tensor_and_zero_whenever_there_were_none() -> None:
    a, b, c = parameters((2, 3), (4,), (1, 5))
    gradients = GradientBuffer([a, b, c], [(c, a)])
    for factor in (2.0, 3.0):
        gradients.attach()
        for _ in range(2):
            (factor * (a.sum() + 10 * b.sum() + 100 * c.sum())).backward()
            gradients.attach()
        assert gradients.flat.tolist() == [200 * factor] * 5 + [2 * factor] * 6 + [20 * factor] * 4
        gradients.flat.fill_(7)
        assert all(p.grad is not None and p.grad.shape == p.shape and p.grad.eq(7).all() for p in (a, b, c))
        for p in (a, b, c):
            p.grad = None


def test_a_group_has_its_slice_if_all_of_it_is_trained() -> None:
    a, b, frozen = parameters((2,), (3,), (4,))
    frozen.requires_grad = False
    gradients = GradientBuffer([a, b], [(b, a), (frozen, a)])
    gradients.attach()
    part = gradients.slice((b, a))
    assert part is not None
    part.copy_(torch.arange(5))
    assert (b.grad.tolist(), a.grad.tolist()) == ([0, 1, 2], [3, 4])  # type: ignore[union-attr]
    assert all(gradients.slice(group) is None for group in ((a, b), (a,), (frozen, a), ()))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("make", [wide_heads, biased_outputs], ids=["one call", "modules"])
def test_kernels_add_what_autograd_would_have_added(make: Callable[[Any], Any]) -> None:
    model = packed_model(make)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = linear_groups(model)
    by_autograd: list[Tensor] = []
    for parameter in trained:
        parameter.register_hook(lambda gradient: None if gradient is None else by_autograd.append(gradient))

    def learned(gradients: GradientBuffer | None) -> list[Tensor]:
        by_autograd.clear()
        model.zero_grad()
        torch.manual_seed(1)
        if gradients is not None:
            gradients.attach()
        with cached_weights(groups, gradients), segments_in_use(SEQUENCE.segments):
            for factor in (1, -0.3):
                forward_hidden(backbone(model), SEQUENCE).double().cumsum(0).sum().mul(factor).backward()
        return [parameter.grad.clone() for parameter in trained if parameter.grad is not None]

    expected = learned(None)
    assert len(by_autograd) == 2 * len(trained)
    gradients = GradientBuffer(trained, [group.parameters() for group in groups])
    for _ in range(2):
        got = learned(gradients)
        assert not by_autograd
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.norm()))
    assert len(learned(None)) == len(trained) == len(by_autograd) / 2
