"""LoRA linear layers that compute in their base's precision, those with one input as one node of the autograd graph.

    y = W x + bias + scaling B A dropout(x)

Only A and B learn; they are kept in fp32 and cast to the base layer's type for the products, so a bf16
model stays bf16 throughout. The low-rank part is added inside the matrix product, not beside it.

Queries, keys and values are made from one input, and so are a gate and what it lets through. A `LinearGroup` makes
them in one product: the W's stand on top of each other, the A's too, and the B's along a diagonal. Alone, products as
narrow as an A's or a B's would take three times their share of a step.
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
from buleyean_rl.models.adapted_linear import AdaptedLinear, _Adapter, _copy_adapters, frozen_linear
from buleyean_rl.models.gradient_buffer import GradientBuffer

ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # as transformers names them


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


class _State(NamedTuple):
    adapters: tuple[str, ...]  # in use
    dropout: float


class LoraLinear(PeftLinear):
    """PEFT's LoRA linear layer with the forward pass of this module."""

    group: LinearGroup | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer. Shape: (..., inputs) to (..., outputs)."""
        group = self.its_group()
        if args or kwargs or group.state() is None:
            return super().forward(x, *args, **kwargs)
        return group.output_of(self, x)

    def its_group(self) -> LinearGroup:
        """The group it is in, or one of its own."""
        if self.group is None:
            self.group = LinearGroup([self])
        return self.group

    def state(self) -> _State | None:
        """What this module needs to know of the layer, or None where PEFT's own code is to compute it."""
        if self.disable_adapters:
            return None if self.merged else _State((), 0.0)
        names = tuple(name for name in self.active_adapters if name in self.lora_A)
        if self.merged or len(names) != 1:
            return None
        dropout = self.lora_dropout[names[0]]
        return _State(names, dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0)


class LinearGroup:
    """LoRA layers that are given the same input, in one product.

    The layers' weights become views of one tensor; what they hold and what they are called stays as it is. Dropout
    draws one mask for all of them.

    Args:
        layers: of one width of input.
    """

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = list(layers)
        self._outputs = [layer.get_base_layer().weight.shape[0] for layer in layers]
        self._weight: Tensor | None = None
        self._known: dict[tuple[str, ...], AdaptedLinear] = {}  # what was found last, by the adapters in use
        self._waiting: dict[LoraLinear, Tensor] = {}
        self._given: tuple[Tensor, _State | None, bool] | None = None
        self._held: dict[tuple[str, ...], AdaptedLinear] = {}

    def state(self) -> _State | None:
        """The layers', or None where they cannot be computed together just now."""
        state = self.layers[0].state()
        return state if all(layer.state() == state for layer in self.layers[1:]) else None

    def output_of(self, layer: LoraLinear, x: Tensor) -> Tensor:
        """What one of the layers makes of `x`; what the others make of it waits for them to be asked."""
        if len(self.layers) == 1:
            return self(x)
        given = (x, layer.state(), torch.is_grad_enabled())
        known = self._given is not None and self._given[0] is x and self._given[1:] == given[1:]
        if not known or layer not in self._waiting:
            parts = self(x).split(self._outputs, -1)
            self._waiting, self._given = dict(zip(self.layers, parts, strict=True)), given
        output = self._waiting.pop(layer)
        if not self._waiting:
            self._given = None
        return output

    def __call__(self, x: Tensor) -> Tensor:
        """The layers' outputs side by side. Shape: (..., inputs) to (..., sum of outputs)."""
        linear = self.as_it_is(x)
        if linear.adapter is None and torch.is_grad_enabled():
            return frozen_linear(x, linear)
        if linear.adapter is None:
            return linear(x.reshape(-1, x.shape[-1]))[0].view(*x.shape[:-1], -1)
        return _LoraLinear.apply(x, linear, *linear.parameters)

    def as_it_is(self, x: Tensor) -> AdaptedLinear:
        """Its weights, adapters and dropout of a pass over as many tokens as `x` has, in its type, for layers alike."""
        state = self.layers[0].state()
        assert state is not None
        found = self._held.get(state.adapters)
        if found is None or found.weight.dtype != x.dtype:
            found = self._look(state.adapters, x, *self.base())
            _copy_adapters([found])
        return found.of_pass(x.shape[:-1].numel(), state.dropout)

    def hold(self, gradients: GradientBuffer | None) -> list[AdaptedLinear]:
        """DriftCheck at weights and adapters now, and not again until `release`; they may not change before.

        Args:
            gradients: to which those in the adapters are added; None for autograd to do it.

        Returns:
            What was found, its adapters still to be copied.
        """
        state = self.state()
        if state is not None:
            weight, bias = self.base()
            self._held = {(): self._look((), weight, weight, bias)}
            found = self._look(state.adapters, weight, weight, bias)
            together = None if gradients is None else gradients.of(found.parameters)
            self._held[state.adapters] = found._replace(gradients=together)
        return list(self._held.values())

    def release(self) -> None:
        """DriftCheck again from now on."""
        self._held = {}

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """A and B of each layer, of the adapters in use."""
        state = self.state()
        return () if state is None else sum(self._pairs(state.adapters), ())

    def _pairs(self, adapters: tuple[str, ...]) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in adapters for layer in self.layers]

    def _look(self, adapters: tuple[str, ...], like: Tensor, weight: Tensor, bias: Tensor | None) -> AdaptedLinear:
        """Its adapters, to be copied to the type of `like`, and its `base`."""
        pairs = self._pairs(adapters)
        scalings = [layer.scaling[name] for name in adapters for layer in self.layers]
        known = self._known.get(adapters)
        if known is None or not known.is_still(weight, pairs, scalings, like):
            known = self._known[adapters] = self._made(weight, pairs, scalings, like)
        return known if bias is None else known._replace(bias=bias)

    def _made(
        self, weight: Tensor, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], scalings: list[float], like: Tensor
    ) -> AdaptedLinear:
        if not pairs:
            tiled = matmul.linear_of(weight) if matmul.multiplies(weight, weight.T) else None
            return AdaptedLinear(weight, None, None, (), tiled)
        adapter = _Adapter([len(a) for a, _ in pairs], self._outputs, weight.shape[1], scalings, like)
        in_fp32 = all(each.dtype == torch.float32 and each.is_contiguous() for pair in pairs for each in pair)
        tiles = in_fp32 and matmul.multiplies(weight, weight.T, adapter.b)
        tiled = matmul.linear_of(weight, adapter.in_tiles()) if tiles else None
        return AdaptedLinear(weight, None, adapter, sum(pairs, ()), tiled)

    def base(self) -> tuple[Tensor, Tensor | None]:
        """The weights and biases of the base layers, on top of each other."""
        bases = [layer.get_base_layer() for layer in self.layers]
        if len(bases) == 1:
            return bases[0].weight, bases[0].bias
        parts = () if self._weight is None else self._weight.split(self._outputs)
        if [base.weight.data_ptr() for base in bases] != [part.data_ptr() for part in parts]:  # new, moved or cast
            self._weight = torch.cat([base.weight.detach() for base in bases])
            for base, part in zip(bases, self._weight.split(self._outputs), strict=True):
                base.weight.data = part
        assert self._weight is not None
        if all(base.bias is None for base in bases):
            return self._weight, None
        biases = [self._weight.new_zeros(len(base.weight)) if base.bias is None else base.bias for base in bases]
        return self._weight, torch.cat(biases)


