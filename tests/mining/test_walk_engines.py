"""A walk mines through servers: each round's adapter reaches them before they are asked again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.cli import main
from buleyean_rl.gguf import export_gguf
from buleyean_rl.inference import llama_server
from buleyean_rl.mining import walk_engines
from buleyean_rl.models.weights import load_base, load_tokenizer
from quick import make_runs_quick
from vllm import BASE, standing_in_for_vllm


@pytest.fixture
def work(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a walk with the tiny model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_runs_quick(monkeypatch)
    Path("p.txt").write_text("\n".join(f"prompt {number}" for number in range(12)))
    Path("h.txt").write_text("\n".join(f"held {number}" for number in range(6)))
    words = f"walk p.txt --held-out h.txt --model {base} -o w --max-tokens 12 --max-drift 99 --epochs 1 --lr 1e-3"
    return words.split()


def test_a_walk_through_servers_of_vllm(work: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def answer(model: str, prompt: str) -> str:
        """The base says no to all, the first round to a third of the prompts, the next to none."""
        number = int(prompt.split()[-1])
        rejected = model == BASE or (model.startswith("round-1") and number % 3 == 0)
        return f"{'no' if rejected else 'yes'} {number}"

    with standing_in_for_vllm(answer) as first, standing_in_for_vllm(answer) as second:
        servers = ["--server", f"{first.url}#{BASE}", "--server", f"{second.url}#{BASE}"]
        words = [*work, *servers, "--judge", "regex:no"]
        assert main([*words, "--rounds", "2", "--json"]) == 0
        walk = json.loads(capsys.readouterr().out)
        assert [entry["rejection_rate"] for entry in walk["rounds"]] == [1, pytest.approx(1 / 3), 0]
        assert [entry["rejected"] for entry in walk["rounds"]] == [0, 12, 4]
        for server in (first, second):
            changes = [call for call, _ in itertools.groupby(server.calls)]
            names = [name for call, name in changes if call == "load"]
            assert [name.rpartition("-")[0] for name in names] == ["round-1", "round-2"]
            # the next is loaded before the earlier one goes
            assert changes == [
                ("answer", BASE),
                ("load", names[0]),
                ("answer", names[0]),
                ("load", names[1]),
                ("unload", names[0]),
                ("answer", names[1]),
                ("unload", names[1]),
            ]
    assert main([*work, "--judge", "regex:no"]) == 2  # other engines answer otherwise
    assert "has a walk with another model" in capsys.readouterr().err


def test_a_walk_through_llama_cpp(work: list[str], base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_gguf(load_base(str(base)), load_tokenizer(str(base)), Path("base.gguf"), "f32", gate=False)
    work[work.index(str(base))] = "base.gguf"
    events: list[tuple[str, str | None]] = []

    class Noted(llama_server.LlamaCppEngine):
        def __init__(self, path: Path, **options: Any) -> None:
            super().__init__(path, **options)
            adapter = options["adapter"]
            self._round = adapter and adapter.path.parent.name
            events.append(("start", self._round))

        def close(self) -> None:
            super().close()
            events.append(("stop", self._round))

    monkeypatch.setattr(walk_engines, "LlamaCppEngine", Noted)
    assert main([*work, "--engine", "llama.cpp", "--rounds", "1", "--judge", "length:-2"]) == 0
    assert events == [("start", None), ("start", "round-1"), ("stop", None), ("stop", "round-1")]
    assert Path("w/round-1/adapter.gguf").read_bytes().startswith(b"GGUF")
    walk = json.loads(Path("w/walk.json").read_bytes())
    assert walk["model"].startswith("llama.cpp ")
    assert len(walk["rounds"]) == 2


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--engine", "llama.cpp"], "llama.cpp runs GGUF files"),
        (["--engine", "vllm"], "no engine 'vllm' for a walk"),
        (["--server", "http://a/v1", "--engine", "llama.cpp"], "leave --engine and --context out"),
        (["--server", "smollm2-135m"], "is no endpoint"),
    ],
)
def test_engines_that_a_walk_cannot_have_are_refused(
    work: list[str], words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*work, *words]) == 2
    assert problem in capsys.readouterr().err
