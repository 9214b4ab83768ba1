"""Judges: what each rejects, the spans it names, and names that mean none."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from importlib.metadata import EntryPoint, EntryPoints
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from buleyean_rl.errors import UsageError
from buleyean_rl.inference.endpoint import EndpointEngine
from buleyean_rl.inference.endpoint_server import Patience
from buleyean_rl.mining.judges import Answer, Verdict, find_judge, registry
from buleyean_rl.mining.judges.llm import LlmJudge, read_verdict
from buleyean_rl.mining.judges.person import PersonJudge
from buleyean_rl.mining.judges.protocol import FunctionJudge
from standin import standing_in

LOOP = "Sleep well! Go to bed early. Go to bed early. Go to bed early."


def verdict(name: str, text: str, prompt: str = "p") -> Verdict:
    ((index, outcome),) = find_judge(name).judge([Answer(prompt, text)])
    assert index == 0
    return outcome


def rejected(name: str, text: str) -> list[str]:
    """The parts that are rejected, the text itself for all of it; [] if it is accepted."""
    outcome = verdict(name, text)
    return [text[start:end] for start, end in outcome.spans] or [text] if outcome.rejected else []


ACCEPTED: list[str] = []
REFUSED = "I\u2019m sorry, but I can\u2019t assist."
RULES = {
    "loops": [(LOOP, ["Go to bed early. Go to bed early."]), ("A fine answer.", ACCEPTED)],
    "length:3-": [("two words", ["two words"]), ("", [""]), ("one two three", ACCEPTED)],
    "length:-3": [("one two three four five ", ["four five"])],
    "refusal": [
        (REFUSED, [REFUSED]),
        ("As an AI language model, I have no body.", ["As an AI language model, I have no body."]),
        ("I cannot provide that.", ["I cannot provide that."]),
        ("I'm sorry to hear that! Here is a poem.", ACCEPTED),
        ("Sure. " + "x" * 300 + " I cannot help you.", ACCEPTED),
    ],
    r"regex:\bfoo+\b": [("foo bar fooo", ["foo", "fooo"])],
    "regex:x*": [("abc", ACCEPTED)],
    "regex:a:b": [("a:b", ["a:b"])],
    "language:en": [
        (
            "Ich gehe heute nicht zur Arbeit, weil ich krank bin.",
            ["Ich gehe heute nicht zur Arbeit, weil ich krank bin."],
        ),
        ("The weather is nice today, so let us go for a walk in the park.", ACCEPTED),
    ],
}


@pytest.mark.parametrize("name", RULES)
def test_what_a_rule_rejects(name: str) -> None:
    for text, parts in RULES[name]:
        assert rejected(name, text) == parts


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


def test_a_function_returns_a_verdict_in_several_ways() -> None:
    answers = [Answer((("user", "q"),), "answer")]
    for value, expected in (
        (True, Verdict(True)),
        (False, Verdict(False)),
        (None, Verdict(None)),
        ([], Verdict(False)),
        ([(4, 6), (0, 2), [1, 3]], Verdict(True, ((0, 3), (4, 6)))),
        (Verdict(True, (), "why"), Verdict(True, (), "why")),
    ):
        (outcome,) = FunctionJudge("mine", lambda _prompt, _answer, value=value: value).judge(answers)
        assert outcome == (0, expected)
    for value in ("yes", 1.5, [(0, 99)], [3], Verdict(7), Verdict(True, ((0, 99),)), Verdict(True, (), 7)):  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="judge mine"):
            list(FunctionJudge("mine", lambda _prompt, _answer, value=value: value).judge(answers))


def test_a_function_that_fails_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"^judge mine failed: ZeroDivisionError: division by zero$"):
        list(FunctionJudge("mine", lambda *_: 1 / 0).judge([Answer("q", "a")]))


def test_python_functions_by_path_and_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judges.py").write_text("def short(prompt, answer):\n    return len(answer) < len(prompt)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert verdict("python:my_judges:short", "a", "long prompt").rejected is True
    point = EntryPoint("brevity", "my_judges:short", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda **named: EntryPoints([point]).select(**named))
    assert verdict("brevity", "long answer", "p").rejected is False


def test_an_edited_function_is_another_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "edited_judges.py").write_text("def all_bad(prompt, answer):\n    return True\n")
    name = "python:edited_judges:all_bad"
    before = find_judge(name).name
    assert before.startswith(f"{name} ")
    assert find_judge(name).name == before
    (tmp_path / "edited_judges.py").write_text("def all_bad(prompt, answer):\n    return False\n")
    assert find_judge(name).name != before
    assert find_judge("python:operator:contains").name == "python:operator:contains"


def test_names_of_no_judge_are_refused() -> None:
    for name, problem in (
        ("nonsense", "no judge 'nonsense': there are loops, length:MIN-MAX, refusal, regex:PATTERN"),
        ("loops:3", "takes nothing after its name"),
        ("length", "needs something after its name"),
        ("length:-", "give the fewest and the most words"),
        ("length:9-3", "no answer has such a length"),
        ("regex:(", "regex:("),
        ("words:/no/such/file", "cannot be read: No such file"),
        ("language:xx", "no language 'xx'"),
        ("python:no_such_module:f", "No module named"),
        ("python:json:no_such", "give MODULE:FUNCTION"),
        ("python:no such:f", "give MODULE:FUNCTION"),
        ("python::", "give MODULE:FUNCTION"),
        ("python:json:decoder", "is not a function"),
        ("llm:nowhere", "is no endpoint"),
        ("person", "needs a terminal"),
    ):
        with pytest.raises(UsageError) as caught:
            find_judge(name)
        assert problem in str(caught.value)


def test_a_models_verdict_is_read() -> None:
    for reply, expected in (
        ('{"verdict": "reject", "quotes": ["is  rome"], "reason": "wrong"}', Verdict(True, ((8, 15),), "wrong")),
        ('Sure!\n```json\n{"verdict": "Accept"}\n```', Verdict(False)),
        ('{"verdict": "accept", "quotes": ["is Rome"]}', Verdict(False)),
        ('{"verdict": "reject", "quotes": ["not there"], "reason": 7}', Verdict(True)),
        ('{"verdict": "reject", "quotes": null}', Verdict(True)),
        ('{broken} {"verdict": "reject", "quotes": "Rome"}', Verdict(True, ((11, 15),))),
        ('{"verdict": "maybe"}', None),
        ("I would reject this.", None),
        ("{" * 5000, None),
    ):
        assert read_verdict(reply, "Capital is Rome.") == expected


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


def test_a_judge_whose_endpoint_fails_gives_no_verdict_and_one_that_refuses_abstains() -> None:
    hasty = Patience(retries=1, pause=0.001)
    with (
        standing_in(lambda _: '{"verdict": "accept"}') as server,
        closing(EndpointEngine(server.url, parallel=1, patience=hasty)) as engine,
    ):
        server.faults = [500, 500, (400, b"content_filter")]
        verdicts = dict(LlmJudge("llm", engine).judge([Answer("q", str(number)) for number in range(3)]))
    assert sorted(verdicts) == [1, 2]
    assert verdicts[1].rejected is None
    assert "content_filter" in verdicts[1].reason
    assert verdicts[2] == Verdict(False)


def test_an_llm_judge_by_name() -> None:
    with standing_in(lambda _: json.dumps({"verdict": "reject"})) as server:
        judge = find_judge(f"llm:{server.url}#m", rubric="r")
        assert dict(judge.judge([Answer("q", "a")])) == {0: Verdict(True)}
        assert judge.name.startswith(f"llm:{server.url}#m rubric ")


def ask_person(keys: str, lines: str = "") -> tuple[dict[int, Verdict], str]:
    """The verdicts, and what the person saw; the keys end in one for the end, or in one that leaves."""
    pressed, typed = iter(keys), iter(lines.split("|"))
    screen = Console(file=StringIO(), width=200)
    judge = PersonJudge(screen, lambda: next(pressed), lambda _question: next(typed))
    verdicts: dict[int, Verdict] = {}
    with suppress(KeyboardInterrupt):
        for index, verdict in judge.judge([Answer("q", f"answer [bold] {number}") for number in range(3)]):
            verdicts[index] = verdict
    return verdicts, screen.file.getvalue()  # type: ignore[attr-defined]


YES, NO = Verdict(False), Verdict(True)


@pytest.mark.parametrize(
    ("keys", "lines", "expected", "said"),
    [
        ("nYs.", "", {0: NO, 1: YES, 2: Verdict(None, (), "skipped")}, "rejected"),
        ("yuny?xar n.", "", {0: NO, 1: YES, 2: NO}, "taken back: accepted"),
        ("yyyuuun.un n q", "", {0: NO, 1: NO}, "2 of 3 verdicts kept"),
        ("pppyy.", "nowhere||BOLD", {0: Verdict(True, ((8, 12),)), 1: YES, 2: YES}, "rejected: 'bold'"),
        ("uq", "", {}, "nothing to take back"),
        ("ny\x03", "", {0: NO, 1: YES}, "2 of 3 verdicts kept"),
        ("nynuq", "", {0: NO, 1: YES}, "2 of 3 verdicts kept"),
    ],
)
def test_a_person_presses_one_key(keys: str, lines: str, expected: dict[int, Verdict], said: str) -> None:
    verdicts, screen = ask_person(keys, lines)
    assert verdicts == expected
    assert said in screen


def test_a_person_may_lose_the_terminal_and_an_answer_may_not_rule_it() -> None:
    def gone(*_: str) -> str:
        raise EOFError

    screen, pressed = Console(file=StringIO()), iter("pn.")
    judge = PersonJudge(screen, lambda: next(pressed), gone)
    assert dict(judge.judge([Answer("q", "a\x1b[2Jb")])) == {0: Verdict(True)}
    assert "\x1b" not in screen.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        list(PersonJudge(screen, gone, gone).judge([Answer("q", "a")]))
