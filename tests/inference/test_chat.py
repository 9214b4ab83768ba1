"""Chat in the terminal: answers, conversations, rejections and output."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from rich.console import Console

from buleyean_rl.data.encode import tokenizer_hash
from buleyean_rl.data.records import read_records
from buleyean_rl.errors import EngineError, ModelError, UsageError
from buleyean_rl.gguf import export_gguf
from buleyean_rl.inference.chat import ChatModel, ask, base_name, open_models, talk
from buleyean_rl.inference.chat_screen import split_blocks
from buleyean_rl.inference.protocol import GREEDY, Answer, Messages, Sampling
from buleyean_rl.inference.transformers_engine import TransformersEngine
from tiny import tiny_llama, tiny_tokenizer


class EchoEngine:
    """An engine that echoes the last message in pieces, and records its messages and samplings."""

    tokenizer = None

    def __init__(self, *, breaks_at: int | None = None, problem: BaseException | None = None) -> None:
        self.seen: list[list[dict[str, str]]] = []
        self.samplings: list[Sampling] = []
        self.breaks_at, self.problem, self.closed = breaks_at, problem, 0

    def generate(self, messages: Messages, sampling: Sampling = GREEDY) -> Generator[str, None, Answer]:
        self.seen.append([dict(m) for m in messages])
        self.samplings.append(sampling)
        try:
            for i, word in enumerate(["You", " said", " ", messages[-1]["content"]]):
                if self.problem is not None and i == self.breaks_at:
                    raise self.problem
                yield word
        finally:
            self.closed += 1
        return Answer(f"You said {messages[-1]['content']}", None, True)


class ScriptEngine(EchoEngine):
    """An engine that answers a text, in pieces of three characters."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def generate(self, messages: Messages, sampling: Sampling = GREEDY) -> Generator[str, None, Answer]:  # noqa: ARG002
        yield from (self.text[i : i + 3] for i in range(0, len(self.text), 3))
        return Answer(self.text, None, True)


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


def terminal(width: int = 80, height: int = 20) -> tuple[Console, Callable[[], str]]:
    """A terminal, and what stands on it at the end: of what is drawn over, the last."""
    out = io.StringIO()

    def shown() -> str:
        rows: list[str] = [""]
        row = 0
        for part in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", out.getvalue()):
            if part == "\n":
                row += 1
                rows += [""] * (row + 1 - len(rows))
            elif part == "\x1b[2K":
                rows[row] = ""
            elif part.startswith("\x1b[") and part.endswith("A"):
                row -= int(part[2:-1])
            elif part[0] not in "\r\x1b":
                rows[row] += part
        return "\n".join(line.rstrip() for line in rows)

    return Console(file=out, width=width, height=height, force_terminal=True, color_system=None), shown


def chat(model: ChatModel, *typed: str, file: Path = Path("unused.jsonl"), console: Console | None = None) -> int:
    return talk([model], console or screen()[0], rejections=file, read=lines(*typed))


def test_ask_prints_the_answer_only() -> None:
    (console, out), engine = screen(), EchoEngine()
    sampling = Sampling(max_tokens=3)
    assert ask([ChatModel("bird", engine)], "a\tb", console, system="Be brief.", sampling=sampling) == ["You said a\tb"]
    assert engine.samplings == [sampling]
    assert out.getvalue() == "You said a\tb\n"
    assert [m["role"] for m in engine.seen[0]] == ["system", "user"]


def test_a_conversation_is_remembered() -> None:
    console, out = screen()
    engine = EchoEngine()
    chat(ChatModel("bird", engine), "one", "", "two", console=console)
    assert [m["content"] for m in engine.seen[1]] == ["one", "You said one", "two"]
    assert "You said two" in out.getvalue()


def test_a_new_conversation_has_the_system_message() -> None:
    engine = EchoEngine()
    read = lines("one", "/new", "two", "/exit", "three")
    talk([ChatModel("bird", engine)], screen()[0], rejections=Path("unused"), system="Be kind.", read=read)
    assert [m["content"] for m in engine.seen[-1]] == ["Be kind.", "two"]
    assert len(engine.seen) == 2


def test_markup_in_an_answer_is_only_text() -> None:
    console, out = screen()
    chat(ChatModel("bird", EchoEngine()), "[bold]x[/bold] [/red]", console=console)
    assert "You said [bold]x[/bold] [/red]" in out.getvalue()


def test_help_lists_what_there_is_and_an_unknown_command_names_it() -> None:
    console, out = screen()
    engine = EchoEngine()
    chat(ChatModel("bird", engine), "/help", "/nope", file=Path("no.jsonl"), console=console)
    for words in ("/new", "/exit", '/no "WORDS" [WHY]', "Rejections go to no.jsonl", "no command /nope"):
        assert words in out.getvalue()
    assert not engine.seen


