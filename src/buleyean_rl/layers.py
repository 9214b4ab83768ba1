"""What a decoder layer does between its matrix products, in one sweep over its tensors instead of several.

    RMSNorm     y = w x / rms(x)            keeps x and 1 / rms(x) for the backward pass
    SwiGLU      y = silu(gate) * up         keeps gate and up, side by side as one product makes them
    rotation    y = x cos + (-x2, x1) sin   keeps cos and sin; of queries and keys, by their positions

In bf16 and fp32 on a CPU, where the sweeps are what is left of the time, in C. Elsewhere in few operations of torch's:
a GPU waits for their launch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from buleyean_rl import kernels
from buleyean_rl.lora import can_be_made_again, side_by_side

ROTATION = "apply_rotary_pos_emb"  # what transformers' attention layers call it


def fuse_layers(model: nn.Module) -> None:
    """Let the norms, SwiGLUs and rotations of a model compute this way, wherever that gives what they gave before.

    Args:
        model: changed in place; its weights, its names and what it saves stay as they are.
    """
    for module in model.modules():
        if "forward" in vars(module):
            continue  # done before
        if type(module).__name__.endswith("RMSNorm"):
            _try(module, _norm_forward(module))
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            _try(module, _mlp_forward(module))
        elif ROTATION in _names(inspect.unwrap(type(module).forward)):
            _try_rotation(module)


def _norm_forward(norm: Any) -> Callable[[Tensor], Tensor]:
    own, epsilon = norm.forward, getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6))

    def in_torch(x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, weight.shape, weight, epsilon)

    def forward(x: Tensor) -> Tensor:
        if kernels.available(x, norm.weight):
            y = _RmsNorm.apply(x, norm.weight, epsilon)
            return can_be_made_again(y, lambda x, weight: kernels.rms_norm(x, weight, epsilon)[0], x, norm.weight)
        if x.dtype == norm.weight.dtype:
            return can_be_made_again(in_torch(x, norm.weight), in_torch, x, norm.weight)
        plain: Tensor = own(x)
        return plain

    return forward


def _mlp_forward(mlp: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        gate_up = side_by_side((mlp.gate_proj, mlp.up_proj), x)
        y = can_be_made_again(_Swiglu.apply(gate_up), _swiglu, gate_up)
        projected: Tensor = mlp.down_proj(y)
        return projected

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


def _names(function: Any) -> set[str]:
    """Names of its module that a function uses."""
    code = getattr(function, "__code__", None)
    return set(code.co_names) & set(function.__globals__) if code else set()


def _try_rotation(attention: Any) -> None:
    """Let an attention layer's own code use our rotation, if it computes the same as the one it names."""
    code = inspect.unwrap(type(attention).forward)  # of what decorates it, as deprecations do
    own = code.__globals__[ROTATION]

    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **more: Any) -> tuple[Tensor, Tensor]:
        fits = q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] == k.shape[-1]
        fits = fits and q.shape[2] > 1  # of single tokens of many rows, each would be a call
        fits = fits and q.dtype == k.dtype == cos.dtype
        if others or more or not fits:
            plain: tuple[Tensor, Tensor] = own(q, k, cos, sin, *others, **more)
            return plain
        return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)

    q, k = torch.linspace(-3, 3, 2 * 2 * 3 * 8, dtype=torch.bfloat16).view(2, 1, 2, 3, 8)
    cos, sin = torch.linspace(-1, 1, 2 * 3 * 8, dtype=torch.bfloat16).view(2, 1, 3, 8)
    try:
        pairs = zip(rotation(q, k, cos, sin), own(q, k, cos, sin), strict=True)
        alike = all((got - expected).float().norm() <= 0.01 * expected.float().norm() for got, expected in pairs)
    except (TypeError, ValueError, RuntimeError):
        return  # another signature: the layer keeps its own
    if alike:
        names = {**code.__globals__, ROTATION: rotation}
        copy = FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
        copy.__kwdefaults__ = code.__kwdefaults__
        attention.forward = MethodType(copy, attention)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Shapes: (rows, heads, tokens, width), (rows or 1, tokens, width) twice; as the first, heads together."""
        cos, sin = (table.expand(len(x), -1, -1).contiguous() for table in (cos, sin))
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, x.new_empty(x.shape))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # laid out as the projection before it wants it, token after token
        grad_x = grad_y.new_empty(grad_y.transpose(1, 2).shape).transpose(1, 2)
        return _rotated(grad_y, cos, sin, grad_x, backward=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, backward: bool = False) -> Tensor:
    if not kernels.available(x, cos, sin):
        return _rotated_in_torch(x, cos.unsqueeze(1), sin.unsqueeze(1), y, backward)
    for row in zip(x if x.stride(-1) == 1 else x.contiguous(), cos, sin, y, strict=True):
        kernels.rotate(*row, backward)
    return y


def _rotated_in_torch(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, backward: bool) -> Tensor:
    """Backward is the transpose of forward: the sines change sign and place."""
    (x1, x2), (y1, y2), (sin1, sin2) = (each.chunk(2, -1) for each in (x, y, sin))
    torch.mul(x, cos, out=y)
    y1.addcmul_(x2, sin2 if backward else sin1, value=1 if backward else -1)
    y2.addcmul_(x1, sin1 if backward else sin2, value=-1 if backward else 1)
    return y


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
        return kernels.rms_norm_backward(grad_y.contiguous(), x, weight, inverse), None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """Shape: (..., 2 * width) to (..., width)."""
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if kernels.available(gate_up):
            return kernels.swiglu_backward(grad_y.contiguous(), gate_up)
        grad = torch.empty_like(gate_up)
        (gate, up), (grad_gate, grad_up) = gate_up.chunk(2, -1), grad.chunk(2, -1)
        torch.mul(nn.functional.silu(gate), grad_y, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_y * up, gate, grad_input=grad_gate)
        return grad


def _swiglu(gate_up: Tensor) -> Tensor:
    if kernels.available(gate_up):
        return kernels.swiglu(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return nn.functional.silu(gate).mul_(up)
