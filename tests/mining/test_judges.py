"""Judges: what each rejects, the spans it names, and names that mean none."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import EntryPoint, EntryPoints
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.endpoint import EndpointEngine
from buleyean_rl.mining.judges import Answer, FunctionJudge, LlmJudge, PersonJudge, Verdict, find_judge
from buleyean_rl.mining.judges import registry as naming
from buleyean_rl.mining.judges.llm import read_verdict
from standin import standing_in

LOOP = "Sleep well! Go to bed early. Go to bed early. Go to bed early."


def verdict(name: str, text: str, prompt: str = "p") -> Verdict:
    ((index, found),) = find_judge(name).judge([Answer(prompt, text)])
    assert index == 0
    return found


def rejected(name: str, text: str) -> list[str]:
    """The parts that are rejected, the text itself for all of it; [] if it is accepted."""
    found = verdict(name, text)
    return [text[start:end] for start, end in found.spans] or [text] if found.rejected else []


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("loops", LOOP, ["Go to bed early. Go to bed early."]),
        ("loops", "A fine answer.", []),
        ("length:3-", "two words", ["two words"]),
        ("length:3-", "", [""]),
        ("length:-3", "one two three four five ", ["four five"]),
        ("length:2-3", "one two three", []),
        ("refusal", "I'm sorry, but I can't help with that.", ["I'm sorry, but I can't help with that."]),
        ("refusal", "I\u2019m sorry, but I can\u2019t assist.", ["I\u2019m sorry, but I can\u2019t assist."]),
        ("refusal", "As an AI language model, I have no body.", ["As an AI language model, I have no body."]),
        ("refusal", "I cannot provide that.", ["I cannot provide that."]),
        ("refusal", "I'm sorry to hear that! Here is a poem.", []),
        ("refusal", "Sure. " + "x" * 300 + " I cannot help you.", []),
        (r"regex:\bfoo+\b", "foo bar fooo", ["foo", "fooo"]),
        ("regex:x*", "abc", []),
        ("regex:a:b", "a:b", ["a:b"]),
        ("language:en", "Bonjour, comment allez-vous aujourd'hui ? Je vais très bien, merci.", None),
        ("language:en", "The weather is nice today, so let us go for a walk in the park.", []),
    ],
)
def test_what_a_rule_rejects(name: str, text: str, parts: list[str] | None) -> None:
    assert rejected(name, text) == ([text] if parts is None else parts)


def test_too_little_text_has_no_language() -> None:
    assert verdict("language:en", "Oui!").rejected is None


def test_listed_words_stand_for_themselves(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("delve\nrich tapestry\n\nC++\n")
    name = f"words:{tmp_path / 'w.txt'}"
    assert rejected(name, "Delve into a rich  tapestry of C++, delved.") == ["Delve", "rich  tapestry", "C++"]
    before = find_judge(name).name
    (tmp_path / "w.txt").write_text("delve\n")
    assert find_judge(name).name != before


@given(st.text(max_size=80))
def test_spans_lie_within_the_text(text: str) -> None:
    for name in ("loops", "length:2-4", "refusal", r"regex:\w\W"):
        for start, end in verdict(name, text).spans:
            assert 0 <= start < end <= len(text)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (True, Verdict(True)),
        (False, Verdict(False)),
        (None, Verdict(None)),
        ([], Verdict(False)),
        ([(4, 6), (0, 2), [1, 3]], Verdict(True, ((0, 3), (4, 6)))),
        (Verdict(True, (), "why"), Verdict(True, (), "why")),
    ],
)
def test_a_function_may_say_it_in_several_ways(said: object, expected: Verdict) -> None:
    (found,) = FunctionJudge("mine", lambda _prompt, _answer: said).judge([Answer((("user", "q"),), "answer")])
    assert found == (0, expected)


@pytest.mark.parametrize("said", ["yes", 1.5, [(0, 99)], [3]])
def test_a_function_that_says_nonsense_is_named(said: object) -> None:
    with pytest.raises(UsageError, match="judge mine"):
        list(FunctionJudge("mine", lambda _prompt, _answer: said).judge([Answer("q", "answer")]))


def test_python_functions_by_path_and_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judges.py").write_text("def short(prompt, answer):\n    return len(answer) < len(prompt)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert verdict("python:my_judges:short", "a", "long prompt").rejected is True
    point = EntryPoint("brevity", "my_judges:short", naming.GROUP)
    monkeypatch.setattr(naming, "entry_points", lambda **named: EntryPoints([point]).select(**named))
    assert verdict("brevity", "long answer", "p").rejected is False


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nonsense", "no judge 'nonsense': there are loops"),
        ("loops:3", "takes nothing after its name"),
        ("length", "needs something after its name"),
        ("length:-", "give the fewest and the most words"),
        ("length:9-3", "no answer has such a length"),
        ("regex:(", "regex:("),
        ("words:/no/such/file", "cannot be read: No such file"),
        ("language:xx", "no language 'xx'"),
        ("python:no_such_module:f", "No module named"),
        ("python:json:no_such", "give MODULE:FUNCTION"),
        ("python:json:decoder", "is not a function"),
        ("llm:nowhere", "is no endpoint"),
        ("person", "needs a terminal"),
    ],
)
def test_names_that_mean_nothing(name: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_judge(name)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"verdict": "reject", "quotes": ["is  rome"], "reason": "wrong"}', Verdict(True, ((8, 15),), "wrong")),
        ('Sure!\n```json\n{"verdict": "Accept"}\n```', Verdict(False)),
        ('{"verdict": "accept", "quotes": ["is Rome"]}', Verdict(False)),
        ('{"verdict": "reject", "quotes": ["not there"], "reason": 7}', Verdict(True)),
        ('{"verdict": "reject", "quotes": null}', Verdict(True)),
        ('{broken} {"verdict": "reject", "quotes": "Rome"}', Verdict(True, ((11, 15),))),
        ('{"verdict": "maybe"}', None),
        ("I would reject this.", None),
        ("", None),
        ("{" * 5000, None),
    ],
)
def test_a_models_verdict_is_read(reply: str, expected: Verdict | None) -> None:
    assert read_verdict(reply, "Capital is Rome."[0:]) == expected


def test_a_model_judges_by_the_rubric_and_is_asked_again() -> None:
    replies: dict[str, Iterator[str]] = {
        "good": iter(['{"verdict": "accept"}']),
        "bad": iter(["hm", '{"verdict": "reject", "quotes": ["bad"]}']),
        "odd": iter(["hm", "hm"]),
    }

    def answer(question: str) -> str:
        return next(replies[next(word for word in replies if f"<<<\nA {word} one" in question)])

    with standing_in(answer) as server, closing(EndpointEngine(server.url)) as engine:
        judge = LlmJudge("llm", engine, "No bad ones.")
        answers = [Answer((("system", "s"), ("user", "q")), f"A {word} one") for word in replies]
        assert dict(judge.judge(answers)) == {
            0: Verdict(False),
            1: Verdict(True, ((2, 5),)),
            2: Verdict(None, (), "the judge's reply is no verdict"),
        }
        assert all("No bad ones." in request["messages"][0]["content"] for request in server.requests)
        assert "system: s\nuser: q" in server.requests[0]["messages"][1]["content"]
        assert judge.name != LlmJudge("llm", engine, "Other.").name
    assert len(server.requests) == 5


def test_an_llm_judge_by_name() -> None:
    with standing_in(lambda _: json.dumps({"verdict": "reject"})) as server:
        judge = find_judge(f"llm:{server.url}#m", rubric="r")
        assert dict(judge.judge([Answer("q", "a")])) == {0: Verdict(True)}
        assert judge.name.startswith(f"llm:{server.url}#m rubric ")


def ask_person(keys: str, lines: str = "") -> dict[int, Verdict]:
    left, said = iter(keys), iter(lines.split("|"))
    screen = Console(file=StringIO())
    judge = PersonJudge(screen, lambda: next(left), lambda _question: next(said))
    return dict(judge.judge([Answer("q", f"answer [bold] {number}") for number in range(3)]))


@pytest.mark.parametrize(
    ("keys", "lines", "expected"),
    [
        ("rAs", "", {0: Verdict(True), 1: Verdict(False), 2: Verdict(None, (), "skipped")}),
        ("aab?rr", "", {0: Verdict(False), 1: Verdict(True), 2: Verdict(True)}),
        ("pppaa", "nowhere||BOLD", {0: Verdict(True, ((8, 12),)), 1: Verdict(False), 2: Verdict(False)}),
    ],
)
def test_a_person_presses_one_key(keys: str, lines: str, expected: dict[int, Verdict]) -> None:
    assert ask_person(keys, lines) == expected


def test_a_person_quits() -> None:
    with pytest.raises(KeyboardInterrupt):
        ask_person("rq")
