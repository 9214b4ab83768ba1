"""The loss's element-wise passes in Triton, for CUDA: each in one sweep; see `elementwise.loss_passes`.

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
def _row_max(x, rows, columns, stride, share, row_max, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * share
    largest = tl.full((COLUMNS,), float("-inf"), tl.float32)
    for start in range(first, min(first + share, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < min(first + share, rows))[:, None] & (column < columns)[None, :]
        place = row.to(tl.int64)[:, None] * stride + column[None, :]
        block = tl.load(x + place, mask=inside, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, tl.max(block, 0))
    tl.store(row_max + tl.program_id(1) * columns + column, largest, mask=column < columns)


@triton.jit
def _sums(
    z, z_ref, rows, columns, stride, share, scale, row_max, reference_row_max, sums,
    HAS_REFERENCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * share
    top = tl.load(row_max + column, mask=column < columns, other=0.0)
    reference_top = tl.load(reference_row_max + column, mask=column < columns, other=0.0)
    sum_exp = tl.zeros((COLUMNS,), tl.float32)
    reference = tl.zeros((COLUMNS,), tl.float32)
    difference = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, min(first + share, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < min(first + share, rows))[:, None] & (column < columns)[None, :]
        place = row.to(tl.int64)[:, None] * stride + column[None, :]
        logit = scale * tl.load(z + place, mask=inside, other=0.0).to(tl.float32)
        sum_exp += tl.sum(tl.where(inside, tl.exp(logit - top[None, :]), 0.0), 0)
        if HAS_REFERENCE:
            reference_logit = scale * tl.load(z_ref + place, mask=inside, other=0.0).to(tl.float32)
            mass = tl.where(inside, tl.exp(reference_logit - reference_top[None, :]), 0.0)
            reference += tl.sum(mass, 0)
            difference += tl.sum(mass * (reference_logit - logit), 0)
        else:
            reference += tl.sum(inside.to(tl.float32), 0)
            difference -= tl.sum(logit, 0)
    share_sums = sums + tl.program_id(1) * 3 * columns + column
    tl.store(share_sums, sum_exp, mask=column < columns)
    tl.store(share_sums + columns, reference, mask=column < columns)
    tl.store(share_sums + 2 * columns, difference, mask=column < columns)


@triton.jit
def _gradient(
    z, z_ref, rows, columns, stride, scale, lse, reference_lse, pi_coefficient, reference_coefficient,
    HAS_REFERENCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    within = column < columns
    inside = (row < rows)[:, None] & within[None, :]
    place = row.to(tl.int64)[:, None] * stride + column[None, :]
    normaliser = tl.load(lse + column, mask=within, other=0.0)[None, :]
    reference_normaliser = tl.load(reference_lse + column, mask=within, other=0.0)[None, :]
    pull = tl.load(pi_coefficient + column, mask=within, other=0.0)[None, :]
    reference_pull = tl.load(reference_coefficient + column, mask=within, other=0.0)[None, :]
    pi = tl.exp(scale * tl.load(z + place, mask=inside, other=0.0).to(tl.float32) - normaliser)
    if HAS_REFERENCE:
        reference = tl.exp(scale * tl.load(z_ref + place, mask=inside, other=0.0).to(tl.float32) - reference_normaliser)
        gradient = pull * (pi - reference) + (pull - reference_pull) * reference  # nothing is left where the two agree
    else:
        gradient = pull * pi - reference_pull * tl.exp(-reference_normaliser)
    tl.store(z + place, (scale * gradient).to(z.dtype.element_ty), mask=inside)


def row_max(x: Tensor) -> Tensor:
    """The largest logit of each node. Shape: (vocabulary, nodes) to (nodes,), in fp32."""
    rows, columns = x.shape
    largest = x.new_empty(SHARES, columns, dtype=torch.float32)
    _row_max[_grid(columns)](x, rows, columns, x.stride(0), _share(rows), largest, ROWS, COLUMNS)
    return largest.amax(0)


def softmax_sums(
    z: Tensor, z_ref: Tensor | None, scale: float, row_max: Tensor, reference_row_max: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the vocabulary, for each node: sum e^z, sum e^z_ref and sum e^z_ref (z_ref - z), less the row_max.

    Args:
        z: logits without their `scale`. Shape: (vocabulary, nodes), nodes next to each other.
        z_ref: the reference's, with the stride of `z`, or None for zeros.
        scale: factor on the logits.
        row_max: subtracted from z before its exponential. Shape: (nodes,).
        reference_row_max: the same for z_ref. Shape: (nodes,).

    Returns:
        Three tensors of shape (nodes,).
    """
    rows, columns = z.shape
    sums = z.new_empty(SHARES, 3, columns, dtype=torch.float32)
    _sums[_grid(columns)](
        *(z, z if z_ref is None else z_ref, rows, columns, z.stride(0), _share(rows), scale),
        *(row_max, reference_row_max, sums, z_ref is not None, ROWS, COLUMNS),
    )
    sum_exp, reference_sum_exp, difference = sums.sum(0)
    return sum_exp, reference_sum_exp, difference


def softmax_gradient(
    z: Tensor,
    z_ref: Tensor | None,
    scale: float,
    lse: Tensor,
    reference_lse: Tensor,
    pi_coefficient: Tensor,
    reference_coefficient: Tensor,
) -> None:
    """scale * (pi_coefficient * softmax(z) - reference_coefficient * softmax(z_ref)), written over `z`.

    Args:
        z: see `softmax_sums`.
        z_ref: see `softmax_sums`.
        scale: factor on the logits.
        lse: log-sum-exp of z. Shape: (nodes,).
        reference_lse: the same of z_ref. Shape: (nodes,).
        pi_coefficient: Shape: (nodes,).
        reference_coefficient: Shape: (nodes,).
    """
    rows, columns = z.shape
    _gradient[triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS)](
        *(z, z if z_ref is None else z_ref, rows, columns, z.stride(0), scale),
        *(lse, reference_lse, pi_coefficient, reference_coefficient, z_ref is not None, ROWS, COLUMNS),
    )


def _grid(columns: int) -> tuple[int, int]:
    return triton.cdiv(columns, COLUMNS), SHARES


def _share(rows: int) -> int:
    """Rows of one program, whole blocks."""
    return triton.cdiv(triton.cdiv(rows, SHARES), ROWS) * ROWS
