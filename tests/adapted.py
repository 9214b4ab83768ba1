"""Tiny models with an adapter that has something to say, and what they compute and learn on a packed sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from buleyean_rl.batching.batch import Batch, pack
from buleyean_rl.batching.forward import forward_hidden
from buleyean_rl.data.trie import Boundary, Judgement
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.packed_attention import PACKED
from buleyean_rl.models.segments import segments_in_use
from buleyean_rl.models.views import backbone, plain_model
from tiny import tiny_llama, tiny_qwen2, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def two_records(vocabulary: int) -> list[Boundary]:
    """The first has three branches: two from the end of its prompt, one from within the first branch."""
    first = vocabulary // 2
    tokens = [(first + i) % vocabulary for i in range(38)]
    return [
        Boundary(tokens[:8], tokens[8:26], [0, 6, 12], [0, 0, 3], [Judgement(0, tokens[8], 1, 1, 1)]),
        Boundary(tokens[26:32], tokens[32:], [0], [0], [Judgement(0, tokens[32], 1, 1, 1)]),
    ]


SEQUENCE = pack([*two_records(len(TOKENIZER)), *two_records(len(TOKENIZER) - 40)])  # 128 tokens


def wide_heads(tokenizer: Any) -> Any:
    """A Llama whose heads are as wide as the kernels take."""
    return tiny_llama(tokenizer, head_dim=32)


def biased(tokenizer: Any) -> Any:
    """The same with biases of queries, keys and values."""
    return tiny_qwen2(tokenizer, head_dim=32)


def biased_outputs(tokenizer: Any) -> Any:
    """The same with a bias of attention's output too, which the decoder's one call adds none to."""
    return tiny_llama(tokenizer, head_dim=32, attention_bias=True)


def stir(model: Any) -> Any:
    """Give a fresh adapter something to say."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def adapted(make: Callable[[], Any], dropout: float = 0.0, targets: list[str] | None = None) -> Any:
    """A model with a fresh adapter."""
    torch.manual_seed(0)
    return attach_lora(make(), lora_config(4, 8, dropout, targets))


def packed_model(
    make: Callable[[Any], Any] = wide_heads, dropout: float = 0.0, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """A model with an adapter, for packed sequences, in training."""
    torch.manual_seed(0)
    model = stir(attach_lora(make(TOKENIZER).to(dtype), lora_config(4, 6, dropout, None)))
    plain_model(model).set_attn_implementation(PACKED)
    return model.train()


def outcome(model: Any, sequence: Batch = SEQUENCE) -> list[Tensor]:
    """Hidden states, and gradients in all that is trained."""
    model.zero_grad()
    torch.manual_seed(1)
    with segments_in_use(sequence.segments):  # in the backward pass too, as the trainer does
        hidden = forward_hidden(backbone(model), sequence).double()
        (hidden * torch.linspace(-1, 2, hidden.numel()).view_as(hidden)).sum().backward()
    return [hidden.detach(), *(p.grad.double() for p in model.parameters() if p.grad is not None)]
