"""Chat in the terminal: answers, conversations and output."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from rich.console import Console

from buleyean_rl.errors import EngineError
from buleyean_rl.gguf import export_gguf
from buleyean_rl.inference.chat import ChatModel, ask, compare, open_models, talk
from buleyean_rl.inference.protocol import GREEDY, Messages, Sampling
from tiny import tiny_llama, tiny_tokenizer


class EchoEngine:
    """An engine that echoes the last message in pieces, and records its messages and samplings."""

    def __init__(self, *, breaks_at: int | None = None, problem: BaseException | None = None) -> None:
        self.seen: list[list[dict[str, str]]] = []
        self.samplings: list[Sampling] = []
        self.breaks_at, self.problem, self.closed = breaks_at, problem, 0

    def generate(self, messages: Messages, sampling: Sampling = GREEDY) -> Generator[str]:
        self.seen.append([dict(m) for m in messages])
        self.samplings.append(sampling)
        try:
            for i, word in enumerate(["You", " said", " ", messages[-1]["content"]]):
                if self.problem is not None and i == self.breaks_at:
                    raise self.problem
                yield word
        finally:
            self.closed += 1


def lines(*typed: str) -> Callable[[], str]:
    """A reader that gives these lines and then the end of input."""
    remaining = list(typed)

    def read() -> str:
        if not remaining:
            raise EOFError
        return remaining.pop(0)

    return read


def screen(width: int = 80) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, color_system=None), out


def test_ask_prints_the_answer_only() -> None:
    out, engine = io.StringIO(), EchoEngine()
    sampling = Sampling(max_tokens=3)
    assert ask(engine, "hello", out, system="Be brief.", sampling=sampling) == "You said hello"
    assert engine.samplings == [sampling]
    assert out.getvalue() == "You said hello\n"
    assert [m["role"] for m in engine.seen[0]] == ["system", "user"]


def test_a_conversation_is_remembered() -> None:
    console, out = screen()
    engine = EchoEngine()
    talk([ChatModel("bird", engine)], console, read=lines("one", "", "two"))
    assert [m["content"] for m in engine.seen[1]] == ["one", "You said one", "two"]
    assert "You said two" in out.getvalue()


def test_a_new_conversation_has_the_system_message() -> None:
    console, _ = screen()
    engine = EchoEngine()
    talk([ChatModel("bird", engine)], console, system="Be kind.", read=lines("one", "/new", "two", "/exit", "three"))
    assert [m["content"] for m in engine.seen[-1]] == ["Be kind.", "two"]
    assert len(engine.seen) == 2


def test_markup_in_an_answer_is_only_text() -> None:
    console, out = screen()
    talk([ChatModel("bird", EchoEngine())], console, read=lines("[bold]x[/bold] [/red]"))
    assert "You said [bold]x[/bold] [/red]" in out.getvalue()


def test_an_unknown_command_prints_the_help() -> None:
    console, out = screen()
    engine = EchoEngine()
    talk([ChatModel("bird", engine)], console, read=lines("/help"))
    assert out.getvalue().count("/new starts over") == 2
    assert not engine.seen


def test_an_interrupted_answer_stays_in_the_conversation() -> None:
    console, _ = screen()
    engine = EchoEngine(breaks_at=2, problem=KeyboardInterrupt())
    model = ChatModel("bird", engine)
    talk([model], console, read=lines("one", "two"))
    assert [m["content"] for m in engine.seen[1]] == ["one", "You said", "two"]
    assert engine.closed == 2


def test_a_failed_line_is_removed_from_the_conversation() -> None:
    console, out = screen()
    model = ChatModel("bird", EchoEngine(breaks_at=0, problem=EngineError("the conversation is too long")))
    talk([model], console, read=lines("one"))
    assert "too long (/new starts over)" in out.getvalue()
    assert model.messages == []


@pytest.mark.parametrize("width", [40, 100])
def test_compare_prints_answers_side_by_side(width: int) -> None:
    console, out = screen(width)
    left, right = EchoEngine(), EchoEngine()
    answers = compare([ChatModel("trained", left), ChatModel("base", right)], "hello", console)
    assert answers == ["You said hello"] * 2
    titles = next(line for line in out.getvalue().splitlines() if "trained" in line)
    assert "base" in titles  # one row holds both panels
    assert max(map(len, out.getvalue().splitlines())) <= width


def test_each_of_two_models_has_its_own_conversation() -> None:
    console, _ = screen()
    left, right = EchoEngine(), EchoEngine(breaks_at=1, problem=KeyboardInterrupt())
    talk([ChatModel("trained", left), ChatModel("base", right)], console, read=lines("one", "two"))
    assert left.seen[1][1]["content"] == "You said one"
    assert right.seen[1][1]["content"] == "You"


def test_files_open_as_chat_models(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "tiny.gguf", gate=False).path
    out = io.StringIO()
    with open_models([path, path], context=128) as models:
        assert [model.name for model in models] == ["tiny", "tiny"]
        answers = [ask(model.engine, "hello", out, sampling=Sampling(max_tokens=8)) for model in models]
    assert answers[0] == answers[1]
    with pytest.raises(EngineError, match="closed"):
        models[0].engine.tokenize("a")


def test_a_missing_second_file_frees_the_first(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "tiny.gguf", gate=False).path
    with (
        pytest.raises(EngineError, match="no such file"),
        open_models([path, tmp_path / "absent.gguf"], context=128),
    ):
        pass
