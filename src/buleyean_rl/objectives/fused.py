"""The token objectives of `losses`, without a (nodes, vocabulary) tensor.

Loss and gradient in the hidden states come out of one pass over small tiles of nodes. A tile's logits exist only while
the tile is computed; what stays is (nodes, width) and smaller. Two matrix products with the output head per tile,
three where the reference model is the base measure:

    z = W h         z_ref = W h_ref         dL/dh = W^T dL/dz

The dense part of dL/dz is a multiple of pi minus a multiple of the base measure; all else is sparse, on the listed
tokens only (see `_tile`): the judged ones and, with a `min_p`, those that are plausible beside them, found by one more
product with the reference's states. A uniform base measure is that of a reference whose logits are all zero. The
products and the sums over the vocabulary are in `vocabulary_softmax`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from buleyean_rl.models.output_head import OutputHead, node_tiles
from buleyean_rl.objectives.complement import Counts, plausible, published_floor, ratios, sparse_target
from buleyean_rl.objectives.losses import NodeLosses, Objective
from buleyean_rl.objectives.vocabulary_softmax import ReferenceSoftmax, Softmax, softmax_over


def fused_loss(
    hidden: Tensor,
    head: OutputHead,
    counts: Counts,
    objective: Objective,
    reference_hidden: Tensor | None = None,
    reference_softmax: ReferenceSoftmax | None = None,
) -> NodeLosses:
    """`complement` or `published` at every node, from hidden states.

    Equal in value and gradient to `losses.complement_loss` and `losses.published_loss` on `head(hidden)`.

    Args:
        hidden: the model's last hidden states. Shape: (nodes, width).
        head: the frozen output head; no gradient flows into it.
        counts: over the vocabulary at each node, entries sorted by node.
        objective: which loss.
        reference_hidden: the reference model's, where the objective uses it. Shape as `hidden`.
        reference_softmax: `vocabulary_softmax.reference_softmax` of those, if it was computed before.

    Returns:
        Losses of shape (nodes,); only `loss` is differentiable.
    """
    counts = counts.astype(torch.float64)
    return NodeLosses(*_FusedLoss.apply(hidden, head, counts, objective, reference_hidden, reference_softmax))


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: OutputHead,
        counts: Counts,
        objective: Objective,
        reference_hidden: Tensor | None,
        reference_softmax: ReferenceSoftmax | None,
    ) -> tuple[Tensor, ...]:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        states = (hidden,) if reference_hidden is None else (hidden, reference_hidden)
        softmax = softmax_over(head, hidden, len(states))
        tiles = []
        for nodes in node_tiles(hidden, softmax.nodes):
            tile_gradient = None if gradient is None else gradient[nodes]
            reference = None if reference_softmax is None else ReferenceSoftmax(*(x[nodes] for x in reference_softmax))
            tile_states, tile_counts = [x[nodes] for x in states], counts.select(nodes)
            if objective.min_p:
                tile_counts = _list_plausible(tile_counts, tile_states[1], objective, head)
                reference = None  # of all tokens but the judged ones
            tiles.append(_tile(softmax, tile_states, tile_counts, reference, objective, head, tile_gradient))
        kl, contrast = (torch.cat(parts) for parts in zip(*tiles, strict=True))
        if objective.uses_reference:
            floor = torch.zeros_like(kl)
        else:
            constants = objective.alpha, objective.tau, objective.prior
            floor = published_floor(counts, len(head.weight), *constants).to(kl.dtype)
        ctx.save_for_backward(gradient)
        loss = objective.alpha * kl + (1 - objective.alpha) * contrast  # (2)
        ctx.mark_non_differentiable(kl, contrast, floor)
        return loss, kl, contrast, floor

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.unsqueeze(-1).to(gradient.dtype), *(5 * (None,))


def _list_plausible(counts: Counts, reference: Tensor, objective: Objective, head: OutputHead) -> Counts:
    """`counts` with the tokens that (1a) lets take what is freed, where some token was judged, as unseen ones."""
    judged, node = torch.unique(counts.node, return_inverse=True)
    if not len(judged):
        return counts
    is_rejected = ratios(counts.count, counts.rounds, prior=objective.prior) < 1
    added: list[tuple[Tensor, ...]] = []
    for nodes in node_tiles(judged):
        logits = head(reference[judged[nodes]])  # (judged nodes, vocabulary)
        entries = ((node >= nodes.start) & (node < nodes.stop)).nonzero()[:, 0]
        listed, rejected = (node[entries] - nodes.start, counts.option[entries]), entries[is_rejected[entries]]
        logits[node[rejected] - nodes.start, counts.option[rejected]] = -math.inf
        unseen = plausible(logits, objective.min_p)
        unseen[listed] = False
        added_node, option = unseen.nonzero(as_tuple=True)
        added.append((judged[nodes][added_node], option))
    return counts.with_unseen(*map(torch.cat, zip(*added, strict=True)))


class _TileLosses(NamedTuple):
    kl: Tensor  # (nodes,)
    contrast: Tensor  # (nodes,)


def _tile(
    softmax: Softmax,
    states: list[Tensor],
    counts: Counts,
    reference: ReferenceSoftmax | None,
    objective: Objective,
    head: OutputHead,
    gradient: Tensor | None,
) -> _TileLosses:
    """Losses at a tile's nodes, from the hidden states of the model and, if any, of the reference.

    The gradient in the model's hidden states is written into `gradient`, unless it is None. Values per node and per
    listed token, which are few, are computed in fp64: a model may be all but sure of a rejected token, and then the
    little it leaves the others is what matters.
    """
    node = counts.node
    dtype = torch.promote_types(states[0].dtype, torch.float32)
    logits, base_logits, shift, base_shift, unlisted_sum, base_unlisted_sum, difference = softmax.sums(
        states, counts, reference
    )
    listed_exp, base_listed_exp = (logits - shift[node]).exp(), (base_logits - base_shift[node]).exp()
    total = unlisted_sum + counts.sum_by_node(listed_exp)
    base_total = base_unlisted_sum + counts.sum_by_node(base_listed_exp)
    lse, base_lse = total.log() + shift, base_total.log() + base_shift

    log_pi, log_base = logits - lse[node], base_logits - base_lse[node]
    pi, base, unlisted_base = log_pi.exp(), log_base.exp(), base_unlisted_sum / base_total
    constants = objective.tau, objective.prior, unlisted_base, objective.min_p > 0
    target = sparse_target(counts, base, len(head.weight), *constants)
    # KL(P || pi) = [sum over all of mu r log(mu r / pi)] / Z - log Z, where all unlisted tokens have one r
    unlisted_kl = difference / base_total + unlisted_base * (lse - base_lse + target.unlisted_ratio.log())
    listed_kl = base * target.ratio * (log_base - log_pi + target.ratio.log())
    all_kl = target.unlisted_ratio * unlisted_kl + counts.sum_by_node(listed_kl)
    kl = all_kl / target.normaliser - target.normaliser.log()
    if objective.uses_reference:
        excess = (log_pi - log_base - target.ratio.log() + target.normaliser.log()[node]).clamp_min(0)
        slope = counts.rate * excess  # dC / d log pi
        contrast = slope * excess / 2  # (3)
    else:
        slope = -counts.rate
        contrast = slope * log_pi  # (4)

    if gradient is not None:
        # (6) on the listed tokens; elsewhere x = 0 and P = mu r / Z leave pi_coefficient pi - base_coefficient mu
        alpha = objective.alpha
        slopes = counts.sum_by_node(slope)
        scale = alpha / target.normaliser
        pi_coefficient, base_coefficient = alpha - (1 - alpha) * slopes, scale * target.unlisted_ratio
        on_listed = alpha * pi - scale[node] * target.ratio * base
        on_listed += (1 - alpha) * ((slope - slopes[node]) * pi + slope * (1 - pi))  # 1 - pi last: the sums may cancel
        gradient.copy_(softmax.gradient(lse, base_lse, pi_coefficient, base_coefficient, on_listed))
    return _TileLosses(kl.to(dtype), counts.sum_by_node(contrast).to(dtype))


def token_logprobs(hidden: Tensor, head: OutputHead, tokens: Tensor) -> Tensor:
    """Log-probability of one token at each node, differentiable, without a (nodes, vocabulary) tensor.

    The logits are computed again in the backward pass: what they are multiplied with is known only there.

    Args:
        hidden: the model's last hidden states. Shape: (nodes, width).
        head: the frozen output head; no gradient flows into it.
        tokens: Shape: (nodes,).

    Returns:
        In nats, in at least fp32. Shape: (nodes,).
    """
    logprobs: Tensor = _TokenLogprobs.apply(hidden, head, tokens)
    return logprobs


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: OutputHead, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, tokens)
        ctx.head = head
        logprobs = []
        for nodes in node_tiles(hidden):
            logits = head.scale_and_cap(head.project(hidden[nodes]))
            logprobs.append(logits.gather(0, tokens[nodes].unsqueeze(0))[0] - logits.logsumexp(0))
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, tokens = ctx.saved_tensors
        head: OutputHead = ctx.head
        gradient = torch.empty_like(hidden)
        for nodes in node_tiles(hidden):
            logits = head.scale_and_cap(head.project(hidden[nodes]))
            logits_gradient = logits.softmax(0).mul_(-grad[nodes])  # d log pi_t / dz = onehot_t - pi
            logits_gradient.scatter_add_(
                0, tokens[nodes].unsqueeze(0), grad[nodes].unsqueeze(0).to(logits_gradient.dtype)
            )
            gradient[nodes] = head.project_backward(
                head.scale_and_cap_backward(logits_gradient, logits).to(hidden.dtype)
            )
        return gradient, None, None
