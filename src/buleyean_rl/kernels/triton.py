"""The loss's element-wise passes in Triton, for CUDA: what `kernels.c` does for a CPU, each in one sweep.

A tile of logits is (vocabulary, nodes), nodes next to each other. A program takes some columns and a share of the
rows; what the shares came to is put together in torch, always the same way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 32, 64  # of a program's block: a row of it is a whole line of memory
SHARES = 32  # of the rows: enough programs for every multiprocessor, also where nodes are few


@triton.jit
def _most(x, rows, columns, stride, share, most, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * share
    found = tl.full((COLUMNS,), float("-inf"), tl.float32)
    for start in range(first, min(first + share, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < min(first + share, rows))[:, None] & (column < columns)[None, :]
        place = row.to(tl.int64)[:, None] * stride + column[None, :]
        block = tl.load(x + place, mask=inside, other=float("-inf")).to(tl.float32)
        found = tl.maximum(found, tl.max(block, 0))
    tl.store(most + tl.program_id(1) * columns + column, found, mask=column < columns)


@triton.jit
def _sums(
    z, z_ref, rows, columns, stride, share, scale, most, base_most, sums,
    HAS_REFERENCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * share
    top = tl.load(most + column, mask=column < columns, other=0.0)
    base_top = tl.load(base_most + column, mask=column < columns, other=0.0)
    total = tl.zeros((COLUMNS,), tl.float32)
    base = tl.zeros((COLUMNS,), tl.float32)
    difference = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, min(first + share, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < min(first + share, rows))[:, None] & (column < columns)[None, :]
        place = row.to(tl.int64)[:, None] * stride + column[None, :]
        logit = scale * tl.load(z + place, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(inside, tl.exp(logit - top[None, :]), 0.0), 0)
        if HAS_REFERENCE:
            base_logit = scale * tl.load(z_ref + place, mask=inside, other=0.0).to(tl.float32)
            mass = tl.where(inside, tl.exp(base_logit - base_top[None, :]), 0.0)
            base += tl.sum(mass, 0)
            difference += tl.sum(mass * (base_logit - logit), 0)
        else:
            base += tl.sum(inside.to(tl.float32), 0)
            difference -= tl.sum(logit, 0)
    mine = sums + tl.program_id(1) * 3 * columns + column
    tl.store(mine, total, mask=column < columns)
    tl.store(mine + columns, base, mask=column < columns)
    tl.store(mine + 2 * columns, difference, mask=column < columns)


@triton.jit
def _gradient(
    z, z_ref, rows, columns, stride, scale, lse, base_lse, of_pi, of_base,
    HAS_REFERENCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    within = column < columns
    inside = (row < rows)[:, None] & within[None, :]
    place = row.to(tl.int64)[:, None] * stride + column[None, :]
    all_of = tl.load(lse + column, mask=within, other=0.0)[None, :]
    all_of_base = tl.load(base_lse + column, mask=within, other=0.0)[None, :]
    pull = tl.load(of_pi + column, mask=within, other=0.0)[None, :]
    base_pull = tl.load(of_base + column, mask=within, other=0.0)[None, :]
    pi = tl.exp(scale * tl.load(z + place, mask=inside, other=0.0).to(tl.float32) - all_of)
    if HAS_REFERENCE:
        base = tl.exp(scale * tl.load(z_ref + place, mask=inside, other=0.0).to(tl.float32) - all_of_base)
        gradient = pull * (pi - base) + (pull - base_pull) * base  # nothing is left where the two agree
    else:
        gradient = pull * pi - base_pull * tl.exp(-all_of_base)
    tl.store(z + place, (scale * gradient).to(z.dtype.element_ty), mask=inside)


def column_most(x: Tensor) -> Tensor:
    """See `kernels.column_most`."""
    rows, columns = x.shape
    most = x.new_empty(SHARES, columns, dtype=torch.float32)
    _most[_grid(columns)](x, rows, columns, x.stride(0), _share(rows), most, ROWS, COLUMNS)
    return most.amax(0)


def softmax_sums(
    z: Tensor, z_ref: Tensor | None, scale: float, most: Tensor, base_most: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.softmax_sums`."""
    rows, columns = z.shape
    sums = z.new_empty(SHARES, 3, columns, dtype=torch.float32)
    _sums[_grid(columns)](
        *(z, z if z_ref is None else z_ref, rows, columns, z.stride(0), _share(rows), scale),
        *(most, base_most, sums, z_ref is not None, ROWS, COLUMNS),
    )
    total, base_total, difference = sums.sum(0)
    return total, base_total, difference


def softmax_gradient(
    z: Tensor, z_ref: Tensor | None, scale: float, lse: Tensor, base_lse: Tensor, of_pi: Tensor, of_base: Tensor
) -> None:
    """See `kernels.softmax_gradient`."""
    rows, columns = z.shape
    _gradient[triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS)](
        *(z, z if z_ref is None else z_ref, rows, columns, z.stride(0), scale),
        *(lse, base_lse, of_pi, of_base, z_ref is not None, ROWS, COLUMNS),
    )


def _grid(columns: int) -> tuple[int, int]:
    return triton.cdiv(columns, COLUMNS), SHARES


def _share(rows: int) -> int:
    """Rows of one program, whole blocks."""
    return triton.cdiv(triton.cdiv(rows, SHARES), ROWS) * ROWS
