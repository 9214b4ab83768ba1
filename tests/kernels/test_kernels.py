"""The kernels against the same work in torch, those for CUDA in Triton's interpreter; and where there are none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from buleyean_rl.kernels import abi, build, elementwise, matmul
from marks import needs_c

SHAPES = [(1, 1), (5, 3), (1000, 64), (257, 37)]
FEW = 4  # rows, of `products.c`
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-21}
in_each_type = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


@pytest.fixture(params=[pytest.param("C", marks=needs_c), "Triton"])
def passes(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Who makes the passes of the loss; Triton's are interpreted where there is no GPU, see conftest."""
    if request.param == "C":
        yield elementwise
        return
    found = pytest.importorskip("buleyean_rl.kernels.triton")
    with torch.device("cuda" if torch.cuda.device_count() else "cpu"):
        yield found


def logits(
    rows: int, nodes: int, reference: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A whole tile, the model's columns and the reference's."""
    torch.manual_seed(rows)
    tile = (6 * torch.randn(rows, 2 * nodes if reference else nodes)).to(dtype)
    return tile, tile[:, :nodes], tile[:, nodes:] if reference else None


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    d: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
    spare: int = 0,
) -> torch.Tensor:
    """a b + c d + added, in bf16; sums are in fp32.

    Args:
        a: Shape: (rows, depth).
        b: elements next to each other in rows or columns. Shape: (depth, columns).
        c: Shape: (rows, inner depth).
        d: as `b`. Shape: (inner depth, columns).
        added: contiguous. Shape: (rows, columns).
        spare: how far a row of the result is from the end of the one before.

    Returns:
        Shape: (rows, columns).
    """
    a, rows, columns = a.contiguous(), len(a), b.shape[1]
    y = torch.full((rows, columns + spare), 7, dtype=a.dtype)
    inner: tuple[abi.Matrix | int, ...] = (abi.Matrix(), abi.Matrix(), 0)
    if c is not None and d is not None:
        c = c.contiguous()
        inner = (matrix(c), matrix(d), len(d))
    given = (matrix(a), matrix(b), len(b), *inner, added, y, y.stride(0), rows, columns)
    abi._call_in(a.dtype, "product", *given, torch.get_num_threads())
    assert (y[:, columns:] == 7).all()
    return y[:, :columns]


def matrix(x: torch.Tensor) -> abi.Matrix:
    return abi.Matrix(x.data_ptr(), *x.stride())


def row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a^T b, the sum of rows' outer products, in fp32 from bf16.

    Args:
        a: Shape: (rows, width).
        b: Shape: (rows, columns).

    Returns:
        Shape: (width, columns).
    """
    a, b = a.contiguous(), b.contiguous()
    y = a.new_empty(a.shape[1], b.shape[1], dtype=torch.float32)
    sizes = (len(a), a.shape[1], b.shape[1])
    abi._call("row_products", a, a.stride(0), b, b.stride(0), *sizes, y, torch.get_num_threads())
    return y


@in_each_type
@pytest.mark.parametrize("shape", SHAPES)
def test_column_most(shape: tuple[int, int], dtype: torch.dtype, passes: Any) -> None:
    tile, *_ = logits(*shape, reference=True, dtype=dtype)
    assert passes.column_most(tile).equal(tile.float().amax(0))


@in_each_type
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_softmax_sums_and_gradient(
    shape: tuple[int, int], reference: bool, scale: float, dtype: torch.dtype, passes: Any
) -> None:
    _, raw, raw_reference = logits(*shape, reference=reference, dtype=dtype)
    z = scale * raw.double()
    z_ref = torch.zeros_like(z) if raw_reference is None else scale * raw_reference.double()
    most, base_most = z.amax(0), z_ref.amax(0)
    mass = (z_ref - base_most).exp()
    expected = torch.stack([(z - most).exp().sum(0), mass.sum(0), (mass * (z_ref - z)).sum(0)])
    got = torch.stack(passes.softmax_sums(raw, raw_reference, scale, most.float(), base_most.float()))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)

    of_pi, of_base = torch.rand(2, shape[1])
    lse, base_lse = z.logsumexp(0), z_ref.logsumexp(0)
    pi, base = (z - lse).exp(), (z_ref - base_lse).exp()
    gradient = scale * (of_pi * pi - of_base * base)
    untouched = None if raw_reference is None else raw_reference.clone()
    passes.softmax_gradient(raw, raw_reference, scale, lse.float(), base_lse.float(), of_pi, of_base)
    summed = scale * (of_pi * (pi + base) + of_base * base)
    exponents = 2**-18 * summed  # z - lse, up to 64, is rounded by as much
    assert ((raw - gradient).abs() <= 2 * ROUNDING[dtype] * gradient.abs() + exponents).all()
    assert raw_reference is None or raw_reference.equal(untouched)


