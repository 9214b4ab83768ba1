"""RMSNorm and SwiGLU in one sweep over their tensors instead of several.

    RMSNorm     y = w x / rms(x)            saves x for the backward pass
    SwiGLU      y = silu(gate) * up         saves gate and up, side by side as one product makes them

In C in bf16 on a CPU; a norm elsewhere in one operation of torch's; otherwise the module's own code runs. And where
torch's products in bf16 are slow, linear layers without an adapter and padded attention go by other ways, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from buleyean_rl.kernels import abi, elementwise, matmul
from buleyean_rl.kernels.precision import bf16_is_emulated
from buleyean_rl.kernels.quantised import QuantisedTensor
from buleyean_rl.models.adapted_linear import AdaptedLinear, frozen_linear
from buleyean_rl.models.lora import concatenated_outputs
from buleyean_rl.models.packed_attention import PADDED
from buleyean_rl.models.private_interfaces import attention_implementation, set_attention_implementation

MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")


def fuse_layers(model: nn.Module) -> None:
    """Replace the `forward` of a model's norms and MLPs, wherever the replacement computes the same.

    Args:
        model: changed in place; its weights, its names and what it saves stay as they are.
    """
    config: Any = getattr(model, "config", None)
    module: Any
    if attention_implementation(config) == "sdpa" and bf16_is_emulated(next(model.parameters())):
        set_attention_implementation(config, PADDED)
    for module in model.modules():
        if "forward" in vars(module):
            continue  # done before
        if type(module).__name__.endswith("RMSNorm"):
            _replace_forward(module, _norm_forward(module), module.weight)
        elif all(hasattr(module, name) for name in MLP) and _has_kernel(module.gate_proj.weight):
            _replace_forward(module, _mlp_forward(module), module.gate_proj.weight)
        elif type(module) is nn.Linear and _is_slow_in_torch(module.weight):
            _replace_forward(module, _linear_forward(module), module.weight)


def _has_kernel(gate: Tensor) -> bool:
    """Whether SwiGLU is in C for this gate. Shape: (width, inputs)."""
    return abi.available(gate) and not len(gate) % abi.BLOCK


def _is_slow_in_torch(weight: Tensor) -> bool:
    return bf16_is_emulated(weight) or isinstance(weight, QuantisedTensor)


def epsilon_of(norm: Any) -> float:
    """What an RMSNorm adds to the mean square."""
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))


def _replace_forward(module: Any, forward: Callable[[Tensor], Tensor], weight: Tensor) -> None:
    """Give a module another forward pass if it computes the same as its own."""
    width = weight.shape[-1]
    x = torch.linspace(-3, 3, 2 * width, dtype=weight.dtype, device=weight.device).view(1, 2, width)
    with torch.no_grad():
        expected, replaced = module(x).float(), forward(x).float()
    if (replaced - expected).norm() <= 0.01 * expected.norm():
        module.forward = forward


def _norm_forward(norm: Any) -> Callable[[Tensor], Tensor]:
    own_forward, epsilon = norm.forward, epsilon_of(norm)

    def forward(x: Tensor) -> Tensor:
        if abi.available(x, norm.weight):
            y: Tensor = _RmsNormFunction.apply(x, norm.weight, epsilon)
        elif x.dtype == norm.weight.dtype:
            y = nn.functional.rms_norm(x, norm.weight.shape, norm.weight, epsilon)
        else:
            y = own_forward(x)
        return y

    return forward


def _mlp_forward(mlp: Any) -> Callable[[Tensor], Tensor]:
    own_forward = mlp.forward

    def forward(x: Tensor) -> Tensor:
        if not abi.available(x):  # the model was cast or moved since
            return own_forward(x)
        gate_up = concatenated_outputs((mlp.gate_proj, mlp.up_proj), x)
        y: Tensor = mlp.down_proj(_SwigluFunction.apply(gate_up))
        return y

    return forward


def _linear_forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    own_forward = linear.forward

    def forward(x: Tensor) -> Tensor:
        weight = linear.weight
        if not (_is_slow_in_torch(weight) and matmul.gemm_available(weight, weight.T)):
            return own_forward(x)
        return frozen_linear(
            x, AdaptedLinear(weight, linear.bias, None, (), matmul.make_linear(weight, bias=linear.bias))
        )

    return forward


class _RmsNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return elementwise.rms_norm(x, weight, epsilon)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return elementwise.rms_norm_backward(grad_y.contiguous(), x, weight, ctx.epsilon), None, None


class _SwigluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return elementwise.swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return elementwise.swiglu_backward(grad_y.contiguous(), gate_up)
