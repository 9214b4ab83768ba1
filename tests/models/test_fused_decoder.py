"""A decoder's layers as one node beside the chain of their modules: the same values, the same gradients, less kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from buleyean_rl.batching.batch import Batch, pack
from buleyean_rl.batching.forward import forward_hidden
from buleyean_rl.batching.layout import probe
from buleyean_rl.kernels import abi, attention, matmul
from buleyean_rl.kernels import decoder as layer
from buleyean_rl.models import fused_decoder as decoder
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.fused_decoder import Decoder, DecoderLayer, _Pass
from buleyean_rl.models.lora import LoraLinear, lora_config
from buleyean_rl.models.packed_attention import PACKED
from buleyean_rl.models.segments import segments_in_use
from buleyean_rl.models.views import backbone, plain_model
from tiny import tiny_llama, tiny_mistral, tiny_model, tiny_qwen2, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROW = pack([*probe(len(TOKENIZER)), *probe(len(TOKENIZER) - 40)])  # a trie and what follows it, of 128 tokens


def adapted(make: Callable[[Any], Any] = tiny_llama, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = attach_lora(make(TOKENIZER).to(dtype), lora_config(4, 6, dropout, None))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    plain_model(model).set_attn_implementation(PACKED)
    return model.train()


def outcome(model: Any, row: Batch = ROW) -> list[torch.Tensor]:
    """Hidden states, and gradients in all that learns."""
    model.zero_grad()
    torch.manual_seed(1)
    with segments_in_use(row.segments):  # in the backward pass too, as the trainer does
        hidden = forward_hidden(backbone(model), row).double()
        (hidden * torch.linspace(-1, 2, hidden.numel()).view_as(hidden)).sum().backward()
    return [hidden.detach(), *(p.grad.double() for p in model.parameters() if p.grad is not None)]


def by_modules(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(DecoderLayer, "knows", lambda *_: False)
        patch.setattr(Decoder, "knows", lambda *_: False)
        return work()


def fused(model: Any) -> list[bool]:
    return ["forward" in vars(layer) for layer in backbone(model).layers]


def sliding(tokenizer: Any) -> Any:
    return tiny_mistral(tokenizer, sliding_window=5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-3)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_mistral, sliding])
def test_a_layer_computes_and_learns_what_its_modules_do(
    make: Callable[[Any], Any],
    dropout: float,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted(make, dropout, dtype)
    assert all(fused(model))
    expected = by_modules(monkeypatch, lambda: outcome(model))
    assert len(expected) == 1 + 2 * 14
    for got, exact in zip(outcome(model), expected, strict=True):
        assert (got - exact).norm() <= tolerance * exact.norm()


def wide_heads(tokenizer: Any) -> Any:
    return tiny_llama(tokenizer, head_dim=32)


def biased(tokenizer: Any) -> Any:
    return tiny_qwen2(tokenizer, head_dim=32)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_in_bf16_it_is_as_near_to_the_exact_one(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_in_bf16(wide_heads, dropout, monkeypatch)


LAYER, PASSES = {"layers", "layers_backward"}, {"adapted", "adapted_backward", "attention", "attention_backward"}


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("make", "called"), [(wide_heads, LAYER), (biased, PASSES)])
def test_in_tiles_it_is_as_near_to_the_exact_one(
    make: Callable[[Any], Any], called: set[str], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: set[str] = set()
    call = abi._call_in
    for module in (attention, layer, matmul):
        monkeypatch.setattr(module, "_call_in", lambda _, name, *given: (calls.add(name), call(_, name, *given)))
    compare_in_bf16(make, dropout, monkeypatch)
    assert called <= calls


def compare_in_bf16(make: Callable[[Any], Any], dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(make, dropout, torch.bfloat16)
    assert all(fused(model))
    got, modules = outcome(model), by_modules(monkeypatch, lambda: outcome(model))
    exact = outcome(model.double())
    for ours, theirs, best in zip(got, modules, exact, strict=True):
        assert (ours - best).norm() <= 1.3 * (theirs - best).norm() + 1e-3 * best.norm()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_one_call_computes_what_the_passes_do_to_the_bit(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(wide_heads, dropout, torch.bfloat16)
    in_one_call = outcome(model)
    monkeypatch.setattr(_Pass, "in_one_call", lambda *_: None)
    for got, expected in zip(in_one_call, outcome(model), strict=True):
        assert got.equal(expected)


def test_with_the_adapter_off_it_is_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(dtype=torch.float64)
    with torch.no_grad(), model.disable_adapter():
        expected = by_modules(monkeypatch, lambda: forward_hidden(backbone(model), ROW))
        torch.testing.assert_close(forward_hidden(backbone(model), ROW), expected)


@pytest.mark.usefixtures("tiles")
def test_in_tiles_a_fresh_adapter_is_its_base_to_the_bit() -> None:
    model = attach_lora(wide_heads(TOKENIZER).bfloat16(), lora_config(4, 8, 0.0, None))
    plain_model(model).set_attn_implementation(PACKED)
    with torch.no_grad():
        expected = forward_hidden(backbone(model), ROW)
        with model.disable_adapter():
            assert forward_hidden(backbone(model), ROW).equal(expected)


def test_what_is_cheap_to_make_again_is_not_kept() -> None:
    model = adapted()
    config, tokens = plain_model(model).config, ROW.input_ids.numel()
    kept: dict[int, int] = {}  # elements of each memory
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.__setitem__(t.untyped_storage().data_ptr(), t.numel()) or t, lambda t: t
    ):
        hidden = backbone(model)(ROW.input_ids, position_ids=ROW.position_ids, use_cache=False)
    assert hidden.last_hidden_state.requires_grad
    width, low = config.hidden_size, 4 * (3 + 1 + 2 + 1)  # of A's
    projected = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    a_layer = tokens * (
        3 * width + projected + 2 * config.intermediate_size + low
    )  # x, the middle, what attention gave
    after_layers = tokens * width + config.hidden_size + 2 * tokens  # the last norm
    assert sum(kept.values()) <= config.num_hidden_layers * a_layer + after_layers


def layers_at_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many layers at a time a pass is asked for."""
    counts: list[int] = []
    compute = decoder._applied
    with monkeypatch.context() as patch:
        patch.setattr(
            decoder, "_applied", lambda layers, *given: (counts.append(len(layers)), compute(layers, *given))[1]
        )
        outcome(model)
    return counts