@in_each_type
def test_equal_logits_cancel_exactly(dtype: torch.dtype, passes: Any) -> None:
    raw = (6 * torch.randn(300, 8)).to(dtype).repeat(1, 2)
    lse, of = raw[:, :8].float().logsumexp(0), torch.rand(8)
    passes.softmax_gradient(raw[:, :8], raw[:, 8:], 1.0, lse, lse, of, of)
    assert not raw[:, :8].any()


@needs_c
def test_many_small_terms_add_up() -> None:
    torch.manual_seed(0)
    z, none = torch.randn(300_000, 4) - 3, torch.zeros(4)  # one after the other they would be off by 6e-6
    total, *_ = elementwise.softmax_sums(z, None, 1.0, none, none)
    torch.testing.assert_close(total.double(), z.double().exp().sum(0), rtol=2e-6, atol=0)


@needs_c
@in_each_type
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (5, 5), (17, 40), (128, 200)])
@pytest.mark.parametrize("group", [1, 3])
def test_causal_softmax_and_its_gradient(queries: int, keys: int, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(queries)
    scores = (5 * torch.randn(2, queries, group, keys)).to(dtype)
    future = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1).unsqueeze(1)
    exact = scores.double().masked_fill(future, float("-inf")).requires_grad_()
    expected = exact.softmax(-1)
    elementwise.causal_softmax(scores)
    torch.testing.assert_close(scores.double(), expected.detach(), rtol=ROUNDING[dtype], atol=1e-7)
    assert not scores[future.expand_as(scores)].any()

    gradient = torch.randn(2, queries, group, keys).to(dtype)
    expected.backward(gradient.double())
    elementwise.softmax_backward(gradient, scores)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=5 * ROUNDING[dtype], atol=5 * ROUNDING[dtype])


@needs_c
@in_each_type
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("width", [2, 20, 64])
def test_rotate_and_its_gradient(width: int, heads_first: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x, gradient = torch.randn(2, 3, 7, width).to(dtype)
    cos, sin = torch.randn(2, 7, width).to(dtype)  # halves that differ, as no model's do
    exact = x.double().requires_grad_()
    first, second = exact.chunk(2, -1)
    expected = exact * cos.double() + torch.cat((-second, first), -1) * sin.double()
    expected.backward(gradient.double())
    for source, backward, result in ((x, False, expected.detach()), (gradient, True, exact.grad)):
        strided = source if heads_first else source.transpose(0, 1).contiguous().transpose(0, 1)
        y = torch.empty(7, 3, width, dtype=dtype).transpose(0, 1) if heads_first else torch.empty_like(source)
        elementwise.rotate(strided, cos, sin, y, backward)
        torch.testing.assert_close(y.double(), result, rtol=ROUNDING[dtype], atol=1e-6)
        elementwise.rotate(strided, cos, sin, strided, backward)  # where it lies
        assert strided.equal(y)


def operand(rows: int, columns: int, across: bool = False) -> torch.Tensor:
    """A matrix in bf16, whose rows or columns have their elements next to each other."""
    x = torch.randn(columns, rows).bfloat16().T
    return x if across else x.contiguous()


@pytest.fixture(params=[1, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("tiles", "threads")
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("inner", [0, 32, 96])
@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 64, 96), (FEW, 1632, 320), (FEW + 1, 64, 32)],
        *[(32, 32, 32), (75, 96, 32), (130, 704, 320), (60, 1312, 64), (70, 1632, 64)],
    ],
    ids=str,
)
def test_product(shape: tuple[int, int, int], inner: int, across: bool) -> None:
    rows, depth, columns = shape
    torch.manual_seed(rows)
    a, b = operand(rows, depth), operand(depth, columns, across)
    more = (operand(rows, inner), operand(inner, columns, not across)) if inner else ()
    expected = a.double() @ b.double()
    for c, d in [more] if more else []:
        expected += c.double() @ d.double()
    got = product(a, b, *more)
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-4 * depth**0.5)
    first = rows // 2 if rows > 2 * FEW or rows <= FEW else 0
    some = product(a[first:], b, *(x[first:] if x is more[0] else x for x in more))
    assert some.equal(got[first:])  # a row does not notice the others, unless they are few
    assert product(a, b, *more, spare=5).equal(got)
    added = 8 * operand(rows, columns)
    got = product(a, b, *more, added=added)
    torch.testing.assert_close(got.double(), expected + added.double(), rtol=2**-8, atol=1e-4 * depth**0.5)


