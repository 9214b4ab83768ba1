"""A LoRA linear layer that computes in its base layer's precision, as one node of the autograd graph.

    y = W x + bias + scaling B A dropout(x)

Only A and B learn; they are kept in fp32 and cast to the base layer's type for the products, so a bf16
model stays bf16 throughout. The low-rank part is added inside the matrix product, not beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from buleyean_rl import kernels


def lora_config(rank: int, alpha: int, dropout: float, target_modules: list[str] | None) -> LoraConfig:
    """A PEFT configuration whose linear layers are `LoraLinear`.

    Args:
        rank: of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: on the input of A.
        target_modules: names of the adapted layers; None for every linear layer but the output head.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules or "all-linear",
    )
    config._register_custom_module({nn.Linear: LoraLinear})
    return config


class LoraLinear(PeftLinear):
    """PEFT's LoRA linear layer with the forward pass of this module."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer. Shape: (..., inputs) to (..., outputs)."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or args or kwargs:
            return super().forward(x, *args, **kwargs)
        (name,) = names
        base, dropout = self.get_base_layer(), self.lora_dropout[name]
        p = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        seed = int(torch.randint(2**32, ())) if p else 0
        return _LoraLinear.apply(
            x,
            base.weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            p,
            seed,
        )


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        p: float,
        seed: int,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a, b = lora_a.to(x.dtype), (lora_b * scaling).to(x.dtype)
        low = _dropout(flat, p, seed) @ a.T
        y = nn.functional.linear(flat, weight, bias).addmm_(low, b.T)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scaling, ctx.dropout, ctx.shape = scaling, (p, seed), x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, weight, a, b = ctx.saved_tensors
        p, seed = ctx.dropout
        grad_y = grad_y.reshape(-1, grad_y.shape[-1])
        grad_low = grad_y @ b
        grad_a = (grad_low.T @ _dropout(flat, p, seed)).float()  # cheaper made again than kept
        grad_b = (low.T @ grad_y).T.float() * ctx.scaling  # the narrow operand first: faster by a third
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ weight
            if p:
                _dropout(grad_low @ a, p, seed, grad_x)
            else:
                grad_x.addmm_(grad_low, a)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None, None


def _dropout(x: Tensor, p: float, seed: int, add_to: Tensor | None = None) -> Tensor:
    """Dropout that a seed makes the same again, added to `add_to` if given. Shape: any."""
    if not p:
        return x
    if kernels.available(x):
        return kernels.dropout(x, p, seed, add_to)
    generator = torch.Generator(x.device).manual_seed(seed)
    dropped = torch.empty_like(x).bernoulli_(1 - p, generator=generator).mul_(x).div_(1 - p)
    return dropped if add_to is None else add_to.add_(dropped)
