"""LoRA layers in a whole model: which are adapted, which compute together, and when weights are looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor

from adapted import TOKENIZER, stir
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.fused_layers import fuse_layers
from buleyean_rl.models.lora import LoraLinear, cached_weights, linear_groups, lora_config, scale_adapter
from lora_layers import SeededDropout, pair
from tiny import tiny_llama, tiny_qwen2

# PEFT asks transformers under a name that goes away with version 6
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(4, 24).reshape(2, 10)


def adapted(dropout: float = 0.0, targets: list[str] | None = None) -> Any:
    torch.manual_seed(0)
    return stir(attach_lora(tiny_qwen2(TOKENIZER), lora_config(4, 8, dropout, targets))).eval()


def test_every_linear_layer_but_the_head_is_adapted() -> None:
    model = adapted()
    names = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_named_layers_alone_are_adapted() -> None:
    names = {
        name.split(".")[-1]
        for name, module in adapted(targets=["q_proj", "v_proj"]).named_modules()
        if isinstance(module, LoraLinear)
    }
    assert names == {"q_proj", "v_proj"}


def test_a_model_learns_as_with_peft_alone() -> None:
    """Dropout included: the same loss and the same gradients from the same seed."""
    ours = adapted(dropout=0.3)
    torch.manual_seed(0)
    plain = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear")
    theirs = attach_lora(tiny_qwen2(TOKENIZER), plain)
    theirs.load_state_dict(ours.state_dict())
    for module in theirs.modules():
        if isinstance(module, PeftLinear):
            module.lora_dropout["default"] = SeededDropout(0.3, torch.float32)
    assert not any(isinstance(module, LoraLinear) for module in theirs.modules())
    results = []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(2)
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_plain_peft_loads_the_adapter(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_qwen2(TOKENIZER), tmp_path)
    assert not any(isinstance(module, LoraLinear) for module in loaded.modules())
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(tiny_qwen2(TOKENIZER)(IDS).logits, expected)


def test_the_disabled_adapter_of_a_model_is_the_base() -> None:
    model, base = adapted(), tiny_qwen2(TOKENIZER)
    fuse_layers(base)  # the same layers but for the adapter
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(IDS).logits, base(IDS).logits)


def test_layers_with_one_input_compute_together() -> None:
    model = adapted()
    attention, mlp = model.base_model.model.model.layers[0].self_attn, model.base_model.model.model.layers[0].mlp
    assert attention.q_proj.group is attention.k_proj.group is attention.v_proj.group
    assert mlp.gate_proj.group is mlp.up_proj.group
    assert all(layer.group.layers == [layer] for layer in (attention.o_proj, mlp.down_proj))
    few = adapted(targets=["q_proj", "v_proj", "up_proj"]).base_model.model.model.layers[0]
    assert few.self_attn.q_proj.group.layers == [few.self_attn.q_proj, few.self_attn.v_proj]
    assert few.mlp.up_proj.group.layers == [few.mlp.up_proj]


def test_a_groups_layers_answer_each_input_in_any_order() -> None:
    attention = adapted().base_model.model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    first, second = torch.randn(2, 5, 64)
    expected = {(layer, x): PeftLinear.forward(layer, x) for layer in layers for x in (first, second)}
    order = [(0, first), (2, first), (0, second), (0, second), (1, first), (2, second), (1, second), (0, first)]
    for place, x in order:
        torch.testing.assert_close(layers[place](x), expected[layers[place], x], rtol=1e-4, atol=1e-5)


def test_pending_outputs_are_dropped_once_the_adapter_is_off() -> None:
    attention = adapted().base_model.model.model.layers[0].self_attn
    x = torch.randn(5, 64)
    attention.q_proj(x)
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        layer.enable_adapters(False)
    torch.testing.assert_close(attention.k_proj(x), attention.k_proj.get_base_layer()(x))


def test_a_group_follows_new_weights_and_another_precision() -> None:
    model = adapted()
    with torch.no_grad():
        model(IDS)
        for name, parameter in model.named_parameters():
            if "k_proj" in name or "up_proj" in name:
                parameter.data = parameter.data * 2
        layer = model.base_model.model.model.layers[0].self_attn.k_proj
        x = torch.randn(5, 64)
        torch.testing.assert_close(layer(x), PeftLinear.forward(layer, x), rtol=1e-4, atol=1e-5)
        model.double()
        assert layer(x.double()).dtype == torch.float64
        torch.testing.assert_close(layer(x.double()), PeftLinear.forward(layer, x.double()))


def test_a_group_scales_each_layer_by_its_own() -> None:
    config = lora_config(4, 8, 0.0, None)
    config.rank_pattern, config.alpha_pattern = {"k_proj": 2}, {"v_proj": 40, "gate_proj": 3}
    torch.manual_seed(0)
    ours = attach_lora(tiny_qwen2(TOKENIZER), config)
    plain = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    plain.rank_pattern, plain.alpha_pattern = config.rank_pattern, config.alpha_pattern
    theirs = attach_lora(tiny_qwen2(TOKENIZER), plain)
    stir(ours)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for model in (ours, theirs):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_two_adapters_fall_back_to_pefts_own_way() -> None:
    model = get_peft_model(tiny_llama(TOKENIZER), lora_config(4, 8, 0.0, None))
    model.add_adapter("second", lora_config(2, 4, 0.0, None))
    stir(model)
    with torch.no_grad():
        first = model(IDS).logits
        model.base_model.set_adapter(["default", "second"])
        both = model(IDS).logits
        model.merge_adapter(["default", "second"])
        torch.testing.assert_close(model(IDS).logits, both, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, both)


def test_a_scaled_adapter_adds_so_much_more() -> None:
    layer, _ = pair()
    x = torch.randn(4, 7)
    with torch.no_grad():
        base, once = layer.get_base_layer()(x), layer(x)
        scale_adapter(layer, 2.5)
        torch.testing.assert_close(layer(x) - base, 2.5 * (once - base), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_frozen_layers_compute_the_same_and_follow_new_weights_afterwards(dropout: float) -> None:
    model = adapted(dropout).train()

    def outputs() -> list[Tensor]:
        torch.manual_seed(3)
        with torch.no_grad():
            twice = [model(IDS).logits, model(IDS).logits]
            with model.disable_adapter():
                return [*twice, model(IDS).logits]

    expected = outputs()
    assert expected[0].equal(expected[1]) == (dropout == 0)  # each pass drops other elements
    groups = linear_groups(model)
    assert len(groups) == 4 * model.config.num_hidden_layers
    with cached_weights(groups):
        for got, alone in zip(outputs(), expected, strict=True):
            assert got.equal(alone)
    with pytest.raises(RuntimeError, match="ends early"), cached_weights(groups):
        raise RuntimeError("a step that ends early")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(2)
    moved, again, base = outputs()
    assert not moved.equal(expected[0])
    assert not again.equal(expected[1])
    assert base.equal(expected[2])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("change", ["scaling", "weight", "type", "parameters"])
def test_what_changed_since_is_looked_up_again(change: str) -> None:
    layer, _ = pair(bias=False, dtype=torch.bfloat16, inputs=64, outputs=96)
    base, a, b = layer.get_base_layer(), layer.lora_A["default"], layer.lora_B["default"]
    x = torch.randn(40, 64).bfloat16()
    with torch.no_grad():
        before = layer(x).double()
        if change == "scaling":
            layer.scaling["default"] *= 3
        elif change == "weight":
            base.weight.data = torch.randn(96, 64).bfloat16()
        elif change == "type":
            layer, x = layer.double(), x.double()
        else:
            b.weight.normal_()
        weight = base.weight.double() + layer.scaling["default"] * b.weight.double() @ a.weight.double()
        got, expected = layer(x).double(), x.double() @ weight.T
    assert (got - expected).norm() <= 0.01 * expected.norm()
    assert change == "type" or (got - before).norm() > 0.1 * expected.norm()
