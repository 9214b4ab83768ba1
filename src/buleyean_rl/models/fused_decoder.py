"""All layers of a Llama-like decoder in one call into C, as one node of autograd's graph.

    ids --embedding--> x --layers--> x --norm--> last hidden states

In bf16 on a CPU, for packed sequences. Whatever else a model is asked for (padded batches, generation, other types and
devices), and every other architecture, transformers' own modules compute. What norms and SwiGLU give to a product is
not saved but computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from buleyean_rl.kernels import abi, attention
from buleyean_rl.kernels.decoder import DecoderLayer, DecoderLayers, SavedActivations
from buleyean_rl.models.adapted_linear import AdaptedLinear
from buleyean_rl.models.fused_layers import epsilon_of
from buleyean_rl.models.lora import LoraLinear
from buleyean_rl.models.packed_attention import PACKED
from buleyean_rl.models.private_interfaces import (
    attending,
    attention_implementation,
    checkpoint_layer,
    has_forward_hooks,
)
from buleyean_rl.models.segments import Segment, active_segments, attention_segments, cu_seqlens, exceeds_window

CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
PROBE_TOKENS = 32
TOLERANCE = 0.02  # of a layer's change to a hidden state, beyond the rounding of bf16


def fuse_decoder(backbone: Any) -> None:
    """Let a decoder compute its layers in one call where that is possible, if it computes the same.

    Args:
        backbone: of a PEFT model whose LoRA layers are grouped; its `forward` is replaced.
    """
    own_forward = backbone.forward
    try:
        decoder = FusedDecoder(backbone)
        if not decoder.matches(own_forward):
            return
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return  # another architecture

    def forward(*args: Any, **kwargs: Any) -> Any:
        passed = {name for name, value in kwargs.items() if value is not None and value is not False}
        is_plain = not args and passed == {"input_ids", "position_ids"} and kwargs.get("use_cache") is False
        hidden = decoder(kwargs["input_ids"], kwargs["position_ids"]) if is_plain else None
        return own_forward(*args, **kwargs) if hidden is None else BaseModelOutputWithPast(last_hidden_state=hidden)

    backbone.forward = forward


class FusedLayer:
    """A decoder layer's weights, as `kernels.decoder` takes them.

    Args:
        module: of transformers, its linear layers `LoraLinear`s in groups.

    Raises:
        ValueError: it has other parts than a layer of Llama.
    """

    def __init__(self, module: Any) -> None:
        self_attention, mlp = module.self_attn, module.mlp
        if {name for name, _ in module.named_children()} != CHILDREN or not _is_adapted(module):
            raise ValueError("not a layer of Llama")
        self.module, self.scale, self.head_width = module, self_attention.scaling, self_attention.head_dim
        self.norms = module.input_layernorm, module.post_attention_layernorm
        self.groups = [
            linear.group for linear in (self_attention.q_proj, self_attention.o_proj, mlp.gate_proj, mlp.down_proj)
        ]
        self.heads, self.key_heads = (
            linear.get_base_layer().weight.shape[0] // self.head_width
            for linear in (self_attention.q_proj, self_attention.k_proj)
        )

    def in_c(self, linears: Sequence[AdaptedLinear]) -> DecoderLayer:
        """The layer with its four `linears` of this pass."""
        weights = [norm.weight for norm in self.norms]
        epsilons = [epsilon_of(norm) for norm in self.norms]
        c_linears = [linear.c_linear for linear in linears if linear.c_linear is not None]
        return DecoderLayer(c_linears, weights, epsilons, (self.heads, self.key_heads), self.scale)


def _is_adapted(layer: Any) -> bool:
    """Whether a layer's modules are LoRA layers, an activation, and nothing else."""
    for part, names in ((layer.self_attn, ATTENTION), (layer.mlp, MLP)):
        adapted = {name for name, module in part.named_children() if isinstance(module, LoraLinear)}
        if adapted != set(names) or {name for name, _ in part.named_children()} - adapted - {"act_fn"}:
            return False
    return True


