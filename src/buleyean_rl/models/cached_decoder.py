"""A transformers model with a cache of keys and values that many sequences share, in the decoding kernel.

Models of Llama's form in bf16 on a CPU: RMSNorm, rotary embeddings, SwiGLU; with biases, norms of heads and LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from buleyean_rl.kernels import abi, matmul
from buleyean_rl.kernels.decode import (
    CACHE_BLOCK,
    Decoder,
    DecoderWeights,
    Draws,
    LayerWeights,
    LinearWeights,
    Rows,
    share_input,
)
from buleyean_rl.models.fused_decoder import agree
from buleyean_rl.models.fused_layers import epsilon_of
from buleyean_rl.models.views import backbone, plain_model

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
SHARED_INPUT = ((0, 3), (3, 4), (4, 6), (6, 7))  # which of the linear layers have one input
PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
FIXED_ROTATIONS = {"default", "linear", "llama3", "yarn"}  # that do not depend on the length of a sequence
OTHER_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
PROBE_TOKENS = 40
NO_DRAWS = Draws(torch.empty(0, dtype=torch.long), *(torch.empty(0) for _ in range(3)))


class UnsupportedModel(Exception):
    """The kernel does not compute this model."""


class CachedDecoder:
    """A model's embedding, rotations, layers and output head.

    Args:
        model: a causal model, PEFT or plain.

    Raises:
        UnsupportedModel: see above.
    """

    decoder: Decoder

    def __init__(self, model: Any) -> None:
        self._model = model
        try:
            self._state = self.weights_state()
            weights = _decoder_weights(model)
            parts: Any = backbone(model)
            self._embedding, self._rotary = parts.embed_tokens, parts.rotary_emb
            self.decoder = Decoder(weights)
            if not _matches(model, weights):
                raise UnsupportedModel("layers that compute something else")
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as problem:
            raise UnsupportedModel(str(problem)) from problem
        self._cosine, self._sine = self._rotations(1024)

    def weights_state(self) -> object:
        """What changes whenever weights or adapters do."""
        return [_linear_state(module) for layer in _layers(self._model) for module in _linears(layer)]

    def refresh(self) -> bool:
        """Take over weights and adapters if they changed; whether they did: then no cached key or value holds."""
        state = self.weights_state()
        if state == self._state:
            return False
        self._state, self.decoder = state, Decoder(_decoder_weights(self._model))
        return True

    def step(
        self, tokens: Sequence[int], sequence: Sequence[int], position: Sequence[int], blocks: Tensor, draws: Draws
    ) -> tuple[list[int], list[float]]:
        """Compute rows, and draw tokens after some of them.

        Args:
            tokens: of the rows.
            sequence: of each row, its row of `blocks`.
            position: of each row in its sequence.
            blocks: see `kernels.decode.Rows`.
            draws: after which rows, and how.

        Returns:
            The tokens and their log-probabilities.
        """
        places = torch.tensor(position)
        if max(position) >= len(self._cosine):
            self._cosine, self._sine = self._rotations(2 * (max(position) + 1))
        with torch.inference_mode():
            x = self._embedding.weight[torch.tensor(tokens)]
            rows = Rows(x, self._cosine[places], self._sine[places], torch.tensor(sequence), places, blocks)
            drawn, logprobs = self.decoder.step(rows, draws)
        return drawn.tolist(), logprobs.tolist()

    @torch.inference_mode()
    def _rotations(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines. Shapes: (positions, head width)."""
        cosine, sine = self._rotary(self._embedding.weight[:1], position_ids=torch.arange(positions).unsqueeze(0))
        return cosine[0].contiguous(), sine[0].contiguous()


def _layers(model: Any) -> list[Any]:
    layers: Any = backbone(model).layers
    return list(layers)


def _linears(layer: Any) -> list[Any]:
    """A layer's linear modules, in the order of `LayerWeights`."""
    attention, mlp = layer.self_attn, layer.mlp
    return [*(getattr(attention, name) for name in ATTENTION), *(getattr(mlp, name) for name in MLP)]


