"""A model behind an OpenAI-compatible endpoint: vLLM, llama.cpp's server, Ollama, or a hosted one.

An endpoint offers answers only, with the log-probabilities of their tokens where it has them: no token ids, and no
log-probabilities of tokens that the caller chooses.

    request --wait until allowed--> POST --read the reply--> answer, or why the prompt is refused
                    ^                      |
                    +------ backoff -------+  time-out, damaged or endless reply, 429, 5xx
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

from buleyean_rl.errors import EngineError
from buleyean_rl.inference.endpoint_client import (
    EndpointClient,
    Reply,
    TransientError,
    max_reply_bytes,
    parse_address,
    read_key,
)
from buleyean_rl.inference.endpoint_reply import (
    TOKEN_VALUES,
    error_message,
    is_retried,
    read_answer,
    read_refusal,
    retry_after,
)
from buleyean_rl.inference.event_loop import EventLoop
from buleyean_rl.inference.protocol import (
    FAILED,
    GREEDY,
    REFUSED,
    Answer,
    BaseEngine,
    Messages,
    OnTokens,
    Outcome,
    Sampling,
    Unanswered,
)
from buleyean_rl.system.wording import counted

T = TypeVar("T")

API_KEY_VARIABLE = "BULEYEAN_API_KEY"
JUDGE_KEY_VARIABLE = "BULEYEAN_JUDGE_API_KEY"
FINAL_STATUSES = {*range(300, 400), 400, 401, 402, 403, 413, 422, 451}  # of a sound endpoint too
MAX_FAILURES = 8  # prompts in a row that end in failures: the endpoint is dead
MAX_REFUSALS = 32  # prompts before the first answer: the endpoint takes no request of this kind


@dataclass(frozen=True)
class Patience:
    """How long an endpoint is waited for.

    Args:
        seconds: for a reply, from connecting to its last byte.
        seconds_per_token: more, for each token of the answer asked for.
        retries: attempts after the first.
        pause: backoff after the first failure, in seconds; it doubles.
        max_pause: the longest backoff.
        max_retry_after: the longest time that the endpoint may ask to wait.
        last_answers: seconds for requests that are under way when the endpoint is given up.
    """

    seconds: float = 60.0
    seconds_per_token: float = 1.0
    retries: int = 6
    pause: float = 0.5
    max_pause: float = 30.0
    max_retry_after: float = 120.0
    last_answers: float = 10.0


DEFAULT_PATIENCE = Patience()


class EndpointEngine(BaseEngine):
    """Chat completions over HTTP, `parallel` at a time.

    Failures are retried with exponential backoff, or after the time that the endpoint names. While other requests
    succeed, a 429 is not counted. A prompt that is refused, or whose request fails every time, is left out; only an
    endpoint that is dead or takes no request at all is an error.

    Args:
        url: such as `http://localhost:8000/v1`; `#name` at its end selects the model; without it, the
            first one that the endpoint lists.
        parallel: concurrent requests.
        key_variable: of the environment, with a bearer token that is sent to this endpoint; None for no token.
        patience: None for the default.

    Raises:
        UsageError: the URL is not valid.
        EngineError: the URL selects no model and the endpoint lists none.
    """

    def __init__(
        self, url: str, *, parallel: int = 8, key_variable: str | None = None, patience: Patience | None = None
    ) -> None:
        address = parse_address(url)
        self.url, self.parallel, self._key_variable = address.url, parallel, key_variable
        self._patience = patience or DEFAULT_PATIENCE
        self._client = EndpointClient(self.url, read_key(key_variable) if key_variable else "", parallel)
        self._loop = EventLoop()
        self._close = weakref.finalize(self, _close, self._loop, self._client)  # nobody closes a judge's engine
        self._successes = self._failures_in_a_row = self._refusals = 0
        self._has_answered = False
        self._dead: asyncio.Event = asyncio.Event()
        self._retry_time = 0.0  # when the endpoint allows the next request
        try:
            self.model = address.model or self._first_model()
        except BaseException:
            self.close()
            raise

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:  # noqa: ARG002
        """Raises EngineError: endpoints do not offer it."""
        self._refuse()

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:  # noqa: ARG002
        """Raises EngineError: endpoints do not offer it."""
        self._refuse()

    def prompt_ids(self, messages: Messages) -> list[int]:  # noqa: ARG002
        """Raises EngineError: endpoints do not offer it."""
        self._refuse()

    def top_logprobs(self, ids: Sequence[int], k: int) -> dict[int, float]:  # noqa: ARG002
        """Raises EngineError: endpoints do not offer it."""
        self._refuse()

    def logprobs(
        self,
        sequences: Sequence[Sequence[int]],  # noqa: ARG002
        starts: Sequence[int] | None = None,  # noqa: ARG002
        on_done: Callable[[int], None] | None = None,  # noqa: ARG002
    ) -> list[list[float]]:
        """Raises EngineError: endpoints do not offer it."""
        self._refuse()

    def generate(self, messages: Messages, sampling: Sampling = GREEDY) -> Generator[str, None, Answer]:
        """The answer, in one piece."""
        (outcome,) = self.answer_many([messages], sampling)
        if isinstance(outcome, Unanswered):
            raise EngineError(outcome.detail)
        yield outcome.text
        return outcome

    def answers(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generator[tuple[int, Outcome]]:
        """The answers as they come, from up to `parallel` concurrent requests."""
        for index, outcome in self._loop.iterate(self._answers(conversations, sampling, seeds)):
            if on_tokens is not None and isinstance(outcome, Answer):
                on_tokens(len(outcome.text.split()) if outcome.tokens is None else outcome.tokens)
            yield index, outcome

    def close(self) -> None:
        """Cancel pending requests and close the connections."""
        self._close()

    def _refuse(self) -> NoReturn:
        raise EngineError(f"{self.url}: an endpoint offers answers only, no tokens and no log-probabilities")

    def _first_model(self) -> str:
        def first(body: bytes) -> str:
            try:
                return str(json.loads(body)["data"][0]["id"])
            except (ValueError, LookupError, TypeError, RecursionError):
                raise TransientError(f"its reply lists no models: {body[:80]!r}") from None

        async def ask() -> str:
            name = await self._send("GET", "models", None, first, 0)
            if isinstance(name, Unanswered):
                raise EngineError(f"{self.url}: {name.detail}; or name the model: {self.url}#name")
            return name

        return self._loop.run(ask())

    async def _answers(
        self, conversations: Sequence[Messages], sampling: Sampling, seeds: Sequence[int] | None
    ) -> AsyncGenerator[tuple[int, Outcome]]:
        """See `answers`. Refusals wait for an answer that proves the request right."""
        unasked = iter(range(len(conversations)))
        running: dict[asyncio.Task[Outcome], int] = {}
        refused: list[tuple[int, Unanswered]] = []
        error: EngineError | None = None
        try:
            while True:
                while error is None and len(running) < self.parallel and (index := next(unasked, None)) is not None:
                    seed = seeds[index] if seeds else sampling.seed + index
                    request = self._completion_request(conversations[index], sampling, seed)
                    running[asyncio.create_task(self._answer(request, sampling))] = index
                patience = None if error is None else self._patience.last_answers
                done, _ = (
                    await asyncio.wait(running, timeout=patience, return_when="FIRST_COMPLETED")
                    if running
                    else ((), ())
                )
                if not done:
                    break
                for task in done:
                    index = running.pop(task)
                    try:
                        outcome = task.result()
                        self._check_alive(outcome)
                    except EngineError as problem:
                        error = error or problem
                        self._dead.set()
                        continue
                    if isinstance(outcome, Unanswered) and outcome.cause == REFUSED:
                        refused.append((index, outcome))
                    else:
                        yield index, outcome
                if self._has_answered:
                    for index, refusal in refused:
                        yield index, refusal._replace(is_permanent=True)
                    refused.clear()
        finally:
            for task in running:
                task.cancel()
        if error is not None:
            raise error
        for index, refusal in refused:
            yield index, refusal

    async def _answer(self, request: Mapping[str, Any], sampling: Sampling) -> Outcome:
        read = partial(read_answer, tokens_asked=sampling.max_tokens, logprobs=sampling.logprobs)
        outcome = await self._send("POST", "chat/completions", request, read, sampling.max_tokens)
        if isinstance(outcome, Unanswered):
            return outcome
        self._has_answered = True
        return outcome._replace(text=self._client.redact(outcome.text))

    def _check_alive(self, outcome: Outcome) -> None:
        """Raises EngineError: too many prompts in a row came to nothing."""
        cause, detail = outcome[:2] if isinstance(outcome, Unanswered) else (None, "")
        self._failures_in_a_row = self._failures_in_a_row + 1 if cause == FAILED else 0
        self._refusals += cause == REFUSED
        if self._failures_in_a_row >= MAX_FAILURES:
            raise EngineError(f"{self.url}: {MAX_FAILURES} prompts in a row have no answer: {detail}")
        if self._refusals >= MAX_REFUSALS and not self._has_answered:
            raise EngineError(f"{self.url}: refuses every prompt, so far {self._refusals}: {detail}")

    def _completion_request(self, messages: Messages, sampling: Sampling, seed: int) -> dict[str, Any]:
        request = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "seed": seed,
        }
        if sampling.temperature > 0:
            request["top_p"] = sampling.top_p
        if sampling.stop:
            request["stop"] = list(sampling.stop)
        return request | ({"logprobs": True} if sampling.logprobs else {})

    async def _send(
        self, method: str, path: str, request: Mapping[str, Any] | None, read: Callable[[bytes], T], tokens: int
    ) -> T | Unanswered:
        """Send a request and read its reply; failures are retried.

        Raises:
            EngineError: the request is wrong, whatever the prompt.
        """
        failures, earlier_successes = 0, self._successes
        seconds = self._patience.seconds + self._patience.seconds_per_token * tokens
        values = tokens * (TOKEN_VALUES if request and request.get("logprobs") else 1)
        while True:
            try:
                await self._wait_for_retry_time()
                reply = await self._client.send(method, path, request, max_reply_bytes(values), seconds)
                if not 200 <= reply.status < 300:
                    return self._read_error(reply)
                value = read(reply.body)
                self._successes += 1
                return value
            except TransientError as problem:
                if problem.is_rate_limit and self._successes > earlier_successes:
                    failures, earlier_successes = 0, self._successes
                else:
                    failures += 1
                asked, shown = problem.retry_after or 0.0, self._client.show(str(problem))
                if failures > self._patience.retries or self._dead.is_set():
                    return Unanswered(FAILED, f"{shown}, in {counted(failures, 'try', 'tries')}", is_permanent=False)
                if asked > self._patience.max_retry_after:
                    return Unanswered(FAILED, f"{shown}, asks to wait {asked:.0f} seconds", is_permanent=False)
                await self._back_off(failures, asked)

    def _read_error(self, reply: Reply) -> Unanswered:
        status, shown = reply.status, self._client.show(error_message(reply.body))
        if is_retried(status) or (self._has_answered and status not in FINAL_STATUSES):
            raise TransientError(
                f"status {status}", is_rate_limit=status == 429, retry_after=retry_after(reply.headers)
            )
        if (refusal := read_refusal(status, reply.body, shown)) is not None:
            return refusal
        hint = ""
        if 300 <= status < 400:
            shown = self._client.show(reply.headers.get("location", ""))
            hint = " (it redirects, and no redirect is followed: name the address itself)"
        elif status in (401, 403):
            variable = self._key_variable or "no variable: only the endpoint of --model, or of the first judge, has one"
            hint = f" (its key is read from {variable})"
        raise EngineError(f"{self.url}: status {status}{hint}: {shown}")

    async def _wait_for_retry_time(self) -> None:
        while (seconds := self._retry_time - time.monotonic()) > 0 and not self._dead.is_set():
            await self._pause(seconds)

    async def _back_off(self, failures: int, asked: float) -> None:
        """Pause before the next attempt: at least the backoff, whatever the endpoint asks."""
        backoff = min(self._patience.max_pause, self._patience.pause * 2 ** max(0, failures - 1))
        self._retry_time = max(self._retry_time, time.monotonic() + asked)
        await self._pause(backoff * random.uniform(0.5, 1.0))  # spreads concurrent retries

    async def _pause(self, seconds: float) -> None:
        """Sleep, or until the endpoint is given up."""
        try:
            await asyncio.wait_for(self._dead.wait(), seconds)
        except TimeoutError:
            return


def _close(loop: EventLoop, client: EndpointClient) -> None:
    loop.close(client.close())
