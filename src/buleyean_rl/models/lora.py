"""LoRA linear layers that compute in their base's precision; those with one input are one node of the autograd graph.

    y = W x + bias + scaling B A dropout(x)

Only A and B learn; they are stored in fp32 and cast to the base layer's type for the products, so a bf16 model stays
bf16 throughout. The low-rank part is accumulated inside the matrix product, not computed beside it.

Queries, keys and values are made from one input, and so are gate and up. A `LinearGroup` makes them in one product: the
W's are stacked, the A's too, and the B's are a block diagonal. Products as narrow as a single A or B are slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from buleyean_rl.kernels import matmul
from buleyean_rl.kernels.quantised import QuantisedTensor
from buleyean_rl.models.adapted_linear import (
    AdaptedLinear,
    AdaptedLinearFunction,
    StackedAdapter,
    copy_adapters,
    frozen_linear,
)
from buleyean_rl.models.gradient_buffer import GradientBuffer
from buleyean_rl.models.private_interfaces import register_lora_layers

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # as transformers names them


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
    register_lora_layers(config, {nn.Linear: LoraLinear})
    return config


class AdapterState(NamedTuple):
    """What a pass does with a layer's adapters."""

    adapters: tuple[str, ...]  # in use
    dropout: float


class LoraLinear(PeftLinear):
    """PEFT's LoRA linear layer with the forward pass of this module."""

    _group: LinearGroup | None = None

    @property
    def group(self) -> LinearGroup:
        """The layers that it computes with; itself alone until `group_layers`."""
        if self._group is None:
            self._group = LinearGroup([self])
        return self._group

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer. Shape: (..., inputs) to (..., outputs)."""
        group = self.group
        if args or kwargs or group.state() is None:
            return super().forward(x, *args, **kwargs)
        return group.layer_output(self, x)

    def state(self) -> AdapterState | None:
        """What a pass does with its adapters, or None where PEFT's own code has to compute it."""
        if self.disable_adapters:
            return None if self.merged else AdapterState((), 0.0)
        names = tuple(name for name in self.active_adapters if name in self.lora_A)
        if self.merged or len(names) != 1:
            return None
        dropout = self.lora_dropout[names[0]]
        return AdapterState(names, dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0)


