"""Which type a device computes in, and products in bf16 on a CPU on which torch is slow in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from buleyean_rl.kernels import precision as arithmetic
from buleyean_rl.kernels.precision import bf16_is_emulated, default_dtype, product

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def ask_anew() -> Iterator[None]:
    arithmetic._cpu_has_bf16.cache_clear()
    yield
    arithmetic._cpu_has_bf16.cache_clear()


@pytest.mark.parametrize(
    ("machine", "has", "dtype"),
    [
        ("x86_64", {"_is_avx512_bf16_supported"}, torch.bfloat16),
        ("AMD64", {"_is_amx_tile_supported"}, torch.bfloat16),
        ("x86_64", {"_is_mkldnn_bf16_supported"}, torch.float32),  # AVX-512 alone: oneDNN makes bf16 of fp32
        ("aarch64", {"_is_mkldnn_bf16_supported"}, torch.bfloat16),
        ("aarch64", set(), torch.float32),
    ],
)
def test_a_cpu_computes_in_bf16_where_it_has_instructions_for_it(
    machine: str, has: set[str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    for module, name in (
        (torch.cpu, "_is_avx512_bf16_supported"),
        (torch.cpu, "_is_amx_tile_supported"),
        (torch.ops.mkldnn, "_is_mkldnn_bf16_supported"),
    ):
        monkeypatch.setattr(module, name, lambda name=name: name in has)
    assert default_dtype(CPU) == dtype
    assert bf16_is_emulated(torch.empty(0, dtype=torch.bfloat16)) == (dtype == torch.float32)
    assert not bf16_is_emulated(torch.empty(0))
    assert not bf16_is_emulated(torch.empty(0, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_product_is_the_same_however_it_is_computed(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr(arithmetic, "ROWS", 3)  # the last ones are fewer
    torch.manual_seed(0)
    a, b = torch.randn(7, 20).bfloat16(), torch.randn(20, 5).bfloat16()
    out = torch.full((7, 5), torch.nan, dtype=torch.bfloat16)
    exact = a.double() @ b.double()
    assert product(a, b, out) is out
    for got in (product(a, b), out):
        assert got.dtype == torch.bfloat16
        assert (got - exact).norm() <= 2**-8 * exact.norm()
    assert product(a.double(), b.double()).equal(exact)
