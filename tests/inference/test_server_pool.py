"""Several servers share the prompts: each is answered once, whoever dies, lags or talks nonsense."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from buleyean_rl.errors import EngineError, UsageError
from buleyean_rl.inference.endpoint import EndpointEngine
from buleyean_rl.inference.endpoint_server import Endpoint, Patience
from buleyean_rl.inference.open import Servers, answers_key, describe_policy, locate, open_engine
from buleyean_rl.inference.protocol import Answer, Unanswered
from standin import StandIn, standing_in

COUNT = 60
PROMPTS = [f"prompt {number}" for number in range(COUNT)]
CONVERSATIONS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
ANSWERS = [prompt.upper() for prompt in PROMPTS]
DOWN = "http://127.0.0.1:9/v1#the-model"


@pytest.fixture
def three() -> Iterator[list[StandIn]]:
    with ExitStack() as stack:
        yield [stack.enter_context(standing_in()) for _ in range(3)]


def connect(urls: Sequence[str], parallel: int = 4, **patience: float) -> EndpointEngine:
    settings = {"pause": 0.01, "max_pause": 0.05, "seconds": 5.0, "seconds_per_token": 0.0, "retries": 2} | patience
    return EndpointEngine([Endpoint(url, parallel) for url in urls], patience=Patience(**settings))  # type: ignore[arg-type]


def ask(engine: EndpointEngine) -> list[str]:
    """The answers; each prompt has exactly one."""
    with closing(engine):
        outcomes = list(engine.answers(CONVERSATIONS))
    assert Counter(index for index, _ in outcomes) == Counter(range(COUNT))
    return [outcome.text for _, outcome in sorted(outcomes) if isinstance(outcome, Answer)]


def test_the_free_ones_take_the_work(three: list[StandIn]) -> None:
    slow, *quick = three
    slow.delay = 0.3
    quick[0].delay = quick[1].delay = 0.01
    engine = connect([server.url for server in three], parallel=2)
    assert ask(engine) == ANSWERS
    shares = [report.answers for report in engine.servers]
    assert sum(shares) == COUNT
    assert shares[0] < min(shares[1:]) / 2
    assert [report.model for report in engine.servers] == ["the-model"] * 3


def test_what_dead_and_mad_servers_had_goes_to_the_others(three: list[StandIn]) -> None:
    three[0].faults = ["not json"] * 1000
    three[1].faults = [None, None, *["hang up"] * 1000]
    engine = connect([*(server.url for server in three), DOWN])
    assert ask(engine) == ANSWERS
    reports = engine.servers
    assert [report.answers for report in reports] == [0, 2, COUNT - 2, 0]
    assert all(report.failures for report in reports if report is not reports[2])
    assert sum(report.passed_on for report in reports) >= 3 * 4


def test_a_wrong_request_gives_one_server_up(three: list[StandIn]) -> None:
    three[0].faults = [401] * 1000
    three[1].faults = [400] * 1000  # refuses everything, without a word why
    engine = connect([server.url for server in three])
    assert ask(engine) == ANSWERS
    assert "its key is read from" in engine.servers[0].given_up
    assert engine.servers[2].answers == COUNT


def test_a_server_that_hangs_loses_its_prompts_to_one_that_is_free(
    three: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("buleyean_rl.inference.endpoint.LATE_SECONDS", 0.2)
    monkeypatch.setattr("buleyean_rl.inference.endpoint.POLL_SECONDS", 0.05)
    three[0].faults = ["silence"] * 1000
    started = time.monotonic()
    assert ask(connect([server.url for server in three], seconds=60)) == ANSWERS
    assert time.monotonic() - started < 20
    three[0].released.set()


def test_what_was_taken_from_a_late_server_goes_back_when_the_taker_dies(
    three: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("buleyean_rl.inference.endpoint.LATE_SECONDS", 0.1)
    monkeypatch.setattr("buleyean_rl.inference.endpoint.POLL_SECONDS", 0.05)
    late, quick, _ = three
    late.delay = 1.0
    quick.faults = [None, None, 401]
    with closing(connect([late.url, quick.url], parallel=1)) as engine:
        outcomes = dict(engine.answers(CONVERSATIONS[:3]))
    assert all(isinstance(outcome, Answer) for outcome in outcomes.values())
    assert [report.answers for report in engine.servers] == [1, 2]
    assert engine.servers[1].given_up


def test_a_server_that_comes_back_is_used_again(three: list[StandIn]) -> None:
    back, steady, _ = three
    back.faults = [503] * 6
    steady.delay = 0.05
    engine = connect([back.url, steady.url], parallel=2, retries=6)
    assert ask(engine) == ANSWERS
    assert engine.servers[0].answers > 0
    assert not engine.servers[0].given_up


def test_a_prompt_that_every_server_refuses_is_left_out(three: list[StandIn]) -> None:
    def answer(prompt: str) -> str:
        if prompt == "prompt 7":
            raise ConnectionError
        return prompt.upper()

    for server in three:
        server.answer = answer
    with closing(connect([server.url for server in three], retries=1)) as engine:
        outcomes = dict(engine.answers(CONVERSATIONS))
    assert len(outcomes) == COUNT
    assert [index for index, outcome in outcomes.items() if isinstance(outcome, Unanswered)] == [7]


def test_without_a_server_left_it_is_an_error_and_costs_no_answer_that_came(three: list[StandIn]) -> None:
    for server in three:
        server.faults = [None, None, *[500] * 1000]
    came: list[int] = []
    with closing(connect([server.url for server in three])) as engine:
        with pytest.raises(EngineError, match="status 500, in 3 tries; so did all 3 servers"):
            came.extend(index for index, _ in engine.answers(CONVERSATIONS))
        assert len(came) == len(set(came)) >= 6


def test_an_interrupted_iteration_ends_all_requests(three: list[StandIn]) -> None:
    for server in three:
        server.delay = 0.2
    with closing(connect([server.url for server in three], parallel=2)) as engine:
        answers = engine.answers(CONVERSATIONS)
        next(answers)
        answers.close()
    assert sum(len(server.requests) for server in three) <= 12
    assert threading.active_count() < 30


# --- their names


def test_servers_are_named_one_by_one_or_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "servers.txt"
    file.write_text("# ours\nhttp://a:1/v1#m\n\nhttp://b:2#m parallel=32 key=B_KEY\n")
    servers = locate(str(file))
    assert isinstance(servers, Servers)
    assert servers.endpoints == (
        Endpoint("http://a:1/v1#m", 8, "BULEYEAN_API_KEY"),
        Endpoint("http://b:2#m", 32, "B_KEY"),
    )
    assert (answers_key(servers), describe_policy(servers)) == ("servers#m", {"model": "m"})
    several = locate(["http://a:1/v1", "https://a:1/v2#m", str(file)[:0] or "http://c/v1"])
    assert isinstance(several, Servers)
    # a key goes to no other scheme, host or port than the first one's
    assert [endpoint.key_variable for endpoint in several.endpoints] == ["BULEYEAN_API_KEY", None, None]
    assert (answers_key(several), describe_policy(several)) == ("servers#", {"model": "servers"})
    assert locate(["http://a:1/v1#m"]) == "http://a:1/v1#m"
    monkeypatch.setenv("B_KEY", "secret")
    with closing(open_engine(servers)) as engine:
        assert [report.url for report in engine.servers] == ["http://a:1/v1", "http://b:2/v1"]


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["http://a/v1", "smollm2-135m"], "smollm2-135m is no endpoint"),
        (["http://a/v1#m", "http://b/v1#n"], "several models, m, n"),
        (["http://a/v1", "http://a/v1"], "named twice"),
        (["http://a/v1", "http://user:secret@b/v1"], "a key belongs in the environment"),
        (["FILE"], "servers.txt:2: give an endpoint a line"),
    ],
)
def test_names_that_cannot_share_the_work_are_refused(tmp_path: Path, names: list[str], problem: str) -> None:
    (tmp_path / "servers.txt").write_text("http://a/v1\nhttp://b/v1 paralel=3\n")
    with pytest.raises(UsageError, match=problem):
        locate([str(tmp_path / "servers.txt") if name == "FILE" else name for name in names])
