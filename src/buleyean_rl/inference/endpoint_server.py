"""One server of an endpoint: a request, retried, and what it says of the server.

request --wait until allowed--> POST --read the reply--> answer, or why the prompt is refused
                ^                      |
                +------ backoff -------+  time-out, damaged or endless reply, 429, 5xx
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

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
from buleyean_rl.inference.protocol import FAILED, REFUSED, Messages, Outcome, Sampling, ServerReport, Unanswered
from buleyean_rl.system.wording import counted

T = TypeVar("T")

PARALLEL = 8  # requests under way at one server
FINAL_STATUSES = {*range(300, 400), 400, 401, 402, 403, 413, 422, 451}  # of a sound endpoint too
VLLM_SETTINGS = "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
MAX_FAILURES = 8  # prompts in a row that end in failures: the endpoint is dead
MAX_REFUSALS = 32  # prompts before the first answer: the endpoint takes no request of this kind


@dataclass(frozen=True)
class Endpoint:
    """Where answers are asked for.

    Args:
        url: such as `http://localhost:8000/v1`; `#name` at its end selects the model; without it, the first one that
            the endpoint lists.
        parallel: concurrent requests.
        key_variable: of the environment, with a bearer token that is sent there; None for no token.
    """

    url: str
    parallel: int = PARALLEL
    key_variable: str | None = None


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


class EndpointServer:
    """An endpoint, and how it has fared so far.

    Failures are retried with exponential backoff, or after the time that the endpoint names. While other requests
    succeed, a 429 is not counted.

    Args:
        endpoint: where it is.
        patience: how long it is waited for.

    Attributes:
        url: its address, without the model's name.
        parallel: concurrent requests.
        report: what it did.
        has_answered: whether it has given an answer: its refusals are about their prompts.
        paused: the tasks that wait for their next attempt.
        under_way: requests that it has.

    Raises:
        UsageError: the URL is not valid.
    """

    def __init__(self, endpoint: Endpoint, patience: Patience) -> None:
        address = parse_address(endpoint.url)
        self.url, self.parallel = address.url, endpoint.parallel
        self.report = ServerReport(address.url, address.model)
        self.has_answered, self.under_way = False, 0
        self.paused: set[asyncio.Task[Any] | None] = set()
        self._key_variable, self._patience = endpoint.key_variable, patience
        self._client = EndpointClient(
            self.url, read_key(self._key_variable) if self._key_variable else "", endpoint.parallel
        )
        self._naming = asyncio.Lock()
        self._successes = self._failures_in_a_row = self._refusals = 0
        self._seconds = 0.0  # that its answers took
        self._dead = asyncio.Event()
        self._retry_time = 0.0  # when the endpoint allows the next request

    @property
    def is_alive(self) -> bool:
        """Whether it has not been given up."""
        return not self._dead.is_set()

    @property
    def mean_seconds(self) -> float | None:
        """That an answer takes; None before the first."""
        return self._seconds / self.report.answers if self.report.answers else None

    async def find_model(self) -> str:
        """The name of its model.

        Raises:
            EngineError: none is selected, and it lists none.
        """
        async with self._naming:
            if not self.report.model:
                name = await self._send("GET", "models", None, _first_model, 0)
                if isinstance(name, Unanswered):
                    raise EngineError(f"{self.url}: {name.detail}; or name the model: {self.url}#name")
                self.report.model = name
        return self.report.model

    async def answer(self, messages: Messages, sampling: Sampling, seed: int) -> Outcome:
        """The answer to a conversation, or why there is none.

        Raises:
            EngineError: the request is wrong, whatever the prompt.
        """
        request = _completion_request(await self.find_model(), messages, sampling, seed)
        read = partial(read_answer, tokens_asked=sampling.max_tokens, logprobs=sampling.logprobs)
        started = time.monotonic()
        outcome = await self._send("POST", "chat/completions", request, read, sampling.max_tokens)
        if isinstance(outcome, Unanswered):
            return outcome
        self.has_answered = True
        self._seconds += time.monotonic() - started
        self.report.answers += 1
        self.report.tokens += outcome.tokens or 0
        return outcome._replace(text=self._client.redact_answer(outcome.text))

    async def load_adapter(self, name: str, path: str) -> None:
        """Have vLLM load a LoRA adapter; afterwards it is the model that is asked.

        Args:
            name: of the adapter there.
            path: of its PEFT folder, where the server sees it.

        Raises:
            EngineError: it cannot.
        """
        request = {"lora_name": name, "lora_path": path}
        try:
            reply = await self._send("POST", "load_lora_adapter", request, bytes, 0)
        except EngineError as error:
            raise EngineError(f"{error}; vLLM loads adapters with {VLLM_SETTINGS}") from None
        if isinstance(reply, Unanswered) and "already been loaded" not in reply.detail:
            raise EngineError(f"{self.url}: cannot load the adapter {path}: {reply.detail}")
        self.report.model = name

    async def unload_adapter(self, name: str) -> None:
        """Have vLLM forget a LoRA adapter."""
        await self._send("POST", "unload_lora_adapter", {"lora_name": name}, bytes, 0)

    def give_up(self, reason: str) -> None:
        """Send no more requests; those under way get no further attempt."""
        self.report.given_up = reason
        self._dead.set()

    def check(self, outcome: Outcome) -> None:
        """Count an outcome.

        Raises:
            EngineError: too many prompts in a row came to nothing.
        """
        cause, detail = outcome[:2] if isinstance(outcome, Unanswered) else (None, "")
        self._failures_in_a_row = self._failures_in_a_row + 1 if cause == FAILED else 0
        self._refusals += cause == REFUSED
        if self._failures_in_a_row >= MAX_FAILURES:
            raise EngineError(f"{self.url}: {MAX_FAILURES} prompts in a row have no answer: {detail}")
        if self._refusals >= MAX_REFUSALS and not self.has_answered:
            raise EngineError(f"{self.url}: refuses every prompt, so far {self._refusals}: {detail}")

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

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
                self.report.failures += 1
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
        if is_retried(status) or (self.has_answered and status not in FINAL_STATUSES):
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
        task = asyncio.current_task()
        self.paused.add(task)
        try:
            await asyncio.wait_for(self._dead.wait(), seconds)
        except TimeoutError:
            return
        finally:
            self.paused.discard(task)


def _first_model(body: bytes) -> str:
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError, RecursionError):
        raise TransientError(f"its reply lists no models: {body[:80]!r}") from None


def _completion_request(model: str, messages: Messages, sampling: Sampling, seed: int) -> dict[str, Any]:
    request = {
        "model": model,
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
