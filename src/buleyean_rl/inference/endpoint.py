"""A model behind an OpenAI-compatible endpoint: vLLM, llama.cpp's server, Ollama, or a hosted one.

An endpoint offers answers only: no token ids, and no log-probabilities of tokens that the caller chooses.

    request --wait until allowed--> POST --complete reply--> answer
                    ^                      |
                    +--- backoff ----------+  time-out, truncated reply, 429, 5xx
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar
from urllib.parse import urldefrag, urlsplit

import httpx2

from buleyean_rl.errors import EngineError, UsageError
from buleyean_rl.inference.protocol import GREEDY, Answer, BaseEngine, Messages, Sampling

T = TypeVar("T")

API_KEY_VARIABLE = "BULEYEAN_API_KEY"
RETRIED_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}
MAX_BACKOFF_SECONDS = 30.0  # unless the endpoint asks for more
MAX_RETRY_AFTER_SECONDS = 300.0  # that an endpoint may ask for


class EndpointEngine(BaseEngine):
    """Chat completions over HTTP, `parallel` at a time.

    Transient failures are retried: time-outs, broken connections, truncated replies, 429 and 5xx, with exponential
    backoff or after the time that the endpoint names. While other requests succeed, a 429 is not counted.

    Args:
        url: such as `http://localhost:8000/v1`; `#name` at its end selects the model; without it, the
            first one that the endpoint lists.
        parallel: concurrent requests.
        timeout: of a read, in seconds.
        retries: maximum attempts after the first.
        pause: backoff after the first failure, in seconds.
        api_key: a bearer token; the environment's BULEYEAN_API_KEY if None.

    Raises:
        UsageError: the URL is not valid.
        EngineError: the URL selects no model and the endpoint lists none.
    """

    def __init__(
        self,
        url: str,
        *,
        parallel: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        pause: float = 0.5,
        api_key: str | None = None,
    ) -> None:
        self.url, model = urldefrag(url)
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no endpoint: give one like http://localhost:8000/v1")
        if parts.path in ("", "/"):
            self.url = self.url.rstrip("/") + "/v1"
        self.parallel, self._retries, self._backoff_seconds = parallel, retries, pause
        key = api_key if api_key is not None else os.environ.get(API_KEY_VARIABLE, "")
        self._client = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
            limits=httpx2.Limits(max_connections=parallel),
        )
        weakref.finalize(self, self._client.close)  # nobody closes a judge's engine
        self._closing = threading.Event()
        self._successes = 0  # requests
        self._retry_time = 0.0  # when the endpoint allows the next request
        try:
            self.model = model or self._first_model()
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

    def generate(self, messages: Messages, sampling: Sampling = GREEDY) -> Generator[str]:
        """The answer, streamed in pieces; retried only before the first piece."""
        request = {**self._completion_request(messages, sampling), "stream": True}
        failures, has_started = 0, False
        while True:
            try:
                for piece in self._stream(request):
                    has_started = True
                    yield piece
                return
            except _TransientError as problem:
                if has_started:
                    raise EngineError(f"{self.url}: the answer broke off: {problem}") from problem
                failures += 1
                self._back_off(problem, failures)

    def answer_many(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """The answers in order, from up to `parallel` concurrent requests."""
        done, lock, failed = 0, threading.Lock(), threading.Event()

        def answer(index: int) -> Answer:
            nonlocal done
            if failed.is_set():
                raise EngineError(f"{self.url}: another request failed")
            request = self._completion_request(conversations[index], sampling)
            try:
                reply = self._request_with_retries(
                    "POST", "chat/completions", _parse_answer, {**request, "seed": sampling.seed + index}
                )
            except EngineError:
                failed.set()
                raise
            with lock:
                done += 1
                if on_done is not None:
                    on_done(done)
            return reply

        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                return list(pool.map(answer, range(len(conversations))))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def close(self) -> None:
        """Cancel pending requests and close the connections."""
        self._closing.set()
        self._client.close()

    def _refuse(self) -> NoReturn:
        raise EngineError(f"{self.url}: an endpoint offers answers only, no tokens and no log-probabilities")

    def _first_model(self) -> str:
        def first(reply: Any) -> str:
            return str(reply["data"][0]["id"])

        try:
            return self._request_with_retries("GET", "models", first)
        except EngineError as error:
            raise EngineError(f"{error}; or name the model: {self.url}#name") from error

    def _completion_request(self, messages: Messages, sampling: Sampling) -> dict[str, Any]:
        request = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
        }
        if sampling.temperature > 0:
            request["top_p"] = sampling.top_p
        return request | ({"stop": list(sampling.stop)} if sampling.stop else {})

    def _request_with_retries(
        self, method: str, path: str, read: Callable[[Any], T], request: Mapping[str, Any] | None = None
    ) -> T:
        """Send a request and read its reply; transient failures are retried."""
        failures, earlier_successes = 0, self._successes
        while True:
            try:
                self._wait_for_retry_time()
                reply = self._send(method, path, request)
                try:
                    text = read(reply.json())
                except (ValueError, LookupError, TypeError) as error:
                    raise _TransientError(f"its reply is no completion: {reply.text[:80]!r}") from error
                self._successes += 1
                return text
            except _TransientError as problem:
                if problem.rate_limit and self._successes > earlier_successes:
                    failures, earlier_successes = 0, self._successes
                else:
                    failures += 1
                self._back_off(problem, failures)

    def _send(self, method: str, path: str, request: Mapping[str, Any] | None) -> httpx2.Response:
        try:
            reply = self._client.request(method, path, json=request)
        except httpx2.TransportError as error:
            raise _TransientError(_describe_failure(error)) from error
        self._check_status(reply)
        return reply

    def _stream(self, request: Mapping[str, Any]) -> Generator[str]:
        """The pieces of a streamed reply; without an end marker it is truncated."""
        self._wait_for_retry_time()
        try:
            with self._client.stream("POST", "chat/completions", json=request) as reply:
                if reply.status_code != 200:
                    reply.read()
                self._check_status(reply)
                ended = False
                for line in reply.iter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        ended = True
                        break
                    try:
                        chunk = json.loads(data)
                        choice = chunk["choices"][0] if chunk.get("choices") else {}
                        piece = (choice.get("delta") or {}).get("content")
                    except (ValueError, LookupError, AttributeError) as error:
                        raise _TransientError(f"a truncated line: {data[:80]!r}") from error
                    if piece:
                        yield piece
                    ended = ended or bool(choice.get("finish_reason"))
        except httpx2.TransportError as error:
            raise _TransientError(_describe_failure(error)) from error
        if not ended:
            raise _TransientError("the stream ended in the middle")
        self._successes += 1

    def _check_status(self, reply: httpx2.Response) -> None:
        status = reply.status_code
        if status == 200:
            return
        if status in RETRIED_STATUSES:
            raise _TransientError(f"status {status}", rate_limit=status == 429, retry_after=_retry_after(reply))
        problem = " ".join(reply.text.split())[:200]
        hint = f" (its key is read from {API_KEY_VARIABLE})" if status in (401, 403) else ""
        raise EngineError(f"{self.url}: status {status}{hint}: {problem}")

    def _wait_for_retry_time(self) -> None:
        while (seconds := self._retry_time - time.monotonic()) > 0:
            self._closing.wait(seconds)
            if self._closing.is_set():
                break
        if self._closing.is_set():
            raise EngineError(f"{self.url}: this engine is closed")

    def _back_off(self, problem: _TransientError, failures: int) -> None:
        """Pause before the next attempt, or give up."""
        if failures > self._retries:
            raise EngineError(f"{self.url}: gave up after {failures} tries: {problem}") from problem
        if problem.retry_after is not None:
            if problem.retry_after > MAX_RETRY_AFTER_SECONDS:
                raise EngineError(
                    f"{self.url}: asks to wait {problem.retry_after:.0f} seconds: try again then"
                ) from problem
            self._retry_time = max(self._retry_time, time.monotonic() + problem.retry_after)
            return
        pause = min(MAX_BACKOFF_SECONDS, self._backoff_seconds * 2 ** max(0, failures - 1))
        self._closing.wait(pause * random.uniform(0.5, 1.0))  # spreads concurrent retries


class _TransientError(Exception):
    """A failure that may not occur in the next attempt."""

    def __init__(self, problem: str, *, rate_limit: bool = False, retry_after: float | None = None) -> None:
        self.rate_limit, self.retry_after = rate_limit, retry_after
        super().__init__(problem)


def _parse_answer(reply: Any) -> Answer:
    choice, usage = reply["choices"][0], reply.get("usage") or {}
    content = choice["message"]["content"]
    if not isinstance(content, str | None):
        raise TypeError
    tokens = usage.get("completion_tokens")
    return Answer(content or "", tokens if isinstance(tokens, int) else None, choice.get("finish_reason") != "length")


def _describe_failure(error: httpx2.TransportError) -> str:
    kind = "timed out" if isinstance(error, httpx2.TimeoutException) else "the connection failed"
    return f"{kind} ({str(error) or type(error).__name__})"


def _retry_after(reply: httpx2.Response) -> float | None:
    """Seconds the endpoint asks to wait; a date, which HTTP allows too, is ignored."""
    try:
        return max(0.0, float(reply.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
