"""LoRA linear layers that compute in their base's precision, those with one input as one node of the autograd graph.

    y = W x + bias + scaling B A dropout(x)

Only A and B learn; they are kept in fp32 and cast to the base layer's type for the products, so a bf16
model stays bf16 throughout. The low-rank part is added inside the matrix product, not beside it.

Queries, keys and values are made from one input, and so are a gate and what it lets through. A `LinearGroup` makes
them in one product: the W's stand on top of each other, the A's too, and the B's along a diagonal. Alone, products as
narrow as an A's or a B's would take three times their share of a step.

The backward pass needs the input of a layer. Where it is cheap to make from what is kept anyway (`can_be_made_again`)
it is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from buleyean_rl import kernels

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
        if self.group is None:
            self.group = LinearGroup([self])
        if args or kwargs or not self.group.alike():
            return super().forward(x, *args, **kwargs)
        return self.group.output_of(self, x)

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
        self._adapter: _Adapter | None = None
        self._waiting: dict[LoraLinear, Tensor] = {}
        self._given: tuple[Tensor, _State | None, bool] | None = None

    def alike(self) -> bool:
        """Whether the layers can be computed together just now."""
        state = self.layers[0].state()
        return state is not None and all(layer.state() == state for layer in self.layers[1:])

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
        state = self.layers[0].state()
        assert state is not None
        weight, bias = self.base()
        if not state.adapters:
            return _linear(x, weight, bias)
        (name,) = state.adapters
        parameters = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for layer in self.layers]
        ranks = [len(a) for a, _ in parameters]
        if self._adapter is None or not self._adapter.fits(ranks, x):
            self._adapter = _Adapter(ranks, self._outputs, x)
        self._adapter.take([layer.scaling[name] for layer in self.layers], parameters)
        seed = int(torch.randint(2**32, ())) if state.dropout else 0
        return _LoraLinear.apply(x, weight, bias, self._adapter, state.dropout, seed, *sum(parameters, ()))

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
    if group is not None and group.layers == list(layers) and group.alike():
        joined: Tensor = group(x)
        return joined
    return torch.cat([layer(x) for layer in layers], -1)


def can_be_made_again(y: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """Mark a layer's input as one that its backward pass makes again.

    Args:
        y: `make(*sources)`.
        make: no gradient is wanted from it.
        sources: what is kept in its stead.

    Returns:
        `y`.
    """
    y.made_from = (make, sources)  # type: ignore[attr-defined]
    return y


class _Adapter:
    """The A's and B's of a group in the type that computes: `a` on top of each other, `b` along a diagonal.

    Their rank is filled up with zeros to what products want.

    Args:
        ranks: of the layers.
        outputs: of the layers.
        x: an input, for its width, type and device.
    """

    def __init__(self, ranks: Sequence[int], outputs: Sequence[int], x: Tensor) -> None:
        self.ranks, self.outputs = list(ranks), list(outputs)
        rank = kernels.depth_of(sum(ranks), x)
        self.a = x.new_zeros(rank, x.shape[-1])
        self.b = x.new_zeros(sum(outputs), rank)
        self._parts = [*self.each_a(self.a), *self.each_b(self.b)]
        self._scalings: list[float] = []
        self.scaling: float | Tensor = 1.0

    def fits(self, ranks: Sequence[int], x: Tensor) -> bool:
        """Whether it is made for these ranks, and for inputs like `x`."""
        return self.ranks == ranks and (self.a.dtype, self.a.device) == (x.dtype, x.device)

    def take(self, scalings: list[float], parameters: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Become these A's and B's. They stay what they are from a forward pass to its backward pass."""
        with torch.no_grad():
            torch._foreach_copy_(self._parts, [pair[i].detach() for i in (0, 1) for pair in parameters])
        if scalings != self._scalings:
            each = self.a.new_zeros(len(self.a))
            each[: sum(self.ranks)] = torch.tensor(scalings).repeat_interleave(torch.tensor(self.ranks))
            self.scaling = scalings[0] if len(set(scalings)) == 1 else each
            self._scalings = scalings

    def each_a(self, a: Tensor) -> list[Tensor]:
        """Each layer's own part of a matrix like `a`."""
        return list(a[: sum(self.ranks)].split(self.ranks))

    def each_b(self, b: Tensor) -> list[Tensor]:
        """Each layer's own part of a matrix like `b`."""
        rows = zip(b[:, : sum(self.ranks)].split(self.outputs), range(len(self.ranks)), strict=True)
        return [row.split(self.ranks, 1)[i] for row, i in rows]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapter: _Adapter,
        p: float,
        seed: int,
        *parameters: Tensor,  # noqa: ARG004 - A and B of each layer; `adapter` has them
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = _product(_dropout(flat, p, seed), adapter.a.T).mul_(adapter.scaling)
        y = _product(flat, weight.T, low, adapter.b.T, bias=bias)
        make, sources = getattr(x, "made_from", (None, (flat,)))
        ctx.save_for_backward(low, weight, *sources)
        ctx.make, ctx.adapter, ctx.dropout, ctx.shape = make, adapter, (p, seed), x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        low, weight, *sources = ctx.saved_tensors
        flat = ctx.make(*sources).view(-1, ctx.shape[-1]) if ctx.make else sources[0]
        adapter: _Adapter = ctx.adapter
        p, seed = ctx.dropout
        grad_y = grad_y.reshape(-1, grad_y.shape[-1])
        grad_low = _product(grad_y, adapter.b).mul_(adapter.scaling)
        grad_a = _row_products(grad_low, _dropout(flat, p, seed))  # cheaper made again than kept
        grad_b = _row_products(low, grad_y).T
        grad_x = None
        if ctx.needs_input_grad[0]:
            if p:
                grad_x = _dropout(_product(grad_low, adapter.a), p, seed, _product(grad_y, weight))
            else:
                grad_x = _product(grad_y, weight, grad_low, adapter.a)
            grad_x = grad_x.view(ctx.shape)
        each_b = [block.contiguous() for block in adapter.each_b(grad_b)]
        of_parameters = [grad for pair in zip(adapter.each_a(grad_a), each_b, strict=True) for grad in pair]
        return grad_x, None, None, None, None, None, *of_parameters


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + bias, in tiles where no gradient is wanted. Shape: (..., inputs) to (..., outputs)."""
    if torch.is_grad_enabled():
        return nn.functional.linear(x, weight, bias)
    return _product(x.reshape(-1, x.shape[-1]), weight.T, bias=bias).view(*x.shape[:-1], -1)


def _product(a: Tensor, b: Tensor, *more: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + c d + bias; `more` is c and d. Shapes: (rows, depth), (depth, columns), (rows, inner), (inner, columns)."""
    if kernels.multiplies(a, b, *more):
        y = kernels.product(a, b, *more)
        return y if bias is None else y.add_(bias)
    y = a @ b if bias is None else torch.addmm(bias, a, b)
    return y.addmm_(*more) if more else y


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in fp32. Shapes: (rows, width), (rows, columns)."""
    # a, the narrow one, is the first operand: faster by a third than the second
    if kernels.multiplies(a, b):
        return kernels.row_products(a, b)
    if a.is_cuda:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return (a.T @ b).float()


def _dropout(x: Tensor, p: float, seed: int, add_to: Tensor | None = None) -> Tensor:
    """Dropout that a seed makes the same again, added to `add_to` if given. Shape: any."""
    if not p:
        return x
    if kernels.available(x):
        return kernels.dropout(x, p, seed, add_to)
    generator = torch.Generator(x.device).manual_seed(seed)
    dropped = torch.empty_like(x).bernoulli_(1 - p, generator=generator).mul_(x).div_(1 - p)
    return dropped if add_to is None else add_to.add_(dropped)


@torch.no_grad()
def strengthen(model: nn.Module, factor: float) -> None:
    """Multiply what an adapter adds to every weight, in place.

    Args:
        model: with LoRA layers.
        factor: 1 leaves it as it is.
    """
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(factor)
