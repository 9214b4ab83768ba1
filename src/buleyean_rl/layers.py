"""What a decoder layer does between its matrix products, in one sweep over its tensors instead of several.

    RMSNorm     y = w x / rms(x)            keeps x and 1 / rms(x) for the backward pass
    SwiGLU      y = silu(gate) * up         keeps gate and up

In bf16 on a CPU only, where the sweeps are what is left of the time; elsewhere the model's own code runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from buleyean_rl import kernels


def fuse_layers(model: nn.Module) -> None:
    """Let the RMSNorms and SwiGLUs of a model compute this way, wherever that gives what they gave before.

    Args:
        model: changed in place; its weights, its names and what it saves stay as they are.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            _try(module, _norm_forward(module))
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            _try(module, _mlp_forward(module))


def _norm_forward(norm: Any) -> Callable[[Tensor], Tensor]:
    own, epsilon = norm.forward, getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6))

    def forward(x: Tensor) -> Tensor:
        if kernels.available(x, norm.weight):
            normalised: Tensor = _RmsNorm.apply(x, norm.weight, epsilon)
            return normalised
        plain: Tensor = own(x)
        return plain

    return forward


def _mlp_forward(mlp: Any) -> Callable[[Tensor], Tensor]:
    own = mlp.forward

    def forward(x: Tensor) -> Tensor:
        if kernels.available(x):
            projected: Tensor = mlp.down_proj(_Swiglu.apply(mlp.gate_proj(x), mlp.up_proj(x)))
            return projected
        plain: Tensor = own(x)
        return plain

    return forward


def _try(module: Any, forward: Callable[[Tensor], Tensor]) -> None:
    """Give a module another forward pass if it computes the same as its own."""
    linear = getattr(module, "gate_proj", None)
    width = len(module.weight) if linear is None else linear.weight.shape[1]
    like = module.weight if linear is None else linear.weight
    x = torch.linspace(-3, 3, 2 * width, dtype=like.dtype, device=like.device).view(1, 2, width)
    with torch.no_grad():
        expected, got = module(x).float(), forward(x).float()
    if (got - expected).norm() <= 0.01 * expected.norm():
        module.forward = forward


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        y, inverse = kernels.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        gradient = grad_y.clone(memory_format=torch.contiguous_format)
        kernels.rms_norm_backward(gradient, x, weight, inverse)
        return gradient, None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return kernels.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gradient = grad_y.clone(memory_format=torch.contiguous_format)
        return kernels.swiglu_backward(gradient, gate, up), gradient
