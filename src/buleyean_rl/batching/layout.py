"""Which layout a model takes, packed or padded: tried once, on two small records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from buleyean_rl.batching.batch import Batch, find_answers, pack, pad_paths
from buleyean_rl.batching.forward import forward_hidden
from buleyean_rl.data.trie import Boundary
from buleyean_rl.models.packed_attention import PACKED
from buleyean_rl.models.views import backbone, eval_mode, plain_model
from buleyean_rl.objectives.losses import Objective

PROBE_RUNS = [7, 6, 6, 7]  # nodes of `probe`
Layout = Callable[[Sequence[Boundary]], Batch]


def make_batch(layout: Layout, boundaries: Sequence[Boundary], objective: Objective) -> Batch:
    """Boundaries in a layout, with the nodes that the objective has a loss at."""
    batch = layout(boundaries)
    if objective.is_listwise:
        return replace(batch, answers=find_answers(boundaries))
    return batch if objective.uses_reference else batch.without_anchors()


def probe(vocabulary: int) -> list[Boundary]:
    """Two records, the first with three branches: two from the end of its prompt, one from within the first branch.

    Their tokens are from the middle of the vocabulary: at its beginning are often those that control a chat, whose
    states in bf16 are mostly noise.
    """
    first = vocabulary // 2
    tokens = [(first + i) % vocabulary for i in range(38)]
    return [
        Boundary(tokens[:8], tokens[8:26], [0, 6, 12], [0, 0, 3], [(0, tokens[8], 1)], 1),
        Boundary(tokens[26:32], tokens[32:], [0], [0], [(0, tokens[32], 1)], 1),
    ]


def choose_layout(model: Any) -> Layout:
    """`pack` if the model's attention can be replaced and the result is the same, else `pad_paths`.

    The model is left with the attention its layout needs.
    """
    plain = plain_model(model)
    own_attention = plain.config._attn_implementation
    records = probe(plain.get_input_embeddings().num_embeddings)
    try:
        with eval_mode(model), torch.no_grad():
            padded = forward_hidden(backbone(model), pad_paths(records).to(plain.device)).float()
            plain.set_attn_implementation(PACKED)
            packed = forward_hidden(backbone(model), pack(records).to(plain.device)).float()
        # In bf16 single nodes may differ by half; a wrong mask moves most nodes of a run.
        differences = (packed - padded).norm(dim=1) / padded.norm(dim=1)
        if all(run.median() < 0.1 for run in differences.split(PROBE_RUNS)):
            return pack
    except (ValueError, RuntimeError, NotImplementedError):
        pass  # a model that cannot be packed is not an error: there is the padded layout
    plain.set_attn_implementation(own_attention)
    return pad_paths
