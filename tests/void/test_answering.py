"""Answers being written: stopped, written on, drawn again, and those of batches in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from asgi import call
from buleyean_rl.void import answering as module
from voids import Echo, until, void_in_process

WORDS = "one two three four five six"


@pytest.fixture
def engine() -> Echo:
    return Echo()


@pytest.fixture
def app(tmp_path: Path, engine: Echo) -> Iterator[Any]:
    with void_in_process(tmp_path, engine=engine) as (app, _):
        yield app


def ask(app: Any, uid: str = "asked-0001", prompt: str = WORDS, **options: Any) -> Any:
    body = {"uid": uid, "conversation": "talk-0001", "prompt": prompt} | options
    return call(app, "POST", "/api/turns", body)


def answer(app: Any, uid: str = "asked-0001") -> Any:
    return call(app, "GET", f"/api/turns/{uid}").json()["answers"][0]


def finished(app: Any, uid: str = "asked-0001") -> Any:
    return until(lambda: (now := answer(app, uid))["state"] not in ("waiting", "writing") and now, 20)


def act(app: Any, action: str, identity: int, status: int = 200) -> Any:
    reply = call(app, "POST", f"/api/answers/{identity}/{action}", {})
    assert reply.status == status
    return reply.json()


@contextmanager
def held(engine: Echo) -> Iterator[None]:
    """While the engine waits before its next word."""
    engine.go.clear()
    yield
    engine.go.set()


def test_an_answer_that_is_cut_says_so_and_goes_on(app: Any) -> None:
    ask(app, max_tokens=2)
    cut = finished(app)
    assert (cut["state"], cut["text"]) == ("cut", "one two ")
    act(app, "continue", cut["id"])
    longer = finished(app)
    assert (longer["id"], longer["state"], longer["text"]) == (cut["id"], "cut", "one two three four ")
    act(app, "continue", cut["id"])
    whole = finished(app)
    assert (whole["state"], whole["text"]) == ("done", f"{WORDS} ")
    act(app, "continue", cut["id"], 409)


def test_a_rejected_answer_does_not_go_on(app: Any) -> None:
    ask(app, max_tokens=2)
    cut = finished(app)
    rejected = call(app, "POST", "/api/rejections", {"uid": "reject-01", "answer": cut["id"]}).json()
    assert "undo its rejection" in act(app, "continue", cut["id"], 409)["error"]
    call(app, "POST", f"/api/rejections/{rejected['id']}/undo", {})
    act(app, "continue", cut["id"])
    assert finished(app)["text"] == "one two three four "


def test_an_answer_is_stopped_with_what_it_has(app: Any, engine: Echo) -> None:
    with held(engine):
        ask(app)
        assert ask(app, "asked-0002").status == 409  # while one is written
        running = answer(app)
        act(app, "again", running["id"], 409)
        assert call(app, "POST", "/api/rejections", {"uid": "reject-01", "answer": running["id"]}).status == 409
        engine.go.set()
        until(lambda: answer(app)["text"], 20)
        shown = call(app, "POST", "/api/turns/asked-0001/stop", {}).json()["answers"][0]
    assert shown["state"] in ("stopped", "done")
    assert WORDS.startswith(shown["text"].strip())


def test_another_answer_takes_the_place_of_one(app: Any) -> None:
    ask(app)
    first = finished(app)
    second = act(app, "again", first["id"])["answers"][0]
    assert (second["id"] != first["id"], second["attempt"], second["slot"]) == (True, 1, 0)
    finished(app)
    shown = call(app, "GET", "/api/conversations/talk-0001").json()["turns"][0]["answers"]
    assert [each["id"] for each in shown] == [second["id"]]


def test_an_answer_is_on_disk_as_it_is_written(tmp_path: Path, engine: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STORE_SECONDS", -1.0)
    with void_in_process(tmp_path, engine=engine) as (app, void):
        with held(engine):
            ask(app)
            engine.go.set()
            until(lambda: void.store.conversations.answer(1)["text"], 20)  # type: ignore[index]
        finished(app)
        void.store.conversations.save(void.store.conversations.answer(1), "one two ", "writing")  # type: ignore[arg-type]
    with void_in_process(tmp_path, engine=engine) as (app, _):  # as after a kill
        assert finished(app)["text"] == f"{WORDS} "


def test_an_engine_that_fails_is_told_and_asked_again(app: Any, engine: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Iterator[str]:
        raise ValueError("no such layer")
        yield

    with monkeypatch.context() as broken:
        broken.setattr(engine, "generate", fail)
        ask(app)
        failed = finished(app)
    assert (failed["state"], failed["error"]) == ("failed", "the model failed: no such layer")
    act(app, "again", failed["id"])
    assert finished(app)["state"] == "done"


def test_an_answer_has_ended_only_once_the_store_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with void_in_process(tmp_path) as (app, void):
        save, shown = void.store.conversations.save, []

        def watch(row: Any, text: str, state: str, **rest: Any) -> None:
            shown.append((state, answer(app)["state"]))
            save(row, text, state, **rest)

        monkeypatch.setattr(void.store.conversations, "save", watch)
        ask(app)
        finished(app)
        assert shown == [("done", "writing")]


def test_an_answer_that_the_disk_does_not_take_is_told(tmp_path: Path) -> None:
    with void_in_process(tmp_path) as (app, void):
        ask(app)
        finished(app)

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        save, void.store.conversations.save = void.store.conversations.save, full  # type: ignore[method-assign]
        assert ask(app, "asked-0002").status == 200
        failed = finished(app, "asked-0002")
        assert (failed["state"], "free some space" in failed["error"]) == ("failed", True)
        void.store.conversations.save = save  # type: ignore[method-assign]


def test_each_turn_hears_the_conversation_so_far(app: Any, engine: Echo) -> None:
    ask(app, prompt="hello", system="Be brief.")
    finished(app)
    ask(app, "asked-0002", "and you?")
    finished(app, "asked-0002")
    roles = [[(each["role"], each["content"]) for each in messages] for messages in engine.heard]
    assert roles[0] == [("system", "Be brief."), ("user", "hello")]
    assert roles[1] == [("user", "hello"), ("assistant", "hello "), ("user", "and you?")]


def test_a_batch_waits_for_those_who_ask(app: Any, engine: Echo) -> None:
    with held(engine):
        prompts = [f"prompt {number}" for number in range(4)]
        assert call(app, "POST", "/api/batches", {"uid": "batch-001", "prompts": prompts}).status == 200
        until(lambda: engine.heard, 20)  # the batch has begun
        ask(app)
    assert finished(app)["state"] == "done"
    until(lambda: call(app, "GET", "/api/batches/batch-001").json()["state"] == "done", 20)
    cards = call(app, "GET", "/api/batches/batch-001/cards", query=b"from=1&count=9").json()["cards"]
    assert [card["answers"][0]["text"] for card in cards] == ["prompt 1 ", "prompt 2 ", "prompt 3 "]


def test_a_batch_that_a_restart_interrupted_goes_on(tmp_path: Path, engine: Echo) -> None:
    with void_in_process(tmp_path, engine=engine) as (app, _), held(engine):
        call(app, "POST", "/api/batches", {"uid": "batch-001", "prompts": ["a", "b"]})
        call(app, "POST", "/api/batches/batch-001/stop", {})
    with void_in_process(tmp_path, engine=engine) as (app, _):
        assert call(app, "GET", "/api/batches").json()["batches"][0]["state"] in ("paused", "done")
        call(app, "POST", "/api/batches/batch-001/resume", {})
        until(lambda: call(app, "GET", "/api/batches/batch-001").json()["state"] == "done", 20)
        card = call(app, "GET", "/api/batches/batch-001/next").json()["card"]
        verdict = {"uid": "verdict-1", "verdict": "rejected", "spans": [[0, 1]], "reason": "why"}
        judged = call(app, "POST", f"/api/turns/{card['id']}/verdict", verdict).json()
        assert (judged["verdict"], judged["answers"][0]["rejections"][0]["spans"]) == ("rejected", [[0, 1]])
        assert call(app, "POST", f"/api/turns/{card['id']}/verdict", verdict | {"verdict": "bad"}).status == 400


def test_prompts_of_a_file_are_looked_at(app: Any) -> None:
    from asgi import BINARY

    for name, content in (("p.txt", b"one\n\ntwo\none\n"), ("p.jsonl", b'{"prompt": "one"}\n{"prompt": "two"}\n')):
        reply = call(app, "POST", "/api/batches/prompts", query=f"name={name}".encode(), headers=BINARY, body=content)
        assert (reply.status, reply.json()["prompts"]) == (200, ["one", "two"])
    empty = call(app, "POST", "/api/batches/prompts", query=b"name=p.txt", headers=BINARY, body=b" ")
    assert (empty.status, "prompt" in empty.json()["error"]) == (400, True)