def test_an_interrupted_answer_stays_in_the_conversation() -> None:
    engine = EchoEngine(breaks_at=2, problem=KeyboardInterrupt())
    chat(ChatModel("bird", engine), "one", "two")
    assert [m["content"] for m in engine.seen[1]] == ["one", "You said", "two"]
    assert engine.closed == 2


def test_a_failed_line_is_removed_from_the_conversation() -> None:
    console, out = screen()
    model = ChatModel("bird", EchoEngine(breaks_at=0, problem=EngineError("the conversation is too long")))
    chat(model, "one", console=console)
    assert "too long (/new starts over)" in out.getvalue()
    assert model.messages == []


# --- on a terminal


LONG = "alpha beta " * 60
MARKDOWN = f"# Title\n\nSome **bold** words.\n\n```\ncode  here\n\nmore\n```\n\n1. one\n\n2. two\n\n{LONG}\n\nEnd."


@pytest.mark.parametrize("height", [5, 60])
def test_words_stay_whole_and_markdown_is_shown(height: int) -> None:
    console, shown = terminal(32, height)
    chat(ChatModel("bird", ScriptEngine(MARKDOWN)), "go", console=console)
    text = shown()
    assert max(map(len, text.splitlines())) <= 32
    assert text.split().count("alpha") == text.split().count("beta") == 60
    assert "Some bold words." in text
    assert "code  here" in text
    assert "End." in text.splitlines()[-2:][0] or "End." in text


def test_an_answer_cannot_rule_the_terminal() -> None:
    console, shown = terminal()
    chat(ChatModel("bird", ScriptEngine("a\x1b[2Jb")), "go", console=console)
    assert "a\N{REPLACEMENT CHARACTER}[2Jb" in shown()


@pytest.mark.parametrize(("width", "is_beside"), [(60, False), (120, True)])
def test_two_answers_are_shown_whole(width: int, is_beside: bool) -> None:
    console, shown = terminal(width, 8)
    models = [ChatModel("trained", ScriptEngine(MARKDOWN)), ChatModel("base", ScriptEngine(f"{LONG}\n\nLast."))]
    assert ask(models, "hello", console) == [MARKDOWN, f"{LONG}\n\nLast."]
    text = shown()
    assert max(map(len, text.splitlines())) <= width
    assert text.split().count("alpha") == 120
    assert "Last." in text
    titles = next(line for line in text.splitlines() if "trained" in line)
    assert ("base" in titles) == is_beside


def test_two_answers_that_are_piped_stand_one_below_the_other() -> None:
    console, out = screen(40)
    ask([ChatModel("trained", EchoEngine()), ChatModel("base", EchoEngine())], "hello", console)
    assert out.getvalue() == "trained:\nYou said hello\nbase:\nYou said hello\n"


def test_blocks_end_where_nothing_can_belong_to_them_any_more() -> None:
    assert split_blocks("a\n\nb\n\nc") == (["a\n\n", "b\n\n"], "c")
    for whole in ("a\n\n", "a\n\n1", "a\n\n12. b", "- a\n\n  b", "- a\n\n- b", "```\na\n\nb", "~~~\na\n\n```\n\nb"):
        assert split_blocks(whole) == ([], whole)
    assert split_blocks("```\na\n\nb\n```\n\nc") == (["```\na\n\nb\n```\n\n"], "c")
    assert split_blocks("a\n\n**b") == (["a\n\n"], "**b")


# --- several models


def test_each_of_two_models_has_its_own_conversation() -> None:
    left, right = EchoEngine(), EchoEngine(breaks_at=1, problem=KeyboardInterrupt())
    models = [ChatModel("trained", left), ChatModel("base", right)]
    talk(models, screen()[0], rejections=Path("unused"), read=lines("one", "two"))
    assert left.seen[1][1]["content"] == "You said one"
    assert right.seen[1][1]["content"] == "You"


# --- rejections


def test_no_rejects_the_last_answer_or_a_part_of_it(tmp_path: Path) -> None:
    console, out = screen(200)
    file, model = tmp_path / "r.jsonl", ChatModel("bird", EchoEngine(), {"model": "m"})
    typed = ("one", "two", "/no rude", '/no "SAID  two" too long', "/no", '/no "three"', "/new", "/no", "four", "/no")
    assert chat(model, *typed, file=file, console=console) == 3
    whole, part, other = read_records(file)
    assert whole.prompt == (("user", "one"), ("assistant", "You said one"), ("user", "two"))
    assert whole.rejected_responses == part.rejected_responses == ("You said two",)
    assert (whole.rejected_spans, part.rejected_spans) == (((),), (((4, 12),),))
    assert (whole.rejection_counts, whole.rounds, whole.ended) == ((1,), (1,), (True,))
    assert whole.policy == {"model": "m", "temperature": 0.7, "top_p": 0.95}
    assert (other.prompt, other.rejected_responses) == ("four", ("You said four",))
    assert [json.loads(line).get("remark") for line in file.read_text().splitlines()] == ["rude", "too long", None]
    text = out.getvalue()
    assert text.count(f"rejected: the answer of bird, in {file}") == 2
    assert text.count("a new file") == 1
    assert f'rejected: "said two" of bird, in {file}' in text
    for problem in ("that is rejected already", 'the last answer has no "three"', "there is no answer to reject yet"):
        assert problem in text