class FusedDecoder:
    """A decoder whose layers are one call.

    Args:
        backbone: of transformers.

    Raises:
        AttributeError: it has other parts than a Llama.
        ValueError: the same.
    """

    def __init__(self, backbone: Any) -> None:
        self.embedding, self.rotary_embedding, self.norm = backbone.embed_tokens, backbone.rotary_emb, backbone.norm
        self.config, self.layers = backbone.config, [FusedLayer(module) for module in backbone.layers]
        self.groups = [group for layer in self.layers for group in layer.groups]

    def __call__(self, input_ids: Tensor, position_ids: Tensor) -> Tensor | None:
        """The last hidden states, or None where the modules have to compute them.

        Args:
            input_ids: Shape: (1, tokens).
            position_ids: Shape: (1, tokens).

        Returns:
            Shape: (1, tokens, width).
        """
        linears = self._linears(input_ids)
        if linears is None:
            return None
        x: Tensor = self.embedding(input_ids)
        cos, sin = self.rotary_embedding(x, position_ids=position_ids)
        if not self._is_checkpointed:
            x = _apply(self.layers, linears, x, cos, sin)
        else:
            for i, layer in enumerate(self.layers):
                x = checkpoint_layer(layer.module, partial(_apply, [layer], linears[4 * i : 4 * i + 4]), x, cos, sin)
        normed: Tensor = self.norm(x)
        return normed

    @torch.no_grad()
    def matches(self, own_forward: Callable[..., Any]) -> bool:
        """Whether each layer computes what its module does, and the decoder what `own_forward` does, on some tokens."""
        vocabulary, outputs = self.embedding.num_embeddings, []
        ids = torch.arange(PROBE_TOKENS, device=self.embedding.weight.device).unsqueeze(0) % vocabulary
        positions = 2 * torch.arange(PROBE_TOKENS, device=ids.device).unsqueeze(0)
        with attending(self.config, PACKED):
            linears = self._linears(ids)
            if linears is None or len({each.sizes for each in _in_c(self.layers, linears)}) > 1:
                return False
            hooks = [
                layer.module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
                for layer in self.layers
            ]
            try:
                last = own_forward(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            finally:
                for hook in hooks:
                    hook.remove()
        states = [self.embedding(ids), *outputs]
        cos, sin = self.rotary_embedding(states[0], position_ids=positions)
        for i, (layer, x, expected) in enumerate(zip(self.layers, states, outputs, strict=False)):
            if not agree(_apply([layer], linears[4 * i : 4 * i + 4], x, cos, sin), expected, expected - x):
                return False
        return len(outputs) == len(self.layers) and agree(self.norm(outputs[-1]), last, last)

    def _linears(self, input_ids: Tensor) -> list[AdaptedLinear] | None:
        """The linear layers of this pass, four a layer; None where C cannot compute it."""
        weight, tokens = self.embedding.weight, input_ids.shape[1]
        if (
            len(input_ids) != 1
            or attention_implementation(self.config) != PACKED
            or not attention.attention_available(weight, tokens, self.layers[0].head_width)
            or not abi.available(weight, *(norm.weight for layer in self.layers for norm in layer.norms))
            or exceeds_window(attention_segments(_segments(tokens), 0), getattr(self.config, "sliding_window", None))
            or any(has_forward_hooks(layer.module) for layer in self.layers)
            or len(states := {group.state() for group in self.groups}) > 1  # some adapters on, some off
            or None in states
        ):
            return None
        linears = [group.adapted_linear(tokens, weight) for group in self.groups]
        # C adds the residual stream where it would add the bias of an output projection
        can_add = all(linear.bias is None for linear in linears[1::2])
        return linears if can_add and all(linear.c_linear is not None for linear in linears) else None

    @property
    def _is_checkpointed(self) -> bool:
        """Whether the layers are to be computed again in the backward pass."""
        module = self.layers[0].module
        return module.gradient_checkpointing and module.training and torch.is_grad_enabled()


def agree(ours: Tensor, theirs: Tensor, change: Tensor) -> bool:
    """Whether the hidden states of most tokens are alike but for rounding. Shapes: (1, tokens, width)."""
    error, scale = (ours - theirs).float().norm(dim=-1), change.float().norm(dim=-1)
    rounding = torch.finfo(theirs.dtype).eps * theirs.float().norm(dim=-1)
    return bool((error <= TOLERANCE * scale + rounding).float().mean() > 0.8)


def _segments(tokens: int) -> tuple[Segment, ...]:
    """Those in use; without, one ordinary causal sequence."""
    return active_segments() or (Segment(tokens),)


def _in_c(layers: Sequence[FusedLayer], linears: Sequence[AdaptedLinear]) -> list[DecoderLayer]:
    return [layer.in_c(linears[4 * i : 4 * i + 4]) for i, layer in enumerate(layers)]


def _apply(
    layers: Sequence[FusedLayer], linears: Sequence[AdaptedLinear], x: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Layers one after the other. Shapes: (1, tokens, width), (1, tokens, head width) twice; as the first."""
    segments = cu_seqlens(_segments(x.shape[1]), 0, x.device)
    call = _LayersCall(
        DecoderLayers(_in_c(layers, linears), cos[0].contiguous(), sin[0].contiguous(), segments), linears
    )
    if torch.is_grad_enabled() and linears[0].adapter is not None:
        y: Tensor = FusedLayerFunction.apply(x, call, *(p for linear in linears for p in linear.parameters))
        return y
    return call.layers.forward(x[0].contiguous(), keep=False)[0].unsqueeze(0)


class _LayersCall(NamedTuple):
    layers: DecoderLayers
    linears: Sequence[AdaptedLinear]


class FusedLayerFunction(torch.autograd.Function):
    """Decoder layers as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _LayersCall, *_parameters: nn.Parameter) -> Tensor:
        """Shape: (1, tokens, width), to the same. The parameters are those that `call` accumulates gradients in."""
        y, saved = call.layers.forward(x[0].contiguous(), keep=True)
        ctx.save_for_backward(*(tensor for layer in saved for tensor in (*layer[:-1], *layer.lora_hidden)))
        ctx.call, ctx.layers = call, len(saved)
        return y.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients in `x` and in the parameters."""
        tensors, fields = ctx.saved_tensors, len(SavedActivations._fields) - 1
        size, call = len(tensors) // ctx.layers, ctx.call
        layers = (tensors[start : start + size] for start in range(0, len(tensors), size))
        saved = [SavedActivations._make((*layer[:fields], tuple(layer[fields:]))) for layer in layers]
        grads = [linear.gradient_accumulator() for linear in call.linears]
        grad_x = call.layers.backward(grad_y[0].contiguous(), saved, ctx.needs_input_grad[0], grads)
        parts = zip(call.linears, grads, strict=True)
        parameter_grads = [part for linear, grad in parts for part in linear.parameter_gradients(grad)]
        return None if grad_x is None else grad_x.unsqueeze(0), None, *parameter_grads
