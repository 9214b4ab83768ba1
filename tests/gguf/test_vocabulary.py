"""Tokenizers as GGUF metadata: every kind passes the gate, and what llama.cpp has no name for is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_export import read_metadata
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors, trainers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from buleyean_rl.errors import ExportError
from buleyean_rl.gguf import About, blueprint_from_model, export_gguf
from buleyean_rl.gguf.ollama import make_modelfile
from buleyean_rl.models import pre_tokenizers
from tiny import SENTENCES, tiny_llama, tiny_qwen2, tiny_tokenizer


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer, as Llama 2's is: characters, a table of merges, bytes for the rest."""
    backend = Tokenizer(token_models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
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
    backend = Tokenizer.from_str(backend.to_str())
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token }}{% endfor %}",
    )


def swallowing_tokenizer() -> PreTrainedTokenizerFast:
    """As Phi-3's: control tokens take the white space after them, but for the first and the end."""
    backend = byte_fallback_tokenizer().backend_tokenizer
    for token, takes_space in (("<|endoftext|>", False), ("<|user|>", True)):
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=takes_space)])
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    for token in spec["added_tokens"]:
        token["rstrip"] |= token["content"] == "</s>"
    backend = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>"
    )


@pytest.mark.parametrize("split", ["gpt-2", "qwen2"])  # smollm is that of all other tests
def test_every_split_passes_the_gate(split: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(split)
    path = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf", "f16").path
    assert read_metadata(path)["tokenizer.ggml.pre"] == split


def test_a_tokenizer_that_adds_bos(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    report = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf", "f32")
    assert report.notes == ()  # the template begins with BOS too, and llama.cpp does not add a second one
    assert read_metadata(report.path)["tokenizer.ggml.add_bos_token"] is True


def test_a_tokenizer_that_composes_characters(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    report = export_gguf(tiny_qwen2(tokenizer), tokenizer, tmp_path / "m.gguf", "f32")
    assert "NFC" in report.notes[0]


def test_a_tokenizer_with_byte_fallback(tmp_path: Path) -> None:
    tokenizer = byte_fallback_tokenizer()
    report = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf", "f32")
    assert read_metadata(report.path)["tokenizer.ggml.model"] == "llama"
    assert "BOS before a chat" in report.notes[0]


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="do not belong together"):
        export_gguf(tiny_llama(tiny_tokenizer()), tiny_tokenizer(vocab_size=450), tmp_path / "m.gguf")


def test_a_split_llama_cpp_has_no_name_for(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(ExportError, match="name for how it splits text is not known"):
        export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf")


def test_splits_and_their_names() -> None:
    tokenizer = tiny_tokenizer()
    for name in pre_tokenizers.NAMES:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.make_pre_tokenizer(name)
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        assert pre_tokenizers.find_name(spec["pre_tokenizer"]) == name
    assert pre_tokenizers.make_pre_tokenizer("unheard of") is None


def test_a_name_says_how_llama_cpp_reads_control_tokens(tmp_path: Path) -> None:
    """llama.cpp takes the white space after them in models with Phi-3 in their name, whatever the model."""
    swallowing = swallowing_tokenizer()
    names = {}
    for stem, tokenizer in (("my-model", swallowing), ("my-phi3", swallowing), ("beats-Phi-3", tiny_tokenizer())):
        path = tmp_path / f"{stem}.gguf"
        report = export_gguf(tiny_llama(tokenizer), tokenizer, path, about=About(name=stem))
        names[stem] = read_metadata(path)["general.name"]
        assert any("the name in the file" in note for note in report.notes) == (names[stem] != stem)
    assert names == {"my-model": "my-model (Phi-3)", "my-phi3": "my-phi3", "beats-Phi-3": "beats-Phi 3"}


def test_the_templates_end_token_ends_an_answer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # as a base model's, though the template ends answers with another
    report = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf")
    assert read_metadata(tmp_path / "m.gguf")["tokenizer.ggml.eot_token_id"] == tokenizer.vocab["<|im_end|>"]
    assert any("ends an answer with '<|im_end|>'" in note for note in report.notes)
    blueprint = blueprint_from_model(tiny_llama(tokenizer), tokenizer)
    text, _ = make_modelfile(tmp_path / "m.gguf", tokenizer, sorted(blueprint.end_tokens))
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert 'PARAMETER stop "<|endoftext|>"' in text
