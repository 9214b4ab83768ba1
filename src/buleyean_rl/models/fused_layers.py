"""What a decoder layer does between its matrix products, in one sweep over its tensors instead of several.

    RMSNorm     y = w x / rms(x)            keeps x for the backward pass
    SwiGLU      y = silu(gate) * up         keeps gate and up, side by side as one product makes them
    rotation    y = x cos + (-x2, x1) sin   keeps cos and sin; of queries and keys, by their positions

And the linear layers that have no adapter, and attention, in bf16 on a CPU on which torch is slow in it.

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

from buleyean_rl.kernels import abi, elementwise, matmul
from buleyean_rl.kernels.precision import bf16_is_emulated
from buleyean_rl.models.adapted_linear import AdaptedLinear, frozen_linear
from buleyean_rl.models.lora import side_by_side
from buleyean_rl.models.packed_attention import PADDED

ROTATION = "apply_rotary_pos_emb"  # what transformers' attention layers call it


def fuse_layers(model: nn.Module) -> None:
    """Let the norms, SwiGLUs and rotations of a model compute this way, wherever that gives what they gave before.

    Args:
        model: changed in place; its weights, its names and what it saves stay as they are.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) == "sdpa" and bf16_is_emulated(next(model.parameters())):
        config._attn_implementation = PADDED
    for module in model.modules():
        if "forward" in vars(module):
            continue  # done before
        if type(module).__name__.endswith("RMSNorm"):
            _try(module, _norm_forward(module))
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            _try(module, _mlp_forward(module))
        elif ROTATION in _names(inspect.unwrap(type(module).forward)):
            _try_rotation(module)
        elif type(module) is nn.Linear and bf16_is_emulated(module.weight):
            _try(module, _linear_forward(module))


def _norm_forward(norm: Any) -> Callable[[Tensor], Tensor]:
    own, epsilon = norm.forward, epsilon_of(norm)

    def forward(x: Tensor) -> Tensor:
        if abi.available(x, norm.weight):
            y: Tensor = _RmsNorm.apply(x, norm.weight, epsilon)
        elif x.dtype == norm.weight.dtype:
            y = nn.functional.rms_norm(x, norm.weight.shape, norm.weight, epsilon)
        else:
            y = own(x)
        return y

    return forward


def epsilon_of(norm: Any) -> float:
    """What an RMSNorm adds to the mean square."""
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * x / rms(x), outside autograd's graph.

    Args:
        x: contiguous. Shape: (..., width).
        weight: Shape: (width,).
        epsilon: added to the mean square.
    """
    if abi.available(x, weight):
        return elementwise.rms_norm(x, weight, epsilon)
    return nn.functional.rms_norm(x, weight.shape, weight, epsilon)


def rms_norm_again(
    x: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Callable[[Tensor, Tensor | None], Tensor]]:
    """The same in a backward pass, and what makes the gradient in `x` from that in it, and adds something to it."""
    if abi.available(x, weight):
        y = elementwise.rms_norm(x, weight, epsilon)
        return y, lambda gradient, added: elementwise.rms_norm_backward(gradient, x, weight, epsilon, added)
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        output = nn.functional.rms_norm(leaf, weight.shape, weight, epsilon)

    def back(gradient: Tensor, added: Tensor | None) -> Tensor:
        (grad,) = torch.autograd.grad(output, leaf, gradient)
        return grad if added is None else grad.add_(added)

    return output.detach(), back


def _mlp_forward(mlp: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        projected: Tensor = mlp.down_proj(_Swiglu.apply(side_by_side((mlp.gate_proj, mlp.up_proj), x)))
        return projected

    return forward


def _linear_forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    own = linear.forward

    def forward(x: Tensor) -> Tensor:
        weight = linear.weight
        if not (bf16_is_emulated(weight) and matmul.multiplies(weight, weight.T)):
            return own(x)
        return frozen_linear(x, AdaptedLinear(weight, linear.bias, None, (), matmul.linear_of(weight)))

    return forward


def _try(module: Any, forward: Callable[[Tensor], Tensor]) -> None:
    """Give a module another forward pass if it computes the same as its own."""
    linear = getattr(module, "gate_proj", None)
    like = module.weight if linear is None else linear.weight
    width = like.shape[-1]
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
        return rotate(x, cos, sin, x.new_empty(x.shape))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        # laid out as the projection before it wants it, token after token
        grad_x = grad_y.new_empty(grad_y.transpose(1, 2).shape).transpose(1, 2)
        cos, sin = ctx.saved_tensors
        return rotate(grad_y, cos, sin, grad_x, backward=True), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, backward: bool = False) -> Tensor:
    """Rotary embedding, outside autograd's graph.

    Args:
        x: Shape: (rows, heads, tokens, width).
        cos: contiguous. Shape: (rows, tokens, width).
        sin: contiguous. Shape: (rows, tokens, width).
        y: filled with the result; it may be `x`. Shape as `x`.
        backward: whether `x` is the gradient in the result, and `y` that in what was rotated.

    Returns:
        `y`.
    """
    if abi.available(x, cos, sin):
        for row in zip(x if x.stride(-1) == 1 else x.contiguous(), cos, sin, y, strict=True):
            elementwise.rotate(*row, backward)
        return y
    (x1, x2), (sin1, sin2) = x.chunk(2, -1), sin.unsqueeze(1).chunk(2, -1)
    if backward:  # the transpose: the sines change sign and place
        sin1, sin2 = -sin2, -sin1
    rotated = x * cos.unsqueeze(1)
    first, second = rotated.chunk(2, -1)
    first.addcmul_(x2, sin1, value=-1)
    second.addcmul_(x1, sin2)
    return y.copy_(rotated)


class _RmsNorm(torch.autograd.Function):
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


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(grad_y.contiguous(), gate_up)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, outside autograd's graph. Shape: (..., 2 * width), contiguous, to (..., width)."""
    if abi.available(gate_up):
        return elementwise.swiglu(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return nn.functional.silu(gate).mul_(up)


def swiglu_backward(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient in `gate_up` from that in the result of `swiglu`. Shapes as there, contiguous."""
    if abi.available(gate_up):
        return elementwise.swiglu_backward(gradient, gate_up)
    grad = torch.empty_like(gate_up)
    (gate, up), (grad_gate, grad_up) = gate_up.chunk(2, -1), grad.chunk(2, -1)
    torch.mul(nn.functional.silu(gate), gradient, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=grad_gate)
    return grad
