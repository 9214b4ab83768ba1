"""RMSNorm, SwiGLU, rotary embedding and rounding in C against torch's fp64, in every instruction set here."""

from __future__ import annotations

from ctypes import byref

import pytest
import torch
from torch import Tensor

from buleyean_rl.kernels import abi, elementwise
from kernel_inputs import ODD, in_all_instruction_sets, random
from marks import needs_c

TOLERANCE = {"rtol": 2**-6, "atol": 2**-6}


def rope(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, backward: bool = False) -> None:
    """Rotary embedding, or its gradient, into `y`. Shapes: (heads, tokens, width), (tokens, width) twice."""
    abi.call("rope", byref(abi.Heads.of(y.copy_(x))), cos, sin, x.shape[-1], backward)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@in_all_instruction_sets
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [1, 37, 64])
def test_rms_norm_and_its_gradient(width: int) -> None:
    torch.manual_seed(width)
    x, weight, grad_y = random(5, width), random(width), random(5, width)
    exact_x = x.double().requires_grad_()
    expected = rms_norm(exact_x, weight.double())
    expected.backward(grad_y.double())
    torch.testing.assert_close(elementwise.rms_norm(x, weight, 1e-5).double(), expected.detach(), **TOLERANCE)
    grad_x = elementwise.rms_norm_backward(grad_y, x, weight, 1e-5)
    torch.testing.assert_close(grad_x.double(), exact_x.grad, **TOLERANCE)


@in_all_instruction_sets
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [32, 96])
def test_swiglu_and_its_gradient(width: int) -> None:
    torch.manual_seed(width)
    gate_up, grad_y = 20 * random(5, 2 * width), random(5, width)
    exact_gate_up = gate_up.double().requires_grad_()
    expected = swiglu(exact_gate_up)
    expected.backward(grad_y.double())
    torch.testing.assert_close(elementwise.swiglu(gate_up).double(), expected.detach(), **TOLERANCE)
    grad_gate_up = elementwise.swiglu_backward(grad_y, gate_up)
    torch.testing.assert_close(grad_gate_up.double(), exact_gate_up.grad, **TOLERANCE)


@in_all_instruction_sets
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("place", [3, 39])  # in a vector, and in the last elements of a row
def test_nan_and_infinity_come_out_of_element_wise_passes(place: int, odd: float) -> None:
    torch.manual_seed(0)
    x, ones = random(3, 40).abs(), torch.ones(40, dtype=torch.bfloat16)
    gate_up = random(3, 64).abs()
    x[1, place] = gate_up[1, place % 32] = gate_up[2, 32 + place % 32] = odd
    grad_y, sane = torch.ones_like(x), torch.arange(3) != 1
    for y in (elementwise.rms_norm(x, ones, 1e-5), elementwise.rms_norm_backward(grad_y, x, ones, 1e-5)):
        assert not y[1, place].isfinite()
        assert y[sane].isfinite().all()
    y, grad = elementwise.swiglu(gate_up), elementwise.swiglu_backward(grad_y[:, :32].contiguous(), gate_up)
    finite = torch.nn.functional.silu(gate_up[:, :32].float()).mul(gate_up[:, 32:].float()).isfinite()
    assert y.isfinite().equal(finite) or odd == -torch.inf  # -inf * 0 is NaN in torch
    assert y[0].isfinite().all()
    assert not (grad[1].isfinite().all() and odd != odd)
    assert not grad[2].isfinite().all()
    rotated = torch.empty(1, 3, 40, dtype=torch.bfloat16)
    rope(x.unsqueeze(0), random(3, 40), random(3, 40), rotated)
    assert not rotated[0, 1, place].isfinite()


@needs_c
def test_every_nan_stays_one_when_it_is_rounded() -> None:
    bits = torch.tensor([0x7FFF, 0x7F81, 0xFFFF, 0xFF81], dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16).repeat(2, 16)
    assert elementwise.swiglu(x).isnan().all()


@in_all_instruction_sets
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("width", [2, 20, 64])
def test_rope_and_its_gradient(width: int, heads_first: bool) -> None:
    torch.manual_seed(width)
    x, gradient = random(2, 3, 7, width)
    cos, sin = random(2, 7, width)  # halves that differ, as no model's do
    exact = x.double().requires_grad_()
    first, second = exact.chunk(2, -1)
    expected = exact * cos.double() + torch.cat((-second, first), -1) * sin.double()
    expected.backward(gradient.double())
    assert exact.grad is not None
    for source, backward, result in ((x, False, expected.detach()), (gradient, True, exact.grad)):
        strided = source if heads_first else source.transpose(0, 1).contiguous().transpose(0, 1)
        y = torch.empty(7, 3, width, dtype=torch.bfloat16).transpose(0, 1) if heads_first else torch.empty_like(source)
        rope(strided, cos, sin, y, backward)
        torch.testing.assert_close(y.double(), result, rtol=2**-8, atol=1e-6)
        rope(strided, cos, sin, strided, backward)  # where it lies
        assert strided.equal(y)
