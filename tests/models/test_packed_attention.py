"""Packed attention against a dense mask over the whole sequence: value and gradient, by each way to compute it."""

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
from buleyean_rl.models import packed_attention as attention
from buleyean_rl.models.packed_attention import packed_attention, padded_attention
from buleyean_rl.models.segments import Segment, cu_seqlens, segments_in_use

SEQUENCES = {
    "one token": (Segment(1),),
    "one block": (Segment(256),),
    "neighbours": (Segment(3), Segment(2), Segment(5)),
    "a trie": (Segment(9), Segment(4, ((0, 6),)), Segment(2, ((0, 3), (9, 11)))),
    "a long branch from a long stem": (Segment(519), Segment(259, ((0, 261),)), Segment(70)),
}
TRIE, LONG = SEQUENCES["a trie"], SEQUENCES["a long branch from a long stem"]
every_sequence = pytest.mark.parametrize("segments", SEQUENCES.values(), ids=SEQUENCES.keys())


def visible(segments: tuple[Segment, ...], window: int | None) -> Tensor:
    """Which token of the sequence sees which, spelled out token by token."""
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


@every_sequence
def test_packed_is_dense(segments: tuple[Segment, ...]) -> None:
    compare(segments)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_is_dense_in_every_precision(dtype: torch.dtype, tolerance: float) -> None:
    compare(LONG, dtype=dtype, tolerance=tolerance)


def test_where_torch_is_slow_in_bf16_it_goes_by_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buleyean_rl.kernels.precision._cpu_has_bf16", lambda: False)
    compare(TRIE, dtype=torch.bfloat16, tolerance=1e-2)


@pytest.mark.parametrize(("segments", "window"), [(TRIE, 1), (TRIE, 5), (TRIE, 10_000), (LONG, 256)])
def test_a_window_counts_along_the_path(segments: tuple[Segment, ...], window: int) -> None:
    compare(segments, window=window)


@pytest.mark.parametrize(("heads", "scaling"), [(2, 0.05), (6, 1.0)])
def test_grouped_heads_and_a_given_scale(heads: int, scaling: float) -> None:
    compare(TRIE, heads=heads, scaling=scaling)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_any_segments_are_dense(lengths: list[int], data: st.DataObject) -> None:
    segments, start = [], 0
    for length in lengths:
        edges = sorted(data.draw(st.sets(st.integers(0, start), max_size=4)))
        pairs = tuple(zip(edges[::2], edges[1::2], strict=False))
        segments.append(Segment(length, pairs))
        start += length
    compare(tuple(segments))


def varlen_attention(
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
        queries, keys = (slice(*cu[i : i + 2].tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
        q_i, k_i, v_i = q[queries], k[keys], v[keys]
        assert len(q_i) <= max_seqlen_q
        assert len(k_i) <= max_seqlen_k
        distance = torch.arange(len(k_i) - len(q_i), len(k_i))[:, None] - torch.arange(len(k_i))
        mask = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        sequence = (x.transpose(0, 1).unsqueeze(0) for x in (q_i, k_i, v_i))
        outputs.append(dense(*sequence, mask, scale)[0])
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("segments", [TRIE, LONG], ids=["a trie", "a long one"])
def test_all_segments_at_once_are_dense(
    segments: tuple[Segment, ...], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(query: Tensor, key: Tensor, value: Tensor, _: object, scale: float, *__: object) -> Tensor:
        seqlens = cu_seqlens(segments, 0, query.device)
        return attention._varlen_attention(query, key, value, seqlens, scale, window)

    monkeypatch.setattr(attention, "varlen_attn", varlen_attention)
    monkeypatch.setattr(attention, "_attention_by_segment", at_once)
    compare(segments, window=window)


@pytest.fixture
def short_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel computes attention however short a sequence is."""
    monkeypatch.setattr(attention_kernels, "attention_available", lambda like, *_: like.dtype == torch.bfloat16)


in_c = pytest.mark.usefixtures("kernels", "short_sequences")


@pytest.mark.usefixtures("kernels", "short_sequences")
def test_in_c_packed_is_dense() -> None:
    compare(LONG, dtype=torch.bfloat16, tolerance=1e-2, width=64)


@in_c
@every_sequence
def test_in_c_more_threads_divide_the_queries_of_a_segment(segments: tuple[Segment, ...]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        compare(segments, dtype=torch.bfloat16, tolerance=1e-2, width=64)
    finally:
        torch.set_num_threads(before)


@in_c
@pytest.mark.parametrize(
    ("width", "heads", "scaling", "tolerance"),
    [(32, 2, 0.3, 1e-2), (96, 6, 3.0, 2e-2), (128, 10, 3.0, 2e-2)],  # 3.0: powers beyond what a float holds
)
def test_in_c_heads_of_any_width_in_any_groups(width: int, heads: int, scaling: float, tolerance: float) -> None:
    compare(TRIE, dtype=torch.bfloat16, tolerance=tolerance, width=width, heads=heads, scaling=scaling)


@in_c
def test_in_c_later_queries_see_the_keys_before_them() -> None:
    q, k, v = torch.randn(3, 1, 2, 150, 64, dtype=torch.bfloat16).unbind()
    whole, _ = packed_attention(torch.nn.Module(), q, k, v, attention_mask=None)
    later, _ = packed_attention(torch.nn.Module(), q[:, :, -40:], k, v, attention_mask=None)
    torch.testing.assert_close(later, whole[:, -40:])


@in_c
def test_in_c_strides_may_be_any() -> None:
    inputs = [torch.randn(1, 2, 40, 64, dtype=torch.bfloat16) for _ in range(3)]
    across = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]
    whole, other = (packed_attention(torch.nn.Module(), *x, attention_mask=None)[0] for x in (inputs, across))
    assert whole.equal(other)


@in_c
def test_in_c_what_no_query_sees_has_no_part() -> None:
    q, k, v = torch.randn(3, 1, 2, 70, 64, dtype=torch.bfloat16).unbind()
    row, _ = packed_attention(torch.nn.Module(), q, k, v, attention_mask=None)
    k[:, :, 50:], v[:, :, 50:] = float("nan"), float("nan")
    with segments_in_use((Segment(50), Segment(20))):
        other, _ = packed_attention(torch.nn.Module(), q, k, v, attention_mask=None)
    torch.testing.assert_close(other[:, :50], row[:, :50])
    assert other[:, 50:].isnan().all()


@pytest.mark.usefixtures("gpu")
@every_sequence
@pytest.mark.parametrize("window", [None, 5])
def test_packed_is_dense_on_cuda(segments: tuple[Segment, ...], window: int | None) -> None:
    compare(segments, dtype=torch.bfloat16, tolerance=2e-2, window=window, width=64, device="cuda")


def test_without_segments_the_sequence_is_causal() -> None:
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


@pytest.mark.parametrize(
    ("has_bf16", "mask"), [(True, torch.bool), (False, torch.bool), (False, torch.bfloat16), (False, None)]
)
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
