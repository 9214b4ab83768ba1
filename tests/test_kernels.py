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
from torch.nn.functional import rms_norm, silu

from buleyean_rl import kernels

needs_c = pytest.mark.skipif(
    kernels.made_for(torch.zeros(0)) is None, reason="no C compiler, or a torch without OpenMP"
)
SHAPES = [(1, 1), (5, 3), (1000, 64), (257, 37)]
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-21}
TWICE = 4  # rounded twice; Triton's interpreter cuts off what is to be rounded
in_each_type = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


@pytest.fixture(params=[pytest.param("C", marks=needs_c), "Triton"])
def passes(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Who makes the passes; Triton's are interpreted where there is no GPU, see conftest."""
    if request.param == "C":
        yield kernels
        return
    found = pytest.importorskip("buleyean_rl.kernels.triton")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield found


def logits(
    rows: int, nodes: int, reference: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A whole tile, the model's columns and the reference's."""
    torch.manual_seed(rows)
    tile = (6 * torch.randn(rows, 2 * nodes if reference else nodes)).to(dtype)
    return tile, tile[:, :nodes], tile[:, nodes:] if reference else None


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
    gradient = scale * (of_pi * (z - lse).exp() - of_base * (z_ref - base_lse).exp())
    untouched = None if raw_reference is None else raw_reference.clone()
    passes.softmax_gradient(raw, raw_reference, scale, lse.float(), base_lse.float(), of_pi, of_base)
    torch.testing.assert_close(raw.double(), gradient.to(dtype).double(), rtol=2 * ROUNDING[dtype], atol=1e-7)
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
    total, *_ = kernels.softmax_sums(z, None, 1.0, none, none)
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
    kernels.causal_softmax(scores)
    torch.testing.assert_close(scores.double(), expected.detach(), rtol=ROUNDING[dtype], atol=1e-7)
    assert not scores[future.expand_as(scores)].any()

    gradient = torch.randn(2, queries, group, keys).to(dtype)
    expected.backward(gradient.double())
    kernels.softmax_backward(gradient, scores)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=5 * ROUNDING[dtype], atol=5 * ROUNDING[dtype])


@in_each_type
@pytest.mark.parametrize("width", [24, 576])
def test_rms_norm_and_its_gradient(width: int, dtype: torch.dtype, passes: Any) -> None:
    torch.manual_seed(width)
    x, gradient = torch.randn(2, 3, 5, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    exact = x.double().requires_grad_()
    expected = rms_norm(exact, (width,), weight.double(), 1e-5)
    expected.backward(gradient.double())
    y, inverse = passes.rms_norm(x, weight, 1e-5)
    grad_x = passes.rms_norm_backward(gradient, x, weight, inverse)
    for got, should in ((y, expected.detach()), (grad_x, exact.grad)):
        torch.testing.assert_close(got.double(), should, rtol=TWICE * ROUNDING[dtype], atol=ROUNDING[dtype])


@in_each_type
@pytest.mark.parametrize("width", [1, 40, 1100])
def test_swiglu_and_its_gradient(width: int, dtype: torch.dtype, passes: Any) -> None:
    torch.manual_seed(width)
    gate_up, gradient = (4 * torch.randn(3, 2, 2 * width)).to(dtype), torch.randn(3, 2, width).to(dtype)
    gate_up[0, 0, 0] = -100
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    expected = silu(gate) * up
    expected.backward(gradient.double())
    for got, should in (
        (passes.swiglu(gate_up), expected.detach()),
        (passes.swiglu_backward(gradient, gate_up), exact.grad),
    ):
        torch.testing.assert_close(got.double(), should, rtol=TWICE * ROUNDING[dtype], atol=1e-5)


@in_each_type
@pytest.mark.parametrize("seed", [7, 2**32 - 5])
@pytest.mark.parametrize("p", [0.05, 0.75])
def test_dropout(p: float, seed: int, dtype: torch.dtype, passes: Any) -> None:
    x = (torch.rand(40, 100) + 0.5).to(dtype)
    y = passes.dropout(x, p, seed)
    kept = y != 0
    torch.testing.assert_close(y.double(), (x.double() / (1 - p) * kept), rtol=2 * ROUNDING[dtype], atol=0)
    assert abs(kept.double().mean() - (1 - p)) < 0.03
    assert passes.dropout(x, p, seed).equal(y)
    assert not passes.dropout(x, p, seed - 1).equal(y)
    added = passes.dropout(x, p, seed, x.clone())
    torch.testing.assert_close(added.double(), (x + y).double(), rtol=TWICE * ROUNDING[dtype], atol=0)


@needs_c
@pytest.mark.parametrize("seed", [7, 2**32 - 5])
def test_dropout_keeps_the_same_on_a_cpu_and_on_cuda(seed: int) -> None:
    triton = pytest.importorskip("buleyean_rl.kernels.triton")
    x = torch.rand(40, 100)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    assert kernels.dropout(x, 0.3, seed).equal(triton.dropout(x.to(on), 0.3, seed).cpu())


@in_each_type
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("width", [2, 20, 64])
def test_rotate_and_its_gradient(width: int, heads_first: bool, dtype: torch.dtype, passes: Any) -> None:
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
        passes.rotate(strided, cos, sin, y, backward)
        torch.testing.assert_close(y.double(), result, rtol=2 * ROUNDING[dtype], atol=1e-6)


@needs_c
def test_only_one_type_of_two_on_a_cpu_is_taken() -> None:
    one, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert kernels.made_for(one) is kernels.made_for(half, half) is kernels
    for unknown in ([one.double()], [one, half], [half, half.to("meta")], [half.to("meta")]):
        assert kernels.made_for(*unknown) is None


@needs_c
@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_there_are_no_kernels(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels._library.cache_clear()
    try:
        assert kernels.made_for(torch.zeros(0, dtype=torch.bfloat16)) is None
        assert not list(tmp_path.rglob("*.so"))
    finally:
        kernels._library.cache_clear()


@needs_c
def test_the_library_is_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runs: list[tuple[str, ...]] = []
    monkeypatch.setattr(kernels, "_run", lambda *command: runs.append(command) or _run(*command))
    kernels._library.cache_clear()
    try:
        assert kernels._library(torch.float32) is not None
        built, runs[:] = len(runs), []
        kernels._library.cache_clear()
        assert kernels._library(torch.float32) is not None
        assert (built, len(runs)) == (3, 1)  # the second time only the processor is asked for
        assert len(list(tmp_path.rglob("*"))) == 3  # two folders, one library
    finally:
        kernels._library.cache_clear()


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout


COMPILES = """
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from buleyean_rl.kernels import triton as passes

sizes = {"ROWS": 32, "COLUMNS": 64, "WIDTH": 1024, "BLOCK": 1024, "HEADS": 16, "HALF": 32}
whole = "rows columns stride share width size heads half first x_head x_token y_head y_token seed threshold".split()
types = dict.fromkeys(whole, "i32") | dict.fromkeys(("scale", "epsilon", "sign"), "fp32")
values = ("x", "y", "z", "z_ref", "weight", "gate_up", "gradient", "grad_x", "grad_gate_up", "cosine", "sine")
kernels = [each for each in vars(passes).values() if isinstance(each, JITFunction)]
assert len(kernels) == 9
for kernel in kernels:
    for capability in (80, 90):
        for value in ("*bf16", "*fp32"):
            for flag in (True, False):
                fixed = sizes | {"HAS_REFERENCE": flag, "ADD": flag}
                fixed = {name: fixed[name] for name in kernel.arg_names if name in fixed}
                known = types | dict.fromkeys(values, value) | dict.fromkeys(fixed, "constexpr")
                source = ASTSource(kernel, {name: known.get(name, "*fp32") for name in kernel.arg_names}, fixed)
                assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
"""


def test_what_is_for_cuda_compiles_for_it(tmp_path: Path) -> None:
    """To machine code, which needs no GPU."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILES], env=environment, check=True)
