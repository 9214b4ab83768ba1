"""The loss's passes for CUDA against the same work in torch's fp64; interpreted where there is no GPU, see conftest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-21}
in_each_type = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


@pytest.fixture
def passes() -> Iterator[Any]:
    module = pytest.importorskip("buleyean_rl.kernels.triton")
    with torch.device("cuda" if torch.cuda.device_count() else "cpu"):
        yield module


def logits(rows: int, nodes: int, reference: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """A whole tile, the model's columns and the reference's."""
    torch.manual_seed(rows)
    tile = (6 * torch.randn(rows, 2 * nodes if reference else nodes)).to(dtype)
    return tile, tile[:, :nodes], tile[:, nodes:] if reference else None


@in_each_type
@pytest.mark.parametrize(
    ("shape", "reference", "scale"),
    [((1, 1), True, 1.0), ((257, 37), True, 0.25), ((257, 37), False, 1.0), ((1000, 64), True, 1.0)],
    ids=str,
)
def test_row_max_sums_and_gradient(
    shape: tuple[int, int], reference: bool, scale: float, dtype: torch.dtype, passes: Any
) -> None:
    tile, raw, raw_reference = logits(*shape, reference=reference, dtype=dtype)
    assert passes.row_max(tile).equal(tile.float().amax(0))
    z = scale * raw.double()
    z_ref = torch.zeros_like(z) if raw_reference is None else scale * raw_reference.double()
    row_max, reference_row_max = z.amax(0), z_ref.amax(0)
    mass = (z_ref - reference_row_max).exp()
    expected = torch.stack([(z - row_max).exp().sum(0), mass.sum(0), (mass * (z_ref - z)).sum(0)])
    got = torch.stack(passes.softmax_sums(raw, raw_reference, scale, row_max.float(), reference_row_max.float()))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)

    pi_coefficient, reference_coefficient = torch.rand(2, shape[1])
    lse, reference_lse = z.logsumexp(0), z_ref.logsumexp(0)
    pi, base = (z - lse).exp(), (z_ref - reference_lse).exp()
    gradient = scale * (pi_coefficient * pi - reference_coefficient * base)
    untouched = None if raw_reference is None else raw_reference.clone()
    of_nodes = (lse.float(), reference_lse.float(), pi_coefficient, reference_coefficient)
    passes.softmax_gradient(raw, raw_reference, scale, *of_nodes)
    summed = scale * (pi_coefficient * (pi + base) + reference_coefficient * base)
    exponents = 2**-18 * summed  # z - lse, up to 64, is rounded by as much
    assert ((raw - gradient).abs() <= 2 * ROUNDING[dtype] * gradient.abs() + exponents).all()
    assert raw_reference is None or raw_reference.equal(untouched)


@in_each_type
def test_equal_logits_cancel_exactly(dtype: torch.dtype, passes: Any) -> None:
    raw = (6 * torch.randn(300, 8)).to(dtype).repeat(1, 2)
    lse, coefficient = raw[:, :8].float().logsumexp(0), torch.rand(8)
    passes.softmax_gradient(raw[:, :8], raw[:, 8:], 1.0, lse, lse, coefficient, coefficient)
    assert not raw[:, :8].any()


def test_nan_comes_out_of_the_sums(passes: Any) -> None:
    _, raw, _ = logits(300, 8, reference=False, dtype=torch.float32)
    raw[7, 3] = float("nan")
    zeros = torch.zeros(8)
    sums, *_ = passes.softmax_sums(raw, None, 1.0, zeros, zeros)
    assert sums.isnan().tolist() == [column == 3 for column in range(8)]


COMPILES = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from buleyean_rl.kernels import triton as passes

fixed = {"ROWS": passes.ROWS, "COLUMNS": passes.COLUMNS}
whole = dict.fromkeys(("rows", "columns", "stride", "share"), "i32")
for kernel in (passes._row_max, passes._sums, passes._gradient):
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
