"""The token objectives of `losses`, without a (nodes, vocabulary) tensor.

The loss and its gradient in the hidden states come out of one pass over small tiles of nodes. A tile's
logits exist only while the tile is worked on, and their gradient takes their place; what is kept is
(nodes, width) and smaller. Two matrix products with the output head per tile, three where the reference
model is the base measure:

    z = W h         z_ref = W h_ref         dL/dh = W^T dL/dz

The dense part of dL/dz is a multiple of pi minus a multiple of the base measure; all else is sparse, on
the rejected tokens only (see `_tile`). A uniform base measure is that of a reference whose logits
are all zero.

A tile lies with the vocabulary first: then W is the left operand of both products, the one that a CPU's
matrix kernels read as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from buleyean_rl import kernels
from buleyean_rl.complement import Counts, complement_floor, published_floor, sparse_target
from buleyean_rl.losses import NodeLosses, Objective

# Nodes of a tile: enough for efficient products, and with V = 49,152 in bf16 it holds 6 MB. A GPU has memory to spare.
TILE = 64
GPU_FACTOR = 32
UNLIKELY = -1e30  # a logit whose exponential is nothing
CHUNK = 1 << 16  # logits that torch works on at a time: they stay in a CPU's cache


@dataclass(frozen=True)
class OutputHead:
    """The frozen map from hidden states to logits: softcap * tanh(scale * (W h + bias) / softcap).

    Args:
        weight: W. Shape: (vocabulary, width).
        bias: Shape: (vocabulary,), or None.
        scale: factor on the logits, above 0 (Cohere, Granite).
        softcap: bound on the logits (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of `hidden` (nodes, width), in at least fp32. Shape: (nodes, vocabulary)."""
        return self.finish(self.project(hidden)).T

    @cached_property
    def transposed(self) -> Tensor:
        """W^T. Shape: (width, vocabulary). Copied in bf16 on a CPU, where W itself makes slower products."""
        in_bf16_on_cpu = self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16
        return self.weight.T.contiguous() if in_bf16_on_cpu else self.weight.T

    def project(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """W h + bias, in the weight's type. Shape: (nodes, width) to (vocabulary, nodes)."""
        raw = torch.mm(self.weight, hidden.T.contiguous(), out=out)
        return raw if self.bias is None else raw.add_(self.bias.unsqueeze(1))

    def finish(self, raw: Tensor) -> Tensor:
        """Logits from what `project` made, in at least fp32. Shape: any."""
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def unfinish(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient in what `project` made, from the gradient in the logits. Shape: any."""
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

    Equal in value and gradient to `losses.published_loss`, `complement_loss` and `ratio_loss` on `head(hidden)`.

    Args:
        hidden: the model's last hidden states. Shape: (nodes, width).
        head: the frozen output head; no gradient flows into it.
        counts: rejections over the vocabulary at each node, entries sorted by node.
        objective: which loss.
        reference_hidden: the frozen base model's, where the objective uses a reference. Shape as `hidden`.

    Returns:
        Losses of shape (nodes,); only `loss` is differentiable.
    """
    counts = counts.astype(torch.float64)
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
        tiles_of_nodes = node_tiles(hidden)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        states = (hidden,) if reference_hidden is None else (hidden, reference_hidden)
        buffer = hidden.new_empty(vocabulary * len(states) * (tiles_of_nodes[0].stop - tiles_of_nodes[0].start))
        tiles = []
        for nodes in tiles_of_nodes:
            both = torch.cat([state[nodes] for state in states])  # one product is faster than two narrow ones
            raw = head.project(both, buffer[: vocabulary * len(both)].view(vocabulary, -1))
            tiles.append(_tile(raw, head, counts.rows(nodes), objective, gradient is not None))
            if gradient is not None:
                gradient[nodes] = (head.transposed @ raw[:, : nodes.stop - nodes.start]).T
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
        return gradient * grad_loss.unsqueeze(-1).to(gradient.dtype), None, None, None, None


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
            logits = head.finish(head.project(hidden[nodes]))
            found.append(logits.gather(0, tokens[nodes].unsqueeze(0))[0] - logits.logsumexp(0))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, tokens = ctx.saved_tensors
        head: OutputHead = ctx.head
        gradient = torch.empty_like(hidden)
        for nodes in node_tiles(hidden):
            logits = head.finish(head.project(hidden[nodes]))
            of_logits = logits.softmax(0).mul_(-grad[nodes])  # d log pi_t / dz = onehot_t - pi
            of_logits.scatter_add_(0, tokens[nodes].unsqueeze(0), grad[nodes].unsqueeze(0).to(of_logits.dtype))
            gradient[nodes] = (head.transposed @ head.unfinish(of_logits, logits).to(hidden.dtype)).T
        return gradient, None, None


class _Tile(NamedTuple):
    kl: Tensor  # (nodes,)
    contrast: Tensor  # (nodes,)
    base: Tensor  # (entries,): base measure of the rejected tokens
    left: Tensor  # (nodes,): what it leaves the others


def _tile(
    raw: Tensor,
    head: OutputHead,
    counts: Counts,
    objective: Objective,
    wants_gradient: bool,
) -> _Tile:
    """The loss of a tile's nodes, from what `project` made of the model's states and then the reference's, if any.

    If the gradient is wanted, it takes the place of the model's columns of `raw`. What is of nodes and of rejected
    tokens, and so is little, is computed in fp64: a model may be as good as sure of a token that was rejected, and what
    it leaves the others is what matters then.
    """
    vocabulary, nodes = len(raw), len(counts.rounds)
    model, reference = raw[:, :nodes], raw[:, nodes:] if objective.uses_reference else None
    most = largest_logit(head, raw)
    most, base_most = most[:nodes], torch.zeros_like(most[:nodes]) if reference is None else most[nodes:]
    node, rejected = counts.node, (counts.option, counts.node)
    logits = head.finish(model[rejected]).double()
    base_logits = torch.zeros_like(logits) if reference is None else head.finish(reference[rejected]).double()
    mass, base_mass = (logits - most[node]).exp(), (base_logits - base_most[node]).exp()
    of_rejected = [counts.sum_by_node(x) for x in (mass, base_mass, base_mass * (base_logits - logits))]
    apart = reference is not None and head.softcap is None
    if apart:  # the sums are of the others alone: as a difference, little would be lost in much
        model[rejected] = raw[:, nodes:][rejected] = max(UNLIKELY, torch.finfo(raw.dtype).min)
    sums = [x.double() for x in vocabulary_sums(head, model, reference, most, base_most)]
    others, base_others, difference = sums if apart else (x - y for x, y in zip(sums, of_rejected, strict=True))
    total, base_total = others + of_rejected[0], base_others + of_rejected[1]
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

    if wants_gradient:
        # dL/dz = alpha (pi - P) + (1 - alpha) dC/dz. P is base / Z, times r on rejected tokens; dC/dz is
        # (sum a) pi - a for the published contrast, g - (sum g) pi with g = a pi / (1 - pi) for unlikelihood, and with
        # g = a max(0, log pi - log P) for `ratio`.
        alpha = objective.alpha
        pulls = counts.sum_by_node(pull)
        of_pi, of_base = alpha + (1 - alpha) * pulls, alpha / target.normaliser
        on_rejected = alpha * pi - of_base[node] * target.ratio * base
        on_rejected += (1 - alpha) * ((pulls[node] - pull) * pi - own_pull)
        _dense_gradient(head, model, reference, *(x.to(most.dtype) for x in (lse, base_lse, of_pi, of_base)))
        model[rejected] = head.unfinish(on_rejected, logits).to(raw.dtype)
    return _Tile(kl.to(most.dtype), counts.sum_by_node(contrast).to(most.dtype), base, left)


def node_tiles(hidden: Tensor) -> list[slice]:
    """Nodes to be worked on together, so few that their logits fit in a tile; hidden is (nodes, width)."""
    return _slices(len(hidden), TILE * (GPU_FACTOR if hidden.is_cuda else 1))


def largest_logit(head: OutputHead, raw: Tensor) -> Tensor:
    """Of each node, from what `project` made. Shape: (vocabulary, nodes) to (nodes,)."""
    passes = kernels.loss_passes(raw)
    return head.finish(raw.amax(0) if passes is None else passes.column_most(raw))


def vocabulary_sums(
    head: OutputHead, raw: Tensor, raw_reference: Tensor | None, most: Tensor, base_most: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the vocabulary, for each node: sum e^z, sum e^z_ref and sum e^z_ref (z_ref - z), exponents less the most.

    Args:
        head: the output head.
        raw: what its `project` made of the model's states. Shape: (vocabulary, nodes).
        raw_reference: the same of the reference's, with the strides of `raw`; None for logits of zero.
        most: the `largest_logit` of `raw`. Shape: (nodes,).
        base_most: that of `raw_reference`, or zero.

    Returns:
        Three tensors of shape (nodes,).
    """
    passes = kernels.loss_passes(raw)
    if head.softcap is None and passes is not None:
        return passes.softmax_sums(raw, raw_reference, head.scale, most, base_most)
    sums = torch.zeros(3, *most.shape, dtype=most.dtype, device=most.device)
    for chunk in _chunks(raw):
        logits = head.finish(raw[chunk])
        reference = None if raw_reference is None else head.finish(raw_reference[chunk])
        sums[0] += (logits - most).exp_().sum(0)
        mass = torch.ones_like(logits) if reference is None else (reference - base_most).exp_()
        sums[1] += mass.sum(0)
        sums[2] += torch.linalg.vecdot(mass, -logits if reference is None else reference - logits, dim=0)
    total, base_total, difference = sums
    return total, base_total, difference


def _dense_gradient(
    head: OutputHead,
    raw: Tensor,
    raw_reference: Tensor | None,
    lse: Tensor,
    base_lse: Tensor,
    of_pi: Tensor,
    of_base: Tensor,
) -> None:
    """of_pi * pi - of_base * base, as a gradient in what `project` made, written over `raw`."""
    passes = kernels.loss_passes(raw)
    if head.softcap is None and passes is not None:
        passes.softmax_gradient(raw, raw_reference, head.scale, lse, base_lse, of_pi, of_base)
        return
    for chunk in _chunks(raw):
        logits = head.finish(raw[chunk])
        log_base = -base_lse if raw_reference is None else head.finish(raw_reference[chunk]) - base_lse
        gradient = (logits - lse).exp_().mul_(of_pi) - log_base.exp_().mul_(of_base)
        raw[chunk] = head.unfinish(gradient, logits)


def _chunks(raw: Tensor) -> list[slice]:
    """Rows of a tile to be worked on together."""
    vocabulary, nodes = raw.shape
    return _slices(vocabulary, vocabulary if raw.is_cuda else CHUNK // max(nodes, 1))


def _slices(length: int, size: int) -> list[slice]:
    """Consecutive slices of at least one; a single empty one where there is nothing."""
    starts = range(0, length, max(size, 1)) or [0]
    return [slice(start, min(start + max(size, 1), length)) for start in starts]
