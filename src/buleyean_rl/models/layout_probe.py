"""Test whether a model's sequences can be packed: do packed and padded sequences have the same hidden states?

packed: every token once, attending to its own path    padded: a row for every path
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from buleyean_rl.models.packed_attention import PACKED
from buleyean_rl.models.private_interfaces import attention_implementation
from buleyean_rl.models.segments import ROUND, Segment, segments_in_use
from buleyean_rl.models.views import backbone, eval_mode, plain_model

Layout = Literal["packed", "padded"]

# A prompt of 8 tokens with three branches, two from its end and one from within the first, and a prompt of 6 with one
# branch. Each path from a prompt to the end of a branch, as token indices in the packed sequence:
PATHS = (
    [*range(14)],
    [*range(8), *range(14, 20)],
    [*range(11), *range(20, 26)],
    [*range(26, 38)],
)
COMPARED_TOKENS = (7, 6, 6, 7)  # number at the end of each path: its branch, and for the first of a prompt one more
SEGMENTS = (
    Segment(14),
    Segment(6, ((0, 8),)),
    Segment(6, ((0, 11),)),
    Segment(12),
)


def probe_layout(model: Any) -> Layout:
    """`packed` if the model's attention can be replaced and the result is the same, else `padded`.

    Sets the attention that the layout needs.

    Args:
        model: a causal language model, PEFT or plain.
    """
    plain = plain_model(model)
    original_attention = attention_implementation(plain.config)
    vocabulary = plain.get_input_embeddings().num_embeddings
    # from the middle of the vocabulary: it often begins with control tokens, whose states are noise in bf16
    ids = (torch.arange(PATHS[-1][-1] + 1) + vocabulary // 2) % vocabulary
    try:
        with eval_mode(model), torch.no_grad():
            padded = _padded_states(model, ids)
            plain.set_attn_implementation(PACKED)
            packed = _packed_states(model, ids)
        # In bf16 single tokens may differ by half; a wrong mask changes the median of a branch.
        if all(((a - b).norm(dim=1) / b.norm(dim=1)).median() < 0.1 for a, b in zip(packed, padded, strict=True)):
            return "packed"
    except (ValueError, RuntimeError, NotImplementedError):
        pass  # not an error: use the padded layout
    plain.set_attn_implementation(original_attention)
    return "padded"


def _padded_states(model: Any, ids: Tensor) -> list[Tensor]:
    """Hidden states of the compared tokens of each path, from padded rows. Shapes: (compared, width)."""
    width = max(map(len, PATHS))
    rows = torch.stack([torch.nn.functional.pad(ids[path], (0, width - len(path))) for path in PATHS])
    columns = torch.arange(width).expand(len(PATHS), width)
    lengths = torch.tensor([[len(path)] for path in PATHS])
    states = _hidden_states(model, rows, columns.contiguous(), (columns < lengths).long())
    return [row[len(path) - n : len(path)] for row, path, n in zip(states, PATHS, COMPARED_TOKENS, strict=True)]


def _packed_states(model: Any, ids: Tensor) -> list[Tensor]:
    """Hidden states of the compared tokens of each path, from a packed sequence. Shapes: (compared, width)."""
    length, padding = len(ids), -len(ids) % ROUND
    positions = torch.zeros(length, dtype=torch.long)
    for path in PATHS:
        positions[path] = torch.arange(len(path))
    padded_ids = torch.cat([ids, ids.new_zeros(padding)])
    padded_positions = torch.cat([positions, torch.arange(padding)])
    with segments_in_use((*SEGMENTS, Segment(padding))):
        states = _hidden_states(model, padded_ids.unsqueeze(0), padded_positions.unsqueeze(0))[0]
    return [states[path[-n:]] for path, n in zip(PATHS, COMPARED_TOKENS, strict=True)]


def _hidden_states(model: Any, ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    """The decoder's last hidden states, in fp32. Shape: (rows, tokens, width)."""
    device = plain_model(model).device
    moved: Sequence[Tensor | None] = [None if x is None else x.to(device) for x in (ids, positions, mask)]
    output = backbone(model)(input_ids=moved[0], position_ids=moved[1], attention_mask=moved[2], use_cache=False)
    return output.last_hidden_state.float()
