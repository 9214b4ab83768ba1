"""The token objectives of `losses`, without a (nodes, vocabulary) tensor.

The loss and its gradient in the hidden states come out of one pass over small tiles of nodes. A tile's
logits exist only while the tile is worked on; what is kept is (nodes, width) and smaller. Two matrix products with the
output head per tile, three where the reference model is the base measure:

    z = W h         z_ref = W h_ref         dL/dh = W^T dL/dz

The dense part of dL/dz is a multiple of pi minus a multiple of the base measure; all else is sparse, on
the rejected tokens only (see `_tile`). A uniform base measure is that of a reference whose logits
are all zero. `softmax` has the products and what lies between them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from buleyean_rl.kernels.precision import product
from buleyean_rl.models.output_head import OutputHead, node_tiles
from buleyean_rl.objectives.complement import Counts, complement_floor, published_floor, sparse_target
from buleyean_rl.objectives.losses import NodeLosses, Objective
from buleyean_rl.objectives.vocabulary_softmax import ReferenceSoftmax, Softmax, softmax_over


def fused_loss(
    hidden: Tensor,
    head: OutputHead,
    counts: Counts,
    objective: Objective,
    reference_hidden: Tensor | None = None,
    reference_rest: ReferenceSoftmax | None = None,
) -> NodeLosses:
    """The objective at every node, from hidden states.

    Equal in value and gradient to `losses.published_loss`, `complement_loss` and `ratio_loss` on `head(hidden)`.

    Args:
        hidden: the model's last hidden states. Shape: (nodes, width).
        head: the frozen output head; no gradient flows into it.
        counts: rejections over the vocabulary at each node, entries sorted by node.
        objective: which loss.
        reference_hidden: the frozen base model's, where the objective uses a reference. Shape as `hidden`.
        reference_rest: what `softmax.reference_softmax` said of those, if it was asked.

    Returns:
        Losses of shape (nodes,); only `loss` is differentiable.
    """
    counts = counts.astype(torch.float64)
    return NodeLosses(*_FusedLoss.apply(hidden, head, counts, objective, reference_hidden, reference_rest))


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: OutputHead,
        counts: Counts,
        objective: Objective,
        reference_hidden: Tensor | None,
        reference_rest: ReferenceSoftmax | None,
    ) -> tuple[Tensor, ...]:
        vocabulary = head.weight.shape[0]
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        states = (hidden,) if reference_hidden is None else (hidden, reference_hidden)
        softmax = softmax_over(head, hidden, len(states))
        tiles = []
        for nodes in node_tiles(hidden, softmax.nodes):
            of_nodes = None if gradient is None else gradient[nodes]
            rest = None if reference_rest is None else ReferenceSoftmax(*(x[nodes] for x in reference_rest))
            of_tile = [x[nodes] for x in states], counts.rows(nodes), rest
            tiles.append(_tile(softmax, *of_tile, objective, vocabulary, of_nodes))
        kl, contrast, base, left = (torch.cat(parts) for parts in zip(*tiles, strict=True))
        if objective.name == "ratio":
            floor = torch.zeros_like(kl)
        elif objective.uses_reference:
            target = sparse_target(counts, base, vocabulary, objective.tau, left)
            floor = complement_floor(counts, target, objective.alpha).to(kl.dtype)
        else:
            floor = published_floor(counts, vocabulary, objective.alpha, objective.tau).to(kl.dtype)
        ctx.save_for_backward(gradient)
        loss = objective.alpha * kl + (1 - objective.alpha) * contrast
        ctx.mark_non_differentiable(kl, contrast, floor)
        return loss, kl, contrast, floor

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.unsqueeze(-1).to(gradient.dtype), *(5 * (None,))


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
        found = []
        for nodes in node_tiles(hidden):
            logits = head.scale_and_cap(head.project(hidden[nodes]))
            found.append(logits.gather(0, tokens[nodes].unsqueeze(0))[0] - logits.logsumexp(0))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, tokens = ctx.saved_tensors
        head: OutputHead = ctx.head
        gradient = torch.empty_like(hidden)
        for nodes in node_tiles(hidden):
            logits = head.scale_and_cap(head.project(hidden[nodes]))
            of_logits = logits.softmax(0).mul_(-grad[nodes])  # d log pi_t / dz = onehot_t - pi
            of_logits.scatter_add_(0, tokens[nodes].unsqueeze(0), grad[nodes].unsqueeze(0).to(of_logits.dtype))
            gradient[nodes] = product(
                head.transposed, head.scale_and_cap_backward(of_logits, logits).to(hidden.dtype)
            ).T
        return gradient, None, None


class _Tile(NamedTuple):
    kl: Tensor  # (nodes,)
    contrast: Tensor  # (nodes,)
    base: Tensor  # (entries,): base measure of the rejected tokens
    left: Tensor  # (nodes,): what it leaves the others


def _tile(
    softmax: Softmax,
    states: list[Tensor],
    counts: Counts,
    rest: ReferenceSoftmax | None,
    objective: Objective,
    vocabulary: int,
    gradient: Tensor | None,
) -> _Tile:
    """The loss of a tile's nodes, from the model's states and then the reference's, if any, of which `rest` is known.

    The gradient in the model's states is written to `gradient`, if it is wanted. What is of nodes and of rejected
    tokens, and so is little, is computed in fp64: a model may be as good as sure of a token that was rejected, and what
    it leaves the others is what matters then.
    """
    node = counts.node
    dtype = torch.promote_types(states[0].dtype, torch.float32)
    logits, base_logits, most, base_most, others, base_others, difference = softmax.sums(states, counts, rest)
    mass, base_mass = (logits - most[node]).exp(), (base_logits - base_most[node]).exp()
    total, base_total = others + counts.sum_by_node(mass), base_others + counts.sum_by_node(base_mass)
    lse, base_lse = total.log() + most, base_total.log() + base_most

    log_pi, log_base = logits - lse[node], base_logits - base_lse[node]
    pi, base, left = log_pi.exp(), log_base.exp(), base_others / base_total
    not_pi = ((others / total).clamp_min(0)[node] + counts.sum_by_node(pi)[node] - pi).clamp_min(
        torch.finfo(pi.dtype).eps
    )
    target = sparse_target(counts, base, vocabulary, objective.tau, left)
    # KL(P || pi) = [sum over others of mu log(mu / pi) + sum over S of mu r log(mu r / pi)] / Z - log Z
    rest_kl = difference / base_total + left * (lse - base_lse)
    sparse = base * target.ratio * (log_base - log_pi + target.ratio.log())
    kl = (rest_kl + counts.sum_by_node(sparse)) / target.normaliser - target.normaliser.log()
    if objective.name == "ratio":
        excess = (log_pi - log_base - target.ratio.log() + target.normaliser.log()[node]).clamp_min(0)
        push = counts.rate * excess
        contrast, pull, own_pull = push * excess / 2, -push, -push * (1 - pi)
    elif objective.uses_reference:
        contrast, pull, own_pull = -counts.rate * not_pi.log(), -counts.rate * pi / not_pi, -counts.rate * pi
    else:
        contrast, pull, own_pull = -counts.rate * log_pi, counts.rate, counts.rate * (1 - pi)

    if gradient is not None:
        # dL/dz = alpha (pi - P) + (1 - alpha) dC/dz. P is base / Z, times r on rejected tokens; dC/dz is
        # (sum a) pi - a for the published contrast, g - (sum g) pi with g = a pi / (1 - pi) for unlikelihood, and with
        # g = a max(0, log pi - log P) for `ratio`.
        alpha = objective.alpha
        pulls = counts.sum_by_node(pull)
        of_pi, of_base = alpha + (1 - alpha) * pulls, alpha / target.normaliser
        on_rejected = alpha * pi - of_base[node] * target.ratio * base
        on_rejected += (1 - alpha) * ((pulls[node] - pull) * pi - own_pull)
        gradient.copy_(softmax.gradient(lse, base_lse, of_pi, of_base, on_rejected))
    return _Tile(kl.to(dtype), counts.sum_by_node(contrast).to(dtype), base, left)
