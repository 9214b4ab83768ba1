"""Adapters whose files are not what their configuration and base ask for; and tied heads when one is merged."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from buleyean_rl.errors import ModelError
from buleyean_rl.models.model import open_model
from buleyean_rl.models.run_files import RUN_FORMAT
from buleyean_rl.models.run_folder import check_files, find_model, load_run, merge_run
from buleyean_rl.models.source import resolve
from tiny import tiny_run, tiny_tokenizer

IDS = torch.tensor([[5, 17, 33, 60]])
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    return tiny_run(tmp_path / "run", base)


def test_a_base_whose_weights_were_replaced_is_refused(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "base.gguf"
    file.write_bytes(b"GGUF of the run")
    config = json.loads((run / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(file)}
    (run / "adapter_config.json").write_text(json.dumps(config))
    trained_on = resolve(str(file)).fingerprint
    (run / "run.json").write_text(json.dumps({"format": RUN_FORMAT, "numerics": {"weights": trained_on}}))
    with pytest.raises(ModelError) as error:
        check_files(find_model(run))
    assert "other files" not in str(error.value)  # it is damaged, as it was
    file.write_bytes(b"GGUF of another")
    with pytest.raises(ModelError, match=r"was trained on other files than .*base\.gguf has now"):
        check_files(find_model(run))


def test_a_base_folder_is_known_by_its_content(base: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", folder := shutil.copytree(base, tmp_path / "base"))
    numerics = {"weights": resolve(str(base)).fingerprint}
    (run / "run.json").write_text(json.dumps({"format": RUN_FORMAT, "numerics": numerics}))
    (folder / "notes.md").write_text("copied")
    check_files(find_model(run))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"was trained on other files than .*base has now"):
        check_files(find_model(run))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda w: w.pop(A), f"lacks {A}"),
        (lambda w: w.update({A.replace("lora_A", "lora_C"): w[A].clone()}), "holds .*lora_C"),
        (lambda w: w.update({A: w[A][:, :-1].clone()}), rf"{A} is \(4, 63\), and \(4, 64\) on its base"),
        (lambda w: w[A].view(-1)[3:4].fill_(float("nan")), f"{A} holds NaN"),
    ],
)
def test_tensors_that_are_not_the_configurations_are_named(
    change: Callable[[dict[str, torch.Tensor]], object], problem: str, run: Path
) -> None:
    weights = load_file(run / "adapter_model.safetensors")
    change(weights)
    save_file(weights, run / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=problem):
        load_run(run)
    with pytest.raises(ModelError, match=problem):  # what every command asks for first
        _ = open_model(str(run)).tokenizer


def test_a_pickled_adapter_is_never_opened(run: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (run / "adapter_model.safetensors").unlink()
    (run / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    for load in (load_run, find_model):
        with pytest.raises(ModelError, match=r"adapter_model.bin is a pickle"):
            load(run)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"base_model_name_or_path": None}, "has no base_model_name_or_path"),
        ({"peft_type": "NONSENSE"}, "cannot load model"),
        ({"alpha_pattern": 7}, "alpha_pattern is not a number for each module"),
        ({"r": 2**40}, "on its base model: they do not belong together"),
        ({"target_modules": ["no_such_layer"]}, "no_such_layer"),
    ],
)
def test_a_configuration_that_the_file_does_not_bear_out_is_refused(
    changes: dict[str, Any], problem: str, run: Path
) -> None:
    config = run / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ModelError, match=problem):
        load_run(run)


def test_without_a_tokenizer_the_bases_is_taken(run: Path) -> None:
    for file in run.glob("*token*"):
        file.unlink()
    (run / "chat_template.jinja").unlink(missing_ok=True)
    assert open_model(str(run)).tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_a_tied_head_is_merged_as_it_was_trained(lora: dict[str, Any], base: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", base, **lora)
    with torch.no_grad():
        expected = load_run(run)[0](IDS).logits
        merged = merge_run(run)[0]
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not merged.config.tie_word_embeddings
