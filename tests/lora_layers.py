"""Our LoRA layer and PEFT's on one base layer, with dropout that draws the same masks in both."""

from __future__ import annotations

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from buleyean_rl.models.dropout import seeded_dropout
from buleyean_rl.models.lora import LoraLinear


class SeededDropout(nn.Module):
    """Our dropout as a module, for PEFT's layers: the same seeds draw the same masks in both, one mask an input.

    Args:
        p: share that is dropped.
        dtype: that our layer computes in, on which the masks depend.
    """

    last: tuple[Tensor, int] | None = None

    def __init__(self, p: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.p, self.dtype = p, dtype

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if SeededDropout.last is None or SeededDropout.last[0] is not x:
            SeededDropout.last = x, int(torch.randint(2**32, ()))
        return x * seeded_dropout(torch.ones_like(x, dtype=self.dtype), self.p, SeededDropout.last[1])


def pair(
    bias: bool = True,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    inputs: int = 7,
    outputs: int = 5,
    masks: torch.dtype = torch.float32,
) -> tuple[LoraLinear, PeftLinear]:
    """Our layer and PEFT's, on one base layer, with one adapter."""
    torch.manual_seed(0)
    base = nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout)
    ours, theirs = (
        layer(base, adapter_name="default", r=3, lora_alpha=6, config=config) for layer in (LoraLinear, PeftLinear)
    )
    if dropout:
        theirs.lora_dropout["default"] = SeededDropout(dropout, masks)
    for a, b in ((ours.lora_A, theirs.lora_A), (ours.lora_B, theirs.lora_B)):
        weight = torch.randn(a["default"].weight.shape)  # fp32, as get_peft_model keeps it
        for module in (a, b):
            module["default"].weight.data = weight.clone()
    return ours, theirs