class LinearGroup:
    """LoRA layers that are given the same input, in one product.

    The layers' weights become views of one tensor; their modules and names stay. Dropout draws one mask for all.

    Args:
        layers: of one width of input.
    """

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = list(layers)
        self._outputs = [layer.get_base_layer().weight.shape[0] for layer in layers]
        self._stacked_weight: Tensor | None = None
        self._stacked_bias: Tensor | None = None
        self._cache: dict[tuple[str, ...], AdaptedLinear] = {}  # by the adapters in use; checked before it is used
        self._frozen: dict[tuple[str, ...], AdaptedLinear] = {}  # the same between `freeze` and `thaw`; not checked
        self._pending: dict[LoraLinear, Tensor] = {}  # outputs of layers that were not called yet
        self._pending_call: tuple[Tensor, AdapterState | None, bool] | None = None

    def state(self) -> AdapterState | None:
        """The layers', or None where they cannot be computed together."""
        state = self.layers[0].state()
        return state if all(layer.state() == state for layer in self.layers[1:]) else None

    def layer_output(self, layer: LoraLinear, x: Tensor) -> Tensor:
        """The output of one of the layers; those of the others wait until they are called with the same input."""
        if len(self.layers) == 1:
            return self(x)
        call = (x, layer.state(), torch.is_grad_enabled())
        pending = self._pending_call
        if pending is None or pending[0] is not x or pending[1:] != call[1:] or layer not in self._pending:
            outputs = self(x).split(self._outputs, -1)
            self._pending, self._pending_call = dict(zip(self.layers, outputs, strict=True)), call
        output = self._pending.pop(layer)
        if not self._pending:
            self._pending_call = None
        return output

    def __call__(self, x: Tensor) -> Tensor:
        """The layers' outputs side by side. Shape: (..., inputs) to (..., sum of outputs)."""
        linear = self.adapted_linear(x.shape[:-1].numel(), x)
        if linear.adapter is None and torch.is_grad_enabled():
            return frozen_linear(x, linear)
        if linear.adapter is None:
            return linear(x.reshape(-1, x.shape[-1]))[0].view(*x.shape[:-1], -1)
        y: Tensor = AdaptedLinearFunction.apply(x, linear, *linear.parameters)
        return y

    def adapted_linear(self, tokens: int, x: Tensor) -> AdaptedLinear:
        """Weights, adapters and dropout of one pass.

        Args:
            tokens: of the pass.
            x: of the type that it computes in.
        """
        state = self.layers[0].state()
        assert state is not None
        linear = self._frozen.get(state.adapters)
        if linear is None or linear.weight.dtype != x.dtype:
            linear = self._lookup(state.adapters, x, self.base())
            copy_adapters([linear])
        return linear.for_pass(tokens, state.dropout)

    def freeze(self, gradients: GradientBuffer | None) -> list[AdaptedLinear]:
        """Look weights and adapters up now, and not again until `thaw`; they may not change before.

        Args:
            gradients: where gradients are accumulated; None for autograd to do it.

        Returns:
            What the layers compute with, whose adapters are still to be copied.
        """
        state = self.state()
        if state is not None:
            base = self.base()
            self._frozen = {(): self._lookup((), base[0], base)}
            linear = self._lookup(state.adapters, base[0], base)
            accumulated = None if gradients is None else gradients.slice(linear.parameters)
            self._frozen[state.adapters] = linear._replace(gradients=accumulated)
        return list(self._frozen.values())

    def thaw(self) -> None:
        """Look weights and adapters up in every pass again."""
        self._frozen = {}

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """A and B of each layer, of the adapters in use."""
        state = self.state()
        return () if state is None else sum(self._pairs(state.adapters), ())

    def base(self) -> tuple[Tensor, Tensor | None]:
        """The weights and biases of the base layers, stacked. Shapes: (outputs, inputs), (outputs,)."""
        bases = [layer.get_base_layer() for layer in self.layers]
        if len(bases) == 1:
            return bases[0].weight, bases[0].bias
        weights = [base.weight for base in bases]
        if isinstance(weights[0], QuantisedTensor):
            self._stack_quantised(weights)
        else:
            self._stacked_weight = self._stack(weights, self._stacked_weight)
        if bases[0].bias is not None:
            self._stacked_bias = self._stack([base.bias for base in bases], self._stacked_bias)
        assert self._stacked_weight is not None
        return self._stacked_weight, self._stacked_bias

    def _stack(self, parameters: Sequence[Any], stacked: Tensor | None) -> Tensor:
        """One tensor, whose parts the parameters become."""
        parts = () if stacked is None else stacked.split(self._outputs)
        if stacked is None or [each.data_ptr() for each in parameters] != [part.data_ptr() for part in parts]:
            stacked = torch.cat([each.detach() for each in parameters])  # they are new, moved or cast
            for each, part in zip(parameters, stacked.split(self._outputs), strict=True):
                each.data = part
        return stacked

    def _stack_quantised(self, weights: Sequence[QuantisedTensor]) -> None:
        """Side by side, nothing is copied."""
        parts, stacked = [part.packed for weight in weights for part in weight.parts], self._stacked_weight
        known = [part.packed for part in stacked.parts] if isinstance(stacked, QuantisedTensor) else []
        if len(parts) != len(known) or any(a is not b for a, b in zip(parts, known, strict=True)):
            self._stacked_weight = torch.cat([weight.detach() for weight in weights])

    def _pairs(self, adapters: tuple[str, ...]) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in adapters for layer in self.layers]

    def _lookup(self, adapters: tuple[str, ...], x: Tensor, base: tuple[Tensor, Tensor | None]) -> AdaptedLinear:
        """What it computes with in the type of `x`; its adapters are still to be copied."""
        pairs = self._pairs(adapters)
        scalings = [layer.scaling[name] for name in adapters for layer in self.layers]
        linear = self._cache.get(adapters)
        if linear is None or not linear.matches(base, pairs, scalings, x):
            linear = self._cache[adapters] = self._build(*base, pairs, scalings, x)
        return linear

    def _build(
        self,
        weight: Tensor,
        bias: Tensor | None,
        pairs: Sequence[tuple[nn.Parameter, nn.Parameter]],
        scalings: list[float],
        x: Tensor,
    ) -> AdaptedLinear:
        if not pairs:
            c_linear = matmul.make_linear(weight, None, bias) if matmul.gemm_available(weight, weight.T) else None
            return AdaptedLinear(weight, bias, None, (), c_linear)
        adapter = StackedAdapter([len(a) for a, _ in pairs], self._outputs, weight.shape[1], scalings, x)
        in_fp32 = all(each.dtype == torch.float32 and each.is_contiguous() for pair in pairs for each in pair)
        in_c = in_fp32 and matmul.gemm_available(weight, weight.T, adapter.b)
        c_linear = matmul.make_linear(weight, adapter.in_c(), bias) if in_c else None
        return AdaptedLinear(weight, bias, adapter, sum(pairs, ()), c_linear)


@contextmanager
def cached_weights(groups: Sequence[LinearGroup], gradients: GradientBuffer | None = None) -> Iterator[None]:
    """Look weights and adapters up once for all passes within, which may not change them.

    Args:
        groups: of a model.
        gradients: where the adapters' gradients are accumulated; None for autograd to do it.
    """
    try:
        copy_adapters([linear for group in groups for linear in group.freeze(gradients)])
        yield
    finally:
        for group in groups:
            group.thaw()


def linear_groups(model: nn.Module) -> list[LinearGroup]:
    """Every group of a model's LoRA layers."""
    return list(dict.fromkeys(layer.group for layer in model.modules() if isinstance(layer, LoraLinear)))


def group_layers(model: nn.Module) -> None:
    """Let the layers of a model that are given the same input compute together.

    Args:
        model: a PEFT model; changed in place.
    """
    for module in model.modules():
        for names in SHARED_INPUTS:
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), LoraLinear)]
            bases = [layer.get_base_layer() for layer in layers]
            kinds = {(isinstance(base.weight, QuantisedTensor), base.bias is None) for base in bases}
            if len(layers) > 1 and len(kinds) == 1:
                group = LinearGroup(layers)
                group.base()
                for layer in layers:
                    layer._group = group


def concatenated_outputs(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The outputs of layers on one input, side by side. Shape: (..., inputs) to (..., sum of outputs)."""
    group = layers[0].group if isinstance(layers[0], LoraLinear) else None
    if group is not None and group.layers == list(layers) and group.state() is not None:
        return group(x)
    return torch.cat([layer(x) for layer in layers], -1)


@torch.no_grad()
def scale_adapter(model: nn.Module, factor: float) -> None:
    """Multiply what an adapter adds to every weight, in place.

    Args:
        model: with LoRA layers.
        factor: 1 changes nothing.
    """
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(factor)
