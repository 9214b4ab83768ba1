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
from typing import Any, Literal, NamedTuple, overload

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from buleyean_rl import kernels
from buleyean_rl.arithmetic import is_slow
from buleyean_rl.gradients import Gradients

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

    def hold(self, gradients: Gradients | None) -> list[AdaptedLinear]:
        """Look at weights and adapters now, and not again until `release`; they may not change before.

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
        """Look again from now on."""
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
            tiled = kernels.linear_of(weight) if kernels.multiplies(weight, weight.T) else None
            return AdaptedLinear(weight, None, None, (), tiled)
        adapter = _Adapter([len(a) for a, _ in pairs], self._outputs, weight.shape[1], scalings, like)
        in_fp32 = all(each.dtype == torch.float32 and each.is_contiguous() for pair in pairs for each in pair)
        tiles = in_fp32 and kernels.multiplies(weight, weight.T, adapter.b)
        tiled = kernels.linear_of(weight, adapter.in_tiles()) if tiles else None
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
def held(groups: Sequence[LinearGroup], gradients: Gradients | None = None) -> Iterator[None]:
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


class _Adapter:
    """The A's and scaled B's of a group in the type that computes: `a` on top of each other, `b` along a diagonal.

    Their rank is filled up with zeros to what products want.

    Args:
        ranks: of the layers.
        outputs: of the layers.
        inputs: of every layer.
        scalings: of the layers.
        x: of the type and on the device that computes.
    """

    def __init__(
        self, ranks: Sequence[int], outputs: Sequence[int], inputs: int, scalings: Sequence[float], x: Tensor
    ) -> None:
        self.ranks, self.outputs, self.scalings = list(ranks), list(outputs), list(scalings)
        rank = kernels.depth_of(sum(ranks), x)
        self.a = x.new_zeros(rank, inputs)
        self.b = x.new_zeros(sum(outputs), rank)
        self._parts = [*self._each_a(self.a), *self._each_b(self.b)]
        each = torch.tensor(self.scalings).repeat_interleave(torch.tensor(self.ranks))
        self._scaling = torch.ones(rank, 1)
        self._scaling[: len(each), 0] = each
        self._scaling = self._scaling.to(x.device)

    @torch.no_grad()
    def copy(self, parameters: Sequence[Tensor]) -> None:
        """Become these A's and B's, one pair after the other."""
        scaled = torch._foreach_mul(list(parameters[1::2]), self.scalings)
        torch._foreach_copy_(self._parts, [*parameters[::2], *scaled])

    def in_tiles(self) -> kernels.Adapter:
        """For `kernels.linear_of`."""
        return kernels.Adapter(self.a, self.b, self.ranks, self.outputs, self.scalings)

    def gradients(self, grad_a: Tensor, grad_b: Tensor) -> list[Tensor]:
        """Each layer's in its A and its B, from those in `a` and the transpose of `b`, in fp32."""
        of_b = [block.contiguous() for block in self._each_b(grad_b.mul_(self._scaling).T)]
        return [grad for pair in zip(self._each_a(grad_a), of_b, strict=True) for grad in pair]

    def _each_a(self, a: Tensor) -> list[Tensor]:
        return list(a[: sum(self.ranks)].split(self.ranks))

    def _each_b(self, b: Tensor) -> list[Tensor]:
        rows = zip(b[:, : sum(self.ranks)].split(self.outputs), range(len(self.ranks)), strict=True)
        return [row.split(self.ranks, 1)[i] for row, i in rows]


