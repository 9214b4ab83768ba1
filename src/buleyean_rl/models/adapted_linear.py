"""A linear layer with its adapter outside autograd's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from buleyean_rl.kernels import abi, elementwise, matmul
from buleyean_rl.kernels.precision import bf16_is_emulated


class _Adapter:
    """The A's and scaled B's of a group in the type that computes: `a` on top of each other, `b` along a diagonal.

    Their rank is filled up with zeros to what products want.

    Args:
        ranks: of the layers.
        outputs: of the layers.
        inputs: of every layer.
        scalings: of the layers.
        x: of the type and on the device that computes.
    """

    def __init__(
        self, ranks: Sequence[int], outputs: Sequence[int], inputs: int, scalings: Sequence[float], x: Tensor
    ) -> None:
        self.ranks, self.outputs, self.scalings = list(ranks), list(outputs), list(scalings)
        rank = matmul.depth_of(sum(ranks), x)
        self.a = x.new_zeros(rank, inputs)
        self.b = x.new_zeros(sum(outputs), rank)
        self._parts = [*self._each_a(self.a), *self._each_b(self.b)]
        each = torch.tensor(self.scalings).repeat_interleave(torch.tensor(self.ranks))
        self._scaling = torch.ones(rank, 1)
        self._scaling[: len(each), 0] = each
        self._scaling = self._scaling.to(x.device)

    @torch.no_grad()
    def copy(self, parameters: Sequence[Tensor]) -> None:
        """Become these A's and B's, one pair after the other."""
        scaled = torch._foreach_mul(list(parameters[1::2]), self.scalings)
        torch._foreach_copy_(self._parts, [*parameters[::2], *scaled])

    def in_tiles(self) -> matmul.Adapter:
        """For `kernels.linear_of`."""
        return matmul.Adapter(self.a, self.b, self.ranks, self.outputs, self.scalings)

    def gradients(self, grad_a: Tensor, grad_b: Tensor) -> list[Tensor]:
        """Each layer's in its A and its B, from those in `a` and the transpose of `b`, in fp32."""
        of_b = [block.contiguous() for block in self._each_b(grad_b.mul_(self._scaling).T)]
        return [grad for pair in zip(self._each_a(grad_a), of_b, strict=True) for grad in pair]

    def _each_a(self, a: Tensor) -> list[Tensor]:
        return list(a[: sum(self.ranks)].split(self.ranks))

    def _each_b(self, b: Tensor) -> list[Tensor]:
        rows = zip(b[:, : sum(self.ranks)].split(self.outputs), range(len(self.ranks)), strict=True)
        return [row.split(self.ranks, 1)[i] for row, i in rows]


