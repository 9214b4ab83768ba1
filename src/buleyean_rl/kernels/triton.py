"""Element-wise passes in Triton, for CUDA: what `kernels.c` does for a CPU, each in one sweep.

Of a layer's passes a program does a row, a token or a block. In the loss a tile of logits is (vocabulary, nodes), nodes
next to each other; a program takes some columns and a share of the rows, and what the shares came to is put together in
torch, always the same way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 32, 64  # of a program's block: a row of it is a whole line of memory
SHARES = 32  # of the rows: enough programs for every multiprocessor, also where nodes are few
BLOCK = 1024  # elements of a program of what goes element by element


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


@triton.jit
def _rms_norm(x, weight, width, epsilon, y, inverse, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < width
    values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 0) / width + epsilon)
    tl.store(inverse + row, scale)
    scaled = (values * scale).to(x.dtype.element_ty).to(tl.float32)  # rounded in between, as models do
    of = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + at, (of * scaled).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(gradient, x, weight, inverse, width, grad_x, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < width
    values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    pulls = tl.load(gradient + row * width + at, mask=inside, other=0.0).to(tl.float32)
    pulls *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(inverse + row)
    along = tl.sum(pulls * values, 0) * scale * scale / width
    tl.store(grad_x + row * width + at, (scale * (pulls - values * along)).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(gate_up, width, y, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + 2 * row * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * row + 1) * width + at, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1 + tl.exp(-tl.maximum(gate, -80.0)))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * width + at, (silu * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gradient, gate_up, width, grad_gate_up, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    pull = tl.load(gradient + row * width + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + 2 * row * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * row + 1) * width + at, mask=inside, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp(-tl.maximum(gate, -80.0)))
    of_gate = pull * up * share * (1 + gate * (1 - share))
    of_up = pull * gate * share
    tl.store(grad_gate_up + 2 * row * width + at, of_gate.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(grad_gate_up + (2 * row + 1) * width + at, of_up.to(gate_up.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    x, x_head, x_token, cosine, sine, heads, half, sign, first, y, y_head, y_token,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, HEADS).to(tl.int64)[:, None], tl.arange(0, HALF)[None, :]
    within = at < half
    inside = (head < heads) & within
    table = token * 2 * half + at
    place = x + head * x_head + token * x_token + at
    x1 = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    cos1 = tl.load(cosine + table, mask=within, other=0.0).to(tl.float32)
    cos2 = tl.load(cosine + table + half, mask=within, other=0.0).to(tl.float32)
    sin1 = tl.load(sine + table + first, mask=within, other=0.0).to(tl.float32)
    sin2 = tl.load(sine + table + half - first, mask=within, other=0.0).to(tl.float32)
    target = y + head * y_head + token * y_token + at
    tl.store(target, (x1 * cos1 - sign * x2 * sin1).to(y.dtype.element_ty), mask=inside)
    tl.store(target + half, (x2 * cos2 + sign * x1 * sin2).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _dropout(x, size, scale, seed, threshold, y, ADD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    mix = seed.to(tl.uint32, bitcast=True)
    drawn = (at.to(tl.uint32) ^ mix) * 0x9E3779B1  # `scramble` of kernels.c
    drawn ^= drawn >> 16
    drawn *= 0x85EBCA6B
    drawn = (drawn ^ (drawn >> 13)) + mix
    drawn *= 0xC2B2AE35
    drawn ^= drawn >> 16
    kept = drawn >= threshold.to(tl.uint32, bitcast=True)
    value = tl.where(kept, tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale, 0.0)
    if ADD:
        value += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


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


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See `kernels.rms_norm`."""
    width = x.shape[-1]
    y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    _rms_norm[(inverse.numel(),)](x, weight, width, epsilon, y, inverse, triton.next_power_of_2(width))
    return y, inverse


def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """See `kernels.rms_norm_backward`."""
    width, grad_x = x.shape[-1], torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _rms_norm_backward[(inverse.numel(),)](gradient, x, weight, inverse, width, grad_x, block)
    return grad_x


def swiglu(gate_up: Tensor) -> Tensor:
    """See `kernels.swiglu`."""
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    _swiglu[y.numel() // width, triton.cdiv(width, BLOCK)](gate_up, width, y, BLOCK)
    return y


def swiglu_backward(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """See `kernels.swiglu_backward`."""
    width, grad = gradient.shape[-1], torch.empty_like(gate_up)
    _swiglu_backward[gradient.numel() // width, triton.cdiv(width, BLOCK)](gradient, gate_up, width, grad, BLOCK)
    return grad


def rotate(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, backward: bool = False) -> None:
    """See `kernels.rotate`."""
    heads, tokens, width = x.shape
    half = width // 2
    sign, first = (-1.0, half) if backward else (1.0, 0)
    _rotate[(tokens,)](
        *(x, *x.stride()[:2], cos, sin, heads, half, sign, first, y, *y.stride()[:2]),
        *(triton.next_power_of_2(heads), triton.next_power_of_2(half)),
    )


def dropout(x: Tensor, p: float, seed: int, add_to: Tensor | None = None) -> Tensor:
    """See `kernels.dropout`; the same elements are kept."""
    y = torch.empty_like(x) if add_to is None else add_to
    bits = (_signed(seed), _signed(int(p * 2**32)))
    _dropout[(triton.cdiv(x.numel(), BLOCK),)](x, x.numel(), 1 / (1 - p), *bits, y, add_to is not None, BLOCK)
    return y


def _signed(bits: int) -> int:
    """32 bits as Triton takes them, whatever their first."""
    return bits - 2**32 if bits >= 2**31 else bits


def _grid(columns: int) -> tuple[int, int]:
    return triton.cdiv(columns, COLUMNS), SHARES


def _share(rows: int) -> int:
    """Rows of one program, whole blocks."""
    return triton.cdiv(triton.cdiv(rows, SHARES), ROWS) * ROWS
