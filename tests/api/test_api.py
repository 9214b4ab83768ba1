"""A line of Python for each command: what it returns, and how that is shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from buleyean_rl import BuleyeanError, Mining, chat, evaluate, export, mine
from buleyean_rl.api.inputs import find_judges
from tiny import tiny_run

PROMPTS = ["Give me a tip.", "What is a river?"]


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("api") / "run", base)


@pytest.fixture(autouse=True)
def one_llama_cpp_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)


def reject_all(prompt: str, answer: str) -> bool:  # noqa: ARG001 - a judge's signature
    return True


def test_mining_with_a_function_returns_records_and_shows_them(base: Path, tmp_path: Path) -> None:
    mined = mine(PROMPTS, str(base), tmp_path / "records.jsonl", judges=reject_all, max_tokens=4)
    assert isinstance(mined, Mining)
    assert [record.prompt for record in mined.records] == PROMPTS
    assert "2 prompts, 2 answers; 2 rejected" in repr(mined)
    assert "What is a river?" in mined._repr_html_()
    again = mine(PROMPTS, str(base), tmp_path / "records.jsonl", judges=reject_all, max_tokens=4)
    assert (again.report.answers_reused, again.records) == (2, mined.records)


def test_a_judge_that_is_a_function_is_named_by_its_text() -> None:
    def accept(prompt: str, answer: str) -> bool:  # noqa: ARG001
        return False

    first = accept

    def accept(prompt: str, answer: str) -> None:  # type: ignore[no-redef]  # noqa: ARG001
        return None

    names = [judge.name for judge in find_judges([first, accept, "loops"])]
    assert names[0].rpartition(" ")[0] == names[1].rpartition(" ")[0]
    assert len(set(names)) == 3
    assert names[2] == "loops"


def test_evaluating_returns_figures_of_each_model(base: Path, run: Path, tmp_path: Path) -> None:
    compared = evaluate(
        str(run), compare=str(base), neutral=["A river runs to the sea."], prompts=PROMPTS, max_tokens=4
    )
    assert {"neutral_kl", "loop_rate"} <= compared.figures.keys()
    assert compared.as_json()["compare"][0]["model"] == str(base)
    assert "answers that loop" in repr(compared)
    assert compared._repr_html_().startswith("<pre")
    (tmp_path / "plot.png").write_text("mine")
    with pytest.raises(BuleyeanError, match=r"plot\.png"):
        compared.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_text() == "mine"


def test_exporting_returns_the_files_and_chat_talks_to_them(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exported = export(base, "m.gguf", "f16")
    assert exported.path == Path("m.gguf")
    assert "m.gguf" in repr(exported)
    assert exported.files[0].parity is not None
    with chat(str(exported.path), "Hi", system="Be brief.", max_tokens=4) as conversation:
        assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]
        assert conversation.say("And then?") == conversation.answer
        assert repr(conversation).startswith("system: Be brief.\nuser: Hi\nassistant: ")
    with chat(str(base), max_tokens=4) as conversation:
        assert conversation.answer == ""
        assert conversation.say("Hi")


def test_an_adapter_is_exported_alone(base: Path, run: Path, tmp_path: Path) -> None:
    exported = export(run, tmp_path / "adapter.gguf", adapter=True, overwrite=True)
    assert [file.quant for file in exported.files] == ["f16"]
    with pytest.raises(BuleyeanError, match="one quantisation"):
        export(run, tmp_path / "other.gguf", ["f16", "q8_0"], adapter=True)
    assert base.exists()