@contextmanager
def held(groups: Sequence[LinearGroup], gradients: GradientBuffer | None = None) -> Iterator[None]:
    """Within, weights and adapters stay what they are, and are looked at once: of all groups in turn, which takes a
    third of the time that it takes between products.

    Args:
        groups: of a model.
        gradients: to which those in its adapters are added; None for autograd to do it.
    """
    try:
        _copy_adapters([found for group in groups for found in group.hold(gradients)])
        yield
    finally:
        for group in groups:
            group.release()


def groups_of(model: nn.Module) -> list[LinearGroup]:
    """Every group of a model's LoRA layers."""
    return list(dict.fromkeys(layer.its_group() for layer in model.modules() if isinstance(layer, LoraLinear)))


def group_layers(model: nn.Module) -> None:
    """Let the layers of a model that are given the same input compute together.

    Args:
        model: a PEFT model; changed in place.
    """
    for module in model.modules():
        for names in ONE_INPUT:
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), LoraLinear)]
            if len(layers) > 1:
                group = LinearGroup(layers)
                group.base()
                for layer in layers:
                    layer.group = group


def side_by_side(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The outputs of layers on one input, next to each other. Shape: (..., inputs) to (..., sum of outputs)."""
    group = getattr(layers[0], "group", None)
    if group is not None and group.layers == list(layers) and group.state() is not None:
        joined: Tensor = group(x)
        return joined
    return torch.cat([layer(x) for layer in layers], -1)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: AdaptedLinear, *_: Tensor) -> Tensor:
        """Shape: (..., inputs) to (..., outputs). The parameters are those of `linear`."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y, low = linear(flat)
        ctx.save_for_backward(flat, low)
        ctx.linear, ctx.shape = linear, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        flat, low = ctx.saved_tensors
        grad_y = grad_y.reshape(-1, grad_y.shape[-1]).contiguous()
        grad_x, of_parameters = ctx.linear.back(grad_y, flat, low, ctx.needs_input_grad[0])
        return None if grad_x is None else grad_x.view(ctx.shape), None, *of_parameters


@torch.no_grad()
def scale_adapter(model: nn.Module, factor: float) -> None:
    """Multiply what an adapter adds to every weight, in place.

    Args:
        model: with LoRA layers.
        factor: 1 leaves it as it is.
    """
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(factor)
