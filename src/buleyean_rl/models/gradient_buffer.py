"""The gradients in all that learns, in one tensor, which stays where it is from step to step.

Made anew among what a backward pass frees, they would leave memory in pieces. And products that know where a layer's
lie add to them themselves: it takes autograd some 30 us for each parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GradientBuffer:
    """Where the gradients in parameters lie.

    Args:
        learning: the parameters.
        together: whose gradients lie one after the other, in this order, where all of these learn.
    """

    def __init__(self, learning: Sequence[nn.Parameter], together: Sequence[tuple[nn.Parameter, ...]]) -> None:
        together = [some for some in together if all(parameter.requires_grad for parameter in some)]
        order = list(dict.fromkeys([*(parameter for some in together for parameter in some), *learning]))
        self.all = torch.cat([parameter.detach().flatten() for parameter in order])
        parts = self.all.split([parameter.numel() for parameter in order])
        self._places = [(parameter, part.view_as(parameter)) for parameter, part in zip(order, parts, strict=True)]
        sizes = [sum(parameter.numel() for parameter in some) for some in together]
        self._together = dict(zip(together, self.all[: sum(sizes)].split(sizes), strict=True))

    def place(self) -> None:
        """Let the gradients be there, zeros, if there are none."""
        if self._places[0][0].grad is None:
            self.all.zero_()
            for parameter, place in self._places:
                parameter.grad = place

    def forget(self) -> None:
        """There are none, as after `nn.Module.zero_grad`, which goes through all modules: a hundredth of a step."""
        for parameter, _ in self._places:
            parameter.grad = None

    def of(self, together: tuple[nn.Parameter, ...]) -> Tensor | None:
        """Those in some parameters, one after the other, if that is how they lie."""
        return self._together.get(together)