def test_all_layers_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert layers_at_once(adapted(), monkeypatch) == [2]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("dtype", "nodes"), [(torch.bfloat16, 1), (torch.float32, 2)])
def test_layers_in_one_call_are_one_node_and_others_a_node_each(
    dtype: torch.dtype, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, apply, made = adapted(wide_heads, dtype=dtype), decoder._Node.apply, []
    monkeypatch.setattr(decoder._Node, "apply", lambda *given: (made.append(given[1]), apply(*given))[1])
    outcome(model)
    assert len(made) == nodes


def test_layers_that_are_watched_are_a_node_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = adapted(), []
    expected = outcome(model)
    backbone(model).layers[1].register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    for got, exact in zip(outcome(model), expected, strict=True):
        assert got.equal(exact)
    assert len(seen) == 1
    assert not seen[0][0].equal(seen[0][1])
    assert layers_at_once(model, monkeypatch) == [1, 1]


def test_a_decoder_that_does_more_than_its_layers_keeps_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(TOKENIZER)
    own = model.model.forward

    def scaled(*args: Any, **given: Any) -> Any:
        output = own(*args, **given)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    model.model.forward = scaled
    adapted_model = attach_lora(model, lora_config(4, 8, 0.0, None))
    plain_model(adapted_model).set_attn_implementation(PACKED)
    assert all(fused(adapted_model))
    assert backbone(adapted_model).forward is scaled
    assert layers_at_once(adapted_model, monkeypatch) == [1, 1]


def test_where_it_cannot_be_one_node_its_own_code_runs() -> None:
    model = adapted().eval()
    ids = ROW.input_ids[:, :9]
    with torch.no_grad():
        expected = backbone(model)(ids).last_hidden_state
        first = backbone(model)(ids[:, :5], use_cache=True)
        later = backbone(model)(ids[:, 5:], cache=first.cache).last_hidden_state
        together = torch.cat([first.last_hidden_state, later], 1)
        torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)
        rows = backbone(model)(ids.repeat(2, 1)).last_hidden_state
        torch.testing.assert_close(rows, expected.expand_as(rows), rtol=1e-4, atol=1e-4)


def test_a_layer_with_some_of_its_adapters_off_is_computed_by_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    backbone(model).layers[0].mlp.down_proj.enable_adapters(False)
    backbone(model).layers[1].self_attn.q_proj.enable_adapters(False)
    expected = by_modules(monkeypatch, lambda: outcome(model))
    for got, exact in zip(outcome(model), expected, strict=True):
        assert got.equal(exact)


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "CohereForCausalLM", "GemmaForCausalLM"])
def test_layers_of_another_form_are_left_alone(name: str) -> None:
    model = attach_lora(tiny_model(name, TOKENIZER), lora_config(4, 8, 0.0, None))
    assert any(isinstance(module, LoraLinear) for module in model.modules())
    assert not any(fused(model))


def test_layers_adapted_in_part_are_left_alone() -> None:
    model = attach_lora(tiny_llama(TOKENIZER), lora_config(4, 8, 0.0, ["q_proj", "v_proj"]))
    assert not any(fused(model))


def test_a_checkpointed_layer_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(dropout=0.4)
    expected = outcome(model)
    plain_model(model).activation_checkpointing_enable()
    assert layers_at_once(model, monkeypatch) == [1, 1] * 2  # again in the backward pass
    for got, exact in zip(outcome(model), expected, strict=True):
        torch.testing.assert_close(got, exact)
