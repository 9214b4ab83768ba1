"""A linear layer with its adapter, and its gradients, as plain functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from buleyean_rl.kernels import abi, matmul
from buleyean_rl.kernels.precision import bf16_is_emulated
from buleyean_rl.kernels.quantised import QuantisedTensor
from buleyean_rl.models.private_interfaces import scaled_copy


class StackedAdapter:
    """The A's and scaled B's of a group in the type that computes: `a` stacked, `b` a block diagonal.

    Their rank is padded with zeros to a multiple that the products take.

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
        rank = matmul.padded_depth(sum(ranks), x)
        self.a = x.new_zeros(rank, inputs)
        self.b = x.new_zeros(sum(outputs), rank)
        self._blocks = [*self._blocks_of_a(self.a), *self._blocks_of_b(self.b)]
        each = torch.tensor(self.scalings).repeat_interleave(torch.tensor(self.ranks))
        self._scaling = torch.ones(rank, 1)
        self._scaling[: len(each), 0] = each
        self._scaling = self._scaling.to(x.device)

    @torch.no_grad()
    def copy(self, parameters: Sequence[Tensor]) -> None:
        """Take over these A's and B's, given pair by pair."""
        scaled_copy(self._blocks, [*parameters[::2], *parameters[1::2]], [*[1.0] * len(self.ranks), *self.scalings])

    def in_c(self) -> matmul.Adapter:
        """For `kernels.matmul.make_linear`."""
        return matmul.Adapter(self.a, self.b, self.ranks, self.outputs, self.scalings)

    def gradients(self, grad_a: Tensor, grad_b: Tensor) -> list[Tensor]:
        """Each layer's in its A and its B, from those in `a` and the transpose of `b`, in fp32."""
        grads_b = [block.contiguous() for block in self._blocks_of_b(grad_b.mul_(self._scaling).T)]
        return [grad for pair in zip(self._blocks_of_a(grad_a), grads_b, strict=True) for grad in pair]

    def _blocks_of_a(self, a: Tensor) -> list[Tensor]:
        return list(a[: sum(self.ranks)].split(self.ranks))

    def _blocks_of_b(self, b: Tensor) -> list[Tensor]:
        rows = zip(b[:, : sum(self.ranks)].split(self.outputs), range(len(self.ranks)), strict=True)
        return [row.split(self.ranks, 1)[i] for row, i in rows]


