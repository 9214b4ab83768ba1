"""An endpoint over real HTTP: transient failures are retried, and no answer is lost or doubled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from buleyean_rl.errors import EngineError, UsageError
from buleyean_rl.inference.endpoint import EndpointEngine
from buleyean_rl.inference.protocol import Engine, Sampling
from standin import StandIn, standing_in

PROMPTS = [f"prompt {number}" for number in range(12)]
CONVERSATIONS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
ANSWERS = [prompt.upper() for prompt in PROMPTS]


@pytest.fixture
def server() -> Iterator[StandIn]:
    with standing_in() as state:
        yield state


def connect(server: StandIn, **settings: object) -> EndpointEngine:
    return EndpointEngine(server.url, **({"pause": 0.01, "timeout": 0.5} | settings))  # type: ignore[arg-type]


def test_answers_are_in_order_and_requests_concurrent(server: StandIn) -> None:
    server.delay = 0.05
    progress: list[int] = []
    with closing(connect(server, parallel=4)) as engine:
        assert isinstance(engine, Engine)
        assert (
            engine.complete_many(CONVERSATIONS, Sampling(max_tokens=7, temperature=0.5, seed=3), progress.append)
            == ANSWERS
        )
    assert progress == list(range(1, 13))
    assert server.max_concurrent == 4
    by_prompt = {request["messages"][0]["content"]: request for request in server.requests}
    request = by_prompt["prompt 5"]
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("the-model", 7, 0.5)
    assert (request["seed"], request["top_p"]) == (8, 0.95)


@pytest.mark.parametrize("fault", [429, 500, 503, 408, "silence", "half", "hang up", "not json", "no choices"])
def test_transient_failures_are_retried(server: StandIn, fault: object) -> None:
    server.faults = [fault] * 5
    with closing(connect(server)) as engine:
        assert engine.complete_many(CONVERSATIONS) == ANSWERS
    assert len(server.requests) == len(PROMPTS) + 5


def test_no_answer_is_lost_with_all_failures_at_once(server: StandIn) -> None:
    server.faults = [429, "half", 500, "hang up", "not json", 503, "no choices", 429] * 2
    with closing(connect(server, parallel=3)) as engine:
        assert engine.complete_many(CONVERSATIONS) == ANSWERS


def test_a_rate_limit_is_not_counted_while_others_succeed(server: StandIn) -> None:
    # Seven in eight requests are turned away: one of twelve would be turned away eight times in a row.
    server.faults = [429 if number % 8 else None for number in range(8 * len(PROMPTS))]
    with closing(connect(server, parallel=8, retries=7, pause=0.001)) as engine:
        assert engine.complete_many(CONVERSATIONS) == ANSWERS


def test_retry_after_is_respected(server: StandIn) -> None:
    server.faults, server.retry_after = [429], "0.4"
    with closing(connect(server, parallel=1)) as engine:
        started = time.monotonic()
        assert engine.complete_many(CONVERSATIONS[:2]) == ANSWERS[:2]
        assert time.monotonic() - started >= 0.4
        server.faults, server.retry_after = [429], "86400"
        with pytest.raises(EngineError, match="asks to wait 86400 seconds"):
            engine.complete_many(CONVERSATIONS[:1])


def test_a_dead_endpoint_is_an_error(server: StandIn) -> None:
    server.faults = [500] * 100
    with closing(connect(server, retries=2, parallel=1)) as engine:
        with pytest.raises(EngineError, match="gave up after 3 tries: status 500"):
            engine.complete_many(CONVERSATIONS)
        assert len(server.requests) == 3


@pytest.mark.parametrize(("status", "hint"), [(400, "the reason"), (401, "BULEYEAN_API_KEY"), (404, "the reason")])
def test_permanent_failures_are_not_retried(server: StandIn, status: int, hint: str) -> None:
    server.faults = [status]
    with closing(connect(server)) as engine, pytest.raises(EngineError, match=hint):
        engine.complete_many(CONVERSATIONS[:1])
    assert len(server.requests) == 1


def test_a_refused_connection_is_an_error() -> None:
    with pytest.raises(EngineError, match="the connection failed"):
        EndpointEngine("http://127.0.0.1:9/v1", retries=1, pause=0.001)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://"])
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is no endpoint"):
        EndpointEngine(url)


def test_the_model_and_the_key(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULEYEAN_API_KEY", "secret")
    with closing(EndpointEngine(server.url.removesuffix("/v1") + "#other", pause=0.01)) as engine:
        assert engine.complete_many(CONVERSATIONS[:1], Sampling(stop=("x",))) == ANSWERS[:1]
    assert server.requests[0]["model"] == "other"
    assert server.requests[0]["stop"] == ["x"]
    assert "top_p" not in server.requests[0]
    assert server.keys == ["Bearer secret"]


def test_a_stream_is_retried_before_its_first_piece(server: StandIn) -> None:
    server.faults = [429, "hang up"]
    with closing(connect(server)) as engine:
        pieces = list(engine.generate(CONVERSATIONS[0]))
    assert pieces == list(ANSWERS[0])


def test_a_truncated_stream_is_an_error(server: StandIn) -> None:
    server.faults = ["half stream"]
    with closing(connect(server)) as engine:
        pieces = engine.generate(CONVERSATIONS[0])
        with pytest.raises(EngineError, match="broke off: a truncated line"):
            list(pieces)


def test_an_endpoint_has_no_tokens(server: StandIn) -> None:
    with closing(connect(server)) as engine, pytest.raises(EngineError, match="answers only"):
        engine.tokenize("a")