@pytest.mark.usefixtures("tiles", "threads")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [32, 75])
@pytest.mark.parametrize("parts", [[(3, 32, 2.0)], [(4, 32, 0.5), (20, 64, 3.0), (6, 32, 1.0)]], ids=str)
def test_a_linear_layer_with_its_adapters_and_their_gradients(
    parts: list[tuple[int, int, float]], rows: int, p: float
) -> None:
    """Each part has a rank, outputs and a scaling."""
    torch.manual_seed(rows)
    ranks, outputs, scalings = zip(*parts, strict=True)
    depth, columns, rank = 96, sum(outputs), 32
    x, weight, added = operand(rows, depth), operand(columns, depth), operand(rows, columns)
    each_a, each_b = (
        [operand(size, depth) for size in ranks],
        [operand(*sizes) for sizes in zip(outputs, ranks, strict=True)],
    )
    a, b = torch.zeros(rank, depth, dtype=torch.bfloat16), torch.zeros(columns, rank, dtype=torch.bfloat16)
    a[: sum(ranks)] = torch.cat(each_a)
    b[:, : sum(ranks)] = torch.block_diag(*(s * part for s, part in zip(scalings, each_b, strict=True)))
    kept = elementwise.dropout(torch.ones_like(x), p, 7).double() if p else 1.0
    exact_x, *exact = [tensor.double().requires_grad_() for tensor in (x, *each_a, *each_b)]
    lows = [(kept * exact_x) @ exact_a.T for exact_a in exact[: len(parts)]]
    scaled = [s * low @ part.T for s, low, part in zip(scalings, lows, exact[len(parts) :], strict=True)]
    y = exact_x @ weight.double().T + torch.cat(scaled, 1) + added.double()
    gradient = operand(rows, columns)
    y.backward(gradient.double())

    linear = matmul.linear_of(weight, matmul.Adapter(a, b, ranks, outputs, scalings)).with_dropout(p, 7)
    got, low = matmul.adapted(x, linear, added)
    assert low is not None
    grads = torch.zeros(linear.learning)
    grad_x = matmul.adapted_backward(gradient, x, linear, low, True, grads)
    assert grad_x is not None
    sizes = [size for part in zip(each_a, each_b, strict=True) for size in (part[0].numel(), part[1].numel())]
    assert linear.learning == sum(sizes) == len(grads)
    of_parts = grads.split(sizes)
    found = low[:, : sum(ranks)], got, grad_x, *of_parts[::2], *of_parts[1::2]
    expected = torch.cat(lows, 1), y, *(tensor.grad for tensor in (exact_x, *exact))
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs is not None
        assert (ours.double() - theirs.view_as(ours)).norm() <= 0.01 * theirs.norm()
    twice = grads.clone()
    assert matmul.adapted_backward(gradient, x, linear, low, False, twice) is None
    assert twice.equal(2 * grads)


@pytest.mark.usefixtures("tiles", "threads")
def test_a_linear_layer_without_adapters() -> None:
    torch.manual_seed(0)
    x, weight = operand(40, 96), operand(64, 96)
    got, low = matmul.adapted(x, matmul.linear_of(weight))
    assert low is None
    assert got.equal(product(x, weight.T))


@pytest.mark.usefixtures("tiles", "threads")
@pytest.mark.parametrize("shape", [(32, 32, 32), (1, 64, 96), (75, 96, 32), (300, 64, 704)], ids=str)
def test_row_products(shape: tuple[int, int, int]) -> None:
    rows, width, columns = shape
    torch.manual_seed(rows)
    a, b = operand(rows, width), operand(rows, columns)
    got = row_products(a, b)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), a.double().T @ b.double(), rtol=1e-5, atol=1e-5 * rows**0.5)


@needs_c
@pytest.mark.parametrize(
    ("tiles", "has_bf16", "expected"), [(2, True, True), (1, True, False), (1, False, True), (0, False, False)]
)
def test_a_loss_without_logits_is_for_where_its_products_are_cheaper_than_torchs(
    tiles: int, has_bf16: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abi, "_tiles", lambda: tiles)
    monkeypatch.setattr("buleyean_rl.kernels.precision._cpu_has_bf16", lambda: has_bf16)
    assert matmul.has_head_sums(torch.empty(64, 32, dtype=torch.bfloat16)) == expected
    assert not matmul.has_head_sums(torch.empty(33, 32, dtype=torch.bfloat16))


