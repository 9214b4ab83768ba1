"""Decoder layers as nodes of the autograd graph: one node each, or all together where they are one call in C.

    x --norm, queries+keys+values, rotation, attention, output--> + x --norm, gate+up, SwiGLU, down--> + --> y

What a chain of modules computes, by the same functions, without the modules between them, for layers of the form that
Llama's have. It keeps x, the sum in the middle, what attention has and gate and up; what norms and SwiGLU give to a
product is made again in the backward pass. Where a layer, or a call of it, is of another form, its own code runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutputWithPast

from buleyean_rl.kernels import abi
from buleyean_rl.kernels.decoder import Kept, Layer, Layers
from buleyean_rl.models.adapted_linear import AdaptedLinear
from buleyean_rl.models.fused_layers import epsilon_of, rms_norm, rms_norm_again, rotate, swiglu, swiglu_backward
from buleyean_rl.models.lora import LinearGroup, LoraLinear
from buleyean_rl.models.packed_attention import PACKED, Row, attending, packed_attention, row_in_use

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
UNKNOWN = ("attention_mask", "cache", "past_key_values")  # to `DecoderLayer`
PROBE = 32  # tokens
LISTENER = "buleyean_listener"


def fuse_decoder(backbone: Any) -> None:
    """Let a decoder's layers be one node each, or where they are one call all together, if that gives what they gave.

    Args:
        backbone: of a PEFT model whose LoRA layers are grouped; changed in place.
    """
    layers = [_fused(module) for module in backbone.modules() if {name for name, _ in module.named_children()} == PARTS]
    known = [layer for layer in layers if layer is not None]
    if known and len(known) == len(layers):
        _try_whole(backbone, known)


def _is_adapted(layer: Any) -> bool:
    """Whether every linear layer of a decoder layer, and nothing beside them, is in a group of ours."""
    for part, names in ((layer.self_attn, ATTENTION), (layer.mlp, MLP)):
        adapted = {name for name, module in part.named_children() if isinstance(module, LoraLinear)}
        others = {name for name, _ in part.named_children()} - adapted - {"act_fn"}
        if adapted != set(names) or others:
            return False
    return True


def _fused(module: Any) -> DecoderLayer | None:
    """Give a layer another forward pass if it computes the same as its own; which one."""
    if not _is_adapted(module):
        return None
    own = module.forward
    try:
        x, cos, sin = _probe(module)
        with torch.no_grad(), _asked(module.self_attn) as asked:
            expected = own(x, position_embeddings=(cos, sin)).float()
        layer = DecoderLayer(module, asked["scaling"], asked.get("sliding_window"))
        with torch.no_grad():
            got = layer(x, cos, sin).float()
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        return None  # of another form

    def forward(x: Tensor, *args: Any, position_embeddings: Any = None, **others: Any) -> Any:
        plain = position_embeddings is None or args or any(others.get(name) is not None for name in UNKNOWN)
        if plain or not layer.knows(x):
            return own(x, *args, position_embeddings=position_embeddings, **others)
        if layer.is_checkpointed:  # which is in `own` otherwise
            return module._gradient_checkpointing_func(layer, x, *position_embeddings)
        return layer(x, *position_embeddings)

    rounding = torch.finfo(x.dtype).eps * expected.norm()
    if (got - expected).norm() > 0.02 * (expected - x).norm() + rounding:
        return None
    module.forward = forward
    return layer


@torch.no_grad()
def _try_whole(backbone: Any, layers: Sequence[DecoderLayer]) -> None:
    """Give a decoder another forward pass, all layers at once, if it computes the same as its own, layer by layer."""
    own = backbone.forward

    def forward(*args: Any, **given: Any) -> Any:
        asked = {name for name, value in given.items() if value is not None and value is not False}
        plain = args or asked != {"input_ids", "position_ids"} or given.get("use_cache") is not False
        if plain or not whole.knows(given["input_ids"]):
            return own(*args, **given)
        return BaseModelOutputWithPast(last_hidden_state=whole(given["input_ids"], given["position_ids"]))

    try:
        whole = Decoder(backbone, layers)
        ids = torch.arange(PROBE, device=whole.embedding.weight.device).unsqueeze(0) % whole.embedding.num_embeddings
        with attending(backbone.config, PACKED):
            expected, got = (each(input_ids=ids, position_ids=2 * ids, use_cache=False)[0] for each in (own, forward))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return  # of another form
    if got.equal(expected):
        backbone.forward = forward


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

    AttentionInterface.register(LISTENER, listen)
    with attending(attention.config, LISTENER):
        yield asked


class DecoderLayer:
    """The weights of a layer of Llama's form, and how it computes with them.

    Args:
        module: of transformers, its linear layers LoRA layers in groups.
        scale: factor on the scores of its attention.
        sliding_window: see `attention.packed_attention`.
    """

    def __init__(self, module: Any, scale: float, sliding_window: int | None) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.module, self.scale, self.sliding_window = module, scale, sliding_window
        self.norms = module.input_layernorm, module.post_attention_layernorm
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
        return _is_packed(x, self.module.self_attn.config) and _are_alike(self.groups)

    @property
    def is_checkpointed(self) -> bool:
        """Whether what it makes is to be made again in the backward pass."""
        return self.module.gradient_checkpointing and self.module.training and torch.is_grad_enabled()

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply the layer. Shapes: (1, tokens, width), (1, tokens, head width) twice; as the first."""
        return _applied([self], x, cos, sin)


