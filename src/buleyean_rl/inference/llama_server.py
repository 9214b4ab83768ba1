"""GGUF files in llama.cpp's server inside this process, by `xllamacpp`: the default engine."""

from __future__ import annotations

import http.client
import json
import queue
import secrets
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from buleyean_rl.errors import EngineError, ModelError
from buleyean_rl.inference.context import fit_prompt
from buleyean_rl.inference.gguf_context import gguf_context
from buleyean_rl.inference.gguf_file import LOAD_FAILURE, check_gguf
from buleyean_rl.inference.protocol import (
    GREEDY,
    Adapter,
    Answer,
    BaseEngine,
    Endpoint,
    Messages,
    OnTokens,
    Outcome,
    RefusedPrompt,
    Sampling,
    Unanswered,
)
from buleyean_rl.inference.token_budget import TokenBudget
from buleyean_rl.models.source import resolve
from buleyean_rl.system.host import available_cores
from buleyean_rl.system.wording import counted

T = TypeVar("T")

FORCING_BIAS = 1e9  # larger than any logit
POLL_SECONDS = 1.0
GREEDY_SAMPLERS = ["temperature"]  # others would sort the vocabulary


class LlamaCppEngine(BaseEngine):
    """A GGUF file in llama.cpp's server, inside this process.

    Answers are computed in `parallel` slots that share one batch and one KV cache, in which a conversation waits until
    there is room for its prompt and answer. Most methods call the server directly; the others
    use its port on the loopback interface, which a random key protects.

    Args:
        path: the GGUF file.
        parallel: conversations at once.
        context: maximum tokens of a conversation, prompt and answer; None, and at most, for the model's own, as memory
            allows.
        threads: None for the available cores.
        exact: KV cache in fp32, for comparing numbers.
        adapter: a LoRA GGUF to apply.
        equal_slots: every slot has the whole context of its own, instead of a share of one cache; for those that ask
            `endpoint` themselves, which wait for no room.

    Raises:
        EngineError: the file is missing, is not GGUF, is truncated, or llama.cpp cannot run it.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        parallel: int = 1,
        context: int | None = None,
        threads: int | None = None,
        exact: bool = False,
        adapter: Adapter | None = None,
        equal_slots: bool = False,
    ) -> None:
        self.path = Path(path)
        header = check_gguf(self.path)
        import xllamacpp

        key = secrets.token_urlsafe()
        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        self.context, total = gguf_context(header, context, exact=exact, parallel=parallel)
        if equal_slots:
            total = self.context * parallel
        self._budget = TokenBudget(total)
        params.n_ctx, params.n_parallel, params.kv_unified = total, parallel, not equal_slots
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or available_cores()
        params.verbosity = -1  # silent
        params.warmup = params.fit_params = params.ui = False
        params.cache_ram_mib = 0  # prompts rarely repeat
        params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [key]
        if adapter is not None:
            check_gguf(adapter.path, model=False)
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(adapter.path), adapter.scale
            params.lora_adapters = [lora]
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError:
            raise EngineError(f"{self.path}: llama.cpp cannot load it: {LOAD_FAILURE}") from None
        self.parallel = parallel
        self.endpoint = Endpoint(self._server.listening_address, key)
        self._address = urlsplit(self.endpoint.url).netloc
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._ascii_token = self.tokenize("a")[-1]
        # Freed before its loop has started, a server never ends: wait for one token.
        self._force_token([self._ascii_token], self._ascii_token, 1)

    @property
    def is_batched(self) -> bool:
        """The slots share each step."""
        return True

    @cached_property
    def tokenizer(self) -> Any:
        """The file's tokenizer in transformers; None where it has no such."""
        from buleyean_rl.models.weights import load_tokenizer

        try:
            return load_tokenizer(resolve(str(self.path)))
        except ModelError:
            return None

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text."""
        request = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return self._post("/tokenize", request)["tokens"]

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The chat template as llama.cpp renders it, without the leading BOS that it adds itself."""
        request = {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        return self._post("/apply-template", request)["prompt"]

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The ids llama.cpp's chat endpoint would evaluate."""
        return self.tokenize(self.render(messages), add_special=True)

    def generate(self, messages: Messages, sampling: Sampling = GREEDY) -> Generator[str, None, Answer]:
        """The answer, streamed in pieces; closing the generator cancels it in the server. See `Engine.generate`."""
        ids = fit_prompt(self, messages)
        if isinstance(ids, Unanswered):
            raise EngineError(ids.detail)
        fields = _sampling_fields(sampling, self.context - len(ids))
        request = {"prompt": ids, "stream": True, "verbose": True, "return_tokens": True, **fields}
        chunks: queue.SimpleQueue[dict[str, Any] | BaseException | None] = queue.SimpleQueue()
        is_cancelled = threading.Event()

        def on_chunk(chunk: dict[str, Any]) -> bool:
            try:
                chunks.put(_check_reply(chunk))
            except EngineError as error:
                chunks.put(error)
            return is_cancelled.is_set()

        def complete() -> None:
            try:
                with self._budget.hold(len(ids) + request["n_predict"]):
                    self._server.handle_completions(request, on_chunk)
                chunks.put(None)
            except BaseException as error:
                chunks.put(error)

        worker = threading.Thread(target=complete, daemon=True)
        worker.start()
        text, tokens, last = "", list[int](), dict[str, Any]()
        try:
            while (chunk := chunks.get()) is not None:
                if isinstance(chunk, BaseException):
                    raise chunk
                last = chunk
                if piece := chunk["choices"][0]["text"]:  # that of the end token is empty
                    text += piece
                    tokens += chunk["__verbose"]["tokens"]
                    yield piece
        finally:
            is_cancelled.set()
            worker.join()
        ended = last["choices"][0]["finish_reason"] == "stop"
        count = last["usage"]["completion_tokens"] - ended
        # Of a character of several tokens the server reports the last.
        is_exact = last["__verbose"]["stop_type"] != "word" and len(tokens) == count
        return Answer(text, count, ended, tuple(tokens) if is_exact else None)

    def answers(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generator[tuple[int, Outcome]]:
        """The answers as they come, computed in `parallel` slots."""

        def answer(index: int) -> Outcome:
            ids = fit_prompt(self, conversations[index])
            if isinstance(ids, Unanswered):
                return ids
            fields = _sampling_fields(sampling, self.context - len(ids))
            seed = seeds[index] if seeds else sampling.seed + index
            fields |= {"seed": seed, "n_probs": int(sampling.logprobs), "verbose": True, "return_tokens": True}
            reply = self._complete({"prompt": ids, **fields})
            choice, drawn = reply["choices"][0], reply["__verbose"]
            ended = choice["finish_reason"] == "stop"
            count = reply["usage"]["completion_tokens"] - ended  # which includes the end token
            is_exact = drawn["stop_type"] != "word" and len(drawn["tokens"]) >= count
            tokens = drawn["tokens"][:count] if is_exact else None
            logprobs = self._drawn_logprobs(ids, tokens, choice) if tokens is not None and sampling.logprobs else None
            return Answer(choice["text"], count, ended, None if tokens is None else tuple(tokens), logprobs)

        counter = None if on_tokens is None else _TokenCounter(self._tokens_under_way, on_tokens)
        for index, outcome in self._run_in_slots(answer, len(conversations), None if counter is None else counter.poll):
            if counter is not None:
                counter.finish(outcome)
            yield index, outcome

    def top_logprobs(self, ids: Sequence[int], k: int) -> dict[int, float]:
        """The k likeliest next tokens with their log-probabilities, before any sampling."""
        # The server reports nothing for a token that ends inside a UTF-8 character, so an ASCII one is forced.
        return {entry["id"]: entry["logprob"] for entry in self._force_token(ids, self._ascii_token, k)["top_logprobs"]}

    def logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[float]]:
        """The tokens' log-probabilities: each is forced in turn, and the prefix is cached."""

        def score(index: int) -> list[float]:
            ids = list(sequences[index])
            return [self._logprob(ids[:i], ids[i]) for i in range(starts[index] if starts else 1, len(ids))]

        scores: dict[int, list[float]] = {}
        for index, score_of_one in self._run_in_slots(score, len(sequences)):
            scores[index] = score_of_one
            if on_done is not None:
                on_done(len(scores))
        return [scores[index] for index in range(len(sequences))]

    def is_end_token(self, token: int) -> bool:
        """Whether `token` ends an answer."""
        request = {
            "prompt": [self._ascii_token],
            "n_predict": 2,
            "temperature": 0,
            "samplers": GREEDY_SAMPLERS,
            "logit_bias": [[token, FORCING_BIAS]],
        }
        return self._complete(request)["choices"][0]["finish_reason"] == "stop"

    def close(self) -> None:
        """Stop the server and free the model."""
        self._server = None

    def _logprob(self, ids: list[int], token: int) -> float:
        """log P(token | ids)."""
        report = self._force_token(ids, token, 1)
        if report and report["id"] == token:
            return report["logprob"]
        # A token that ends inside a UTF-8 character is reported only among the likeliest.
        for k in (256, 1 << 20):
            likeliest = self.top_logprobs(ids, k)
            if token in likeliest:
                return likeliest[token]
        raise EngineError(f"{self.path}: llama.cpp reported no log-probability for token {token}")

    def _drawn_logprobs(self, ids: list[int], tokens: list[int], choice: dict[str, Any]) -> tuple[float, ...]:
        """Of an answer's tokens. Those that end inside a UTF-8 character are not reported, and scored one by one."""
        reported, logprobs = list(choice["logprobs"]["content"] if choice["logprobs"] else [])[::-1], []
        for i, token in enumerate(tokens):
            if reported and reported[-1]["id"] == token:
                logprobs.append(reported.pop()["logprob"])
            else:
                logprobs.append(self._logprob([*ids, *tokens[:i]], token))
        return tuple(logprobs)

    def _tokens_under_way(self) -> int:
        """Tokens drawn so far of the answers that are being computed."""
        slots: Any = self._request("GET", "/slots")
        return sum(each["n_decoded"] for slot in slots if slot["is_processing"] for each in slot["next_token"])

    def _force_token(self, ids: Sequence[int], token: int, k: int) -> dict[str, Any]:
        """The server's report on the next token when `token` is forced; {} where there is none."""
        request = {
            "prompt": list(ids),
            "n_predict": 1,
            "n_probs": k,
            "temperature": 0,
            "samplers": GREEDY_SAMPLERS,
            "logit_bias": [[token, FORCING_BIAS]],
        }
        logprobs = self._complete(request)["choices"][0]["logprobs"]
        return logprobs["content"][0] if logprobs else {}

    def _run_in_slots(
        self, task: Callable[[int], T], count: int, poll: Callable[[], None] | None = None
    ) -> Generator[tuple[int, T]]:
        """(index, task(index)) for every index below `count`, as they are done, one per slot at a time.

        Meanwhile `poll` is called every POLL_SECONDS.
        """
        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                indices = {pool.submit(task, index): index for index in range(count)}
                done: queue.SimpleQueue[Future[T]] = queue.SimpleQueue()
                for future in indices:
                    future.add_done_callback(done.put)
                for _ in range(count):
                    future = _next_done(done, poll)
                    yield indices[future], future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _complete(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._server is None:
            raise EngineError(f"{self.path}: this engine is closed")
        with self._budget.hold(len(request["prompt"]) + request["n_predict"]):
            return _check_reply(self._server.handle_completions(request))

    def _post(self, endpoint: str, request: dict[str, Any]) -> dict[str, Any]:
        return self._request("POST", endpoint, json.dumps(request))

    def _request(self, method: str, endpoint: str, body: str | None = None) -> dict[str, Any]:
        """A request over the loopback interface, for endpoints without a method in process."""
        if self._server is None:
            raise EngineError(f"{self.path}: this engine is closed")
        connection = http.client.HTTPConnection(self._address, timeout=60)
        try:
            connection.request(method, endpoint, body, self._headers)
            return _check_reply(json.loads(connection.getresponse().read()))
        except (OSError, ValueError) as error:
            raise EngineError(f"{self.path}: llama.cpp's {endpoint} did not answer: {error}") from error
        finally:
            connection.close()


def _next_done(done: queue.SimpleQueue[Future[T]], poll: Callable[[], None] | None) -> Future[T]:
    while poll is not None:
        try:
            return done.get(timeout=POLL_SECONDS)
        except queue.Empty:
            poll()
    return done.get()


class _TokenCounter:
    """Reports tokens as they are drawn: those of answers that are done, and those under way."""

    def __init__(self, under_way: Callable[[], int], on_tokens: OnTokens) -> None:
        self._under_way, self._on_tokens = under_way, on_tokens
        self._finished = self._reported = 0

    def poll(self) -> None:
        self._report(self._finished + self._under_way())

    def finish(self, outcome: Outcome) -> None:
        self._finished += (outcome.tokens or 0) if isinstance(outcome, Answer) else 0
        self._report(self._finished)

    def _report(self, tokens: int) -> None:
        if tokens > self._reported:
            self._on_tokens(tokens - self._reported)
            self._reported = tokens


def _check_reply(reply: dict[str, Any]) -> dict[str, Any]:
    """The server's reply; an error in it is raised as `EngineError`."""
    if "error" not in reply:
        return reply
    error = reply["error"]
    if error.get("type") == "exceed_context_size_error":
        raise EngineError(
            f"the conversation has {counted(error['n_prompt_tokens'], 'token')} and the context holds "
            f"{error['n_ctx']:,}: start a new one, or ask for a larger context"
        )
    problem = f"llama.cpp: {error.get('message', error)}"
    raise RefusedPrompt(problem) if error.get("code") == 400 else EngineError(problem)


def _sampling_fields(sampling: Sampling, free_tokens: int) -> dict[str, Any]:
    """The request fields for `Sampling`; the server applies only the samplers in this list."""
    return {
        "n_predict": min(sampling.max_tokens, free_tokens),
        "temperature": sampling.temperature,
        "samplers": ["top_p", "temperature"] if sampling.temperature > 0 else GREEDY_SAMPLERS,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "stop": list(sampling.stop),
    }
