"""Likelihood of tokens, divergence of two models and entropy of one, from hidden states.

    hidden states --a tile of nodes at a time--> log pi(token), KL(pi_ref || pi), H(pi), each exact over the vocabulary

As in `fused` there is never a (nodes, vocabulary) tensor; here nothing is differentiated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from buleyean_rl.models.output_head import OutputHead, largest_logit, node_tiles, vocabulary_sums


class TextFigures(NamedTuple):
    """Two models' predictions of the next token at each node, in nats.

    Args:
        nll: -log pi(token). Shape: (nodes,).
        reference_nll: -log pi_ref(token), or None without a reference. Shape: (nodes,).
        kl: KL(pi_ref || pi) over the vocabulary, or None without a reference. Shape: (nodes,).
        entropy: H(pi) over the vocabulary. Shape: (nodes,).
        reference_entropy: H(pi_ref), or None without a reference. Shape: (nodes,).
    """

    nll: Tensor
    reference_nll: Tensor | None
    kl: Tensor | None
    entropy: Tensor
    reference_entropy: Tensor | None


@torch.no_grad()
def compare_distributions(
    hidden: Tensor, reference_hidden: Tensor | None, head: OutputHead, tokens: Tensor
) -> TextFigures:
    """Likelihood of the next token under a model and its reference, and how far their distributions are apart.

    Args:
        hidden: the model's last hidden states. Shape: (nodes, width).
        reference_hidden: the reference's, or None for no reference. Shape as `hidden`.
        head: the output head of both.
        tokens: the next token at each node. Shape: (nodes,).

    Returns:
        See `TextFigures`; in fp32, or fp64 if the head is.
    """
    states = [hidden] if reference_hidden is None else [hidden, reference_hidden]
    tiles = [_compare(projected, head, next_tokens) for projected, next_tokens in _projected(states, head, tokens)]
    figures = TextFigures(*(torch.cat(parts) for parts in zip(*tiles, strict=True)))
    if reference_hidden is None:
        return figures._replace(reference_nll=None, kl=None, reference_entropy=None)
    return figures


@torch.no_grad()
def token_nlls(hidden: Tensor, head: OutputHead, tokens: Tensor) -> Tensor:
    """-log pi(token) at each node, in nats.

    Args:
        hidden: last hidden states. Shape: (nodes, width).
        head: the output head.
        tokens: Shape: (nodes,).

    Returns:
        In fp32, or fp64 if the head is. Shape: (nodes,).
    """
    tiles = []
    for projected, next_tokens in _projected([hidden], head, tokens):
        shift = largest_logit(head, projected)
        total, _, _ = vocabulary_sums(head, projected, None, shift, torch.zeros_like(shift))
        tiles.append(total.log() + shift - _token_logits(projected, head, next_tokens))
    return torch.cat(tiles)


def _projected(states: list[Tensor], head: OutputHead, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Tile by tile, the projections of all states side by side, (vocabulary, states x nodes), and the nodes' tokens."""
    for nodes in node_tiles(tokens):
        yield head.project(torch.cat([state[nodes] for state in states])), tokens[nodes]


def _compare(projected: Tensor, head: OutputHead, tokens: Tensor) -> tuple[Tensor, ...]:
    """The fields of `TextFigures` of a tile; without a reference the model is its own."""
    nodes, shift = len(tokens), largest_logit(head, projected)
    model, reference = projected[:, :nodes], projected[:, -nodes:]
    model_shift, base_shift = shift[:nodes], shift[-nodes:]
    total, base_total, difference = vocabulary_sums(head, model, reference, model_shift, base_shift)
    lse, base_lse = total.log() + model_shift, base_total.log() + base_shift
    # KL(pi_ref || pi) = E_ref[z_ref - z] - lse_ref + lse; rounding may bring it below 0
    kl = (difference / base_total - base_lse + lse).clamp_min(0)
    # H(pi) = lse - E_pi[z], the same sum for a reference pi and a model whose logits are all zero
    _, _, moment = vocabulary_sums(head, torch.zeros_like(projected), projected, torch.zeros_like(shift), shift)
    moment, base_moment = moment[:nodes], moment[-nodes:]
    nll, base_nll = lse - _token_logits(model, head, tokens), base_lse - _token_logits(reference, head, tokens)
    return nll, base_nll, kl, lse - moment / total, base_lse - base_moment / base_total


def _token_logits(projected: Tensor, head: OutputHead, tokens: Tensor) -> Tensor:
    """The logit of one token per node. Shape: (nodes,)."""
    return head.scale_and_cap(projected.gather(0, tokens.unsqueeze(0)).squeeze(0))
