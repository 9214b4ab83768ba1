"""Fused layers beside the model's own: the same values, the same gradients, and untouched where they are not known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from buleyean_rl.kernels import abi
from buleyean_rl.models.fused_layers import fuse_layers
from buleyean_rl.models.packed_attention import PADDED
from buleyean_rl.models.private_interfaces import attention_implementation
from tiny import tiny_llama, tiny_tokenizer


class Mlp(nn.Module):
    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def norm(kind: type[nn.Module] = LlamaRMSNorm) -> Any:
    module = kind(32)
    nn.init.uniform_(module.weight, 0.2, 1.5)
    return module


def outcome(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    (y.double() * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    assert x.grad is not None
    return y.double(), x.grad.double()


def compare(make: Any) -> None:
    torch.manual_seed(0)
    module = make().bfloat16().requires_grad_(False)
    x = 2 * torch.randn(2, 5, 32).bfloat16()
    exact = outcome(module.double(), x.double())
    module.bfloat16()
    own = outcome(module, x)
    fuse_layers(module)
    assert "forward" in vars(module)
    for got, plain, expected in zip(outcome(module, x), own, exact, strict=True):
        assert (got - expected).norm() <= 1.2 * (plain - expected).norm() + 1e-3 * expected.norm()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("make", [norm, Mlp])
def test_a_fused_layer_computes_what_its_own_code_does(make: Any) -> None:
    compare(make)


def test_without_kernels_a_norm_is_torch_s_and_an_mlp_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "available", lambda *_: False)
    compare(norm)
    mlp = Mlp().bfloat16()
    fuse_layers(mlp)
    assert "forward" not in vars(mlp)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("make", [lambda: norm(GemmaRMSNorm), lambda: Mlp("gelu")])
def test_a_layer_that_computes_something_else_is_left_alone(make: Any) -> None:
    module = make().bfloat16()
    fuse_layers(module)
    assert "forward" not in vars(module)


@pytest.mark.usefixtures("kernels")
def test_a_model_keeps_its_names_and_answers_in_any_precision() -> None:
    torch.manual_seed(0)
    model = tiny_llama(tiny_tokenizer()).bfloat16()
    ids = torch.arange(4, 24).view(1, -1)
    names, before = list(model.state_dict()), model(ids).logits
    fuse_layers(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(ids).logits, before, rtol=0.05, atol=0.05 * before.abs().max().item())
    assert model.float()(ids).logits.isfinite().all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("bias", "shape"), [(True, (3, 64)), (False, (2, 40, 64))])
def test_a_linear_layer_is_as_near_to_the_exact_one_where_torch_is_slow(
    bias: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("buleyean_rl.kernels.precision._cpu_has_bf16", lambda: False)
    torch.manual_seed(0)
    layer = nn.Linear(64, 96, bias=bias).bfloat16().requires_grad_(False)
    x = torch.randn(shape).bfloat16()
    exact = outcome(copy.deepcopy(layer).double(), x.double())
    fuse_layers(layer)
    assert "forward" in vars(layer)
    for got, expected in zip(outcome(layer, x), exact, strict=True):
        assert (got - expected).norm() <= 2**-8 * expected.norm()
    with torch.no_grad():
        assert (layer(x) - exact[0]).norm() <= 2**-8 * exact[0].norm()
    assert layer.float()(x.float()).dtype == torch.float32


def test_a_linear_layer_is_left_alone_where_torch_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buleyean_rl.kernels.precision._cpu_has_bf16", lambda: True)
    layer = nn.Linear(64, 96).bfloat16()
    fuse_layers(layer)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize(
    ("own", "dtype", "has_bf16", "then"),
    [
        ("sdpa", torch.bfloat16, False, PADDED),
        ("sdpa", torch.bfloat16, True, "sdpa"),
        ("sdpa", torch.float32, False, "sdpa"),
        ("eager", torch.bfloat16, False, "eager"),  # a model that asks for what torch's function does not do
    ],
)
def test_attention_goes_by_fp32_where_torch_is_slow(
    own: str, dtype: torch.dtype, has_bf16: bool, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("buleyean_rl.kernels.precision._cpu_has_bf16", lambda: has_bf16)
    model = tiny_llama(tiny_tokenizer()).to(dtype)
    ids = torch.arange(4, 24).view(2, -1)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    exact = copy.deepcopy(model).double()(ids, attention_mask=mask).logits[:, -1]
    model.set_attn_implementation(own)
    fuse_layers(model)
    assert attention_implementation(model.config) == then
    assert (model(ids, attention_mask=mask).logits[:, -1] - exact).norm() <= 0.02 * exact.norm()
