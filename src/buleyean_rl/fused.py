"""The token objectives of `losses`, without a (nodes, vocabulary) tensor.

The loss and its gradient in the hidden states come out of one pass over small tiles of nodes. A tile's
logits exist only while the tile is worked on, and their gradient takes their place; what is kept is
(nodes, width) and smaller. Two matrix
products with the output head per tile, three where the reference model is the base measure:

    z = W h         z_ref = W h_ref         dL/dh = W^T dL/dz

The dense part of dL/dz is a multiple of pi minus a multiple of the base measure; all else is sparse, on
the rejected tokens only (see `_logit_gradient`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from buleyean_rl.complement import Counts, SparseTarget, complement_floor, published_floor, sparse_target
from buleyean_rl.losses import NodeLosses, Objective

# Logits in flight. A tile's are kept in the model's type: enough nodes for efficient products, 7 MB in bf16. A strip's
# are worked on in fp32: few enough nodes to stay in a CPU's cache. A GPU has memory to spare, and calls cost it more.
TILE = 54 << 16
STRIP = 6 << 16
GPU_FACTOR = 32


@dataclass(frozen=True)
class OutputHead:
    """The frozen map from hidden states to logits: softcap * tanh(scale * (W h + bias) / softcap).

    Args:
        weight: W. Shape: (vocabulary, width).
        bias: Shape: (vocabulary,), or None.
        scale: factor on the logits (Cohere, Granite).
        softcap: bound on the logits (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of `hidden` (nodes, width), in at least fp32. Shape: (nodes, vocabulary)."""
        return self.finish(self.project(hidden))

    def project(self, hidden: Tensor) -> Tensor:
        """W h + bias, in the weight's type. Shape: (nodes, width) to (nodes, vocabulary)."""
        return torch.nn.functional.linear(hidden, self.weight, self.bias)

    def finish(self, raw: Tensor) -> Tensor:
        """Logits from what `project` made, in at least fp32. Shape: (nodes, vocabulary)."""
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def unfinish(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient in what `project` made, from the gradient in the logits. Shape: (nodes, vocabulary)."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap) ** 2)
        return gradient * self.scale if self.scale != 1.0 else gradient


def fused_loss(
    hidden: Tensor,
    head: OutputHead,
    counts: Counts,
    objective: Objective,
    reference_hidden: Tensor | None = None,
) -> NodeLosses:
    """The objective at every node, from hidden states.

    Equal in value and gradient to `losses.published_loss` and `losses.complement_loss` on `head(hidden)`.

    Args:
        hidden: the model's last hidden states. Shape: (nodes, width).
        head: the frozen output head; no gradient flows into it.
        counts: rejections over the vocabulary at each node, entries sorted by node.
        objective: which loss.
        reference_hidden: the frozen base model's, where the objective uses a reference. Shape as `hidden`.

    Returns:
        Losses of shape (nodes,); only `loss` is differentiable.
    """
    counts = counts.astype(torch.promote_types(hidden.dtype, torch.float32))
    return NodeLosses(*_FusedLoss.apply(hidden, head, counts, objective, reference_hidden))


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: OutputHead,
        counts: Counts,
        objective: Objective,
        reference_hidden: Tensor | None,
    ) -> tuple[Tensor, ...]:
        vocabulary = head.weight.shape[0]
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        strips = []
        factor = GPU_FACTOR if hidden.is_cuda else 1
        for tile in _slices(0, len(hidden), factor * TILE // vocabulary):
            raw = head.project(hidden[tile])
            reference = None if reference_hidden is None else head.project(reference_hidden[tile])
            for strip in _slices(tile.start, tile.stop, factor * STRIP // vocabulary):
                rows = slice(strip.start - tile.start, strip.stop - tile.start)
                base_rows = None if reference is None else reference[rows]
                strips.append(_strip(raw[rows], base_rows, head, counts.rows(strip), objective, gradient is not None))
            if gradient is not None:
                gradient[tile] = raw @ head.weight
        kl, contrast, base = (torch.cat(parts) for parts in zip(*strips, strict=True))
        if objective.uses_reference:
            target = sparse_target(counts, base, vocabulary, objective.tau)
            floor = complement_floor(counts, target, objective.alpha)
        else:
            floor = published_floor(counts, vocabulary, objective.alpha, objective.tau)
        ctx.save_for_backward(gradient)
        loss = objective.alpha * kl + (1 - objective.alpha) * contrast
        ctx.mark_non_differentiable(kl, contrast, floor)
        return loss, kl, contrast, floor

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.unsqueeze(-1).to(gradient.dtype), None, None, None, None


def _slices(start: int, stop: int, size: int) -> list[slice]:
    """Consecutive slices of at least one; a single empty one where there is nothing."""
    firsts = range(start, stop, max(size, 1)) or [start]
    return [slice(first, min(first + max(size, 1), stop)) for first in firsts]


class _Strip(NamedTuple):
    kl: Tensor  # (nodes,)
    contrast: Tensor  # (nodes,)
    base: Tensor  # (entries,): base measure of the rejected tokens


def _strip(
    raw: Tensor,
    raw_reference: Tensor | None,
    head: OutputHead,
    counts: Counts,
    objective: Objective,
    wants_gradient: bool,
) -> _Strip:
    """The loss of a few nodes; if its gradient is wanted, it takes the place of `raw`."""
    logits = head.finish(raw)
    rejected = (counts.node, counts.option)
    lse = logits.logsumexp(-1)
    log_pi = logits[rejected] - lse[counts.node]
    vocabulary = logits.shape[-1]
    if raw_reference is None:
        base_dense: Tensor | float = 1 / vocabulary
        log_base = torch.full_like(log_pi, -math.log(vocabulary))
        base_kl = lse - logits.mean(-1) - math.log(vocabulary)
    else:
        reference = head.finish(raw_reference)
        reference_lse = reference.logsumexp(-1)
        log_base = reference[rejected] - reference_lse[counts.node]
        base_dense = (reference - reference_lse.unsqueeze(-1)).exp_()
        base_kl = torch.linalg.vecdot(base_dense, reference.sub_(logits)) - reference_lse + lse
    base = log_base.exp()
    target = sparse_target(counts, base, vocabulary, objective.tau)
    # KL(P || pi) = [KL(mu || pi) + sum_S mu (r - 1)(log mu - log pi) + sum_S mu r log r] / Z - log Z
    sparse = base * ((target.ratio - 1) * (log_base - log_pi) + torch.xlogy(target.ratio, target.ratio))
    kl = (base_kl + counts.sum_by_node(sparse)) / target.normaliser - target.normaliser.log()
    contrast = counts.sum_by_node(_contrast(log_pi, counts, objective))
    if wants_gradient:
        pi = (logits - lse.unsqueeze(-1)).exp_()
        raw.copy_(head.unfinish(_logit_gradient(pi, base_dense, base, target, counts, objective), logits))
    return _Strip(kl, contrast, base)


def _contrast(log_pi: Tensor, counts: Counts, objective: Objective) -> Tensor:
    """The contrast's term of each rejected token. Shape: (entries,)."""
    if not objective.uses_reference:
        return -counts.rate * log_pi
    return -counts.rate * _one_minus(log_pi.exp()).log()


def _logit_gradient(
    pi: Tensor,
    base_dense: Tensor | float,
    base: Tensor,
    target: SparseTarget,
    counts: Counts,
    objective: Objective,
) -> Tensor:
    """dL/dz = alpha (pi - P) + (1 - alpha) dC/dz, in place of `pi`. Shape: (nodes, vocabulary).

    P is base / Z plus a sparse correction. dC/dz is (sum a) pi - a for the published contrast, and
    g - (sum g) pi with g = a pi / (1 - pi) for unlikelihood; a and g live on rejected tokens only.
    """
    alpha, rejected = objective.alpha, (counts.node, counts.option)
    if objective.uses_reference:
        pi_rejected = pi[rejected]
        pull = -counts.rate * pi_rejected / _one_minus(pi_rejected)
    else:
        pull = counts.rate
    correction = -alpha * base * (target.ratio - 1) / target.normaliser[counts.node] - (1 - alpha) * pull
    gradient = pi.mul_((alpha + (1 - alpha) * counts.sum_by_node(pull)).unsqueeze(-1))
    weight = (alpha / target.normaliser).unsqueeze(-1)
    if isinstance(base_dense, Tensor):
        gradient.addcmul_(base_dense, weight, value=-1)
    else:
        gradient.sub_(base_dense * weight)
    return gradient.index_put_(rejected, correction, accumulate=True)


def _one_minus(probability: Tensor) -> Tensor:
    """1 - p, never zero: a token at probability one has a large, finite loss."""
    return (1 - probability).clamp_min(torch.finfo(probability.dtype).eps)