def test_of_two_models_the_last_is_rejected(tmp_path: Path) -> None:
    models = [ChatModel("base", ScriptEngine("Fine.")), ChatModel("trained", ScriptEngine(" \n"))]
    talk(models, screen()[0], rejections=tmp_path / "r.jsonl", read=lines("one", "/no"))
    (record,) = read_records(tmp_path / "r.jsonl")
    assert record.rejected_responses == ("",)  # which is how a record says an answer of nothing


def test_a_file_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    console, out = screen(200)
    file = tmp_path / "notes"
    file.write_text("my notes\n")
    assert chat(ChatModel("bird", EchoEngine()), "one", "/no", file=file, console=console) == 0
    assert "is no records file, and stays as it is" in out.getvalue()
    assert file.read_text() == "my notes\n"


def test_the_drawn_tokens_are_in_the_record(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    engine = TransformersEngine(tiny_llama(tokenizer), tokenizer)
    sampling, file = Sampling(max_tokens=8), tmp_path / "r.jsonl"
    talk([ChatModel("tiny", engine)], screen()[0], rejections=file, sampling=sampling, read=lines("hello", "/no"))
    (record,) = read_records(file)
    (expected,) = engine.answer_many([[{"role": "user", "content": "hello"}]], sampling)
    assert isinstance(expected, Answer)
    assert (record.rejected_responses, record.token_ids) == ((expected.text,), (expected.token_ids,))
    assert (record.ended, record.tokenizer) == ((expected.ended,), tokenizer_hash(tokenizer))
    assert record.token_ids != (None,)


# --- models by their names


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_tokenizer()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return export_gguf(tiny_llama(tokenizer), tokenizer, path, gate=False).path


def test_files_and_folders_open_as_chat_models(gguf: Path, base: Path) -> None:
    with open_models([str(gguf), str(base)], context=128) as models:
        assert [(model.name, model.policy) for model in models] == [
            ("tiny", {"model": "tiny.gguf"}),
            ("base", {"model": "base"}),
        ]
        for model in models:
            (answer,) = ask([model], "hello", screen()[0], sampling=Sampling(max_tokens=8))
            assert model.engine.tokenize(answer)
    with pytest.raises(EngineError, match="closed"):
        models[0].engine.tokenize("a")
    assert base_name(str(base)) == str(base)


def test_a_missing_second_file_frees_the_first(gguf: Path) -> None:
    with pytest.raises(EngineError, match="no such file"), open_models([str(gguf), "absent.gguf"], context=128):
        pass


def test_tokens_that_llama_cpp_draws_are_in_the_record(gguf: Path, tmp_path: Path) -> None:
    sampling, prompts = Sampling(max_tokens=1), [f"hello {number}" for number in range(4)]
    with open_models([str(gguf)], context=128) as (model,):
        talk(
            [model],
            screen()[0],
            rejections=tmp_path / "r.jsonl",
            sampling=sampling,
            read=lines(*(line for prompt in prompts for line in ("/new", prompt, "/no"))),
        )
        expected = model.engine.answer_many([[{"role": "user", "content": prompt}] for prompt in prompts], sampling)
        hashed = tokenizer_hash(model.engine.tokenizer)
    records = list(read_records(tmp_path / "r.jsonl"))
    for record, answer in zip(records, expected, strict=True):
        assert isinstance(answer, Answer)
        assert answer.text.startswith(record.rejected_responses[0])  # half a character at the end is not streamed
        assert record.token_ids in ((None,), (answer.token_ids,))  # None where a character had several tokens
    assert any(record.token_ids != (None,) for record in records)
    assert {record.tokenizer for record in records} <= {hashed, None}


def test_an_adapter_is_for_a_gguf_file(gguf: Path) -> None:
    problem = r"absent\.gguf: no such file"
    with pytest.raises(EngineError, match=problem), open_models([str(gguf)], lora="absent.gguf"):
        pass


def test_what_needs_a_gguf_file_says_so(base: Path) -> None:
    with pytest.raises(UsageError, match="--lora goes with a GGUF file"), open_models([str(base)], lora="a.gguf"):
        pass
    problem = "--engine llama-cpp-python goes with a GGUF"
    with pytest.raises(UsageError, match=problem), open_models([str(base)], engine="llama-cpp-python"):
        pass
    with pytest.raises(ModelError, match="unknown model 'nonsense'"), open_models(["nonsense"]):
        pass
