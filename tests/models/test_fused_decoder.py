"""A decoder's layers in one call beside their modules: the same values, the same gradients, less saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from adapted import SEQUENCE, TOKENIZER, biased, biased_outputs, outcome, packed_model, wide_heads
from buleyean_rl.batching.forward import forward_hidden
from buleyean_rl.models import fused_decoder
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.fused_decoder import FusedDecoder, FusedLayerFunction
from buleyean_rl.models.lora import LoraLinear, lora_config
from buleyean_rl.models.packed_attention import PACKED
from buleyean_rl.models.views import adapter_disabled, backbone, plain_model
from tiny import tiny_llama, tiny_mistral, tiny_model


def by_modules(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(FusedDecoder, "__call__", lambda *_: None)
        return work()


def is_fused(model: Any) -> bool:
    return "forward" in vars(backbone(model))


def forward_only(model: Any) -> None:
    with torch.no_grad():
        forward_hidden(backbone(model), SEQUENCE)


def layers_of_calls(model: Any, monkeypatch: pytest.MonkeyPatch, work: Callable[[Any], object] = outcome) -> list[int]:
    """How many layers each call into C is of."""
    counts: list[int] = []
    apply = fused_decoder._apply
    with monkeypatch.context() as patch:
        patch.setattr(fused_decoder, "_apply", lambda layers, *x: (counts.append(len(layers)), apply(layers, *x))[1])
        work(model)
    return counts


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("make", [wide_heads, biased])
def test_one_call_is_as_near_to_the_exact_one_as_the_modules(
    make: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed_model(make)
    assert is_fused(model)
    got, modules = outcome(model), by_modules(monkeypatch, lambda: outcome(model))
    assert len(got) == 1 + 2 * 14
    exact = outcome(model.double())
    for ours, theirs, best in zip(got, modules, exact, strict=True):
        assert (ours - best).norm() <= 1.3 * (theirs - best).norm() + 1e-3 * best.norm()


@pytest.mark.usefixtures("kernels")
def test_with_dropout_only_the_reference_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model(dropout=0.4)
    assert is_fused(model)
    assert layers_of_calls(model, monkeypatch) == []
    with adapter_disabled(model):
        assert layers_of_calls(model, monkeypatch, forward_only) == [2]


@pytest.mark.usefixtures("kernels")
def test_a_fresh_adapter_is_its_base_to_the_bit() -> None:
    model = attach_lora(wide_heads(TOKENIZER).bfloat16(), lora_config(4, 8, 0.0, None))
    plain_model(model).set_attn_implementation(PACKED)
    assert is_fused(model)
    with torch.no_grad():
        expected = forward_hidden(backbone(model), SEQUENCE)
        with model.disable_adapter():
            assert forward_hidden(backbone(model), SEQUENCE).equal(expected)


@pytest.mark.usefixtures("kernels")
def test_with_the_adapter_off_it_is_the_base() -> None:
    model, base = packed_model(), wide_heads(TOKENIZER).bfloat16()
    base.set_attn_implementation(PACKED)
    with torch.no_grad(), model.disable_adapter():
        got, expected = (forward_hidden(part, SEQUENCE).float() for part in (backbone(model), base.model))
    assert (got - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.usefixtures("kernels")
def test_what_is_cheap_to_compute_again_is_not_saved() -> None:
    model = packed_model()
    config, tokens = plain_model(model).config, SEQUENCE.input_ids.numel()
    saved: dict[int, int] = {}  # bytes of each memory
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        hidden = backbone(model)(input_ids=SEQUENCE.input_ids, position_ids=SEQUENCE.position_ids, use_cache=False)
    assert hidden.last_hidden_state.requires_grad
    width, heads = config.hidden_size, config.num_attention_heads
    attended, projected = heads * config.head_dim, (heads + 2 * config.num_key_value_heads) * config.head_dim
    padding, ranks = 2 * 32, 4 * 32  # of two tensors; of A's, each group's padded
    layer = 2 * (2 * width + attended + projected + 2 * config.intermediate_size + padding + ranks) + 4 * heads
    after_layers = 2 * (tokens * width + config.hidden_size)  # the last norm
    assert sum(saved.values()) <= config.num_hidden_layers * tokens * layer + after_layers


@pytest.mark.usefixtures("kernels")
def test_all_layers_are_one_node_and_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, apply, nodes = packed_model(), FusedLayerFunction.apply, []
    monkeypatch.setattr(FusedLayerFunction, "apply", lambda *given: (nodes.append(given[1]), apply(*given))[1])
    assert layers_of_calls(model, monkeypatch) == [2]
    assert len(nodes) == 1


@pytest.mark.usefixtures("kernels")
def test_checkpointed_layers_are_a_call_each_and_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model()
    expected = outcome(model)
    plain_model(model).activation_checkpointing_enable()
    assert layers_of_calls(model, monkeypatch) == [1, 1] * 2  # again in the backward pass
    for got, exact in zip(outcome(model), expected, strict=True):
        assert got.equal(exact)


@pytest.mark.usefixtures("kernels")
def test_layers_that_are_watched_are_computed_by_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = packed_model(), []
    expected = by_modules(monkeypatch, lambda: outcome(model))
    backbone(model).layers[1].register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    for got, exact in zip(outcome(model), expected, strict=True):
        assert got.equal(exact)
    assert len(seen) == 1
    assert not seen[0][0].equal(seen[0][1])


@pytest.mark.usefixtures("kernels")
def test_a_layer_with_some_of_its_adapters_off_is_computed_by_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model()
    backbone(model).layers[0].mlp.down_proj.enable_adapters(False)
    backbone(model).layers[1].self_attn.q_proj.enable_adapters(False)
    expected = by_modules(monkeypatch, lambda: outcome(model))
    for got, exact in zip(outcome(model), expected, strict=True):
        assert got.equal(exact)


@pytest.mark.usefixtures("kernels")
def test_generation_and_several_rows_are_computed_by_the_modules() -> None:
    model = packed_model().eval()
    ids = SEQUENCE.input_ids[:, :40]
    positions = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        expected = backbone(model)(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.float()
        first = backbone(model)(ids[:, :5], use_cache=True)
        later = backbone(model)(ids[:, 5:], cache=first.cache).last_hidden_state
        together = torch.cat([first.last_hidden_state, later], 1).float()
        assert (together - expected).norm() <= 0.02 * expected.norm()
        rows = backbone(model)(ids.repeat(2, 1)).last_hidden_state.float()
        assert (rows - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("window", "calls"), [(5, []), (64, [2])])  # the longest path has 26 tokens
def test_a_window_that_hides_something_is_for_the_modules(
    window: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed_model(lambda tokenizer: tiny_mistral(tokenizer, sliding_window=window, head_dim=32))
    assert layers_of_calls(model, monkeypatch) == calls


@pytest.mark.usefixtures("kernels")
def test_a_decoder_that_does_more_than_its_layers_is_left_alone() -> None:
    model = wide_heads(TOKENIZER).bfloat16()
    own = model.model.forward

    def scaled(*args: Any, **given: Any) -> Any:
        output = own(*args, **given)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    model.model.forward = scaled
    assert backbone(attach_lora(model, lora_config(4, 8, 0.0, None))).forward is scaled


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_llama(TOKENIZER, head_dim=32),  # in fp32
        lambda: biased_outputs(TOKENIZER).bfloat16(),
        *(
            lambda name=name: tiny_model(f"{name}ForCausalLM", TOKENIZER, head_dim=32).bfloat16()
            for name in ("Qwen3", "Cohere", "Gemma")
        ),
        lambda: tiny_model(
            "GraniteForCausalLM", TOKENIZER, num_attention_heads=2, num_key_value_heads=1, residual_multiplier=0.5
        ).bfloat16(),
    ],
    ids=["fp32", "biases", "Qwen3", "Cohere", "Gemma", "Granite"],
)
def test_other_decoders_are_left_alone(make: Callable[[], Any]) -> None:
    model = attach_lora(make(), lora_config(4, 8, 0.0, None))
    assert any(isinstance(module, LoraLinear) for module in model.modules())
    assert not is_fused(model)


@pytest.mark.usefixtures("kernels")
def test_layers_adapted_in_part_are_left_alone() -> None:
    model = attach_lora(wide_heads(TOKENIZER).bfloat16(), lora_config(4, 8, 0.0, ["q_proj", "v_proj"]))
    assert not is_fused(model)
