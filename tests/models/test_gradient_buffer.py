"""GradientBuffer in one tensor: autograd adds to them where they lie, and so do products that know where that is."""

from __future__ import annotations

import pytest
import torch
from test_fused_decoder import ROW, adapted, biased, wide_heads
from torch import Tensor, nn

from buleyean_rl.batching.forward import forward_hidden
from buleyean_rl.models.gradient_buffer import GradientBuffer
from buleyean_rl.models.lora import groups_of, held
from buleyean_rl.models.segments import segments_in_use
from buleyean_rl.models.views import backbone


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def test_they_lie_in_one_tensor_and_begin_at_zero_whenever_there_are_none() -> None:
    a, b, c = parameters((2, 3), (4,), (1, 5))
    gradients = GradientBuffer([a, b, c], [(c, a)])
    for factor in (2.0, 3.0):
        gradients.place()
        for _ in range(2):
            (factor * (a.sum() + 10 * b.sum() + 100 * c.sum())).backward()
            gradients.place()
        assert gradients.all.tolist() == [200 * factor] * 5 + [2 * factor] * 6 + [20 * factor] * 4
        gradients.all.fill_(7)
        assert all(p.grad is not None and p.grad.shape == p.shape and p.grad.eq(7).all() for p in (a, b, c))
        gradients.forget()
        assert all(p.grad is None for p in (a, b, c))


def test_those_of_some_parameters_are_given_if_they_lie_in_this_order_and_all_of_these_learn() -> None:
    a, b, frozen = parameters((2,), (3,), (4,))
    frozen.requires_grad = False
    gradients = GradientBuffer([a, b], [(b, a), (frozen, a)])
    gradients.place()
    found = gradients.of((b, a))
    assert found is not None
    found.copy_(torch.arange(5))
    assert (b.grad.tolist(), a.grad.tolist()) == ([0, 1, 2], [3, 4])  # type: ignore[union-attr]
    assert all(gradients.of(some) is None for some in ((a, b), (a,), (frozen, a), ()))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("make", [wide_heads, biased], ids=["one call", "passes"])
def test_products_add_what_autograd_would_have_added(make: object) -> None:
    model = adapted(make, 0.4, torch.bfloat16)  # type: ignore[arg-type]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = groups_of(model)
    by_autograd: list[Tensor] = []
    for parameter in learning:
        parameter.register_hook(lambda gradient: None if gradient is None else by_autograd.append(gradient))

    def learned(gradients: GradientBuffer | None) -> list[Tensor]:
        by_autograd.clear()
        model.zero_grad()
        torch.manual_seed(1)
        if gradients is not None:
            gradients.place()
        with held(groups, gradients), segments_in_use(ROW.segments):
            for factor in (1, -0.3):
                forward_hidden(backbone(model), ROW).double().cumsum(0).sum().mul(factor).backward()
        return [parameter.grad.clone() for parameter in learning if parameter.grad is not None]

    expected = learned(None)
    assert len(by_autograd) == 2 * len(learning)
    gradients = GradientBuffer(learning, [group.parameters() for group in groups])
    for _ in range(2):
        got = learned(gradients)
        assert not by_autograd
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.norm()))
    assert len(learned(None)) == len(learning) == len(by_autograd) / 2
