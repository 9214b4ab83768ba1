"""How likely tokens are, how far two models are apart and how sure one is, from hidden states.

    hidden states --a tile of nodes at a time--> log pi(token), KL(pi_ref || pi), H(pi), each exact over the vocabulary

As in `fused` no (nodes, vocabulary) tensor is ever made; here nothing is differentiated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from buleyean_rl.models.output_head import OutputHead, largest_logit, node_tiles, vocabulary_sums


class TextFigures(NamedTuple):
    """What two models make of the next token at each node, in nats.

    Args:
        nll: -log pi(token). Shape: (nodes,).
        reference_nll: -log pi_ref(token), or None without a reference. Shape: (nodes,).
        kl: KL(pi_ref || pi) over the vocabulary, or None without a reference. Shape: (nodes,).
        entropy: H(pi) over the vocabulary. Shape: (nodes,).
    """

    nll: Tensor
    reference_nll: Tensor | None
    kl: Tensor | None
    entropy: Tensor


@torch.no_grad()
def compare_distributions(
    hidden: Tensor, reference_hidden: Tensor | None, head: OutputHead, tokens: Tensor
) -> TextFigures:
    """The next token's likelihood under a model and its reference, and their distributions beside each other.

    Args:
        hidden: the model's last hidden states. Shape: (nodes, width).
        reference_hidden: the reference's, or None for no reference. Shape as `hidden`.
        head: the output head of both.
        tokens: which token comes next at each node. Shape: (nodes,).

    Returns:
        See `TextFigures`; in fp32, or fp64 if the head is.
    """
    states = [hidden] if reference_hidden is None else [hidden, reference_hidden]
    tiles = [_compare(raw, head, following) for raw, following in _projected(states, head, tokens)]
    nll, reference_nll, kl, entropy = (torch.cat(parts) for parts in zip(*tiles, strict=True))
    figures = TextFigures(nll, reference_nll, kl, entropy)
    return figures._replace(reference_nll=None, kl=None) if reference_hidden is None else figures


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
    for raw, following in _projected([hidden], head, tokens):
        most = largest_logit(head, raw)
        total, _, _ = vocabulary_sums(head, raw, None, most, torch.zeros_like(most))
        tiles.append(total.log() + most - _logits_of(raw, head, following))
    return torch.cat(tiles)


def _projected(states: list[Tensor], head: OutputHead, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Tile by tile, what the head makes of all the states side by side, and the tokens of the tile's nodes."""
    for nodes in node_tiles(tokens):
        yield head.project(torch.cat([state[nodes] for state in states])), tokens[nodes]


def _compare(raw: Tensor, head: OutputHead, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """NLL, reference NLL, KL and entropy of a tile; where there is no reference, the model is its own."""
    nodes, most = len(tokens), largest_logit(head, raw)
    model, reference = raw[:, :nodes], raw[:, -nodes:]
    model_most, base_most = most[:nodes], most[-nodes:]
    total, base_total, difference = vocabulary_sums(head, model, reference, model_most, base_most)
    lse, base_lse = total.log() + model_most, base_total.log() + base_most
    # KL(pi_ref || pi) = E_ref[z_ref - z] - lse_ref + lse; rounding may bring it below 0
    kl = (difference / base_total - base_lse + lse).clamp_min(0)
    # H(pi) = lse - E_pi[z], the same sum of a reference pi and a model whose logits are all zero
    zeros = torch.zeros_like(raw)[:, :nodes]
    _, _, moment = vocabulary_sums(head, zeros, model, torch.zeros_like(model_most), model_most)
    nll, base_nll = lse - _logits_of(model, head, tokens), base_lse - _logits_of(reference, head, tokens)
    return nll, base_nll, kl, lse - moment / total


def _logits_of(raw: Tensor, head: OutputHead, tokens: Tensor) -> Tensor:
    """The logit of one token per node. Shape: (nodes,)."""
    return head.scale_and_cap(raw.gather(0, tokens.unsqueeze(0)).squeeze(0))