def _decoder_weights(model: Any) -> DecoderWeights:
    """The weights and the adapter in use, which is copied.

    Raises:
        ValueError: the kernel does not compute this model.
    """
    plain = plain_model(model)
    config, head, norm = plain.config.get_text_config(decoder=True), plain.get_output_embeddings(), backbone(model).norm
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation not in FIXED_ROTATIONS or any(getattr(config, name, None) not in (None, 1) for name in OTHER_LOGITS):
        raise ValueError("rotations or logits of another kind")
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError("an output head of another kind")
    if type(backbone(model).embed_tokens) is not nn.Embedding:
        raise ValueError("an embedding of another kind")
    layers = [_layer_weights(layer) for layer in _layers(model)]
    head_width = _layers(model)[0].self_attn.head_dim
    weights = DecoderWeights(layers, head_width, norm.weight.detach(), epsilon_of(norm), head.weight.detach())
    matrices = [weights.head, *(linear.weight for layer in layers for linear in layer.linears)]
    sizes = [size for matrix in matrices for size in matrix.shape]
    if len({tuple(linear.weight.shape for linear in layer.linears) for layer in layers}) > 1:
        raise ValueError("layers of several sizes")
    if any(size % abi.BLOCK for size in (head_width, *sizes)) or not matmul.gemm_available(norm.weight, *matrices):
        raise ValueError("not in bf16 on a CPU, or sizes that are no multiples of 32")
    if not all(matrix.is_contiguous() for matrix in matrices):
        raise ValueError("weights that do not lie in one piece")
    return weights


def _layer_weights(layer: Any) -> LayerWeights:
    attention, norms = layer.self_attn, (layer.input_layernorm, layer.post_attention_layernorm)
    head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if {name for name, _ in layer.named_children()} != PARTS or any(
        norm is not None and epsilon_of(norm) != epsilon_of(norms[0]) for norm in head_norms
    ):
        raise ValueError("not a layer of Llama's form")
    modules = _linears(layer)
    groups = [modules[start:stop] for start, stop in SHARED_INPUT]
    return LayerWeights(
        [linear for group in groups for linear in share_input(list(map(_weights, group)), list(map(_adapter, group)))],
        (norms[0].weight.detach(), norms[1].weight.detach()),
        (_weight(head_norms[0]), _weight(head_norms[1])),
        (epsilon_of(norms[0]), epsilon_of(norms[1])),
        attention.scaling,
    )


def _weight(norm: Any) -> Tensor | None:
    return None if norm is None else norm.weight.detach()


def _adapter_in_use(module: Any) -> str | None:
    """The name of a linear module's adapter; None where it has none or it is off.

    Raises:
        ValueError: there are several.
    """
    if not hasattr(module, "lora_A") or module.disable_adapters or module.merged:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) > 1:
        raise ValueError("several adapters at once")
    return names[0] if names else None


def _linear_state(module: Any) -> object:
    """What changes whenever a linear module's weights do."""
    name = _adapter_in_use(module)
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    tensors = [base.weight] if name is None else [base.weight, module.lora_A[name].weight, module.lora_B[name].weight]
    scaling = None if name is None else module.scaling[name]
    return name, scaling, [(tensor.data_ptr(), tensor._version) for tensor in tensors]


def _weights(module: Any) -> LinearWeights:
    """Of a linear module, without its adapter."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if not isinstance(base, nn.Linear):
        raise ValueError("a linear layer of another kind")
    return LinearWeights(base.weight.detach(), None if base.bias is None else base.bias.detach())


def _adapter(module: Any) -> tuple[Tensor, Tensor] | None:
    """A copy of a linear module's adapter in use: A and B, scaled."""
    name = _adapter_in_use(module)
    if name is None:
        return None
    a, b = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach() * module.scaling[name]
    return a.bfloat16(), b.bfloat16()


@torch.no_grad()
def _matches(model: Any, weights: DecoderWeights) -> bool:
    """Whether each layer computes what its module does, on some tokens."""
    decoder, inputs, outputs = backbone(model), [], []
    ids = torch.arange(PROBE_TOKENS).unsqueeze(0) % len(weights.head)

    def record(_module: Any, arguments: Any, output: Any) -> None:
        inputs.append(arguments[0])
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(record) for layer in _layers(model)]
    was_training = model.training
    model.eval()
    try:
        decoder(input_ids=ids, use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    positions = torch.arange(PROBE_TOKENS)
    rotary: Any = decoder.rotary_emb
    cosine, sine = (table[0].contiguous() for table in rotary(inputs[0], position_ids=positions.unsqueeze(0)))
    for layer, x, expected in zip(weights.layers, inputs, outputs, strict=True):
        one = Decoder(weights._replace(layers=[layer]))
        memory = [torch.empty(one.block_numbers, dtype=torch.bfloat16) for _ in range(-(-PROBE_TOKENS // CACHE_BLOCK))]
        blocks = torch.tensor([[block.data_ptr() for block in memory]])
        ours = x[0].clone()
        one.step(Rows(ours, cosine, sine, torch.zeros_like(positions), positions, blocks), NO_DRAWS)
        if not agree(ours.unsqueeze(0), expected, expected - x):
            return False
    return len(outputs) == len(weights.layers)
