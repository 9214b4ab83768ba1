"""One model: what is determined once, what it says of itself, how a command hands it on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from buleyean_rl.cli import main
from buleyean_rl.errors import ModelError
from buleyean_rl.kernels.build import KernelStatus
from buleyean_rl.models import model as module
from buleyean_rl.models import source, views
from buleyean_rl.models.layout_probe import probe_layout
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.models.run_files import read_run
from buleyean_rl.models.run_folder import find_model, run_base
from buleyean_rl.models.source import resolve
from buleyean_rl.training import guard
from tiny import tiny_llama, tiny_run, tiny_tokenizer

ADAPTER = lora_config(4, 8, 0.0, None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a GGUF file is converted to, once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, cache: Path, use_cache: Callable[[Path], None]) -> Counter[str]:
    """How often names are resolved, weights hashed, layouts probed and heads checked."""
    counted: Counter[str] = Counter()

    def count(what: str, function: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            if not (what == "resolve" and isinstance(args[0], source.Source)):
                counted[what] += 1
            return function(*args, **kwargs)

        return counting

    use_cache(cache)
    resolving = count("resolve", source.resolve)
    for name in ("models.run_folder", "models.weights", "training.run", "mining.walk"):
        monkeypatch.setattr(f"buleyean_rl.{name}.resolve", resolving)
    monkeypatch.setattr(source, "file_sha256", count("hash", source.file_sha256))
    monkeypatch.setattr(module, "probe_layout", count("probe", probe_layout))
    monkeypatch.setattr(views, "output_head", count("head", views.output_head))
    return counted


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from buleyean_rl.gguf import export_gguf

    path, tokenizer = tmp_path_factory.mktemp("gguf") / "base.gguf", tiny_tokenizer()
    export_gguf(tiny_llama(tokenizer), tokenizer, path, "f32", gate=False)
    return path


def test_training_determines_everything_once(
    calls: Counter[str],
    gguf: Path,
    rejections: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guard, "MAX_PROMPTS", 1)
    words = ["train", str(rejections), "--model", str(gguf), "-o", str(tmp_path / "run"), "--max-steps", "6"]
    assert main([*words, "--batch-size", "5", "--lr", "1e-3"]) == 0  # three epochs: with a reference cache
    assert calls == {"resolve": 1, "hash": 1, "probe": 1, "head": 1}
    err = capsys.readouterr().err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["format"] == 2
    assert f"compute: {run['compute']}" in err
    assert "packed sequences" in run["compute"]
    assert err.count("compute: ") == 1


def test_mining_determines_everything_once(
    calls: Counter[str], gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    words = ["mine", str(tmp_path / "p.txt"), "--model", str(gguf), "-o", str(tmp_path / "r.jsonl")]
    assert main([*words, "--engine", "transformers", "--max-tokens", "4", "--judge", "length:9999-"]) == 0
    assert calls == {"resolve": 1, "hash": 1}
    assert "compute: " in capsys.readouterr().err


def test_evaluating_determines_everything_once(
    calls: Counter[str], gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path / "run", gguf)
    calls.clear()
    assert main(["evaluate", str(run), "--limit", "2", "--max-tokens", "3", "--json", "-"]) == 0
    assert calls["resolve"] == 1
    assert (calls["hash"], calls["probe"], calls["head"]) == (1, 1, 1)
    assert capsys.readouterr().err.count("compute: ") == 1


def test_a_walk_hashes_its_base_once(
    calls: Counter[str], gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_PROMPTS", 1)
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {number}" for number in range(4)))
    (tmp_path / "h.txt").write_text("\n".join(f"unseen {number}" for number in range(2)))
    words = ["walk", str(tmp_path / "p.txt"), "--held-out", str(tmp_path / "h.txt"), "--model", str(gguf)]
    words += ["-o", str(tmp_path / "w"), "--rounds", "1", "--judge", "length:9999-", "--max-tokens", "4"]
    assert main([*words, "--epochs", "1", "--max-drift", "99"]) == 0
    assert calls["resolve"] == 1
    assert calls["hash"] == 2  # the base, and the round's adapter
    assert (calls["probe"], calls["head"]) == (3, 3)  # training; the base and the round on neutral texts


def test_exporting_determines_everything_once(calls: Counter[str], gguf: Path, tmp_path: Path) -> None:
    assert main(["export", str(gguf), "-o", str(tmp_path / "again.gguf"), "--quant", "f16"]) == 0
    assert calls == {"resolve": 1, "hash": 1}


# --- what it says


def test_a_model_describes_its_computation(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(module.abi, "available", lambda *_: True)
    for status, words in (
        (KernelStatus("AVX512-BF16", None), "AVX512-BF16 kernels"),
        (KernelStatus(None, "no C compiler: install gcc or clang"), "no kernels (no C compiler: install gcc or clang)"),
    ):
        monkeypatch.setattr(module.build, "status", lambda status=status: status)
        model = open_model(str(base), dtype=torch.float32)
        assert model.describe() == f"compute: fp32, {words}, 2 threads"
        model.attach_adapter(ADAPTER)
        assert model.describe().startswith(f"compute: fp32, {words}")
        assert model.describe().endswith("packed sequences, 2 threads")


def test_a_model_has_its_parts(base: Path) -> None:
    model = open_model(str(base), dtype=torch.float32)
    assert model.tokenizer.chat_template == tiny_tokenizer().chat_template
    assert model.module is model.plain
    assert not model.has_adapter
    ids = torch.arange(4, 24).unsqueeze(0)
    with torch.no_grad(), model.eval_mode():
        expected = model.module(ids).logits
        model.attach_adapter(ADAPTER)
        for name, parameter in model.module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        assert not torch.allclose(model.module(ids).logits, expected)
        with model.adapter_disabled():
            torch.testing.assert_close(model.module(ids).logits, expected, rtol=1e-4, atol=1e-4)
        hidden = model.backbone(ids, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(model.head(hidden), model.module(ids).logits[0], rtol=1e-4, atol=1e-4)
    assert model.module.peft_config["default"].base_model_name_or_path == str(base)
    with pytest.raises(ModelError, match="has an adapter already"):
        model.attach_adapter(ADAPTER)


def test_a_run_is_merged_or_keeps_its_adapter(base: Path, tmp_path: Path) -> None:
    run, ids = tiny_run(tmp_path / "run", base), torch.arange(4, 24).unsqueeze(0)
    merged, keep_adapter = (open_model(str(run), dtype=torch.float32, keep_adapter=switch) for switch in (False, True))
    with torch.no_grad():
        expected = keep_adapter.module(ids).logits
        torch.testing.assert_close(merged.module(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (merged.has_adapter, keep_adapter.has_adapter) == (False, True)


def test_models_of_one_base_share_its_weights_and_nothing_else(base: Path, tmp_path: Path) -> None:
    run, ids = tiny_run(tmp_path / "run", base), torch.arange(4, 24).unsqueeze(0)
    plain, alone = (open_model(str(name), dtype=torch.float32, keep_adapter=True) for name in (base, run))
    learning = plain.with_source(plain.source)
    with torch.no_grad():
        expected = plain.module(ids).logits
        trained = plain.with_source(alone.source)
        assert torch.equal(trained.module(ids).logits, alone.module(ids).logits)
        learning.attach_adapter(ADAPTER)
        for name, parameter in learning.module.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        assert not torch.equal(learning.module(ids).logits, expected)
        torch.testing.assert_close(plain.module(ids).logits, expected)
        torch.testing.assert_close(trained.module(ids).logits, alone.module(ids).logits)
        with trained.adapter_disabled():
            torch.testing.assert_close(trained.module(ids).logits, expected)
    weights = {weight.data_ptr() for weight in plain.base_module.parameters()}
    for model in (learning, trained):
        assert weights <= {weight.data_ptr() for weight in model.module.parameters()}


def test_a_model_in_memory_is_a_model() -> None:
    inside = tiny_llama(tiny_tokenizer())
    model = Model.from_module(inside, tiny_tokenizer())
    assert model.module is inside
    assert (model.dtype, model.device.type, model.layout) == (torch.float32, "cpu", "packed")
    with pytest.raises(ModelError, match="is a model in memory"):
        _ = model.source.fingerprint


# --- what its fingerprint is


class Hub:
    """A stand-in for the Hub's client: a commit, or nobody who answers."""

    commit: str | None = "a" * 40

    def model_info(self, repository: str, timeout: float) -> Any:  # noqa: ARG002
        if self.commit is None:
            raise ConnectionError("offline")
        return type("Info", (), {"sha": self.commit})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The Hub and an empty cache of it."""
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("buleyean_rl.models.hub.is_reachable", lambda: True)
    monkeypatch.setattr(Hub, "commit", "a" * 40)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_hub_models_fingerprint_is_its_commit(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("org/model").fingerprint == "a" * 16
    monkeypatch.setattr(Hub, "commit", "b" * 40)
    assert resolve("org/model").fingerprint == "b" * 16
    assert resolve("org/model").revision == "b" * 40
    # offline, what is cached is what is loaded
    monkeypatch.setattr(Hub, "commit", None)
    with pytest.raises(ModelError, match=r"'org/model': the Hub cannot be reached and it is not cached"):
        _ = resolve("org/model").fingerprint
    snapshot = hub / "models--org--model" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (hub / "models--org--model" / "refs").mkdir()
    (hub / "models--org--model" / "refs" / "main").write_text("c" * 40)
    assert resolve("org/model").fingerprint == "c" * 16


@pytest.mark.usefixtures("hub")
def test_a_hub_model_is_loaded_at_the_commit_that_was_fingerprinted(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revisions: list[str] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, revision, **__: revisions.append(revision) or str(base)
    )
    model = open_model("org/model")
    assert model.source.fingerprint == "a" * 16
    monkeypatch.setattr(Hub, "commit", "b" * 40)  # somebody uploads another version meanwhile
    assert model.tokenizer.eos_token == "<|im_end|>"
    assert set(revisions) == {"a" * 40}


def test_a_runs_fingerprint_is_of_base_and_adapter(base: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", base)
    located = find_model(run)
    plain = resolve(str(base)).fingerprint
    assert located.fingerprint.startswith(f"{plain}+")
    adapter = run / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes() + b" ")
    assert find_model(run).fingerprint != located.fingerprint
    assert resolve(located).fingerprint == plain


# --- runs of an earlier format


def test_a_run_of_another_format_is_refused(base: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", base)
    (run / "run.json").write_text('{"format": 2, "objective": "complement"}')
    assert run_base(run) == str(base)
    assert read_run(run)["objective"] == "complement"
    (run / "run.json").write_text('{"objective": "complement"}')
    for read in (run_base, read_run, find_model):
        with pytest.raises(ModelError, match=r"run\.json is of format 1, .* train the run again") as caught:
            read(run)
        assert "\n" not in str(caught.value)
