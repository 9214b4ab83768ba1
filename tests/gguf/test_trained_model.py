"""The model that was trained, against what an export merged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_export import write_unchecked

from buleyean_rl.errors import ParityError
from buleyean_rl.gguf import blueprint_from_run
from buleyean_rl.gguf.export import export
from buleyean_rl.gguf.tensors import shift
from buleyean_rl.gguf.trained_model import compare_with_trained
from buleyean_rl.models.run_folder import find_model
from gguf import GGUFReader
from tiny import tiny_run


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
)
def test_what_is_merged_is_what_was_trained(lora: dict[str, Any], base: Path, tmp_path: Path) -> None:
    run = find_model(tiny_run(tmp_path / "run", base, **lora))
    blueprint = blueprint_from_run(run)
    comparison = compare_with_trained(run, blueprint)
    assert comparison.divergence < comparison.tolerance
    assert comparison.precision is None
    name = "blk.1.attn_v.weight"
    wrong = replace(blueprint, tensors={**blueprint.tensors, name: shift(blueprint.tensors[name], 0.05)})
    with pytest.raises(ParityError, match="not the one that was trained"):
        compare_with_trained(run, wrong)


def test_a_base_trained_in_another_precision_is_reported(base: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", base)
    (run / "run.json").write_text(json.dumps({"format": 2, "compute": "bf16, AVX2 kernels"}))
    report = export(str(run), tmp_path / "m.gguf", ["f16"])
    assert report["trained"]["precision"] == "bf16"
    assert 0 < report["trained"]["divergence"] < report["trained"]["tolerance"]


def test_an_adapters_own_head_is_in_the_file(base: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", base, modules_to_save=["lm_head"])
    export(str(run), tmp_path / "m.gguf", ["f32"])
    names = {tensor.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert {"output.weight", "token_embd.weight"} <= names


@pytest.mark.parametrize(("bits", "passes"), [(8, True), (4, False)])
def test_a_base_quantised_for_training_has_a_limit(bits: int, passes: bool, base: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", base)
    report = {"format": 2, "compute": f"bf16 from weights of {bits}.5 bits, kernels", "config": {"base_bits": bits}}
    (run / "run.json").write_text(json.dumps(report))
    if passes:
        trained = export(str(run), tmp_path / "m.gguf", ["f16"])["trained"]
        assert trained["precision"] == f"{bits} bits"
        assert 0 < trained["divergence"] < trained["tolerance"] == 1e-2
    else:
        with pytest.raises(ParityError, match="was quantised to 4 bits; train with --base-bits 8 or 16"):
            export(str(run), tmp_path / "m.gguf", ["f16"])


def test_an_adapter_on_a_gguf_file_is_merged_into_its_numbers(tmp_path: Path) -> None:
    path, _, _ = write_unchecked(tmp_path)
    run = find_model(tiny_run(tmp_path / "run", path))
    comparison = compare_with_trained(run, blueprint_from_run(run))
    assert comparison.precision is None
    assert comparison.divergence < comparison.tolerance
