"""One tiny model of every row of `ARCHITECTURES`: it passes its gate, and what is wrong in its row is caught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_export import write_unchecked
from transformers import GPT2Config, GPT2LMHeadModel

from buleyean_rl.errors import ParityError, UnsupportedArchitecture
from buleyean_rl.gguf import architectures, blueprint, blueprint_from_model, check_parity, export_gguf, write_gguf
from buleyean_rl.gguf.metadata import make_field
from shapes import DYNAMIC, GEMMA, SHAPES, make_shape
from tiny import tiny_model, tiny_tokenizer


def test_every_row_has_a_shape() -> None:
    assert {make_shape(shape).config.model_type for shape in SHAPES} == set(architectures.ARCHITECTURES)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_passes_the_gate(shape: str, tmp_path: Path) -> None:
    report = export_gguf(make_shape(shape), tiny_tokenizer(), tmp_path / "m.gguf", "f32")
    assert report.parity is not None
    rounds = "gemma" in shape  # llama.cpp looks GELU up in a table of half precision
    assert report.parity.largest < (2e-2 if rounds else 1e-3)
    assert report.parity.divergence < (1e-5 if rounds else 1e-6)


def test_interleave_by_hand() -> None:
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0], [11.0], [12.0], [13.0]])
    pairs = torch.tensor([[0.0], [2.0], [1.0], [3.0], [10.0], [12.0], [11.0], [13.0]])
    assert torch.equal(architectures.interleave(rows, heads=2), pairs)
    assert torch.equal(architectures.deinterleave(pairs, heads=2), rows)
    wide = torch.randn(3 * 10, 7)
    assert torch.equal(architectures.deinterleave(architectures.interleave(wide, 3), 3), wide)


# --- what is caught ----------------------------------------------------------------------------------------


def test_a_missing_permutation_is_caught_by_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(architectures, "_interleaved_heads", lambda *_: None)
        path, model, tokenizer = write_unchecked(tmp_path)
    with pytest.raises(ParityError, match=r"tensor .*attn_q"):
        check_parity(model, tokenizer, path)


def test_a_missing_permutation_is_caught_by_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate quantises without it too, so the bytes agree; at the coarsest type."""
    monkeypatch.setattr(architectures, "_interleaved_heads", lambda *_: None)
    path, model, tokenizer = write_unchecked(tmp_path, quant="q4_0")
    with pytest.raises(ParityError, match=r"log-probabilities differ: 0\.\d+ nats"):
        check_parity(model, tokenizer, path)


@pytest.mark.parametrize(("shape", "module"), [("qwen3", "mlp.up_proj"), ("phi3-long", "mlp.gate_up_proj")])
def test_swapped_tensors_are_caught(shape: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parameters of one shape change places, in the file and in the gate alike."""
    right = architectures.tensor_layouts
    first, second = (f"model.layers.{i}.{module}.weight" for i in (0, 1))

    def swapped(config: Any, parameters: list[str]) -> dict[str, architectures.TensorLayout]:
        layouts = right(config, parameters)
        return layouts | {first: layouts[second], second: layouts[first]}

    monkeypatch.setattr(blueprint, "tensor_layouts", swapped)
    with pytest.raises(ParityError, match="log-probabilities differ"):
        export_gguf(make_shape(shape), tiny_tokenizer(), tmp_path / "m.gguf", "q8_0")
    assert not list(tmp_path.iterdir())


def test_norms_without_their_one_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {name: replace(row, norm_shift=0.0) for name, row in architectures.ARCHITECTURES.items()}
    monkeypatch.setattr(architectures, "ARCHITECTURES", rows)
    with pytest.raises(ParityError, match="log-probabilities differ"):
        export_gguf(make_shape("gemma2"), tiny_tokenizer(), tmp_path / "m.gguf", "q8_0")


@pytest.mark.parametrize(
    ("shape", "key", "wrong"),
    [
        ("gemma2", "gemma2.attn_logit_softcapping", 0.5),
        ("gemma2", "gemma2.attention.sliding_window", 4),
        ("gemma3", "gemma3.rope.freq_base_swa", 100.0),
        ("phi3-long", "phi3.rope.scaling.attn_factor", 2.0),
    ],
)
def test_wrong_metadata_of_an_architecture_is_caught(shape: str, key: str, wrong: Any, tmp_path: Path) -> None:
    model, tokenizer = make_shape(shape), tiny_tokenizer()
    planned = blueprint_from_model(model, tokenizer)
    assert key in planned.metadata
    planned.metadata[key] = make_field(wrong)
    path = write_gguf(planned, {"q8_0": tmp_path / "m.gguf"}, gate=False)[0].path
    with pytest.raises(ParityError, match="log-probabilities differ"):
        check_parity(model, tokenizer, path)


def test_wrong_rope_factors_are_caught(tmp_path: Path) -> None:
    planned = blueprint_from_model(make_shape("phi3-long"), tiny_tokenizer())
    names = "rope_factors_long.weight", "rope_factors_short.weight"
    planned.tensors[names[0]], planned.tensors[names[1]] = planned.tensors[names[1]], planned.tensors[names[0]]
    with pytest.raises(ParityError, match="log-probabilities differ"):
        write_gguf(planned, {"f32": tmp_path / "m.gguf"})


# --- what is refused ---------------------------------------------------------------------------------------


def test_an_unsupported_architecture_names_the_supported(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=400))
    with pytest.raises(UnsupportedArchitecture, match=r"'gpt2'; supported are Llama .*Mistral, SmolLM3, Qwen2"):
        export_gguf(model, tiny_tokenizer(), tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("architecture", "settings", "problem"),
    [
        ("Llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("Llama", {"rope_parameters": DYNAMIC}, "scaling 'dynamic'"),
        ("Qwen2", {"use_sliding_window": True}, "qwen2 with a sliding window"),
        ("Qwen3", {"attention_bias": True}, "qwen3 with biases"),
        ("SmolLM3", {"no_rope_layer_interval": 2}, "layers without rotation other than every fourth"),
        ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 32}, "query_pre_attn_scalar 32 rather than 16"),
        ("Gemma2", GEMMA | {"layer_types": ["full_attention"] * 2}, "full attention other than in layer 2 of 2"),
        ("Gemma3", GEMMA | {"attn_logit_softcapping": 50.0}, "capped attention"),
        ("Gemma3", GEMMA | {"use_bidirectional_attention": True}, "attention in both directions"),
    ],
)
def test_features_llama_cpp_lacks(architecture: str, settings: dict[str, Any], problem: str) -> None:
    config = tiny_model(f"{architecture}ForCausalLM", tiny_tokenizer(), **settings).config
    with pytest.raises(UnsupportedArchitecture, match=problem):
        architectures.find_architecture(config)
