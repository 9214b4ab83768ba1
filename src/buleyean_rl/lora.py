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
        base = self.get_base_layer()
        return _LoraLinear.apply(
            x,
            self.lora_dropout[name](x),
            base.weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
    ) -> Tensor:
        flat, flat_dropped = x.reshape(-1, x.shape[-1]), dropped.reshape(-1, x.shape[-1])
        a, b = lora_a.to(x.dtype), (lora_b * scaling).to(x.dtype)
        low = flat_dropped @ a.T
        y = nn.functional.linear(flat, weight, bias).addmm_(low, b.T)
        ctx.save_for_backward(flat_dropped, low, weight, a, b)
        ctx.scaling, ctx.shared, ctx.shape = scaling, dropped is x, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        dropped, low, weight, a, b = ctx.saved_tensors
        grad_y = grad_y.reshape(-1, grad_y.shape[-1])
        grad_low = grad_y @ b
        grad_a = (grad_low.T @ dropped).float()
        grad_b = (grad_y.T @ low).float() * ctx.scaling
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ weight
            if ctx.shared:
                grad_x.addmm_(grad_low, a)
            grad_x = grad_x.view(ctx.shape)
        if not ctx.shared and ctx.needs_input_grad[1]:
            grad_dropped = (grad_low @ a).view(ctx.shape)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None
