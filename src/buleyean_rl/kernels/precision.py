"""Which type a device computes in, and products in bf16 where torch only makes them of fp32's.

A CPU without instructions for bf16 takes a hundred times as long over torch's products in it as over those in fp32. The
kernels do not: there a model in bf16 takes half the memory, and what they do not compute is done in fp32.
"""

from __future__ import annotations

import platform
from functools import lru_cache

import torch
from torch import Tensor

ROWS = 4096  # that are copied to fp32 at a time


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 where torch is quick in it on a device, fp32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def bf16_is_emulated(x: Tensor) -> bool:
    """Whether torch's products of tensors of this type, where this one is, are slower than in fp32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _cpu_has_bf16()


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, in fp32 where that is quicker, some rows at a time.

    Args:
        a: Shape: (rows, depth).
        b: Shape: (depth, columns).
        out: filled with the result, if given, and returned. Shape: (rows, columns).
    """
    if not bf16_is_emulated(a):
        return torch.mm(a, b, out=out)
    y, in_fp32 = a.new_empty(len(a), b.shape[1]) if out is None else out, b.float()
    for start in range(0, len(a), ROWS):
        y[start : start + ROWS] = a[start : start + ROWS].float() @ in_fp32
    return y


@lru_cache
def _cpu_has_bf16() -> bool:
    """Whether it has instructions for it: with AVX-512 alone oneDNN takes bf16 too, and is slower than in fp32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    asks_mkldnn = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # which macOS and Windows on ARM lack
    return asks_mkldnn is not None and bool(asks_mkldnn())
