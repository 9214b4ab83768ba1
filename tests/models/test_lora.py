"""`LoraLinear` beside PEFT's own layer: one value, one gradient, one file format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor

from lora_layers import pair

# PEFT asks transformers under a name that goes away with version 6
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(4, 24).reshape(2, 10)


def outcome(layer: PeftLinear, x: Tensor) -> dict[str, Any]:
    """What a layer answers, and every gradient, with the same dropout each time."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = layer(x)
    (y * torch.linspace(-1, 2, y.numel()).reshape(y.shape)).sum().backward()
    return {"y": y, "x": x.grad, "A": layer.lora_A["default"].weight.grad, "B": layer.lora_B["default"].weight.grad}


@pytest.mark.parametrize(
    ("bias", "dropout", "shape"), [(True, 0.5, (2, 3, 7)), (False, 0.0, (4, 7)), (True, 0.0, (1, 1, 7))]
)
def test_value_and_gradient_are_pefts(bias: bool, dropout: float, shape: tuple[int, ...]) -> None:
    ours, theirs = pair(bias, dropout)
    x = torch.randn(shape)
    torch.testing.assert_close(outcome(ours, x), outcome(theirs, x), rtol=1e-5, atol=1e-5)


def test_dropout_drops_only_in_training() -> None:
    ours, _ = pair(dropout=0.5)
    x = torch.randn(4, 7)
    expected = pair(dropout=0.0)[0](x)
    assert not torch.allclose(ours(x), expected)
    torch.testing.assert_close(ours.eval()(x), expected)


def test_an_input_without_gradient_gets_none() -> None:
    ours, theirs = pair()
    x = torch.randn(4, 7)
    for layer in (ours, theirs):
        layer(x).sum().backward()
    torch.testing.assert_close(ours.lora_A["default"].weight.grad, theirs.lora_A["default"].weight.grad)
    assert x.grad is None


def test_bf16_stays_bf16_with_adapter_gradients_in_fp32() -> None:
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(3))
    got = outcome(pair(dtype=torch.bfloat16)[0], x.bfloat16())
    assert {name: value.dtype for name, value in got.items()} == {
        "y": torch.bfloat16,
        "x": torch.bfloat16,
        "A": torch.float32,
        "B": torch.float32,
    }
    for name, exact in outcome(pair()[1], x).items():
        torch.testing.assert_close(got[name].float(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("bias", "dropout", "shape"), [(True, 0.5, (2, 33, 64)), (False, 0.0, (40, 64))])
def test_in_c_value_and_gradient_are_pefts(bias: bool, dropout: float, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    ours, _ = pair(bias, dropout, torch.bfloat16, inputs=64, outputs=96)
    _, theirs = pair(bias, dropout, inputs=64, outputs=96, masks=torch.bfloat16)
    theirs.get_base_layer().load_state_dict(ours.get_base_layer().state_dict())  # rounded alike
    got = outcome(ours, x)
    for name, exact in outcome(theirs, x.float()).items():
        torch.testing.assert_close(got[name].float(), exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


@pytest.mark.usefixtures("kernels")
def test_in_c_inputs_and_gradients_lie_however_they_may() -> None:
    ours, _ = pair(dtype=torch.bfloat16, inputs=64, outputs=96)
    x = torch.randn(64, 40).bfloat16().T  # its columns next to each other
    a, b = (ours.lora_A["default"].weight, ours.lora_B["default"].weight)
    outcomes = []
    for like in (x, x.contiguous()):
        y = ours(like)
        pulls = (torch.ones(()).bfloat16().expand_as(y), torch.ones_like(y))  # the first is one number
        outcomes += [(y, *torch.autograd.grad(y, [a, b], pull, retain_graph=True)) for pull in pulls]
    for other in outcomes[1:]:
        assert all(got.equal(expected) for got, expected in zip(other, outcomes[0], strict=True))
    torch.testing.assert_close(
        outcomes[0][0], ours.get_base_layer()(x) + 2 * x @ (b @ a).bfloat16().T, rtol=0.05, atol=0.5
    )


@pytest.mark.usefixtures("kernels")
def test_in_c_the_base_is_the_same_without_a_gradient() -> None:
    ours, _ = pair(dtype=torch.bfloat16, inputs=64, outputs=96)
    ours.enable_adapters(False)
    x = torch.randn(2, 33, 64).bfloat16()
    with torch.no_grad():
        got = ours(x)
    torch.testing.assert_close(got, ours.get_base_layer()(x), rtol=0.01, atol=0.01)


def test_a_fresh_or_disabled_adapter_is_the_base() -> None:
    ours, _ = pair()
    x = torch.randn(4, 7)
    base = ours.get_base_layer()(x)
    assert not torch.allclose(ours(x), base)
    ours.enable_adapters(False)
    assert torch.equal(ours(x), base)
    ours.enable_adapters(True)
    ours.lora_B["default"].weight.data.zero_()  # as a fresh adapter's is
    torch.testing.assert_close(ours(x), base)


def test_a_merged_layer_answers_the_same() -> None:
    ours, _ = pair()
    x = torch.randn(4, 7)
    before = ours(x)
    ours.merge()
    torch.testing.assert_close(ours(x), before, rtol=1e-5, atol=1e-5)
    ours.unmerge()
    torch.testing.assert_close(ours(x), before, rtol=1e-5, atol=1e-5)
