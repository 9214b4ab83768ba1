"""The gradients of all trainable parameters in one tensor, which stays where it is from step to step.

Allocated anew within a backward pass, they would fragment memory; and kernels that know where a layer's gradients are
accumulate them there, without autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GradientBuffer:
    """Where the gradients of parameters are.

    Args:
        parameters: all that are trained.
        groups: whose gradients are contiguous, in this order, where all of a group are trained.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], groups: Sequence[tuple[nn.Parameter, ...]]) -> None:
        groups = [group for group in groups if all(parameter.requires_grad for parameter in group)]
        order = list(dict.fromkeys([*(parameter for group in groups for parameter in group), *parameters]))
        self.flat = torch.cat([parameter.detach().flatten() for parameter in order])
        parts = self.flat.split([parameter.numel() for parameter in order])
        self._views = [(parameter, part.view_as(parameter)) for parameter, part in zip(order, parts, strict=True)]
        sizes = [sum(parameter.numel() for parameter in group) for group in groups]
        self._slices = dict(zip(groups, self.flat[: sum(sizes)].split(sizes), strict=True))

    def attach(self) -> None:
        """Make these the parameters' gradients, zeros, if they have none."""
        if self._views[0][0].grad is None:
            self.flat.zero_()
            for parameter, view in self._views:
                parameter.grad = view

    def slice(self, group: tuple[nn.Parameter, ...]) -> Tensor | None:
        """The gradients of a group, one after the other, if that is how they are."""
        return self._slices.get(group)
