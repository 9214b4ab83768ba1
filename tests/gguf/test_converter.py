"""Other architectures: a stand-in of llama.cpp's converter, written here for GPT-2, behind the same gate."""

from __future__ import annotations

from pathlib import Path

import pytest

import gguf
from buleyean_rl.errors import ExportError, ParityError, UnsupportedArchitecture
from buleyean_rl.gguf.export import export
from tiny import tiny_model, tiny_tokenizer

CONVERTER = """
import sys
from pathlib import Path

import gguf, torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer
from buleyean_rl.gguf.vocabulary import tokenizer_metadata

source, _, target, _, kind = sys.argv[1:]
assert kind == "f32"
config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
writer = gguf.GGUFWriter(target, "gpt2")
writer.add_context_length(config.n_positions)
writer.add_embedding_length(config.n_embd)
writer.add_feed_forward_length(4 * config.n_embd)
writer.add_block_count(config.n_layer)
writer.add_head_count(config.n_head)
writer.add_layer_norm_eps(config.layer_norm_epsilon)
for key, value in tokenizer_metadata(tokenizer, config.vocab_size).items():
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)]
    add(key, value)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
for name, tensor in load_file(Path(source) / "model.safetensors").items():
    if "c_" in name and name.endswith("weight"):  # GPT-2 keeps these the other way round
        tensor = tensor.T
    stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
    writer.add_tensor(stored, PLANTED(stored, tensor).contiguous().numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer("gpt-2")
    settings = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
    for part in (tiny_model("GPT2LMHeadModel", tokenizer, **settings), tokenizer):
        part.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def checkout(folder: Path, planted: str = "lambda name, tensor: tensor") -> Path:
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(f"PLANTED = {planted}\n{CONVERTER}")
    return folder


@pytest.mark.slow
def test_the_converters_file_is_proven_and_quantised(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(checkout(tmp_path / "llama.cpp")))
    report = export(str(gpt2), tmp_path / "m.gguf", ["f32", "q8_0"])
    full, quantised = report["files"]
    assert full["parity"]["positions"] == 32
    assert full["parity"]["divergence"] < 1e-4
    assert "compared in full precision" in quantised["notes"][-1]
    fields = gguf.GGUFReader(quantised["path"]).fields
    assert fields["general.architecture"].contents() == "gpt2"
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt2", "llama.cpp", "m-F32.gguf", "m-Q8_0.gguf"]


@pytest.mark.slow
def test_a_wrong_conversion_is_caught(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = "lambda name, tensor: tensor.flip(0) if name == 'blk.0.attn_output.weight' else tensor"
    monkeypatch.setenv("LLAMA_CPP_DIR", str(checkout(tmp_path / "llama.cpp", planted)))
    with pytest.raises(ParityError, match="log-probabilities differ"):
        export(str(gpt2), tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt2", "llama.cpp"]


def test_without_a_checkout_it_is_named(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    with pytest.raises(UnsupportedArchitecture, match=r"'gpt2'; supported are .*set LLAMA_CPP_DIR"):
        export(str(gpt2), tmp_path / "m.gguf")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(ExportError, match=r"has no convert_hf_to_gguf.py"):
        export(str(gpt2), tmp_path / "m.gguf")


def test_what_the_converter_says_when_it_fails(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkout(tmp_path / "llama.cpp")
    (folder / "convert_hf_to_gguf.py").write_text("raise SystemExit('Model GPT2LMHeadModel is not supported')")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(folder))
    with pytest.raises(ExportError, match=r"convert_hf_to_gguf.py failed: Model GPT2LMHeadModel is not supported"):
        export(str(gpt2), tmp_path / "m.gguf")
