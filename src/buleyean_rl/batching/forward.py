"""Forward passes over batches: hidden states of the model and of the reference at the nodes, and losses from both.

Batch --forward_hidden--> hidden states --losses_from_states--> NodeLosses
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from buleyean_rl.batching.batch import Answers, Batch, concatenate
from buleyean_rl.batching.micro_batch import MICRO_BATCH_TOKENS, bin_pack
from buleyean_rl.models.output_head import OutputHead
from buleyean_rl.models.segments import segments_in_use
from buleyean_rl.models.views import adapter_disabled, backbone
from buleyean_rl.objectives.fused import fused_loss, token_logprobs
from buleyean_rl.objectives.losses import NodeLosses, Objective, listwise_loss

REFERENCE_TOKENS = 3 * MICRO_BATCH_TOKENS  # of a forward pass without a backward pass


def forward_hidden(backbone: torch.nn.Module, batch: Batch) -> Tensor:
    """Last hidden states at a batch's nodes.

    Args:
        backbone: a transformers decoder without its output head, its attention set to
            `packed_attention.PACKED` if the batch is packed.
        batch: see `Batch`.

    Returns:
        Shape: (nodes, width).
    """
    with segments_in_use(batch.segments):
        output = backbone(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        )
    return output.last_hidden_state.flatten(0, 1).index_select(0, batch.nodes)


def batch_losses(model: Any, head: OutputHead, batch: Batch, objective: Objective) -> NodeLosses:
    """The objective at each node of a batch.

    Args:
        model: a PEFT model, or a plain one where the objective uses no reference.
        head: its output head.
        batch: in the model's layout.
        objective: which loss.
    """
    if objective.uses_reference:
        (batch,) = add_references(model, [batch])
    return losses_from_states(forward_hidden(backbone(model), batch), head, batch, objective)


def losses_from_states(hidden: Tensor, head: OutputHead, batch: Batch, objective: Objective) -> NodeLosses:
    """The objective from the hidden states at a batch's nodes.

    Args:
        hidden: the model's. Shape: (nodes, width).
        head: the output head.
        batch: with the reference where the objective uses it.
        objective: which loss.
    """
    reference = batch.reference
    if batch.answers is None or reference is None:
        return fused_loss(hidden, head, batch.counts, objective, reference, batch.reference_softmax)
    ratios = answer_logprobs(hidden, head, batch.answers) - answer_logprobs(reference, head, batch.answers)
    return listwise_loss(ratios, batch.answers.counts, objective)


def answer_logprobs(hidden: Tensor, head: OutputHead, answers: Answers) -> Tensor:
    """Log-probability of each answer.

    Args:
        hidden: at the nodes of a batch. Shape: (nodes, width).
        head: the output head.
        answers: of the batch.

    Returns:
        In nats, without the end token. Shape: (answers,).
    """
    return answers.sum(token_logprobs(hidden[answers.parent], head, answers.token))


def reference_hidden(model: Any, batch: Batch) -> Tensor:
    """Hidden states at a batch's nodes of the reference: the model without adapter and dropout."""
    with adapter_disabled(model), torch.no_grad():
        return forward_hidden(backbone(model), batch)


def add_references(model: Any, batches: Sequence[Batch]) -> list[Batch]:
    """Batches with their `reference`, computed where it is missing.

    Packed ones are concatenated, so that the weights are read once for all.

    Args:
        model: a PEFT model.
        batches: on its device.
    """
    completed = list(batches)
    missing = [i for i, batch in enumerate(batches) if batch.reference is None]
    limit = REFERENCE_TOKENS if all(batch.segments is not None for batch in batches) else 0
    for group in bin_pack(missing, lambda i: batches[i].input_ids.numel(), limit):
        concatenated = concatenate([batches[i] for i in group]) if len(group) > 1 else batches[group[0]]
        states = reference_hidden(model, concatenated).split([len(batches[i].nodes) for i in group])
        for i, reference in zip(group, states, strict=True):
            completed[i] = replace(batches[i], reference=reference)
    return completed
