"""The C kernels against the same work in torch's fp64, for every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref
from typing import Any

import pytest
import torch
from torch import Tensor

from buleyean_rl.kernels import abi, attention, matmul
from kernel_inputs import ODD, in_all_instruction_sets, random
from marks import needs_c

FEW_ROWS = 4  # of gemm.c


def matrix(x: Tensor | None) -> abi.Matrix:
    return abi.Matrix() if x is None else abi.Matrix(x.data_ptr(), *x.shape, *x.stride())


def gemm(
    a: Tensor, b: Tensor, a2: Tensor | None = None, b2: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    """a b + a2 b2 + added, whose rows have something between them that stays as it is."""
    y = torch.full((len(a), b.shape[1] + 5), 7, dtype=torch.bfloat16)
    if added is not None:
        added = torch.nn.functional.pad(added, (0, 5))
    places = abi.address(added), y.data_ptr(), None
    abi.call(
        "gemm", byref(abi.GemmArgs(matrix(a), matrix(b), matrix(a2), matrix(b2), *places, y.stride(0), y.stride(0)))
    )
    assert (y[:, -5:] == 7).all()
    return y[:, :-5]


def gemm_of_transpose(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, in fp32."""
    c = torch.empty(a.shape[1], b.shape[1])
    nothing = abi.Matrix(), abi.Matrix()
    abi.call("gemm", byref(abi.GemmArgs(matrix(a.T), matrix(b), *nothing, None, None, c.data_ptr(), b.shape[1], 0)))
    return c


@in_all_instruction_sets
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "depth2", "transposed"),
    [
        (1, 64, 96, 0, True),
        (FEW_ROWS, 1632, 320, 32, True),
        (FEW_ROWS, 64, 32, 0, False),
        (FEW_ROWS + 1, 64, 32, 96, True),
        (75, 96, 32, 32, False),
        (130, 704, 320, 96, True),  # two pieces of the depth
        (70, 1632, 64, 32, False),  # two panels of it
        (410, 32, 64, 0, True),  # enough rows for a thread each
    ],
)
def test_gemm(rows: int, depth: int, columns: int, depth2: int, transposed: bool) -> None:
    torch.manual_seed(rows)
    a, b, added = random(rows, depth), random(depth, columns, transposed=transposed), 8 * random(rows, columns)
    second = (random(rows, depth2), random(depth2, columns, transposed=transposed)) if depth2 else ()
    exact = a.double() @ b.double()
    if second:
        exact += second[0].double() @ second[1].double()
    tolerance = {"rtol": 2**-8, "atol": 1e-4 * depth**0.5}
    y = gemm(a, b, *second)
    torch.testing.assert_close(y.double(), exact, **tolerance)
    torch.testing.assert_close(gemm(a, b, *second, added=added).double(), exact + added.double(), **tolerance)
    first = rows // 2 if rows > 2 * FEW_ROWS else 0
    some = gemm(a[first:], b, *((second[0][first:], second[1]) if second else ()))
    assert some.equal(y[first:])  # a row does not notice the others, unless they are few


@in_all_instruction_sets
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(1, 64, 96), (75, 96, 32), (300, 64, 704), (1600, 32, 64)], ids=str)
def test_gemm_of_a_transpose(shape: tuple[int, int, int]) -> None:
    rows, width, columns = shape
    torch.manual_seed(rows)
    a, b = random(rows, width), random(rows, columns)
    torch.testing.assert_close(
        gemm_of_transpose(a, b).double(), a.double().T @ b.double(), rtol=1e-5, atol=1e-5 * rows**0.5
    )


@in_all_instruction_sets
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("rows", [FEW_ROWS, 40])
def test_nan_and_infinity_come_out_of_a_gemm(rows: int, odd: float) -> None:
    a, b = random(rows, 64), random(64, 32, transposed=True)
    a[2, 5] = odd
    y, expected = gemm(a, b), a.float() @ b.float()
    assert y[2].isfinite().logical_not().all()
    assert y.isnan().equal(expected.isnan())
    assert gemm_of_transpose(b.T.contiguous(), b.T.contiguous() * odd).isfinite().logical_not().all()


