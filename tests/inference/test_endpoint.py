"""An endpoint over real HTTP: transient failures are retried, and no answer is lost or doubled."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from buleyean_rl.errors import EngineError, UsageError
from buleyean_rl.inference.endpoint import EndpointEngine
from buleyean_rl.inference.endpoint_server import Patience
from buleyean_rl.inference.protocol import Answer, Engine, Sampling, Unanswered
from standin import StandIn, standing_in

PROMPTS = [f"prompt {number}" for number in range(12)]
CONVERSATIONS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
ANSWERS = [prompt.upper() for prompt in PROMPTS]


@pytest.fixture
def server() -> Iterator[StandIn]:
    with standing_in() as state:
        yield state


def connect(server: StandIn, parallel: int = 8, **patience: float) -> EndpointEngine:
    settings = {"pause": 0.01, "seconds": 0.5, "seconds_per_token": 0.0} | patience
    return EndpointEngine(server.url, parallel=parallel, patience=Patience(**settings))  # type: ignore[arg-type]


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
        (outcome,) = engine.answer_many(CONVERSATIONS[:1])
        assert outcome == Unanswered("failed", "status 429, asks to wait 86400 seconds", is_permanent=False)


def test_an_endpoint_asks_for_no_shorter_pause_than_the_backoff(server: StandIn) -> None:
    server.faults, server.retry_after = [429], "0"
    with closing(connect(server, pause=0.6)) as engine:
        started = time.monotonic()
        assert engine.complete_many(CONVERSATIONS[:1]) == ANSWERS[:1]
        assert time.monotonic() - started >= 0.3


def test_a_prompt_that_fails_every_time_is_left_out(server: StandIn) -> None:
    server.faults = [500] * 3
    with closing(connect(server, retries=2, parallel=1)) as engine:
        first, *others = engine.answer_many(CONVERSATIONS)
    assert first == Unanswered("failed", "status 500, in 3 tries", is_permanent=False)
    assert [other.text for other in others] == ANSWERS[1:]  # type: ignore[union-attr]


def test_a_dead_endpoint_is_an_error_and_costs_no_answer_that_came(server: StandIn) -> None:
    server.faults = [None, None, *[500] * 100]
    came: list[int] = []
    with closing(connect(server, retries=1, parallel=2)) as engine:
        with pytest.raises(EngineError, match="8 prompts in a row have no answer: status 500"):
            came.extend(index for index, _ in engine.answers(CONVERSATIONS))
        assert {0, 1} <= set(came)
        assert len(server.requests) <= 2 + 2 * 9


@pytest.mark.parametrize(
    ("status", "body", "cause"),
    [
        (400, b'{"error": {"code": "context_length_exceeded"}}', "longer than the context"),
        (
            400,
            b'{"error": {"message": "maximum context length is 8192 tokens", "code": 400}}',
            "longer than the context",
        ),
        (422, b'{"error": "`inputs` tokens + `max_new_tokens` must be <= 4096"}', "longer than the context"),
        (413, b"<html>Request Entity Too Large</html>", "longer than the context"),
        (400, b'{"error": {"innererror": {"code": "ResponsibleAIPolicyViolation"}}}', "content filter"),
        (403, b'{"error": {"message": "Your input was flagged"}}', "content filter"),
        (200, b'{"choices": [{"finish_reason": "content_filter", "message": {"content": "I"}}]}', "content filter"),
        (200, b'{"choices": [{"message": {"content": null, "reasoning_content": "Hm"}}]}', "no text"),
        (200, b'{"choices": [{"message": {"content": "", "tool_calls": [{"id": "1"}]}}]}', "no text"),
        (400, b"Bad Request", "refused"),
    ],
)
def test_a_refused_prompt_is_left_out(server: StandIn, status: int, body: bytes, cause: str) -> None:
    server.faults = [(status, body)]
    with closing(connect(server, parallel=1)) as engine:
        first, *others = engine.answer_many(CONVERSATIONS)
    assert isinstance(first, Unanswered)
    assert (first.cause, first.is_permanent) == (cause, True)
    assert len(server.requests) == len(others) + 1 == len(PROMPTS)


def test_refusals_without_a_reason_need_an_answer_to_be_about_the_prompt(server: StandIn) -> None:
    server.faults = [400] * 100
    with closing(connect(server)) as engine:
        assert not any(outcome.is_permanent for outcome in engine.answer_many(CONVERSATIONS))  # type: ignore[union-attr]
        with pytest.raises(EngineError, match="refuses every prompt, so far 32: status 400: the reason"):
            engine.answer_many(CONVERSATIONS * 3)


@pytest.mark.parametrize(("status", "hint"), [(401, "its key is read from"), (404, "the reason"), (307, "redirects")])
def test_a_wrong_request_is_an_error_at_once(server: StandIn, status: int, hint: str) -> None:
    server.faults = [status]
    with closing(connect(server, parallel=1)) as engine, pytest.raises(EngineError, match=hint):
        engine.complete_many(CONVERSATIONS[:4])
    assert len(server.requests) == 1


def test_a_sound_endpoint_may_fail_in_any_way_once(server: StandIn) -> None:
    server.faults = [None, 404, 418, 204]
    with closing(connect(server, parallel=1)) as engine:
        assert engine.complete_many(CONVERSATIONS) == ANSWERS


def test_a_refused_connection_is_an_error() -> None:
    with pytest.raises(EngineError, match="the connection failed"):
        EndpointEngine("http://127.0.0.1:9/v1", patience=Patience(retries=1, pause=0.001))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", "http://user:a/secret@x/v1"])
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is no endpoint") as caught:
        EndpointEngine(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://user:secret@x/v1", "http://secret@x", "https://x/v1?key=secret"])
def test_a_secret_in_the_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="a key belongs in the environment") as caught:
        EndpointEngine(url)
    assert "secret" not in str(caught.value)


def test_the_model_and_the_key(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-a-long-secret"
    monkeypatch.setenv("A_KEY", f"{key}\n")
    server.answer = lambda _: f"the {key} is {key}"
    with closing(EndpointEngine(server.url.removesuffix("/v1") + "#other", key_variable="A_KEY")) as engine:
        assert engine.complete_many(CONVERSATIONS[:1], Sampling(stop=("x",))) == ["the [key] is [key]"]
        server.faults = [(401, b"wrong key sk-a-long-secret")]
        with pytest.raises(EngineError, match=r"its key is read from A_KEY\): wrong key \[key\]"):
            engine.complete_many(CONVERSATIONS[:1])
    assert server.requests[0]["model"] == "other"
    assert server.requests[0]["stop"] == ["x"]
    assert "top_p" not in server.requests[0]
    assert server.keys == [f"Bearer {key}"] * 2
    with closing(EndpointEngine(server.url)) as engine:
        engine.complete_many(CONVERSATIONS[:1])
    assert server.keys[-1] is None
    monkeypatch.setenv("A_KEY", "sécret")
    with pytest.raises(UsageError, match="A_KEY has characters that no key has"):
        EndpointEngine(server.url, key_variable="A_KEY")


def test_a_short_key_is_a_word_and_stays_in_answers(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "ollama")
    server.answer = lambda _: "ollama runs models"
    with closing(EndpointEngine(server.url, key_variable="A_KEY")) as engine:
        assert engine.complete_many(CONVERSATIONS[:1]) == ["ollama runs models"]


def test_a_reply_of_many_values_is_not_parsed(server: StandIn) -> None:
    server.faults = [(200, b'{"choices": [' + b"[]," * 5000 + b"[]]}")]
    server.answer = lambda _: "[]," * 1000
    with closing(connect(server)) as engine:
        assert engine.complete_many(CONVERSATIONS[:1]) == ["[]," * 1000]
    assert len(server.requests) == 2


def test_halves_of_surrogate_pairs_are_replaced(server: StandIn) -> None:
    server.answer = lambda _: "a\ud800b\udc00\U0001f600"
    with closing(connect(server)) as engine:
        assert engine.complete_many(CONVERSATIONS[:1]) == ["a\ufffdb\ufffd\U0001f600"]


def test_an_interrupted_iteration_ends_its_requests(server: StandIn) -> None:
    server.delay = 0.3
    with closing(connect(server, parallel=2, seconds=20)) as engine:
        answers = engine.answers(CONVERSATIONS)
        next(answers)
        answers.close()
    assert len(server.requests) <= 4
    with pytest.raises(EngineError, match="closed"):
        engine.complete_many(CONVERSATIONS)


def test_an_endpoint_has_no_tokens(server: StandIn) -> None:
    with closing(connect(server)) as engine, pytest.raises(EngineError, match="answers only"):
        engine.tokenize("a")


def test_log_probabilities_where_the_endpoint_has_them(server: StandIn) -> None:
    entry = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    choice = {"message": {"content": "a" * 900}, "finish_reason": "length", "logprobs": {"content": [entry] * 900}}
    body = json.dumps({"choices": [choice], "usage": {"completion_tokens": 900}}).encode()
    tokens: list[int] = []
    with closing(connect(server)) as engine:
        server.faults = [(200, body)]
        sampling = Sampling(max_tokens=900, logprobs=True)
        ((_, answer),) = engine.answers(CONVERSATIONS[:1], sampling, on_tokens=tokens.append)
        assert answer == Answer("a" * 900, 900, False, None, (-0.5,) * 900)
        assert tokens == [900]
        assert server.requests[-1]["logprobs"] is True
        ((_, answer),) = engine.answers(CONVERSATIONS[:1], sampling)  # which has none
        assert answer == Answer(ANSWERS[0], None, True)
        engine.complete_many(CONVERSATIONS[:1])
        assert "logprobs" not in server.requests[-1]
