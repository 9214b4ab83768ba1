"""Targets: the files of a run, a model or a GGUF, and keys that nobody else can read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from buleyean_rl.errors import EngineError, UsageError
from buleyean_rl.inference.gguf_context import gguf_slots
from buleyean_rl.inference.gguf_file import check_gguf
from buleyean_rl.live import prepare as preparing
from buleyean_rl.live.keys import find_key
from buleyean_rl.live.target import Target, TargetQuery, find_target
from tiny import tiny_run

Targets = dict[str, Target]


def test_a_run_is_its_base_and_its_adapter_made_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: Targets
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf = targets["tiny"].gguf
    target = preparing.prepare(TargetQuery(str(tiny_run(tmp_path / "my-run", Path(gguf))), tokenizer=True))
    assert (target.name, target.base, target.gguf) == ("my-run", "tiny", gguf)
    assert target.adapter is not None
    assert check_gguf(target.adapter, model=False).metadata["general.type"] == "adapter"
    made = Path(target.adapter).stat().st_mtime_ns
    monkeypatch.setattr(preparing, "write_adapter", lambda *_: pytest.fail("made twice"))
    assert preparing.prepare(TargetQuery(str(tmp_path / "my-run"), tokenizer=True)) == target
    assert Path(target.adapter).stat().st_mtime_ns >= made
    folder = preparing.prepare(TargetQuery(str(base)))
    assert (folder.name, folder.adapter, folder.tokenizer) == ("base", None, None)
    check_gguf(folder.gguf)
    with pytest.raises(UsageError, match="has its adapter already"):
        preparing.prepare(TargetQuery(str(tmp_path / "my-run"), lora="a.gguf"))


def test_a_file_is_what_its_header_says(targets: Targets) -> None:
    gguf, adapter = targets["first"].gguf, targets["first"].adapter
    assert adapter is not None
    assert asyncio.run(find_target(TargetQuery(gguf))) == Target("tiny", "tiny", gguf)
    assert asyncio.run(find_target(TargetQuery(gguf, lora=adapter))) == Target("first", "tiny", gguf, adapter)
    assert asyncio.run(find_target(TargetQuery(adapter, base=gguf))) == Target("first", "tiny", gguf, adapter)
    with pytest.raises(UsageError, match="--lora"):
        asyncio.run(find_target(TargetQuery(adapter)))
    with pytest.raises(EngineError, match="no such file"):
        asyncio.run(find_target(TargetQuery("none.gguf")))


def test_a_process_that_makes_files_says_what_is_wrong() -> None:
    with pytest.raises(EngineError, match="unknown model 'nonsense'"):
        asyncio.run(find_target(TargetQuery("nonsense")))


def test_slots_fit_into_memory(targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    header = check_gguf(targets["tiny"].gguf)  # 512 tokens
    assert gguf_slots(header, None, None) == (512, 8)
    assert gguf_slots(header, 100, 3) == (100, 3)
    monkeypatch.setattr("buleyean_rl.inference.gguf_context.affordable_tokens", lambda *_: 3000)
    assert gguf_slots(header, None, None) == (512, 2)
    monkeypatch.setattr("buleyean_rl.inference.gguf_context.affordable_tokens", lambda *_: 600)
    assert gguf_slots(header, None, None) == (300, 1)


def test_a_key_is_in_a_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "from-the-environment")
    assert find_key("A_KEY") == "from-the-environment"
    path = tmp_path / "key"
    path.write_text("secret\n")
    path.chmod(0o600)
    assert find_key("A_KEY", path) == "secret"
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        find_key("A_KEY", path)
    with pytest.raises(UsageError) as error:
        find_key("A_KEY", Path("sk-given-in-place-of-a-file"))
    assert "sk-given" not in str(error.value)
    path.chmod(0o600)
    for content in ("", "two words", "é"):
        path.write_text(content)
        with pytest.raises(UsageError, match="holds no key"):
            find_key("A_KEY", path)