@in_all_instruction_sets
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("parts", [[(3, 32, 2.0)], [(4, 32, 0.5), (20, 64, 3.0), (6, 32, 1.0)]], ids=str)
def test_a_linear_layer_with_its_adapters_and_their_gradients(parts: list[tuple[int, int, float]]) -> None:
    """Each part has a rank, outputs and a scaling."""
    torch.manual_seed(0)
    ranks, outputs, scalings = zip(*parts, strict=True)
    rows, depth, columns, rank = 75, 96, sum(outputs), 32
    x, weight, added, grad_y = random(rows, depth), random(columns, depth), random(rows, columns), random(rows, columns)
    each_a = [torch.randn(size, depth) for size in ranks]
    each_b = [torch.randn(*sizes) for sizes in zip(outputs, ranks, strict=True)]
    a, b = torch.zeros(rank, depth, dtype=torch.bfloat16), torch.zeros(columns, rank, dtype=torch.bfloat16)
    linear = matmul.make_linear(weight, matmul.Adapter(a, b, ranks, outputs, scalings))
    a[: sum(ranks)] = torch.cat(each_a)
    b[:, : sum(ranks)] = torch.block_diag(*(s * part for s, part in zip(scalings, each_b, strict=True)))
    exact_x, *exact = [tensor.double().requires_grad_() for tensor in (x, *each_a, *each_b)]
    lows = [exact_x @ exact_a.T for exact_a in exact[: len(parts)]]
    terms = [s * low @ part.T for s, low, part in zip(scalings, lows, exact[len(parts) :], strict=True)]
    y = exact_x @ weight.double().T + torch.cat(terms, 1) + added.double()
    y.backward(grad_y.double())
    got, low = matmul.lora_linear(x, linear, added)
    grads = torch.zeros(linear.adapter_size)
    assert low is not None
    grad_x = matmul.lora_linear_backward(grad_y, x, linear, low, True, grads)
    sizes = [size for part in zip(each_a, each_b, strict=True) for size in (part[0].numel(), part[1].numel())]
    of_parts = grads.split(sizes)
    results = low[:, : sum(ranks)], got, grad_x, *of_parts[::2], *of_parts[1::2]
    expected = torch.cat(lows, 1), y, *(tensor.grad for tensor in (exact_x, *exact))
    for ours, theirs in zip(results, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert (ours.double() - theirs.view_as(ours)).norm() <= 0.01 * theirs.norm()
    twice = grads.clone()
    assert matmul.lora_linear_backward(grad_y, x, linear, low, False, twice) is None
    assert twice.equal(2 * grads)


@needs_c
def test_a_linear_layer_without_adapters() -> None:
    x, weight, bias = random(40, 96), random(64, 96), random(64)
    y, low = matmul.lora_linear(x, matmul.make_linear(weight))
    assert low is None
    assert y.equal(gemm(x, weight.T))
    y, _ = matmul.lora_linear(x, matmul.make_linear(weight, bias=bias))
    assert y.equal(gemm(x, weight.T, added=bias.expand(40, 64)))


@in_all_instruction_sets
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("sizes", [(1, 32, 32), (31, 64, 1056), (300, 32, 2048)], ids=str)
@pytest.mark.parametrize("growth", [0.0, 200.0])  # of a logit from the first token to the last
def test_head_softmax(sizes: tuple[int, int, int], growth: float) -> None:
    nodes, width, vocabulary = sizes
    torch.manual_seed(nodes)
    weight, hidden = random(vocabulary, width), random(nodes, width)
    weight[:, 0], hidden[:, 0] = torch.linspace(0, growth, vocabulary), 1
    weight[:, 1] = 7  # by the sum of the powers as they are rounded, the mean of this is exact
    tokens, places = torch.tensor([vocabulary - 1, 3, 7]), torch.tensor([0, 0, nodes - 1])
    most, total, mean = matmul.head_softmax(weight, hidden, 0.5, tokens, places)
    z, exact = 0.5 * (hidden.double() @ weight.double().T), weight.double()
    z[places, tokens] = -torch.inf
    assert (z.amax(1) <= most + 31).all()
    assert (most <= z.amax(1) + 1e-3).all()
    torch.testing.assert_close(most + total.double().log(), z.logsumexp(1), rtol=1e-6, atol=1e-5)
    scale = exact.abs().max()
    torch.testing.assert_close(mean.double() / scale, z.softmax(1) @ exact / scale, rtol=0, atol=2**-8)
    torch.testing.assert_close(mean[:, 1], torch.full((nodes,), 7.0), rtol=1e-5, atol=0)


@in_all_instruction_sets
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("token", [0, 700])
def test_nan_and_infinity_come_out_of_the_heads_softmax(token: int, odd: float) -> None:
    weight, hidden, none = random(1056, 32).abs(), random(40, 32).abs(), torch.zeros(0, dtype=torch.int64)
    hidden[3, 5] = odd
    *sums, mean = matmul.head_softmax(weight, hidden, 1.0, none, none)
    sane = torch.arange(40) != 3
    assert not (sums[0] + sums[1].log() + mean.sum(1))[3].isfinite()
    assert all(x[sane].isfinite().all() for x in (*sums, mean))
    weight[token, 7] = odd
    *_, mean = matmul.head_softmax(weight, random(40, 32).abs(), 1.0, none, none)
    assert mean[:, 7].isfinite().logical_not().all()


def dense_attention(q: Tensor, k: Tensor, v: Tensor, seqlens: attention.CuSeqlens, scale: float) -> Tensor:
    """In fp64, segment by segment. Shape: (tokens, heads, width)."""
    group, parts = len(q) // len(k), []
    keys = torch.arange(k.shape[1]) if seqlens.keys is None else seqlens.keys
    for i in range(len(seqlens.cu_seqlens_q) - 1):
        queries = q[:, seqlens.cu_seqlens_q[i] : seqlens.cu_seqlens_q[i + 1]]
        seen = keys[seqlens.cu_seqlens_k[i] : seqlens.cu_seqlens_k[i + 1]]
        k_seen, v_seen = (x[:, seen].repeat_interleave(group, 0) for x in (k, v))
        future = torch.ones(queries.shape[1], len(seen)).triu(len(seen) - queries.shape[1] + 1).bool()
        parts.append((scale * queries @ k_seen.mT).masked_fill(future, -torch.inf).softmax(-1) @ v_seen)
    return torch.cat(parts, 1).transpose(0, 1)


def seqlens_of(queries: list[int], contexts: list[list[int]] | None = None) -> attention.CuSeqlens:
    """Segments one after the other; which tokens each sees beside its own."""
    starts = torch.tensor([0, *queries]).cumsum(0)
    keys = [
        torch.cat([torch.tensor(context, dtype=torch.int64), torch.arange(start, start + size)])
        for context, start, size in zip(contexts or [[]] * len(queries), starts, queries, strict=False)
    ]
    cu_seqlens_k = torch.tensor([0, *map(len, keys)]).cumsum(0).int()
    places = torch.cat(keys) if contexts else None
    return attention.CuSeqlens(places, starts.int(), cu_seqlens_k, max(queries), max(map(len, keys)))


@in_all_instruction_sets
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "scale", "seqlens"),
    [
        (1, 1, 32, 0.3, seqlens_of([1])),
        (9, 3, 64, 0.125, seqlens_of([33, 70])),
        (10, 2, 32, 4.0, seqlens_of([40, 5, 31], [[], [*range(40)], [*range(17), 40, 41]])),  # scores far apart
        (2, 1, 96, 0.1, seqlens_of([300])),  # two parts
    ],
)
def test_attention_and_its_gradient(
    heads: int, key_heads: int, width: int, scale: float, seqlens: attention.CuSeqlens
) -> None:
    torch.manual_seed(heads)
    tokens = int(seqlens.cu_seqlens_q[-1])
    inputs = [random(count, tokens, width) for count in (heads, key_heads, key_heads)]
    grad_y = random(tokens, heads, width)
    exact = [x.double().requires_grad_() for x in inputs]
    expected = dense_attention(*exact, seqlens, scale)
    expected.backward(grad_y.double())
    y, lse = attention.attention(*inputs, seqlens, scale)
    grads = [torch.empty(tokens, len(x), width, dtype=torch.bfloat16).transpose(0, 1) for x in inputs]
    attention.attention_backward(grad_y, *inputs, y, lse, seqlens, scale, *grads)
    for ours, theirs in zip((y, *grads), (expected, *(x.grad for x in exact)), strict=True):
        assert theirs is not None
        assert (ours.double() - theirs).norm() <= 0.02 * theirs.norm() + 1e-6