class AdaptedLinear(NamedTuple):
    """A group's weights and adapters in one pass.

    Args:
        weight: Shape: (outputs, inputs).
        bias: Shape: (outputs,), or None.
        adapter: None for the base alone.
        parameters: A and B of each layer.
        c_linear: the same for the kernels, where they compute it.
        dropout: share of the input dropped on the way to A.
        seed: of the dropout.
        gradients: where those in the parameters are accumulated, one after the other; None where autograd does it.
    """

    weight: Tensor
    bias: Tensor | None
    adapter: StackedAdapter | None
    parameters: tuple[nn.Parameter, ...]
    c_linear: abi.Linear | None
    dropout: float = 0.0
    seed: int = 0
    gradients: Tensor | None = None

    def matches(
        self,
        base: tuple[Tensor, Tensor | None],
        pairs: Sequence[tuple[nn.Parameter, nn.Parameter]],
        scalings: list[float],
        x: Tensor,
    ) -> bool:
        """Whether it still has these weights, parameters and scalings, and computes in the type of `x`."""
        tensors = *base, *(parameter for pair in pairs for parameter in pair)
        computes, c_linear = base[0] if self.adapter is None else self.adapter.a, self.c_linear
        return (
            all(a is b for a, b in zip((self.weight, self.bias, *self.parameters), tensors, strict=True))
            and (computes.dtype, computes.device) == (x.dtype, x.device)
            and (self.adapter is None or self.adapter.scalings == scalings)
            and (c_linear is None or [c_linear.weight, c_linear.bias] == [*map(abi.address, base)])
            and (c_linear is None or base[0].dtype == torch.bfloat16)
        )

    def for_pass(self, tokens: int, dropout: float) -> AdaptedLinear:
        """The same for so many tokens, with a dropout mask of its own; dropout is not in the kernels."""
        if dropout:
            return self._replace(c_linear=None, dropout=dropout, seed=int(torch.randint(2**32, ())))
        return self if tokens >= matmul.min_rows(self.weight) else self._replace(c_linear=None)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output, and what A makes of the input, which `backward` needs.

        Args:
            x: contiguous. Shape: (tokens, inputs).

        Returns:
            Shapes: (tokens, outputs), (tokens, ranks).
        """
        if self.c_linear is not None:
            return matmul.lora_linear(x, self.c_linear)
        y = nn.functional.linear(x, self.weight, self.bias)
        if self.adapter is None:
            return y, None
        lora_hidden = _dropout(x, self.dropout, self.seed) @ self.adapter.a.T
        return y.addmm_(lora_hidden, self.adapter.b.T), lora_hidden

    def backward(
        self, grad_y: Tensor, x: Tensor, lora_hidden: Tensor, needs_grad_x: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients in the input, if needed, and in the parameters, for autograd to add.

        Args:
            grad_y: contiguous. Shape: (tokens, outputs).
            x: the input. Shape: (tokens, inputs).
            lora_hidden: what A made of it. Shape: (tokens, ranks).
            needs_grad_x: whether the gradient in the input is needed.
        """
        assert self.adapter is not None
        if self.c_linear is not None:
            grads = self.gradient_accumulator()
            grad_x = matmul.lora_linear_backward(grad_y, x, self.c_linear, lora_hidden, needs_grad_x, grads)
            return grad_x, self.parameter_gradients(grads)
        a, b = self.adapter.a, self.adapter.b
        grad_hidden, grad_x = grad_y @ b, None
        grad_a = _transposed_product(grad_hidden, _dropout(x, self.dropout, self.seed))  # made again, not saved
        grad_b = _transposed_product(lora_hidden, grad_y)
        if needs_grad_x and self.dropout:
            grad_x = _dropout(grad_hidden @ a, self.dropout, self.seed, grad_y @ self.weight)
        elif needs_grad_x:
            grad_x = (grad_y @ self.weight).addmm_(grad_hidden, a)
        return grad_x, [*self.adapter.gradients(grad_a, grad_b)]

    def gradient_accumulator(self) -> Tensor:
        """What the kernels add gradients in the parameters to, one after the other."""
        assert self.c_linear is not None
        return torch.zeros(self.c_linear.adapter_size) if self.gradients is None else self.gradients

    def parameter_gradients(self, accumulator: Tensor) -> list[Tensor | None]:
        """What autograd has to add to each parameter's gradient: nothing where that was accumulated in its place."""
        if accumulator is self.gradients:
            return [None] * len(self.parameters)
        parts = accumulator.split([parameter.numel() for parameter in self.parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]


class AdaptedLinearFunction(torch.autograd.Function):
    """A linear layer with its adapter as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: AdaptedLinear, *_parameters: nn.Parameter) -> Tensor:
        """Shape: (..., inputs) to (..., outputs). The parameters are those of `linear`."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y, lora_hidden = linear(flat)
        ctx.save_for_backward(flat, lora_hidden)
        ctx.linear, ctx.shape = linear, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients in `x` and in the parameters."""
        flat, lora_hidden = ctx.saved_tensors
        grad_y = grad_y.reshape(-1, grad_y.shape[-1]).contiguous()
        grad_x, parameter_grads = ctx.linear.backward(grad_y, flat, lora_hidden, ctx.needs_input_grad[0])
        return None if grad_x is None else grad_x.view(ctx.shape), None, *parameter_grads


def copy_adapters(linears: Sequence[AdaptedLinear]) -> None:
    """Copy A's and scaled B's to where the products read them, which is as often as they may have changed."""
    for linear in linears:
        if linear.adapter is not None:
            linear.adapter.copy(linear.parameters)


def frozen_linear(x: Tensor, linear: AdaptedLinear) -> Tensor:
    """A linear layer without adapters, with a gradient in its input alone. Shape: (..., inputs) to (..., outputs)."""
    if linear.c_linear is None or not (bf16_is_emulated(x) or isinstance(linear.weight, QuantisedTensor)):
        return nn.functional.linear(x, linear.weight, linear.bias)
    y: Tensor = _FrozenLinearFunction.apply(x, linear)
    return y


class _FrozenLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: AdaptedLinear) -> Tensor:
        ctx.linear = linear
        return linear(x.reshape(-1, x.shape[-1]).contiguous())[0].view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        flat = grad_y.reshape(-1, grad_y.shape[-1]).contiguous()
        grad_x = matmul.linear_input_gradient(flat, ctx.linear.c_linear)
        return grad_x.view(*grad_y.shape[:-1], -1), None


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in fp32. Shapes: (tokens, width), (tokens, columns)."""
    # a, the narrower one, has to be the first operand: the product is faster
    if a.is_cuda:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return (a.T @ b).float()


def _dropout(x: Tensor, p: float, seed: int, add_to: Tensor | None = None) -> Tensor:
    """Dropout that a seed reproduces, added to `add_to` if given. Shape: any."""
    if not p:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    # 16 random bits an element, four from a draw: three times as fast as a Bernoulli draw an element
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
    dropped = (bits >= round(p * 2**16) - 2**15) * x * (1 / (1 - p))
    return dropped if add_to is None else add_to.add_(dropped)
