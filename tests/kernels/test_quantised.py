"""Matrices in GGUF's blocks pass for the matrices that they stand for, in torch and in the kernels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from torch import Tensor, nn

from buleyean_rl.kernels import matmul
from buleyean_rl.kernels.matmul import Adapter
from buleyean_rl.kernels.quantised import (
    KINDS,
    OF_BITS,
    Q4_0,
    Q4_1,
    Q4_K,
    Q6_K,
    Q8_0,
    Blocks,
    QuantisedTensor,
    quantise,
)
from gguf import GGML_QUANT_SIZES
from kernel_inputs import in_all_instruction_sets, random

# where the half precision numbers of a block are
HALVES = {Q4_0: (0,), Q4_1: (0, 2), Q8_0: (0,), Q4_K: (0, 2), Q6_K: (208,)}


def blocks(kind: int, rows: int, width: int) -> Blocks:
    """Random bytes, but for what scales all of a block."""
    numbers, size = GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(kind)
    packed = generator.integers(0, 256, (rows, width // numbers, size), np.uint8)
    for offset in HALVES[kind]:
        scales = generator.normal(0, 0.01, packed.shape[:2]).astype(np.float16)
        packed[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return Blocks(kind, torch.from_numpy(packed.reshape(rows, -1)))


def matrix(*parts: Blocks, dtype: torch.dtype = torch.bfloat16) -> tuple[QuantisedTensor, Tensor]:
    """In blocks, and its numbers by the gguf package."""
    numbers = [torch.from_numpy(np.array(dequantize(part.packed.numpy(), part.kind))) for part in parts]
    return QuantisedTensor(parts, dtype), torch.cat(numbers).to(dtype)


@in_all_instruction_sets
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_dequantise_as_gguf_does(kind: int) -> None:
    quantised, numbers = matrix(blocks(kind, 5, 512))
    assert quantised.dequantise().equal(numbers)
    assert quantised.T.dequantise().equal(numbers.T)


@in_all_instruction_sets
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kinds", [(Q8_0,), (Q4_0, Q4_1), (Q4_K, Q4_K, Q6_K)])
def test_a_layer_of_blocks_is_the_layer_of_their_numbers(kinds: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    quantised, numbers = matrix(*(blocks(kind, 64 * (number + 1), 512) for number, kind in enumerate(kinds)))
    outputs = [64 * (number + 1) for number in range(len(kinds))]
    ranks = [32] + [0] * (len(kinds) - 1)
    adapter = Adapter(random(32, 512), random(sum(outputs), 32), ranks, outputs, [1.0] * len(kinds))
    x, grad_y = random(70, 512), random(70, sum(outputs))
    results = []
    for weight in (quantised, numbers):
        linear = matmul.make_linear(weight, adapter)
        y, hidden = matmul.lora_linear(x, linear)
        assert hidden is not None
        grads = torch.zeros(linear.adapter_size)
        grad_x = matmul.lora_linear_backward(grad_y, x, linear, hidden, True, grads)
        frozen = matmul.linear_input_gradient(grad_y, matmul.make_linear(weight))
        results.append((y, grad_x, grads, frozen))
    assert all(a is not None and b is not None and a.equal(b) for a, b in zip(*results, strict=True))


@in_all_instruction_sets
def test_a_head_of_blocks_has_the_softmax_of_its_numbers() -> None:
    torch.manual_seed(0)
    weights, hidden = matrix(blocks(Q6_K, 416, 256)), random(40, 256)  # more rows than are packed at a time
    listed = torch.tensor([3, 400]), torch.tensor([0, 33])
    ours, theirs = (matmul.head_softmax(weight, hidden, 1.0, *listed) for weight in weights)
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda w: nn.functional.linear(
        torch.ones(2, 3, w.shape[1], dtype=w.dtype), w, torch.ones(len(w), dtype=w.dtype)
    ),
    "w x": lambda w: w @ torch.ones(w.shape[1], 3, dtype=w.dtype),
    "w^T y": lambda w: w.T @ torch.ones(len(w), 3, dtype=w.dtype),
    "y w": lambda w: torch.ones(3, len(w), dtype=w.dtype) @ w,
    "embedding": lambda w: nn.functional.embedding(torch.tensor([[5, 0], [65, 5]]), w),
    "rows": lambda w: w[torch.tensor([-1, 2])],
    "no rows": lambda w: w[torch.tensor([], dtype=torch.long)],
    "zeros like it": lambda w: w.new_zeros(2, 3),
    "slice": lambda w: w[60:66] @ torch.ones(w.shape[1], 1, dtype=w.dtype),
    "contiguous": lambda w: w.T.contiguous() + 0,
    "sum": lambda w: w.sum(0),
    "cast": lambda w: w.double() @ torch.ones(w.shape[1], 1, dtype=torch.double),
    "concatenated": lambda w: torch.cat([w, w]) @ torch.ones(w.shape[1], 1, dtype=w.dtype),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("numbers_at_once", [1 << 22, 2048])
def test_torch_computes_with_blocks(name: str, numbers_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buleyean_rl.kernels.quantised.NUMBERS", numbers_at_once)
    quantised, numbers = matrix(blocks(Q4_1, 64, 512), blocks(Q8_0, 32, 512), dtype=torch.float32)
    torch.testing.assert_close(OPERATIONS[name](quantised), OPERATIONS[name](numbers))


def test_the_gradient_goes_through_a_parameter_of_blocks() -> None:
    quantised, numbers = matrix(blocks(Q4_0, 64, 64), dtype=torch.float32)
    gradients = []
    for weight in (quantised, numbers):
        parameter, x = nn.Parameter(weight, requires_grad=False), torch.ones(3, 64, requires_grad=True)
        (nn.functional.linear(x, parameter) ** 2).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_blocks_do_not_change() -> None:
    quantised, _ = matrix(blocks(Q8_0, 4, 64))
    with pytest.raises(RuntimeError, match="does not change"):
        quantised.add_(1)


@pytest.mark.parametrize(("bits", "error"), [(4, 0.08), (8, 0.006)])
def test_a_matrix_is_quantised(bits: int, error: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(33, 64)
    quantised = quantise(weight, bits)
    assert quantised is not None
    assert quantised.parts[0].kind == OF_BITS[bits]
    assert (quantised.dequantise() - weight).norm() < error * weight.norm()
    assert quantise(torch.randn(4, 40), bits) is None  # no whole number of blocks