@in_all_instruction_sets
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("token", [0, 40])
def test_nan_and_infinity_come_out_of_attention(token: int, which: int, odd: float) -> None:
    torch.manual_seed(0)
    inputs, seqlens, grad_y = [random(1, 70, 32).abs() for _ in range(3)], seqlens_of([70]), random(70, 1, 32)
    inputs[which][0, token, 3] = odd
    y, lse = attention.attention(*inputs, seqlens, 0.1)
    expected = dense_attention(*(x.double() for x in inputs), seqlens, 0.1)
    lost = y.isfinite() & ~expected.isfinite()
    assert not lost[token:].any()  # queries before it see nothing of it, but in the same block
    grads = [torch.empty_like(x) for x in inputs]
    attention.attention_backward(grad_y, *inputs, y, lse, seqlens, 0.1, *grads)
    assert not all(grad.isfinite().all() for grad in grads)


def _gemm() -> None:
    gemm(random(40, 64), random(64, 32))


def _lora_linear() -> None:
    weight, a, b = random(64, 64), random(32, 64), random(64, 32)
    linear = matmul.make_linear(weight, matmul.Adapter(a, b, [32], [64], [1.0]))
    matmul.lora_linear(random(40, 64), linear)


def _attention() -> None:
    attention.attention(*(random(1, 40, 32) for _ in range(3)), seqlens_of([40]), 0.1)