class Decoder:
    """All layers of a decoder, what gives the first its input, and the norm after the last.

    Args:
        backbone: of transformers.
        layers: its own.
    """

    def __init__(self, backbone: Any, layers: Sequence[DecoderLayer]) -> None:
        self.embedding, self.rotation, self.norm = backbone.embed_tokens, backbone.rotary_emb, backbone.norm
        self.config, self.layers = backbone.config, layers
        self.groups = [group for layer in layers for group in layer.groups]

    def knows(self, ids: Tensor) -> bool:
        """As `DecoderLayer.knows`; and nothing is to happen between its layers."""
        apart = any(layer.is_checkpointed or layer.module._forward_hooks for layer in self.layers)
        return not apart and _is_packed(ids, self.config) and _are_alike(self.groups)

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The last hidden states. Shapes: (1, tokens) twice, to (1, tokens, width)."""
        x: Tensor = self.embedding(ids)
        normed: Tensor = self.norm(_applied(self.layers, x, *self.rotation(x, position_ids=positions)))
        return normed


def _is_packed(row: Tensor, config: Any) -> bool:
    return len(row) == 1 and config._attn_implementation == PACKED


def _are_alike(groups: Sequence[LinearGroup]) -> bool:
    """Whether all adapters are on, or all off."""
    states = {group.state() for group in groups}
    return len(states) == 1 and None not in states


def _applied(layers: Sequence[DecoderLayer], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Layers one after the other. Shapes: (1, tokens, width), (1, tokens, head width) twice; as the first."""
    passes = [_Pass.of(layer, x, cos.contiguous(), sin.contiguous()) for layer in layers]
    together = _OneCall.of(passes, x)
    for found in passes if together is None else [together]:  # apart, each gives back its memory when it is done
        if torch.is_grad_enabled() and found.linears[0].adapter is not None:
            x = _Node.apply(x, found, *(parameter for linear in found.linears for parameter in linear.parameters))
        else:
            x = found(x[0].contiguous(), keep=False)[0].unsqueeze(0)
    return x