class AdaptedLinear(NamedTuple):
    """A group's weights and adapters in one pass, outside autograd's graph.

    Args:
        weight: Shape: (outputs, inputs).
        bias: Shape: (outputs,).
        adapter: None where the base alone is meant.
        parameters: A and B of each layer.
        tiled: the same for `kernels.adapted`, where that is to compute.
        p: share of the input dropped on the way to A.
        seed: of what is dropped.
        gradients: where those in the parameters are added up, one after the other; None where autograd is to add them.
    """

    weight: Tensor
    bias: Tensor | None
    adapter: _Adapter | None
    parameters: tuple[nn.Parameter, ...]
    tiled: abi.Linear | None
    p: float = 0.0
    seed: int = 0
    gradients: Tensor | None = None

    def is_still(
        self, weight: Tensor, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], scalings: list[float], like: Tensor
    ) -> bool:
        """Whether these are its weights, parameters and scalings, where they were, and it computes in `like`'s type."""
        tensors = weight, *(parameter for pair in pairs for parameter in pair)
        computes = weight if self.adapter is None else self.adapter.a
        return (
            all(a is b for a, b in zip((self.weight, *self.parameters), tensors, strict=True))
            and (computes.dtype, computes.device) == (like.dtype, like.device)
            and (self.adapter is None or self.adapter.scalings == scalings)
            and (self.tiled is None or (self.tiled.weight, torch.bfloat16) == (weight.data_ptr(), weight.dtype))
        )

    def of_pass(self, tokens: int, p: float) -> AdaptedLinear:
        """The same for so many tokens, with dropout of its own."""
        tiled = self.tiled if tokens >= matmul.least_rows(self.weight) else None
        if not p:
            return self if tiled is self.tiled else self._replace(tiled=tiled)
        seed = int(torch.randint(2**32, ()))
        return self._replace(tiled=tiled and tiled.with_dropout(p, seed), p=p, seed=seed)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The output, with something added to it, and what A makes of the input, which `back` wants.

        Args:
            x: contiguous. Shape: (tokens, inputs).
            added: contiguous. Shape: (tokens, outputs).

        Returns:
            Shapes: (tokens, outputs), (tokens, ranks).
        """
        if self.tiled is not None:
            y, low = matmul.adapted(x, self.tiled, added)
            return y if self.bias is None else y.add_(self.bias), low
        terms = [term for term in (self.bias, added) if term is not None]
        y = torch.addmm(terms.pop(), x, self.weight.T) if terms else x @ self.weight.T
        for term in terms:
            y += term
        if self.adapter is None:
            return y, None
        low = _dropout(x, self.p, self.seed) @ self.adapter.a.T
        return y.addmm_(low, self.adapter.b.T), low

    @overload
    def back(
        self, grad_y: Tensor, x: Tensor, low: Tensor, of_x: Literal[True] = True
    ) -> tuple[Tensor, list[Tensor | None]]: ...

    @overload
    def back(self, grad_y: Tensor, x: Tensor, low: Tensor, of_x: bool) -> tuple[Tensor | None, list[Tensor | None]]: ...

    def back(
        self, grad_y: Tensor, x: Tensor, low: Tensor, of_x: bool = True
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients in the input, if it is wanted, and for autograd in the parameters, from that in the output.

        Args:
            grad_y: contiguous. Shape: (tokens, outputs).
            x: see `__call__`.
            low: what that gave.
            of_x: whether the one in the input is wanted.
        """
        assert self.adapter is not None
        if self.tiled is not None:
            grads = self.gradients_so_far()
            grad_x = matmul.adapted_backward(grad_y, x, self.tiled, low, of_x, grads)
            return grad_x, self.of_parameters(grads)
        a, b = self.adapter.a, self.adapter.b
        grad_low, grad_x = grad_y @ b, None
        grad_a = _row_products(grad_low, _dropout(x, self.p, self.seed))  # cheaper made again than kept
        grad_b = _row_products(low, grad_y)
        if of_x and self.p:
            grad_x = _dropout(grad_low @ a, self.p, self.seed, grad_y @ self.weight)
        elif of_x:
            grad_x = (grad_y @ self.weight).addmm_(grad_low, a)
        return grad_x, [*self.adapter.gradients(grad_a, grad_b)]

    def gradients_so_far(self) -> Tensor:
        """What gradients in the parameters are to be added to, one after the other."""
        assert self.tiled is not None
        return torch.zeros(self.tiled.learning) if self.gradients is None else self.gradients

    def of_parameters(self, grads: Tensor) -> list[Tensor | None]:
        """What autograd is to add to the parameters' gradients, from those one after the other: nothing where they were
        added already.
        """
        if grads is self.gradients:
            return [None] * len(self.parameters)
        parts = grads.split([parameter.numel() for parameter in self.parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]


def _copy_adapters(found: Sequence[AdaptedLinear]) -> None:
    """Copy A's and B's, scaled, to where products find them, until they are looked at again."""
    tiled = [(linear.tiled, linear.parameters) for linear in found if linear.adapter is not None and linear.tiled]
    if tiled:
        matmul.copy_adapters(tiled)
    for linear in found:
        if linear.adapter is not None and linear.tiled is None:
            linear.adapter.copy(linear.parameters)


def frozen_linear(x: Tensor, linear: AdaptedLinear) -> Tensor:
    """A linear layer without adapters, with a gradient in its input alone. Shape: (..., inputs) to (..., outputs)."""
    if linear.tiled is None or not bf16_is_emulated(x):
        return nn.functional.linear(x, linear.weight, linear.bias)
    y: Tensor = _FrozenLinear.apply(x, linear)
    return y


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: AdaptedLinear) -> Tensor:
        ctx.linear = linear
        return linear(x.reshape(-1, x.shape[-1]).contiguous())[0].view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        across = ctx.linear.weight.T.contiguous()
        grad_x, _ = matmul.adapted(grad_y.reshape(-1, grad_y.shape[-1]).contiguous(), matmul.linear_of(across))
        return grad_x.view(*grad_y.shape[:-1], -1), None


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in fp32. Shapes: (rows, width), (rows, columns)."""
    # a, the narrow one, is the first operand: faster by a third than the second
    if a.is_cuda:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return (a.T @ b).float()


def _dropout(x: Tensor, p: float, seed: int, add_to: Tensor | None = None) -> Tensor:
    """Dropout that a seed makes the same again, added to `add_to` if given. Shape: any."""
    if not p:
        return x
    if abi.available(x):
        return elementwise.dropout(x, p, seed, add_to)
    generator = torch.Generator(x.device).manual_seed(seed)
    dropped = torch.empty_like(x).bernoulli_(1 - p, generator=generator).mul_(x).div_(1 - p)
    return dropped if add_to is None else add_to.add_(dropped)