def _attention_backward() -> None:
    x = [random(1, 40, 32) for _ in range(7)]
    more = random(40, 1, 32), torch.zeros(1, 40), seqlens_of([40]), 0.1
    attention.attention_backward(random(40, 1, 32), *x[:3], *more, *x[3:6])


def _head_softmax() -> None:
    matmul.head_softmax(random(64, 32), random(4, 32), 1.0, *torch.zeros(2, 0, dtype=torch.int64))


@needs_c
@pytest.mark.parametrize("kernel", [_gemm, _lora_linear, _attention, _attention_backward, _head_softmax])
def test_too_little_memory_is_an_error(kernel: Callable[[], Any]) -> None:
    library = abi.library()
    assert library is not None
    kernel()
    try:
        library.limit_memory(1000)
        with pytest.raises(MemoryError, match="micro-batch-tokens"):
            kernel()
    finally:
        library.limit_memory(2**62)
    kernel()


@needs_c
def test_only_bf16_on_a_cpu_and_whole_blocks_are_taken() -> None:
    bf16 = torch.zeros(32, 32, dtype=torch.bfloat16)
    assert matmul.gemm_available(bf16)
    assert not matmul.gemm_available(bf16, bf16[:, :31])
    assert not abi.available(bf16.float())
    assert not abi.available(bf16, bf16.to("meta"))
    assert matmul.padded_depth(33, bf16) == 64
    assert matmul.padded_depth(33, bf16.float()) == 33
    assert matmul.head_softmax_available(bf16)
    assert not matmul.head_softmax_available(torch.empty(33, 32, dtype=torch.bfloat16))
