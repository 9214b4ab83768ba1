"""Model folders whose files say something else than their model: refused before weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from buleyean_rl.errors import ModelError
from buleyean_rl.models.model import open_model
from buleyean_rl.models.weights import check_model, eos_token_ids, load_base, load_config, load_tokenizer
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def change_json(folder: Path, changes: dict[str, Any], file: str = "config.json") -> None:
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda w: w.pop(UP), f"lack {UP}"),
        (lambda w: w.update({UP: w[UP][:-1].clone()}), rf"{UP} is \(95, 64\) in its files, and \(96, 64\)"),
        (lambda w: w.update({UP.replace(".1.", ".2."): w[UP].clone()}), "hold model.layers.2.mlp.up_proj.weight"),
        (lambda w: w.update({UP.replace("weight", "bias"): torch.ones(96)}), "hold model.layers.1.mlp.up_proj.bias"),
        (
            lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}),
            "ties the output head .* another head, lm_head.weight",
        ),
    ],
)
def test_weights_that_are_not_the_configurations_are_named(
    change: Callable[[dict[str, torch.Tensor]], object], problem: str, folder: Path
) -> None:
    change_weights(folder, change)
    with pytest.raises(ModelError, match=problem):
        check_model(str(folder))
    with pytest.raises(ModelError, match=problem):  # what every command asks for first
        _ = open_model(str(folder)).tokenizer


def test_an_equal_head_in_a_tied_model_is_no_other_head(folder: Path) -> None:
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    check_model(str(folder))
    model = load_base(str(folder))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_an_untied_model_without_its_head_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for part in (tiny_llama(tokenizer, tie=False), tokenizer):
        part.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda w: w.pop("lm_head.weight"))
    for load in (check_model, load_base):
        with pytest.raises(ModelError, match=r"lack lm_head.weight"):
            load(str(tmp_path))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(number: float, folder: Path) -> None:
    change_weights(folder, lambda w: w[UP].view(-1)[5:6].fill_(number))
    with pytest.raises(ModelError, match=f"{UP} holds NaN or infinity"):
        load_base(str(folder))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": ...}, "has no hidden_size"),
        ({"num_hidden_layers": None}, "has no num_hidden_layers"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"vocab_size": "400"}, "vocab_size is 400"),
        ({"head_dim": 2**40}, "head_dim is"),
        ({"model_type": ...}, "has no model_type"),
        ({"rms_norm_eps": float("nan")}, "NaN is no number"),
        ({"model_type": "weird", "auto_map": {"AutoConfig": "code.Config"}}, "own code .* which is never run"),
    ],
)
def test_a_configuration_that_the_files_do_not_bear_out_is_refused(
    changes: dict[str, Any], problem: str, folder: Path
) -> None:
    change_json(folder, changes)
    (folder / "code.py").write_text("raise SystemExit('ran')")
    for load in (load_config, check_model):
        with pytest.raises(ModelError, match=problem):
            load(str(folder))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[]", b"[" * 100_000])
def test_a_damaged_file_is_one_line(file: str, content: bytes, folder: Path) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        _ = open_model(str(folder)).tokenizer
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_shards_are_files_of_the_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(ModelError, match="no file of this folder"):
        check_model(str(folder))


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"such as '<tool>', and its embedding 400 rows"):
        _ = open_model(str(folder)).tokenizer


def test_a_folder_without_a_tokenizer_says_so(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(str(folder))


def test_a_template_that_is_no_program_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% if messages %}")
    with pytest.raises(ModelError, match="its chat template does not render a question"):
        load_tokenizer(str(folder))


def test_what_transformers_cannot_build_is_refused(folder: Path) -> None:
    change_json(folder, {"rope_parameters": {"rope_type": {}, "rope_theta": []}})
    with pytest.raises(ModelError, match="cannot load model"):
        _ = open_model(str(folder)).module
    with pytest.raises(ModelError, match="cannot load model"):
        _ = open_model(str(folder)).tokenizer


@pytest.mark.parametrize("model_type", ["llama", "weird"])
def test_a_models_own_code_is_never_run(model_type: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "code.py").write_text("raise SystemExit('ran')")
    maps = {"AutoConfig": "code.A", "AutoModelForCausalLM": "code.B", "AutoTokenizer": ["code.C", None]}
    change_json(folder, {"model_type": model_type, "auto_map": maps})
    change_json(folder, {"auto_map": maps, "tokenizer_class": "Weird"}, "tokenizer_config.json")
    refusals = []
    for load in (load_config, check_model, load_base, load_tokenizer):
        try:
            load(str(folder))
        except ModelError as error:
            refusals.append(str(error))
    assert len(refusals) >= 3 * (model_type == "weird")
    assert all("never run" in refusal and "trust_remote_code" not in refusal for refusal in refusals)
    assert not any(capfd.readouterr())  # nothing was asked


def test_of_the_generation_settings_only_the_end_tokens_are_kept(folder: Path) -> None:
    settings = {"eos_token_id": [2, 0], "repetition_penalty": 3.0, "use_cache": [], "max_new_tokens": 1}
    change_json(folder, settings, "generation_config.json")
    loaded = load_base(str(folder)).generation_config
    assert (loaded.eos_token_id, loaded.repetition_penalty, loaded.max_new_tokens) == ([2, 0], None, None)
    assert loaded.use_cache in (None, True)


def test_an_end_token_is_a_token(folder: Path) -> None:
    change_json(folder, {"eos_token_id": [2, 4000]}, "generation_config.json")
    with pytest.raises(ModelError, match="eos_token_id 4000 is none of its 400 tokens"):
        load_base(str(folder))
    with pytest.raises(ModelError, match="eos_token_id 4000 is none of its 400 tokens"):
        eos_token_ids(str(folder), load_config(str(folder)))
