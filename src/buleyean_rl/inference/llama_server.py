"""A GGUF file in llama.cpp's own server, inside this process: `xllamacpp`, the default engine."""

from __future__ import annotations

import http.client
import json
import queue
import secrets
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from buleyean_rl.errors import EngineError
from buleyean_rl.inference.gguf_file import ailment, check_gguf, cores
from buleyean_rl.inference.protocol import CONTEXT, GREEDY, Adapter, Answer, Completing, Messages, Sampling

T = TypeVar("T")

CERTAIN = 1e9  # a logit bias that no logit outweighs
GREEDY_SAMPLERS = ["temperature"]  # any other would sort the whole vocabulary for nothing


class LlamaCppEngine(Completing):
    """A GGUF file in llama.cpp's own server, inside this process.

    Answers are computed in `parallel` slots that share one batch. The server listens on a free port of the
    loopback interface, for callers who hold this process's random key; the methods here mostly call
    into it directly.

    Args:
        path: the GGUF file.
        parallel: how many conversations to work on at once.
        context: tokens of one conversation, prompt and answer together, at most.
        threads: for one token; the physical cores if None.
        exact: keep the attention cache in 32 bits, for comparing numbers.
        adapter: a LoRA GGUF to apply.

    Raises:
        EngineError: the file is missing, is not GGUF, is cut short, or llama.cpp cannot run it.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        parallel: int = 1,
        context: int = CONTEXT,
        threads: int | None = None,
        exact: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        self.path = Path(path)
        check_gguf(self.path)
        import xllamacpp

        key = secrets.token_urlsafe()
        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_ctx, params.n_parallel = context * parallel, parallel
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or cores()
        params.verbosity = -1  # nothing of its own on our stdout and stderr
        params.warmup = params.fit_params = params.ui = params.endpoint_slots = False
        params.cache_ram_mib = 0  # prompts seldom repeat: no second cache in memory
        params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [key]
        if adapter is not None:
            check_gguf(adapter.path)
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(adapter.path), adapter.scale
            params.lora_adapters = [lora]
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError:
            raise EngineError(f"{self.path}: llama.cpp cannot load it: {ailment(self.path)}") from None
        self.parallel = parallel
        self._address = urlsplit(self._server.listening_address).netloc
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._plain_token = self.tokenize("a")[-1]
        # A server that is freed before its loop has begun never ends: one token, and it has.
        self._next([self._plain_token], self._plain_token, 1)

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text."""
        request = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return self._post("/tokenize", request)["tokens"]

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The chat template as llama.cpp renders it: a leading BOS that it will add itself is left out."""
        request = {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        return self._post("/apply-template", request)["prompt"]

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The ids llama.cpp's chat endpoint would evaluate."""
        return self.tokenize(self.render(messages), add_special=True)

    def generate(self, messages: Messages, sampling: Sampling = GREEDY) -> Generator[str]:
        """The answer in pieces as they come; closing the generator stops the server's work on it."""
        request = {"prompt": self.prompt_ids(messages), "stream": True, **_llama_sampling(sampling)}
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        abandoned = threading.Event()

        def on_chunk(chunk: dict[str, Any]) -> bool:
            try:
                pieces.put(_checked(chunk)["choices"][0]["text"])
            except EngineError as error:
                pieces.put(error)
            return abandoned.is_set()

        def work() -> None:
            try:
                self._server.handle_completions(request, on_chunk)
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                if piece:
                    yield piece
        finally:
            abandoned.set()
            worker.join()

    def answer_many(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """The answers in order, `parallel` of them in the making at any time."""

        def answer(index: int) -> Answer:
            request = {
                "prompt": self.prompt_ids(conversations[index]),
                **_llama_sampling(sampling),
                "seed": sampling.seed + index,
            }
            reply = self._complete(request)
            choice, drawn = reply["choices"][0], reply["usage"]["completion_tokens"]
            ended = choice["finish_reason"] == "stop"
            return Answer(choice["text"], drawn - ended, ended)  # the end itself is counted there

        return self._in_slots(answer, len(conversations), on_done)

    def top_logprobs(self, ids: Sequence[int], k: int) -> dict[int, float]:
        """The k likeliest next tokens, from the logits before any sampling."""
        # The server reports nothing for a token that ends inside a UTF-8 character, so a plain one is drawn.
        return {c["id"]: c["logprob"] for c in self._next(ids, self._plain_token, k)["top_logprobs"]}

    def logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[float]]:
        """The tokens' log-probabilities: each is forced in turn, and the cache makes it one evaluation."""

        def score(index: int) -> list[float]:
            ids = list(sequences[index])
            return [self._logprob(ids[:i], ids[i]) for i in range(starts[index] if starts else 1, len(ids))]

        return self._in_slots(score, len(sequences), on_done)

    def ends_at(self, token: int) -> bool:
        """Whether drawing `token` ends an answer."""
        request = {
            "prompt": [self._plain_token],
            "n_predict": 2,
            "temperature": 0,
            "samplers": GREEDY_SAMPLERS,
            "logit_bias": [[token, CERTAIN]],
        }
        return self._complete(request)["choices"][0]["finish_reason"] == "stop"

    def close(self) -> None:
        """Stop the server and free the model."""
        self._server = None

    def _logprob(self, ids: list[int], token: int) -> float:
        """log P(token | ids)."""
        forced = self._next(ids, token, 1)
        if forced and forced["id"] == token:
            return forced["logprob"]
        # A token that ends inside a UTF-8 character is not reported: look for it among the likeliest.
        for k in (256, 1 << 20):
            likeliest = self.top_logprobs(ids, k)
            if token in likeliest:
                return likeliest[token]
        raise EngineError(f"{self.path}: llama.cpp gave no log-probability for token {token}")

    def _next(self, ids: Sequence[int], token: int, k: int) -> dict[str, Any]:
        """The server's report on the next token when `token` is drawn; {} where it stays silent."""
        request = {
            "prompt": list(ids),
            "n_predict": 1,
            "n_probs": k,
            "temperature": 0,
            "samplers": GREEDY_SAMPLERS,
            "logit_bias": [[token, CERTAIN]],
        }
        logprobs = self._complete(request)["choices"][0]["logprobs"]
        return logprobs["content"][0] if logprobs else {}

    def _in_slots(self, task: Callable[[int], T], count: int, on_done: Callable[[int], None] | None = None) -> list[T]:
        """[task(0), ..., task(count - 1)], as many at a time as there are slots."""
        done, lock = 0, threading.Lock()

        def run(index: int) -> T:
            nonlocal done
            result = task(index)
            with lock:
                done += 1
                if on_done is not None:
                    on_done(done)
            return result

        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                return list(pool.map(run, range(count)))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """A completion, computed in this process."""
        if self._server is None:
            raise EngineError(f"{self.path}: this engine is closed")
        return _checked(self._server.handle_completions(request))

    def _post(self, endpoint: str, request: dict[str, Any]) -> dict[str, Any]:
        """An answer of the server's loopback interface, for what it does not offer in process."""
        if self._server is None:
            raise EngineError(f"{self.path}: this engine is closed")
        connection = http.client.HTTPConnection(self._address, timeout=60)
        try:
            connection.request("POST", endpoint, json.dumps(request), self._headers)
            return _checked(json.loads(connection.getresponse().read()))
        except (OSError, ValueError) as error:
            raise EngineError(f"{self.path}: llama.cpp's {endpoint} did not answer: {error}") from error
        finally:
            connection.close()


def _checked(reply: dict[str, Any]) -> dict[str, Any]:
    """The server's reply, or its error as ours."""
    if "error" not in reply:
        return reply
    error = reply["error"]
    if error.get("type") == "exceed_context_size_error":
        raise EngineError(
            f"the conversation has {error['n_prompt_tokens']} tokens and the context holds {error['n_ctx']}: "
            "start a new one, or ask for a larger context"
        )
    raise EngineError(f"llama.cpp: {error.get('message', error)}")


def _llama_sampling(sampling: Sampling) -> dict[str, Any]:
    """A server request's fields for `Sampling`; only the samplers named here are applied."""
    return {
        "n_predict": sampling.max_tokens,
        "temperature": sampling.temperature,
        "samplers": ["top_p", "temperature"] if sampling.temperature > 0 else GREEDY_SAMPLERS,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "stop": list(sampling.stop),
    }