@pytest.mark.usefixtures("tiles")
def test_products_in_tiles_are_of_bf16_and_whole_tiles() -> None:
    assert matmul.multiplies(operand(40, 64), operand(64, 32))
    assert not matmul.multiplies(operand(40, 60), operand(60, 32))
    assert not matmul.multiplies(operand(40, 64), operand(64, 31))
    assert not matmul.multiplies(operand(40, 64).float(), operand(64, 32).float())
    assert matmul.depth_of(33, operand(1, 32)) == 64
    assert matmul.depth_of(33, operand(1, 32).float()) == 33


@pytest.mark.usefixtures("tiles", "threads")
@pytest.mark.parametrize("sizes", [(1, 32, 32), (31, 64, 1056), (300, 32, 2048)], ids=str)
@pytest.mark.parametrize("growth", [0.0, 200.0])  # of a logit from the first token to the last
def test_head_sums(sizes: tuple[int, int, int], growth: float) -> None:
    nodes, width, vocabulary = sizes
    torch.manual_seed(nodes)
    weight, hidden = torch.randn(vocabulary, width).bfloat16(), torch.randn(nodes, width).bfloat16()
    weight[:, 0], hidden[:, 0] = torch.linspace(0, growth, vocabulary), 1
    weight[:, 1] = 7  # by the sum of the powers as they are rounded, the mean of this is exact
    tokens, places = torch.tensor([vocabulary - 1, 3, 7]), torch.tensor([0, 0, nodes - 1])
    most, total, mean = matmul.head_sums(weight, hidden, 0.5, tokens, places)
    z, exact = 0.5 * (hidden.double() @ weight.double().T), weight.double()
    z[places, tokens] = -torch.inf
    assert (z.amax(1) <= most + 31).all()
    assert (most <= z.amax(1) + 1e-3).all()
    torch.testing.assert_close(most + total.double().log(), z.logsumexp(1), rtol=1e-6, atol=1e-5)
    scale = exact.abs().max()
    torch.testing.assert_close(mean.double() / scale, z.softmax(1) @ exact / scale, rtol=0, atol=2**-8)
    torch.testing.assert_close(mean[:, 1], torch.full((nodes,), 7.0), rtol=1e-5, atol=0)


@needs_c
def test_only_one_type_of_two_on_a_cpu_is_taken() -> None:
    assert abi.available(torch.zeros(1))
    assert not abi.available(torch.zeros(1).double())
    assert not abi.available(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))
    assert not abi.available(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, device="meta"))


@needs_c
@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_there_are_no_kernels(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    abi._library.cache_clear()
    try:
        assert not abi.available(torch.zeros(0, dtype=torch.bfloat16))
        assert not list(tmp_path.rglob("*.so"))
    finally:
        abi._library.cache_clear()


@needs_c
def test_the_library_is_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runs: list[tuple[str, ...]] = []
    monkeypatch.setattr(build, "_run", lambda *command: runs.append(command) or _run(*command))
    abi._library.cache_clear()
    try:
        assert abi._library(torch.float32) is not None
        built, runs[:] = len(runs), []
        abi._library.cache_clear()
        assert abi._library(torch.float32) is not None
        assert (built, len(runs)) == (3, 1)  # the second time only the processor is asked for
        assert len(list(tmp_path.rglob("*"))) == 3  # two folders, one library
    finally:
        abi._library.cache_clear()


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout


COMPILES = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from buleyean_rl.kernels import triton as passes

fixed = {"ROWS": passes.ROWS, "COLUMNS": passes.COLUMNS}
whole = dict.fromkeys(("rows", "columns", "stride", "share"), "i32")
for kernel in (passes._most, passes._sums, passes._gradient):
    for capability in (80, 90):
        for logits in ("*bf16", "*fp32"):
            for reference in (True, False):
                constants = {n: v for n, v in (fixed | {"HAS_REFERENCE": reference}).items() if n in kernel.arg_names}
                types = whole | {"scale": "fp32"} | dict.fromkeys(("x", "z", "z_ref"), logits)
                types |= dict.fromkeys(constants, "constexpr")
                source = ASTSource(kernel, {name: types.get(name, "*fp32") for name in kernel.arg_names}, constants)
                assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
"""


def test_what_is_for_cuda_compiles_for_it(tmp_path: Path) -> None:
    """To machine code, which needs no GPU."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILES], env=environment, check=True)
