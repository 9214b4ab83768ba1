"""A decoder layer as one node of the autograd graph.

    x --norm, queries+keys+values, rotation, attention, output--> + x --norm, gate+up, SwiGLU, down--> + --> y

What a chain of modules computes, by the same functions, without the modules between them, for layers of the form that
Llama's have. It keeps x, the sum in the middle, what attention has and gate and up; what norms and SwiGLU give to a
product is made again in the backward pass. Where a layer, or a call of it, is of another form, its own code runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from buleyean_rl import kernels
from buleyean_rl.attention import PACKED, Row, packed_attention, row_in_use
from buleyean_rl.kernels.layer import Kept, Layer
from buleyean_rl.layers import epsilon_of, rms_norm, rms_norm_again, rotate, swiglu, swiglu_backward
from buleyean_rl.lora import AdaptedLinear, LoraLinear

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
UNKNOWN = ("attention_mask", "cache", "past_key_values")  # to `DecoderLayer`
PROBE = 32  # tokens
LISTENER = "buleyean_listener"


def fuse_decoder_layers(model: nn.Module) -> None:
    """Let a model's decoder layers be one node each, wherever that gives what they gave before.

    Args:
        model: a PEFT model whose LoRA layers are grouped; changed in place.
    """
    for layer in model.modules():
        if {name for name, _ in layer.named_children()} == PARTS and _is_adapted(layer):
            _try(layer)


def _is_adapted(layer: Any) -> bool:
    """Whether every linear layer of a decoder layer, and nothing beside them, is in a group of ours."""
    for part, names in ((layer.self_attn, ATTENTION), (layer.mlp, MLP)):
        adapted = {name for name, module in part.named_children() if isinstance(module, LoraLinear)}
        others = {name for name, _ in part.named_children()} - adapted - {"act_fn"}
        if adapted != set(names) or others:
            return False
    return True


def _try(layer: Any) -> None:
    """Give a layer another forward pass if it computes the same as its own."""
    own = layer.forward
    try:
        x, cos, sin = _probe(layer)
        with torch.no_grad(), _asked(layer.self_attn) as asked:
            expected = own(x, position_embeddings=(cos, sin)).float()
        node = DecoderLayer(layer, asked["scaling"], asked.get("sliding_window"))
        with torch.no_grad():
            got = node(x, cos, sin).float()
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        return  # of another form

    def forward(x: Tensor, *args: Any, position_embeddings: Any = None, **others: Any) -> Any:
        plain = position_embeddings is None or args or any(others.get(name) is not None for name in UNKNOWN)
        if plain or not node.knows(x):
            return own(x, *args, position_embeddings=position_embeddings, **others)
        if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():  # which is in `own` otherwise
            return layer._gradient_checkpointing_func(node, x, *position_embeddings)
        return node(x, *position_embeddings)

    rounding = torch.finfo(x.dtype).eps * expected.norm()
    if (got - expected).norm() <= 0.02 * (expected - x).norm() + rounding:
        layer.forward = forward


def _probe(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """An input of a layer, and cosines and sines of its rotation."""
    weight, width = layer.input_layernorm.weight, layer.self_attn.head_dim
    x = torch.linspace(-3, 3, PROBE * len(weight)).cos().to(weight).view(1, PROBE, -1)
    angles = torch.linspace(0, 9, PROBE * width // 2).view(1, PROBE, -1).repeat(1, 1, 2)
    return x, angles.cos().to(x), angles.sin().to(x)


@contextmanager
def _asked(attention: Any) -> Iterator[dict[str, Any]]:
    """What a layer asks of `packed_attention`, which it is given within."""
    asked: dict[str, Any] = {}

    def listen(*args: Any, **settings: Any) -> tuple[Tensor, None]:
        asked.update(settings)
        return packed_attention(*args, **settings)

    before, attention.config._attn_implementation = attention.config._attn_implementation, LISTENER
    AttentionInterface.register(LISTENER, listen)
    try:
        yield asked
    finally:
        attention.config._attn_implementation = before


class DecoderLayer:
    """The weights of a layer of Llama's form, and how it computes with them.

    Args:
        layer: of transformers, its linear layers LoRA layers in groups.
        scale: factor on the scores of its attention.
        sliding_window: see `attention.packed_attention`.
    """

    def __init__(self, layer: Any, scale: float, sliding_window: int | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention, self.scale, self.sliding_window = attention, scale, sliding_window
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.epsilons = [epsilon_of(norm) for norm in self.norms]
        self.groups = [
            linear.its_group() for linear in (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj)
        ]
        self.head_width = attention.head_dim
        self.heads, self.key_heads = (
            linear.get_base_layer().weight.shape[0] // self.head_width
            for linear in (attention.q_proj, attention.k_proj)
        )

    def heads_of(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in what makes them at once. Shapes: (tokens, outputs); (1, heads, tokens, width)."""
        heads = projected.view(1, len(projected), -1, self.head_width).transpose(1, 2)
        query, key, value = heads.split((self.heads, self.key_heads, self.key_heads), 1)
        return query, key, value

    def knows(self, x: Tensor) -> bool:
        """Whether it can be computed this way just now: it is one packed row, and all adapters are on, or all off."""
        if len(x) > 1 or self.attention.config._attn_implementation != PACKED:
            return False
        state, *others = [group.state() for group in self.groups]
        return state is not None and all(other == state for other in others)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply the layer. Shapes: (1, tokens, width), (1, tokens, head width) twice; as the first."""
        linears, cos, sin = [group.as_it_is(x) for group in self.groups], cos.contiguous(), sin.contiguous()
        row = row_in_use(x.shape[1], self.scale, self.sliding_window)
        found = self._in_one_call(x, linears, row, cos, sin) or _Pass(self, linears, row, cos, sin)
        if torch.is_grad_enabled() and linears[0].adapter is not None:
            parameters = [parameter for linear in linears for parameter in linear.parameters]
            y: Tensor = _Node.apply(x, found, *parameters)
            return y
        return found(x[0].contiguous())[0].unsqueeze(0)

    def _in_one_call(
        self, x: Tensor, linears: list[AdaptedLinear], row: Row, cos: Tensor, sin: Tensor
    ) -> _OneCall | None:
        """A pass that is one call in C, where all its parts are there."""
        stretches = row.in_tiles(x, x.shape[1], self.head_width)
        tiled = [linear.tiled for linear in linears if linear.tiled is not None and linear.bias is None]
        norms = [norm.weight for norm in self.norms]
        if stretches is None or len(tiled) < len(linears) or not kernels.available(x, cos, sin, *norms):
            return None
        layer = Layer(tiled, norms, self.epsilons, (self.heads, self.key_heads), self.scale, cos[0], sin[0], stretches)
        return _OneCall(layer, linears)


class _Pass(NamedTuple):
    """A layer with the weights and adapters of one pass. All its tensors are of (tokens, some width)."""

    layer: DecoderLayer
    linears: list[AdaptedLinear]
    row: Row
    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> tuple[Tensor, Kept]:
        """The layer's result, and what `back` needs."""
        layer, (qkv, output, gate_up, down) = self.layer, self.linears
        projected, low_qkv = qkv(rms_norm(x, *self._norm(0)))
        self._rotate(projected)
        attended, lse = self.row.attend(*layer.heads_of(projected))
        attended = attended.view(len(x), -1)
        middle, low_output = output(attended, added=x)
        gates, low_gate_up = gate_up(rms_norm(middle, *self._norm(1)))
        y, low_down = down(swiglu(gates), added=middle)
        lows = low_qkv, low_output, low_gate_up, low_down
        return y, Kept(projected, attended, middle, gates, lse, lows)

    def back(self, gradient: Tensor, x: Tensor, kept: Kept, of_x: bool) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients in x, if it is wanted, and in the parameters, from that in the result."""
        layer, (qkv, output, gate_up, down) = self.layer, self.linears
        low_qkv, low_output, low_gate_up, low_down = kept.lows
        grad, of_down = down.back(gradient, swiglu(kept.gate_up), low_down)
        grad = swiglu_backward(grad, kept.gate_up)
        normed, norm_back = rms_norm_again(kept.middle, *self._norm(1))
        grad, of_gate_up = gate_up.back(grad, normed, low_gate_up)
        of_middle = norm_back(grad, gradient)
        grad, of_output = output.back(of_middle, kept.attended, low_output)
        of_projected = torch.empty_like(kept.projected)
        of_attended, attended = (each.view(1, len(grad), layer.heads, -1) for each in (grad, kept.attended))
        inputs, of_inputs = layer.heads_of(kept.projected), layer.heads_of(of_projected)
        self.row.back(of_attended, inputs, attended, kept.lse, of_inputs)
        self._rotate(of_projected, backward=True)
        normed, norm_back = rms_norm_again(x, *self._norm(0))
        of_normed, of_qkv = qkv.back(of_projected, normed, low_qkv, of_x)
        of_parameters = [*of_qkv, *of_output, *of_gate_up, *of_down]
        return None if of_normed is None else norm_back(of_normed, of_middle), of_parameters

    def _norm(self, which: int) -> tuple[Tensor, float]:
        """The weight of a norm, and what is added to its mean square."""
        return self.layer.norms[which].weight, self.layer.epsilons[which]

    def _rotate(self, projected: Tensor, backward: bool = False) -> None:
        """Turn queries and keys where they lie, next to each other, or gradients in them back."""
        turned = projected[:, : -self.layer.key_heads * self.layer.head_width]
        heads = turned.view(1, len(turned), -1, self.layer.head_width).transpose(1, 2)
        rotate(heads, self.cos, self.sin, heads, backward)


class _OneCall(NamedTuple):
    """The same in one call; `linears` are what its gradients are for."""

    layer: Layer
    linears: list[AdaptedLinear]

    def __call__(self, x: Tensor) -> tuple[Tensor, Kept]:
        """See `_Pass`."""
        return self.layer.forward(x)

    def back(self, gradient: Tensor, x: Tensor, kept: Kept, of_x: bool) -> tuple[Tensor | None, list[Tensor]]:
        """See `_Pass.back`."""
        grad_x, grads = self.layer.backward(gradient, x, kept, of_x)
        parts = zip(self.linears, grads, strict=True)
        return grad_x, [part for linear, grad in parts for part in linear.of_parameters(grad)]


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, found: _Pass | _OneCall, *_: Tensor) -> Tensor:
        """Shape: (1, tokens, width), to the same. The parameters are those of the pass."""
        x = x[0].contiguous()
        y, kept = found(x)
        ctx.save_for_backward(x, *kept[:-1], *kept.lows)
        ctx.found = found
        return y.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, projected, attended, middle, gate_up, lse, *lows = ctx.saved_tensors
        kept = Kept(projected, attended, middle, gate_up, lse, tuple(lows))
        grad_x, of_parameters = ctx.found.back(gradient[0].contiguous(), x, kept, ctx.needs_input_grad[0])
        return None if grad_x is None else grad_x.unsqueeze(0), None, *of_parameters
