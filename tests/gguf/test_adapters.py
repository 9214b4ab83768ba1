"""Adapters: merged tensor by tensor as PEFT does it, or left in a file of their own that llama.cpp applies."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_export import needs_llama_cpp_python

import gguf
from buleyean_rl.errors import ExportError, ModelError, ParityError
from buleyean_rl.gguf import (
    adapter_file,
    architectures,
    blueprint,
    blueprint_from_model,
    blueprint_from_run,
    export_gguf,
    write_adapter,
    write_gguf,
)
from buleyean_rl.inference.gguf_engines import open_gguf
from buleyean_rl.inference.protocol import Adapter
from buleyean_rl.models import run_folder
from tiny import tiny_llama, tiny_model, tiny_qwen2, tiny_run, tiny_tokenizer

LOW_RANK: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3, "layers.1.mlp.down_proj": 32}},
}
OTHER: dict[str, dict[str, Any]] = {
    "saved": {"modules_to_save": ["norm"]},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
}


def make_base(form: str, folder: Path) -> Path:
    """The same model in every form a base comes in."""
    tokenizer = tiny_tokenizer()
    # transformers reads no biases from a GGUF of this architecture
    model = tiny_llama(tokenizer, attention_bias=form != "gguf")
    if form == "gguf":
        return export_gguf(model, tokenizer, folder / "base.gguf", "f32", gate=False).path
    model.save_pretrained(folder / "base", max_shard_size="100KB" if form == "shards" else "5GB")
    tokenizer.save_pretrained(folder / "base")
    assert (len(list(folder.glob("base/*.safetensors"))) > 1) is (form == "shards")
    return folder / "base"


@pytest.mark.parametrize(
    ("form", "adapter"),
    [
        ("folder", "plain"),
        ("shards", "patterns"),
        ("gguf", "rslora"),
        ("folder", "saved"),
        ("shards", "bias"),
        ("gguf", "dora"),
    ],
)
def test_merging_by_tensor_is_merging_as_peft_does(form: str, adapter: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", make_base(form, tmp_path), **(LOW_RANK | OTHER)[adapter])
    streamed, expected = blueprint_from_run(str(run)), blueprint_from_model(*run_folder.merge_run(run))
    assert streamed.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(streamed.tensors[name].read_all(), tensor.read_all(), rtol=1e-5, atol=1e-6)
    assert write_gguf(streamed, {"f32": tmp_path / "m.gguf"})[0].parity is not None


def test_the_adapter_changes_what_is_exported(base: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", base)
    merged, plain = blueprint_from_run(str(run)).tensors, blueprint_from_run(str(base)).tensors
    changed = {name for name in plain if not torch.equal(merged[name].read_all(), plain[name].read_all())}
    assert changed == {f"blk.{i}.{name}.weight" for i in (0, 1) for name in ("attn_q", "attn_k", "attn_v", "ffn_down")}


@pytest.mark.parametrize(
    ("form", "adapter", "engine"),
    [
        ("shards", "patterns", "xllamacpp"),
        ("gguf", "rslora", "xllamacpp"),
        pytest.param("folder", "plain", "llama-cpp-python", marks=[pytest.mark.slow, needs_llama_cpp_python]),
    ],
)
def test_the_adapter_file_is_the_merged_file(form: str, adapter: str, engine: str, tmp_path: Path) -> None:
    """In llama.cpp itself: base + file at scale 1 is the merged file, at scale 0 the base, at 0.5 neither."""
    base = make_base(form, tmp_path)
    run = tiny_run(tmp_path / "run", base, **LOW_RANK[adapter])
    report = write_adapter(run, tmp_path / "a.gguf", "f32", engine=engine)
    assert report.parity is not None
    assert report.parity.positions == 32
    if not base.suffix:
        base = write_gguf(blueprint_from_run(str(base)), {"f32": tmp_path / "b.gguf"})[0].path
    merged = write_gguf(blueprint_from_run(str(run)), {"f32": tmp_path / "m.gguf"}, gate=False)[0].path
    ids = tiny_tokenizer()("The quick brown fox jumps over the lazy dog.")["input_ids"]

    def scores(path: Path, scale: float | None = None) -> np.ndarray:
        applied = None if scale is None else Adapter(report.path, scale)
        with closing(open_gguf(path, engine, context=128, exact=True, threads=1, adapter=applied)) as opened:
            return np.array(opened.logprobs([ids])[0])

    expected, plain = scores(merged), scores(base)
    assert np.abs(expected - plain).max() > 0.1
    assert np.abs(scores(base, 1.0) - expected).max() < 2e-3
    assert np.abs(scores(base, 0.0) - plain).max() < 1e-4
    half = scores(base, 0.5)
    assert min(np.abs(half - expected).max(), np.abs(half - plain).max()) > 0.01


def test_what_an_adapter_file_says(base: Path, tmp_path: Path) -> None:
    report = write_adapter(tiny_run(tmp_path / "run", base), tmp_path / "a.gguf")
    reader = gguf.GGUFReader(report.path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    assert (metadata["general.type"], metadata["adapter.type"]) == ("adapter", "lora")
    assert (metadata["adapter.lora.alpha"], metadata["general.architecture"]) == (8.0, "llama")
    assert len(reader.tensors) == 16
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F16"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "run"]


@pytest.mark.parametrize("kind", ["Phi3ForCausalLM", "Gemma3ForCausalLM"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    gemma = {"query_pre_attn_scalar": 16} if "Gemma" in kind else {}
    for part in (tiny_model(kind, tokenizer, head_dim=16, **gemma), tokenizer):
        part.save_pretrained(tmp_path / "base")
    names = ["qkv_proj", "gate_up_proj"] if "Phi" in kind else ["q_proj", "o_proj", "gate_proj"]
    run = tiny_run(tmp_path / "run", tmp_path / "base", target_modules=names)
    assert write_adapter(run, tmp_path / "a.gguf", "f32").parity is not None
    assert write_gguf(blueprint_from_run(str(run)), {"q8_0": tmp_path / "m.gguf"})[0].parity is not None


# --- what is caught, and what is refused -------------------------------------------------------------------


def test_an_unpermuted_adapter_is_caught(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path / "run", base)
    monkeypatch.setattr(adapter_file, "_rescale_b", lambda _b, pair, _alpha: pair.b)
    with pytest.raises(ParityError, match="log-probabilities differ"):
        write_adapter(run, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_adapter_on_the_wrong_tensor_is_caught(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path / "run", base, target_modules=["k_proj", "v_proj"])
    right = architectures.tensor_layouts

    def crossed(config: Any, parameters: list[str]) -> dict[str, architectures.TensorLayout]:
        layouts = right(config, parameters)
        k, v = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv")
        return layouts | {k: layouts[v], v: layouts[k]}

    monkeypatch.setattr(blueprint, "tensor_layouts", crossed)
    with pytest.raises(ParityError, match="log-probabilities differ"):
        write_adapter(run, tmp_path / "a.gguf")


def test_an_adapter_at_another_scale_is_caught(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path / "run", base, use_rslora=True)
    monkeypatch.setattr(adapter_file, "_rescale_b", lambda b, _pair, _alpha: b)  # as if it were plain LoRA
    with pytest.raises(ParityError, match="log-probabilities differ"):
        write_adapter(run, tmp_path / "a.gguf")


def test_a_gguf_base_with_more_than_transformers_reads(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer, attention_bias=True)
    path = export_gguf(model, tokenizer, tmp_path / "base.gguf", "f32", gate=False).path
    with pytest.raises(ExportError, match=r"transformers does not read its tensor blk.0.attn_k.bias"):
        blueprint_from_run(str(path))


@pytest.mark.parametrize(
    ("kind", "problem"),
    [("saved", r"replaces model.layers.0.input_layernorm.weight whole"), ("dora", "DoRA"), ("bias", "trained biases")],
)
def test_what_an_adapter_file_cannot_say(kind: str, problem: str, base: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", base, **OTHER[kind])
    with pytest.raises(ExportError, match=rf"{problem}.*export the merged model instead"):
        write_adapter(run, tmp_path / "a.gguf")


def test_an_adapter_of_the_tied_output(base: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", base)
    tensors = load_file(run / "adapter_model.safetensors")
    for side in "AB":
        tensors[f"base_model.model.lm_head.lora_{side}.weight"] = torch.zeros(4, 4)
    save_file(tensors, run / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="the adapter updates the output matrix"):
        write_adapter(run, tmp_path / "a.gguf")


def test_an_adapter_of_another_model(base: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", base)
    other = tmp_path / "other"
    for part in (tiny_qwen2(tiny_tokenizer(), hidden_size=32, num_key_value_heads=1), tiny_tokenizer()):
        part.save_pretrained(other)
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    with pytest.raises(ModelError, match="base model"):
        blueprint_from_run(str(run))
    with pytest.raises(ExportError, match="base model"):
        write_adapter(run, tmp_path / "a.gguf")


def test_no_adapter_at_all(base: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", base)
    with pytest.raises(ExportError, match="written as f32, f16, bf16, not as 'q4_k_m'"):
        write_adapter(run, tmp_path / "a.gguf", "q4_k_m")
    (run / "adapter_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ExportError, match=r"adapter_model.safetensors: cannot be read"):
        blueprint_from_run(str(run))
    shutil.copytree(run, tmp_path / "ia3")
    config = json.loads((run / "adapter_config.json").read_text())
    (tmp_path / "ia3/adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(ExportError, match="of type 'IA3'; only LoRA"):
        blueprint_from_run(str(tmp_path / "ia3"))


@pytest.mark.parametrize("side", "AB")
def test_an_adapter_with_an_empty_tensor(side: str, base: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", base)
    tensors = load_file(run / "adapter_model.safetensors")
    name = f"base_model.model.model.layers.0.self_attn.v_proj.lora_{side}.weight"
    tensors[name] = torch.zeros(0, tensors[name].shape[1])
    save_file(tensors, run / "adapter_model.safetensors")
    for export in (lambda: blueprint_from_run(str(run)), lambda: write_adapter(run, tmp_path / "a.gguf")):
        with pytest.raises(ExportError, match=r"v_proj\.lora_.* is empty: the file is damaged"):
            export()