class _Pass(NamedTuple):
    """A layer with the weights and adapters of one pass. All its tensors are of (tokens, some width)."""

    layer: DecoderLayer
    linears: list[AdaptedLinear]
    row: Row
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor) -> _Pass:
        """As adapters and segments are just now."""
        row = row_in_use(x.shape[1], layer.scale, layer.sliding_window)
        return cls(layer, [group.as_it_is(x) for group in layer.groups], row, cos, sin)

    def __call__(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Kept]]:  # noqa: ARG002 - see `_OneCall`
        """The layer's result, and what `back` needs. Shape: (tokens, width)."""
        layer, (qkv, output, gate_up, down) = self.layer, self.linears
        projected, low_qkv = qkv(rms_norm(x, *self._norm(0)))
        self._rotate(projected)
        attended, lse = self.row.attend(*layer.heads_of(projected))
        attended = attended.view(len(x), -1)
        middle, low_output = output(attended, added=x)
        gates, low_gate_up = gate_up(rms_norm(middle, *self._norm(1)))
        y, low_down = down(swiglu(gates), added=middle)
        lows = low_qkv, low_output, low_gate_up, low_down
        return y, [Kept(x, projected, attended, middle, gates, lse, lows)]

    def back(
        self, gradient: Tensor, of_layers: Sequence[Kept], of_x: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients in its input, if it is wanted, and in the parameters, from that in the result."""
        layer, (qkv, output, gate_up, down), (kept,) = self.layer, self.linears, of_layers
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
        normed, norm_back = rms_norm_again(kept.x, *self._norm(0))
        of_normed, of_qkv = qkv.back(of_projected, normed, low_qkv, of_x)
        of_parameters = [*of_qkv, *of_output, *of_gate_up, *of_down]
        return None if of_normed is None else norm_back(of_normed, of_middle), of_parameters

    def in_one_call(self) -> Layer | None:
        """The layer for `kernels.layer`, where all its parts are there."""
        layer, norms = self.layer, [norm.weight for norm in self.layer.norms]
        tiled = [linear.tiled for linear in self.linears if linear.tiled is not None and linear.bias is None]
        if len(tiled) < len(self.linears) or not abi.available(self.cos, self.sin, *norms):
            return None
        return Layer(tiled, norms, layer.epsilons, (layer.heads, layer.key_heads), layer.scale)

    def _norm(self, which: int) -> tuple[Tensor, float]:
        """The weight of a norm, and what is added to its mean square."""
        return self.layer.norms[which].weight, self.layer.epsilons[which]

    def _rotate(self, projected: Tensor, backward: bool = False) -> None:
        """Turn queries and keys where they lie, next to each other, or gradients in them back."""
        turned = projected[:, : -self.layer.key_heads * self.layer.head_width]
        heads = turned.view(1, len(turned), -1, self.layer.head_width).transpose(1, 2)
        rotate(heads, self.cos, self.sin, heads, backward)


class _OneCall(NamedTuple):
    """Layers one after the other in one call; `linears` are what its gradients are for."""

    layers: Layers
    linears: list[AdaptedLinear]

    @classmethod
    def of(cls, passes: Sequence[_Pass], x: Tensor) -> _OneCall | None:
        """These passes, where all their parts are there."""
        first, *others = passes
        stretches = first.row.in_tiles(x, x.shape[1], first.layer.head_width)
        layers = [layer for each in passes if (layer := each.in_one_call()) is not None]
        alike = len({layer.sizes for layer in layers}) == 1 and all(each.row == first.row for each in others)
        if stretches is None or len(layers) < len(passes) or not alike:
            return None
        found = Layers(layers, first.cos[0], first.sin[0], stretches)
        return cls(found, [linear for each in passes for linear in each.linears])

    def __call__(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Kept]]:
        """The last one's result, and what `back` needs of each, if it is to be kept. Shape: (tokens, width)."""
        return self.layers.forward(x, keep)

    def back(self, gradient: Tensor, kept: Sequence[Kept], of_x: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients in the first one's input, if it is wanted, and in all parameters, from that in the result."""
        grads = [linear.gradients_so_far() for linear in self.linears]
        grad_x = self.layers.backward(gradient, kept, of_x, grads)
        parts = zip(self.linears, grads, strict=True)
        return grad_x, [part for linear, grad in parts for part in linear.of_parameters(grad)]


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, found: _Pass | _OneCall, *_: Tensor) -> Tensor:
        """Shape: (1, tokens, width), to the same. The parameters are those of the passes."""
        y, kept = found(x[0].contiguous(), keep=True)
        ctx.save_for_backward(*(tensor for of_layer in kept for tensor in (*of_layer[:-1], *of_layer.lows)))
        ctx.found, ctx.layers = found, len(kept)
        return y.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved, fields = ctx.saved_tensors, len(Kept._fields) - 1
        size = len(saved) // ctx.layers
        each = (saved[start : start + size] for start in range(0, len(saved), size))
        kept = [Kept._make((*tensors[:fields], tuple(tensors[fields:]))) for tensors in each]
        grad_x, of_parameters = ctx.found.back(gradient[0].contiguous(), kept, ctx.needs_input_grad[0])
        return None if grad_x is None else grad_x.unsqueeze(0), None, *of_parameters
