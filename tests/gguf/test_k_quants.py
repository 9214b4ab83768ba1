"""K-quants: llama.cpp's own quantiser in another process, its files proven like any other."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_export import needs_llama_cpp_python

import gguf
from buleyean_rl.errors import ExportError, ParityError
from buleyean_rl.gguf import blueprint_from_model, check_parity, export_gguf, k_quants, write_gguf
from tiny import tiny_llama, tiny_tokenizer

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.slow
@needs_llama_cpp_python
@pytest.mark.parametrize("quant", ["q2_k", "q4_k_m", "q6_k"])
def test_k_quants_pass_the_gate(quant: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    report = export_gguf(tiny_llama(tokenizer, **WIDE), tokenizer, tmp_path / "m.gguf", quant)
    assert report.parity is not None
    assert report.parity.tensors == 20
    assert not report.fallbacks
    matrices = {kind for name, kind in types(report.path).items() if not name.endswith("norm.weight")}
    assert matrices <= {f"Q{bits}_K" for bits in range(2, 7)}
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.slow
@needs_llama_cpp_python
def test_several_quantisations_come_from_one_merge(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    read: list[tuple[int, int]] = []
    paths = {quant: tmp_path / f"{quant}.gguf" for quant in ("q4_k_m", "q8_0", "q6_k")}
    planned = blueprint_from_model(tiny_llama(tokenizer, **WIDE), tokenizer)
    reports = write_gguf(planned, paths, progress=lambda *done: read.append(done))
    assert [report.quant for report in reports] == list(paths)
    assert read == [(i, 20) for i in range(1, 21)]  # every tensor once
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q4_k_m.gguf", "q6_k.gguf", "q8_0.gguf"]
    kinds = {quant: gguf.GGUFReader(path).fields["general.file_type"].contents() for quant, path in paths.items()}
    assert kinds == {"q4_k_m": 15, "q8_0": 7, "q6_k": 18}


@pytest.mark.slow
@needs_llama_cpp_python
def test_odd_widths_fall_back(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    report = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf", "q4_k_m")
    assert "blk.0.ffn_up.weight" in report.fallbacks
    assert types(report.path)["blk.0.ffn_up.weight"] == "Q5_0"


@pytest.mark.slow
@needs_llama_cpp_python
def test_a_flipped_bit_is_caught(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer, **WIDE)
    path = export_gguf(model, tokenizer, tmp_path / "m.gguf", "q4_k_m", gate=False).path
    tensor = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.0.ffn_up.weight")
    tensor.data.reshape(-1).view(np.uint8)[100] ^= 1
    with pytest.raises(ParityError, match=r"blk.0.ffn_up.weight \(Q4_K\) differs from the model's in 1 of"):
        check_parity(model, tokenizer, path)


@pytest.mark.slow
@needs_llama_cpp_python
def test_what_llama_cpp_says_when_it_fails(tmp_path: Path) -> None:
    source = tmp_path / "bad.gguf"
    source.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 64)
    with pytest.raises(ExportError, match=r"llama.cpp failed while making q4_k_m: .*(load|read|quantize)"):
        k_quants.quantise_file(source, tmp_path / "out.gguf", "q4_k_m")


def test_an_abort_does_not_take_us_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aborts = "import os, sys; print('GGML_ASSERT(n % 256 == 0) failed', file=sys.stderr, flush=True); os.abort()"
    monkeypatch.setattr(k_quants, "QUANTISE_PROGRAM", aborts)
    monkeypatch.setattr(k_quants, "is_installed", lambda: True)
    with pytest.raises(ExportError, match=r"was stopped by signal 6 while making q6_k: GGML_ASSERT\(n % 256"):
        k_quants.quantise_file(tmp_path / "a.gguf", tmp_path / "b.gguf", "q6_k")


def test_without_the_extra_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(k_quants, "is_installed", lambda: False)
    tokenizer = tiny_tokenizer()
    with pytest.raises(ExportError, match="pip install llama-cpp-python"):
        export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf", "q4_k_m")
    assert not list(tmp_path.iterdir())
