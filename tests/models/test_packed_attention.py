"""Packed attention against a dense mask over the whole row: value and gradient, blocks ragged and whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from buleyean_rl.kernels import attention as attention_kernels
from buleyean_rl.models import blockwise_attention
from buleyean_rl.models import packed_attention as attention
from buleyean_rl.models import segments as layouts
from buleyean_rl.models.blockwise_attention import BLOCK
from buleyean_rl.models.packed_attention import packed_attention, padded_attention
from buleyean_rl.models.segments import Segment, segments_in_use

ROWS = {
    "one token": (Segment(1),),
    "one block": (Segment(BLOCK),),
    "a block and one": (Segment(BLOCK + 1),),
    "neighbours": (Segment(3), Segment(2), Segment(5)),
    "a trie": (Segment(9), Segment(4, ((0, 6),)), Segment(2, ((0, 3), (9, 11)))),
    "a long branch from a long stem": (Segment(2 * BLOCK + 7), Segment(BLOCK + 3, ((0, BLOCK + 5),)), Segment(70)),
}
every_row = pytest.mark.parametrize("segments", ROWS.values(), ids=ROWS.keys())


def visible(segments: tuple[Segment, ...], window: int | None) -> Tensor:
    """Which token of the row sees which, spelled out token by token."""
    size = sum(segment.length for segment in segments)
    mask, start = torch.zeros(size, size, dtype=torch.bool), 0
    for segment in segments:
        path = [token for a, b in segment.context for token in range(a, b)]
        for token in range(start, start + segment.length):
            path.append(token)
            mask[token, path[-window:] if window else path] = True
        start += segment.length
    return mask


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def compare(
    segments: tuple[Segment, ...],
    *,
    dtype: torch.dtype = torch.double,
    tolerance: float = 1e-10,
    window: int | None = None,
    heads: int = 4,
    scaling: float | None = None,
    width: int = 6,
    device: str = "cpu",
) -> None:
    torch.manual_seed(0)
    size, of = sum(segment.length for segment in segments), {"dtype": dtype, "device": device, "requires_grad": True}
    inputs = [torch.randn(1, count, size, width, **of) for count in (heads, 2, 2)]  # type: ignore[call-overload]
    with segments_in_use(segments):
        got, nothing = packed_attention(
            torch.nn.Module(), *inputs, attention_mask=None, scaling=scaling, sliding_window=window
        )
    assert nothing is None
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = dense(*exact, visible(segments, window).to(device), width**-0.5 if scaling is None else scaling)
    pull = torch.randn_like(expected)
    got.backward(pull.to(dtype))
    expected.backward(pull)
    for ours, theirs in zip((got, *(t.grad for t in inputs)), (expected, *(t.grad for t in exact)), strict=True):
        assert ours is not None
        assert theirs is not None
        assert ours.dtype == dtype
        scale = theirs.abs().max().clamp_min(1)
        torch.testing.assert_close(ours.double() / scale, theirs / scale, rtol=tolerance, atol=tolerance)


@every_row
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_is_dense(segments: tuple[Segment, ...], dtype: torch.dtype, tolerance: float) -> None:
    compare(segments, dtype=dtype, tolerance=tolerance)


@every_row
@pytest.mark.parametrize("window", [1, 5, BLOCK, 10_000])
def test_a_window_counts_along_the_path(segments: tuple[Segment, ...], window: int) -> None:
    compare(segments, window=window)


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("scaling", [None, 1.0, 0.05])
def test_grouped_heads_and_a_given_scale(heads: int, scaling: float | None) -> None:
    compare(ROWS["a trie"], heads=heads, scaling=scaling)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_any_row_of_segments_is_dense(lengths: list[int], data: st.DataObject) -> None:
    segments, start = [], 0
    for length in lengths:
        edges = sorted(data.draw(st.sets(st.integers(0, start), max_size=4)))
        pairs = tuple(zip(edges[::2], edges[1::2], strict=False))
        segments.append(Segment(length, pairs))
        start += length
    compare(tuple(segments))


def of_many_lengths(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = True,  # which torch 2.11 does without being told
) -> Tensor:
    """What FlashAttention does on CUDA, sequence by sequence: the last query of each sees up to its last key."""
    assert enable_gqa
    assert window_size[1] == 0
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        of_query, of_key = (slice(*until[i : i + 2].tolist()) for until in (cu_seqlens_q, cu_seqlens_k))
        rows, keys = q[of_query], k[of_key]
        assert len(rows) <= max_seqlen_q
        assert len(keys) <= max_seqlen_k
        distance = torch.arange(len(keys) - len(rows), len(keys))[:, None] - torch.arange(len(keys))
        mask = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        sequence = (x.transpose(0, 1).unsqueeze(0) for x in (rows, keys, v[of_key]))
        outputs.append(dense(*sequence, mask, scale)[0])
    return torch.cat(outputs)


@every_row
@pytest.mark.parametrize("window", [None, 1, 5, 10_000])
def test_all_stretches_at_once_are_dense(
    segments: tuple[Segment, ...], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(query: Tensor, key: Tensor, value: Tensor, _: object, scale: float) -> Tensor:
        lengths = layouts._lengths(segments, 0, query.device)
        return attention._attend_at_once(query, key, value, lengths, scale, window)

    monkeypatch.setattr(attention, "varlen_attn", of_many_lengths)
    monkeypatch.setattr(blockwise_attention._BlockwiseBackward, "apply", at_once)
    monkeypatch.setattr(attention, "_attend", lambda *x: at_once(*x[:5]))
    compare(segments, window=window)


@pytest.fixture
def short_rows(tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """Attention goes by tiles however short a row is."""
    monkeypatch.setattr(attention_kernels, "attends", lambda like, *_: like.dtype == torch.bfloat16)


@pytest.mark.usefixtures("short_rows")
@every_row
@pytest.mark.parametrize("threads", [1, 5])
def test_in_tiles_packed_is_dense(segments: tuple[Segment, ...], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # more threads divide the queries of a stretch
    try:
        compare(segments, dtype=torch.bfloat16, tolerance=1e-2, width=64)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize(("scaling", "tolerance"), [(0.3, 1e-2), (3.0, 2e-2)])  # powers beyond what a float holds
@pytest.mark.parametrize("width", [32, 96, 128])
@pytest.mark.parametrize("heads", [2, 6, 10])
def test_tiles_of_any_width_and_heads_in_any_groups(width: int, heads: int, scaling: float, tolerance: float) -> None:
    compare(ROWS["a trie"], dtype=torch.bfloat16, tolerance=tolerance, width=width, heads=heads, scaling=scaling)


@pytest.mark.usefixtures("short_rows")
def test_in_tiles_later_queries_see_the_keys_before_them() -> None:
    q, k, v = torch.randn(3, 1, 2, 150, 64, dtype=torch.bfloat16).unbind()
    whole, _ = packed_attention(torch.nn.Module(), q, k, v, attention_mask=None)
    later, _ = packed_attention(torch.nn.Module(), q[:, :, -40:], k, v, attention_mask=None)
    torch.testing.assert_close(later, whole[:, -40:])


@pytest.mark.usefixtures("short_rows")
def test_tiles_of_tensors_however_they_lie() -> None:
    inputs = [torch.randn(1, 2, 40, 64, dtype=torch.bfloat16) for _ in range(3)]
    across = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]
    whole, other = (packed_attention(torch.nn.Module(), *x, attention_mask=None)[0] for x in (inputs, across))
    assert whole.equal(other)


@pytest.mark.usefixtures("short_rows")
def test_in_tiles_what_no_query_sees_has_no_part() -> None:
    q, k, v = torch.randn(3, 1, 2, 70, 64, dtype=torch.bfloat16).unbind()
    row, _ = packed_attention(torch.nn.Module(), q, k, v, attention_mask=None)
    k[:, :, 50:], v[:, :, 50:] = float("nan"), float("nan")
    with segments_in_use((Segment(50), Segment(20))):
        other, _ = packed_attention(torch.nn.Module(), q, k, v, attention_mask=None)
    torch.testing.assert_close(other[:, :50], row[:, :50])
    assert other[:, 50:].isnan().all()


@pytest.mark.usefixtures("gpu")
@every_row
@pytest.mark.parametrize("window", [None, 5, BLOCK])
def test_packed_is_dense_on_cuda(segments: tuple[Segment, ...], window: int | None) -> None:
    compare(segments, dtype=torch.bfloat16, tolerance=2e-2, window=window, width=64, device="cuda")


def test_without_segments_the_row_is_causal() -> None:
    q, k, v = torch.randn(3, 1, 2, 7, 4, dtype=torch.double).unbind()
    got, _ = packed_attention(torch.nn.Module(), q, k, v, attention_mask=None)
    torch.testing.assert_close(got, dense(q, k, v, visible((Segment(7),), None), 0.5))


def test_segments_are_in_use_only_within() -> None:
    q, k, v = torch.randn(3, 1, 2, 7, 4, dtype=torch.double).unbind()
    before, _ = packed_attention(torch.nn.Module(), q, k, v, attention_mask=None)
    with segments_in_use((Segment(3), Segment(4))):
        within, _ = packed_attention(torch.nn.Module(), q, k, v, attention_mask=None)
    after, _ = packed_attention(torch.nn.Module(), q, k, v, attention_mask=None)
    assert torch.equal(before, after)
    assert not torch.allclose(before, within)


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.bfloat16])
def test_padded_attention_is_transformers_own(
    has_bf16: bool, mask: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("buleyean_rl.kernels.precision._cpu_has_bf16", lambda: has_bf16)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 7, 16).bfloat16() for heads in (4, 2, 2))
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    seen = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7).clone()
    seen[1, :, :, :3] = False  # the second row's first tokens are padding
    seen[1, :, :3, 0] = True
    given = None
    if mask is not None:
        given = seen if mask == torch.bool else torch.zeros(seen.shape, dtype=mask).masked_fill(~seen, -1e30)
    got, weights = padded_attention(module, query, key, value, given)
    exact, _ = sdpa_attention_forward(
        module,
        *(x.double() for x in (query, key, value)),
        None if given is None else given if mask == torch.bool else given.double(),
    )
    assert got.dtype == torch.bfloat16
    assert weights is None
    assert (got - exact).norm() <= 0.01 * exact.norm()
