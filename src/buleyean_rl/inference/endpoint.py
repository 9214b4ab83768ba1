"""Models behind OpenAI-compatible endpoints: vLLM, llama.cpp's server, Ollama, or a hosted one; one server or many.

An endpoint offers answers only, with the log-probabilities of their tokens where it has them: no token ids, and no
log-probabilities of tokens that the caller chooses.

    prompts --to whoever is free--> servers --> outcomes --each once--> caller
                  ^                    |
                  +--------------------+  what a server failed at, or is late with, where another is free
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from buleyean_rl.errors import EngineError
from buleyean_rl.inference.endpoint_server import DEFAULT_PATIENCE, PARALLEL, Endpoint, EndpointServer, Patience
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
    ServerReport,
    Unanswered,
)

API_KEY_VARIABLE = "BULEYEAN_API_KEY"
JUDGE_KEY_VARIABLE = "BULEYEAN_JUDGE_API_KEY"
POLL_SECONDS = 1.0  # between two looks for late prompts
LATE_SECONDS = 5.0  # under way, at least; and so many times what the server that is free takes:
LATE_FACTOR = 4.0
UNASKED = Unanswered(FAILED, "its server was given up", is_permanent=False)


class EndpointEngine(BaseEngine):
    """Chat completions over HTTP, so many at a time at each server.

    A prompt that is refused, or whose request fails every time at every server, is left out. A server that is dead or
    takes no request at all is given up, and its prompts go to the others; it is an error when none is left.

    Args:
        endpoints: a URL, see `Endpoint`; or several, of the same model.
        parallel: concurrent requests at the one URL.
        key_variable: see `Endpoint`, of the one URL.
        patience: None for the default.

    Raises:
        UsageError: a URL is not valid.
        EngineError: the one URL selects no model and the endpoint lists none.
    """

    def __init__(
        self,
        endpoints: str | Sequence[Endpoint],
        *,
        parallel: int = PARALLEL,
        key_variable: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        several = [Endpoint(endpoints, parallel, key_variable)] if isinstance(endpoints, str) else list(endpoints)
        self._patience = patience or DEFAULT_PATIENCE
        self._servers = [EndpointServer(endpoint, self._patience) for endpoint in several]
        self._loop = EventLoop()
        self._close = weakref.finalize(self, _close, self._loop, self._servers)  # nobody closes a judge's engine
        if len(self._servers) == 1:
            try:
                self._loop.run(self._servers[0].find_model())
            except BaseException:
                self.close()
                raise

    @property
    def servers(self) -> Sequence[ServerReport]:
        """See `Completer.servers`."""
        return [server.report for server in self._servers]

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
        """The answers as they come, each once, from whichever server gave them."""
        for outcomes in self._loop.iterate(self._answers(conversations, sampling, seeds)):
            for index, outcome in outcomes:
                if on_tokens is not None and isinstance(outcome, Answer):
                    on_tokens(len(outcome.text.split()) if outcome.tokens is None else outcome.tokens)
                yield index, outcome

    def close(self) -> None:
        """Cancel pending requests and close the connections."""
        self._close()

    def _refuse(self) -> NoReturn:
        raise EngineError(
            f"{self._servers[0].url}: an endpoint offers answers only, no tokens and no log-probabilities"
        )

    async def _answers(
        self, conversations: Sequence[Messages], sampling: Sampling, seeds: Sequence[int] | None
    ) -> AsyncGenerator[list[tuple[int, Outcome]]]:
        """See `answers`, in batches. Refusals wait for an answer that proves the request right."""
        queue = _Queue(self._servers, len(conversations))
        errors: list[EngineError] = []
        outcomes: list[tuple[int, Outcome]] = []
        refused: dict[EndpointServer, list[tuple[_Prompt, Unanswered]]] = {server: [] for server in self._servers}
        try:
            while True:
                for prompt, server in queue.assign():
                    seed = seeds[prompt.index] if seeds else sampling.seed + prompt.index
                    queue.start(prompt, server, server.answer(conversations[prompt.index], sampling, seed))
                if outcomes:  # while their places are taken again
                    yield outcomes
                    outcomes = []
                if not queue.running or (ended := await queue.wait(self._patience.last_answers)) is None:
                    break
                for prompt, server, task in ended:
                    try:
                        outcome = task.result()
                        server.check(outcome)
                    except EngineError as error:
                        if server.is_alive:
                            errors.append(error)
                            server.give_up(str(error))
                        queue.give_back(prompt, *(prompt for prompt, _ in refused[server]))
                        refused[server].clear()
                        continue
                    is_proven = server.has_answered
                    if isinstance(outcome, Unanswered):
                        may_differ = outcome.cause == FAILED or (outcome.cause == REFUSED and not is_proven)
                        if may_differ and queue.pass_on(prompt, server, outcome):
                            continue
                        if outcome.cause == REFUSED:
                            refused[server].append((prompt, outcome))
                            continue
                    outcomes.append((prompt.index, outcome))
                for server in self._servers:
                    while server.has_answered and refused[server]:
                        prompt, refusal = refused[server].pop()
                        outcomes.append((prompt.index, refusal._replace(is_permanent=True)))
        finally:
            queue.cancel()
        if not any(server.is_alive for server in self._servers):
            others = f"; so did all {len(errors)} servers" if len(errors) > 1 else ""
            raise EngineError(f"{errors[0]}{others}")
        left = [*(pair for pairs in refused.values() for pair in pairs), *queue.leftovers()]
        yield [(prompt.index, refusal) for prompt, refusal in left]


def _close(loop: EventLoop, servers: Sequence[EndpointServer]) -> None:
    async def close() -> None:
        for server in servers:
            await server.close()

    loop.close(close())


@dataclass(eq=False)
class _Prompt:
    """A prompt to be answered, with the servers that came to nothing on it, what the last one said, and since when it
    is under way.
    """

    index: int
    tried: set[EndpointServer] = field(default_factory=set)
    outcome: Unanswered = UNASKED
    started: float = 0.0


class _Queue:
    """Who answers what: every prompt is asked, or under way at one server, or has its outcome.

    Args:
        servers: that answer.
        count: of prompts.
    """

    def __init__(self, servers: Sequence[EndpointServer], count: int) -> None:
        self._servers, self._unasked = servers, iter(range(count))
        self._returned: deque[_Prompt] = deque()
        self._ended: asyncio.Queue[asyncio.Task[Outcome]] = asyncio.Queue()
        self.running: dict[asyncio.Task[Outcome], tuple[_Prompt, EndpointServer]] = {}

    def assign(self) -> Generator[tuple[_Prompt, EndpointServer]]:
        """Prompts for the servers that are free, in turn."""
        free = [server for server in self._servers if server.is_alive]
        while free:
            for server in list(free):
                prompt = self._next(server) if server.under_way < server.parallel and server.is_alive else None
                if prompt is None:
                    free.remove(server)
                else:
                    yield prompt, server

    def start(self, prompt: _Prompt, server: EndpointServer, answer: Coroutine[Any, Any, Outcome]) -> None:
        """Ask a server."""
        prompt.started = time.monotonic()
        task = asyncio.create_task(answer)
        self.running[task] = prompt, server
        server.under_way += 1
        task.add_done_callback(self._ended.put_nowait)

    async def wait(self, patience: float) -> list[tuple[_Prompt, EndpointServer, asyncio.Task[Outcome]]] | None:
        """What has ended meanwhile, perhaps nothing; None where nothing is worth waiting for.

        Args:
            patience: seconds for the last answers of servers that were all given up.
        """
        is_over = not any(server.is_alive for server in self._servers)
        seconds = patience if is_over else POLL_SECONDS if len(self._servers) > 1 else None
        try:
            async with asyncio.timeout(seconds):
                tasks = [await self._ended.get()]
        except TimeoutError:
            return None if is_over else []
        while not self._ended.empty():
            tasks.append(self._ended.get_nowait())
        return [(*self._leave(task), task) for task in tasks if task in self.running]

    def give_back(self, *prompts: _Prompt) -> None:
        """Prompts that another server may answer: also one that was late with it, where no other is left."""
        for prompt in prompts:
            if not self._is_left(prompt):
                prompt.tried.clear()
            self._returned.append(prompt)

    def leftovers(self) -> Iterator[tuple[_Prompt, Unanswered]]:
        """Prompts that every server which is left came to nothing on."""
        return ((prompt, prompt.outcome) for prompt in self._returned)

    def pass_on(self, prompt: _Prompt, server: EndpointServer, outcome: Unanswered) -> bool:
        """Give back what a server came to nothing on; false where every other one did so too."""
        prompt.tried.add(server)
        prompt.outcome = outcome
        if not self._is_left(prompt):
            return False
        server.report.passed_on += 1
        self._returned.append(prompt)
        return True

    def cancel(self) -> None:
        """End what is under way."""
        for task in list(self.running):
            self._leave(task)
            task.cancel()

    def _is_left(self, prompt: _Prompt) -> bool:
        """Whether a server is left that has not tried a prompt."""
        return any(server.is_alive and server not in prompt.tried for server in self._servers)

    def _next(self, server: EndpointServer) -> _Prompt | None:
        for prompt in self._returned:
            if server not in prompt.tried:
                self._returned.remove(prompt)
                return prompt
        if (index := next(self._unasked, None)) is not None:
            return _Prompt(index)
        return self._steal(server)

    def _steal(self, thief: EndpointServer) -> _Prompt | None:
        """A prompt that waits at another server for its next attempt, or is late there."""
        if len(self._servers) == 1 or thief.mean_seconds is None:
            return None
        late = time.monotonic() - max(LATE_SECONDS, LATE_FACTOR * thief.mean_seconds)
        for task, (prompt, server) in self.running.items():
            if server is not thief and thief not in prompt.tried and (task in server.paused or prompt.started < late):
                self._leave(task)
                task.cancel()
                prompt.tried.add(server)
                server.report.passed_on += 1
                return prompt
        return None

    def _leave(self, task: asyncio.Task[Outcome]) -> tuple[_Prompt, EndpointServer]:
        prompt, server = self.running.pop(task)
        server.under_way -= 1
        return prompt, server