class AdaptedLinear(NamedTuple):
    """A group's weights and adapters in one pass, outside autograd's graph.

    Args:
        weight: Shape: (outputs, inputs).
        bias: Shape: (outputs,).
        adapter: None where the base alone is meant.
        parameters: A and B of each layer.
        tiled: the same for `kernels.adapted`, where that is to compute.
        p: share of the input dropped on the way to A.
        seed: of what is dropped.
        gradients: where those in the parameters are added up, one after the other; None where autograd is to add them.
    """

    weight: Tensor
    bias: Tensor | None
    adapter: _Adapter | None
    parameters: tuple[nn.Parameter, ...]
    tiled: kernels.Linear | None
    p: float = 0.0
    seed: int = 0
    gradients: Tensor | None = None

    def is_still(
        self, weight: Tensor, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], scalings: list[float], like: Tensor
    ) -> bool:
        """Whether these are its weights, parameters and scalings, where they were, and it computes in `like`'s type."""
        tensors = weight, *(parameter for pair in pairs for parameter in pair)
        computes = weight if self.adapter is None else self.adapter.a
        return (
            all(a is b for a, b in zip((self.weight, *self.parameters), tensors, strict=True))
            and (computes.dtype, computes.device) == (like.dtype, like.device)
            and (self.adapter is None or self.adapter.scalings == scalings)
            and (self.tiled is None or (self.tiled.weight, torch.bfloat16) == (weight.data_ptr(), weight.dtype))
        )

    def of_pass(self, tokens: int, p: float) -> AdaptedLinear:
        """The same for so many tokens, with dropout of its own."""
        tiled = self.tiled if tokens >= kernels.least_rows(self.weight) else None
        if not p:
            return self if tiled is self.tiled else self._replace(tiled=tiled)
        seed = int(torch.randint(2**32, ()))
        return self._replace(tiled=tiled and tiled.with_dropout(p, seed), p=p, seed=seed)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The output, with something added to it, and what A makes of the input, which `back` wants.

        Args:
            x: contiguous. Shape: (tokens, inputs).
            added: contiguous. Shape: (tokens, outputs).

        Returns:
            Shapes: (tokens, outputs), (tokens, ranks).
        """
        if self.tiled is not None:
            y, low = kernels.adapted(x, self.tiled, added)
            return y if self.bias is None else y.add_(self.bias), low
        terms = [term for term in (self.bias, added) if term is not None]
        y = torch.addmm(terms.pop(), x, self.weight.T) if terms else x @ self.weight.T
        for term in terms:
            y += term
        if self.adapter is None:
            return y, None
        low = _dropout(x, self.p, self.seed) @ self.adapter.a.T
        return y.addmm_(low, self.adapter.b.T), low

    @overload
    def back(
        self, grad_y: Tensor, x: Tensor, low: Tensor, of_x: Literal[True] = True
    ) -> tuple[Tensor, list[Tensor | None]]: ...

    @overload
    def back(self, grad_y: Tensor, x: Tensor, low: Tensor, of_x: bool) -> tuple[Tensor | None, list[Tensor | None]]: ...

    def back(
        self, grad_y: Tensor, x: Tensor, low: Tensor, of_x: bool = True
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients in the input, if it is wanted, and for autograd in the parameters, from that in the output.

        Args:
            grad_y: contiguous. Shape: (tokens, outputs).
            x: see `__call__`.
            low: what that gave.
            of_x: whether the one in the input is wanted.
        """
        assert self.adapter is not None
        if self.tiled is not None:
            grads = self.gradients_so_far()
            grad_x = kernels.adapted_backward(grad_y, x, self.tiled, low, of_x, grads)
            return grad_x, self.of_parameters(grads)
        a, b = self.adapter.a, self.adapter.b
        grad_low, grad_x = grad_y @ b, None
        grad_a = _row_products(grad_low, _dropout(x, self.p, self.seed))  # cheaper made again than kept
        grad_b = _row_products(low, grad_y)
        if of_x and self.p:
            grad_x = _dropout(grad_low @ a, self.p, self.seed, grad_y @ self.weight)
        elif of_x:
            grad_x = (grad_y @ self.weight).addmm_(grad_low, a)
        return grad_x, [*self.adapter.gradients(grad_a, grad_b)]

    def gradients_so_far(self) -> Tensor:
        """What gradients in the parameters are to be added to, one after the other."""
        assert self.tiled is not None
        return torch.zeros(self.tiled.learning) if self.gradients is None else self.gradients

    def of_parameters(self, grads: Tensor) -> list[Tensor | None]:
        """What autograd is to add to the parameters' gradients, from those one after the other: nothing where they were
        added already.
        """
        if grads is self.gradients:
            return [None] * len(self.parameters)
        parts = grads.split([parameter.numel() for parameter in self.parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]


def _copy_adapters(found: Sequence[AdaptedLinear]) -> None:
    """Copy A's and B's, scaled, to where products find them, until they are looked at again."""
    tiled = [(linear.tiled, linear.parameters) for linear in found if linear.adapter is not None and linear.tiled]
    if tiled:
        kernels.copy_adapters(tiled)
    for linear in found:
        if linear.adapter is not None and linear.tiled is None:
            linear.adapter.copy(linear.parameters)


def frozen_linear(x: Tensor, linear: AdaptedLinear) -> Tensor:
    """A linear layer without adapters, with a gradient in its input alone. Shape: (..., inputs) to (..., outputs)."""
    if linear.tiled is None or not is_slow(x):
        return nn.functional.linear(x, linear.weight, linear.bias)
    y: Tensor = _FrozenLinear.apply(x, linear)
    return y


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: AdaptedLinear) -> Tensor:
        ctx.linear = linear
        return linear(x.reshape(-1, x.shape[-1]).contiguous())[0].view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        across = ctx.linear.weight.T.contiguous()
        grad_x, _ = kernels.adapted(grad_y.reshape(-1, grad_y.shape[-1]).contiguous(), kernels.linear_of(across))
        return grad_x.view(*grad_y.shape[:-1], -1), None


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


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in fp32. Shapes: (rows, width), (rows, columns)."""
    # a, the narrow one, is the first operand: faster by a third than the second
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
