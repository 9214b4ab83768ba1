"""A model behind an OpenAI-compatible endpoint: vLLM, llama.cpp's server, Ollama, or a hosted one.

Answers are all such an endpoint gives: it has no token ids, and log-probabilities of its own choosing only.

    request --wait until allowed--> POST --whole reply--> answer
                    ^                      |
                    +--- backoff ----------+  time-out, half a reply, 429, 5xx
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
from buleyean_rl.inference.protocol import GREEDY, Answer, Completing, Messages, Sampling

T = TypeVar("T")

KEY_VARIABLE = "BULEYEAN_API_KEY"
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
LONGEST_PAUSE = 30.0  # seconds, unless the endpoint asks for more
LONGEST_WAIT = 300.0  # seconds that an endpoint may ask for


class EndpointEngine(Completing):
    """Chat completions over HTTP, `parallel` at a time.

    Passing failures are retried: time-outs, broken connections, replies that end too early, 429 and
    5xx, after a pause that doubles or that the endpoint names. While others get through, a 429 is no failure.

    Args:
        url: such as `http://localhost:8000/v1`; `#name` at its end names the model, else it is the first one
            the endpoint lists.
        parallel: requests at once.
        timeout: seconds to wait for the next byte.
        retries: failures in a row after which a request fails.
        pause: seconds after the first failure.
        api_key: a bearer token; the environment's BULEYEAN_API_KEY if None.

    Raises:
        UsageError: the URL is none.
        EngineError: no model was named and the endpoint lists none.
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
        self.parallel, self._retries, self._pause = parallel, retries, pause
        key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE, "")
        self._client = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
            limits=httpx2.Limits(max_connections=parallel),
        )
        weakref.finalize(self, self._client.close)  # a judge's engine is closed by nobody
        self._closing = threading.Event()
        self._answered = 0  # requests that got through
        self._not_before = 0.0  # when the endpoint wants to hear from us again
        try:
            self.model = model or self._first_model()
        except BaseException:
            self.close()
            raise

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:  # noqa: ARG002
        """Not to be had."""
        self._only_answers()

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:  # noqa: ARG002
        """Not to be had."""
        self._only_answers()

    def prompt_ids(self, messages: Messages) -> list[int]:  # noqa: ARG002
        """Not to be had."""
        self._only_answers()

    def top_logprobs(self, ids: Sequence[int], k: int) -> dict[int, float]:  # noqa: ARG002
        """Not to be had."""
        self._only_answers()

    def logprobs(
        self,
        sequences: Sequence[Sequence[int]],  # noqa: ARG002
        starts: Sequence[int] | None = None,  # noqa: ARG002
        on_done: Callable[[int], None] | None = None,  # noqa: ARG002
    ) -> list[list[float]]:
        """Not to be had."""
        self._only_answers()

    def generate(self, messages: Messages, sampling: Sampling = GREEDY) -> Generator[str]:
        """The answer in pieces as they come; retried only until the first piece."""
        request = {**self._request(messages, sampling), "stream": True}
        failures, started = 0, False
        while True:
            try:
                for piece in self._stream(request):
                    started = True
                    yield piece
                return
            except _Passing as problem:
                if started:
                    raise EngineError(f"{self.url}: the answer broke off: {problem}") from problem
                failures += 1
                self._wait(problem, failures)

    def answer_many(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """The answers in order, `parallel` of them on the way at any time."""
        done, lock, failed = 0, threading.Lock(), threading.Event()

        def answer(index: int) -> Answer:
            nonlocal done
            if failed.is_set():
                raise EngineError(f"{self.url}: another request failed")
            request = self._request(conversations[index], sampling)
            try:
                reply = self._ask("POST", "chat/completions", _answer, {**request, "seed": sampling.seed + index})
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
        """End what is under way and close the connections."""
        self._closing.set()
        self._client.close()

    def _only_answers(self) -> NoReturn:
        raise EngineError(f"{self.url}: an endpoint gives answers only, no tokens and no log-probabilities")

    def _first_model(self) -> str:
        def first(reply: Any) -> str:
            return str(reply["data"][0]["id"])

        try:
            return self._ask("GET", "models", first)
        except EngineError as error:
            raise EngineError(f"{error}; or name the model: {self.url}#name") from error

    def _request(self, messages: Messages, sampling: Sampling) -> dict[str, Any]:
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

    def _ask(self, method: str, path: str, read: Callable[[Any], T], request: Mapping[str, Any] | None = None) -> T:
        """One request, retried until it is answered or has failed too often."""
        failures, answered = 0, self._answered
        while True:
            try:
                self._until_allowed()
                reply = self._send(method, path, request)
                try:
                    text = read(reply.json())
                except (ValueError, LookupError, TypeError) as error:
                    raise _Passing(f"its reply is no completion: {reply.text[:80]!r}") from error
                self._answered += 1
                return text
            except _Passing as problem:
                if problem.rate_limit and self._answered > answered:
                    failures, answered = 0, self._answered
                else:
                    failures += 1
                self._wait(problem, failures)

    def _send(self, method: str, path: str, request: Mapping[str, Any] | None) -> httpx2.Response:
        try:
            reply = self._client.request(method, path, json=request)
        except httpx2.TransportError as error:
            raise _Passing(_reason(error)) from error
        self._check(reply)
        return reply

    def _stream(self, request: Mapping[str, Any]) -> Generator[str]:
        """The pieces of one streamed reply; one that ends without saying so is broken."""
        self._until_allowed()
        try:
            with self._client.stream("POST", "chat/completions", json=request) as reply:
                if reply.status_code != 200:
                    reply.read()
                self._check(reply)
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
                        raise _Passing(f"half a line: {data[:80]!r}") from error
                    if piece:
                        yield piece
                    ended = ended or bool(choice.get("finish_reason"))
        except httpx2.TransportError as error:
            raise _Passing(_reason(error)) from error
        if not ended:
            raise _Passing("the stream ended in the middle")
        self._answered += 1

    def _check(self, reply: httpx2.Response) -> None:
        status = reply.status_code
        if status == 200:
            return
        if status in TRY_AGAIN:
            raise _Passing(f"status {status}", rate_limit=status == 429, after=_retry_after(reply))
        problem = " ".join(reply.text.split())[:200]
        hint = f" (its key is read from {KEY_VARIABLE})" if status in (401, 403) else ""
        raise EngineError(f"{self.url}: status {status}{hint}: {problem}")

    def _until_allowed(self) -> None:
        while (seconds := self._not_before - time.monotonic()) > 0:
            self._closing.wait(seconds)
            if self._closing.is_set():
                break
        if self._closing.is_set():
            raise EngineError(f"{self.url}: this engine is closed")

    def _wait(self, problem: _Passing, failures: int) -> None:
        """Pause before the next try, or give up."""
        if failures > self._retries:
            raise EngineError(f"{self.url}: gave up after {failures} tries: {problem}") from problem
        if problem.after is not None:
            if problem.after > LONGEST_WAIT:
                raise EngineError(f"{self.url}: asks to wait {problem.after:.0f} seconds: try again then") from problem
            self._not_before = max(self._not_before, time.monotonic() + problem.after)
            return
        pause = min(LONGEST_PAUSE, self._pause * 2 ** max(0, failures - 1))
        self._closing.wait(pause * random.uniform(0.5, 1.0))  # not all at once


class _Passing(Exception):
    """A failure that another try may not meet."""

    def __init__(self, problem: str, *, rate_limit: bool = False, after: float | None = None) -> None:
        self.rate_limit, self.after = rate_limit, after
        super().__init__(problem)


def _answer(reply: Any) -> Answer:
    choice, usage = reply["choices"][0], reply.get("usage") or {}
    content = choice["message"]["content"]
    if not isinstance(content, str | None):
        raise TypeError
    tokens = usage.get("completion_tokens")
    return Answer(content or "", tokens if isinstance(tokens, int) else None, choice.get("finish_reason") != "length")


def _reason(error: httpx2.TransportError) -> str:
    kind = "timed out" if isinstance(error, httpx2.TimeoutException) else "the connection failed"
    return f"{kind} ({str(error) or type(error).__name__})"


def _retry_after(reply: httpx2.Response) -> float | None:
    """Seconds the endpoint asks to wait; a date, which may stand there too, counts as no request."""
    try:
        return max(0.0, float(reply.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
