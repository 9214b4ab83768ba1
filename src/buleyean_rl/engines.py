"""Inference engines: one small protocol, and what implements it.

An engine turns text into token ids, messages into a prompt, prompts into answers, and token ids into
log-probabilities; everything above it (chat, demo, parity gate, evaluation) is written against `Engine`
alone. `LlamaCppEngine` runs a GGUF file in llama.cpp, inside this process; `TransformersEngine` runs a
model that is already in memory. Both answer greedily with the same text where the weights are the same.

    messages --render--> text --tokenize--> ids --> generate, complete_many, top_logprobs, logprobs

An engine is not a tokenizer or a model loader: it is handed a file, or a model.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import secrets
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable
from urllib.parse import urlsplit

from buleyean_rl.errors import EngineError

Messages = Sequence[Mapping[str, str]]
T = TypeVar("T")

GGUF_MAGIC = b"GGUF"
CONTEXT = 2048  # tokens per conversation, unless asked for more: the cache is memory
CERTAIN = 1e9  # a logit bias that no logit outweighs
GREEDY_SAMPLERS = ["temperature"]  # any other would sort the whole vocabulary for nothing


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Args:
        max_tokens: the longest answer.
        temperature: 0 takes the likeliest token every time.
        top_p: the nucleus to draw from, applied before the temperature; ignored at temperature 0.
        seed: same seed, same answer; ignored at temperature 0.
        stop: texts that end the answer, and are left out of it.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0
    stop: tuple[str, ...] = ()


GREEDY = Sampling()


@runtime_checkable
class Engine(Protocol):
    """What runs a model. Every method raises EngineError where the engine fails."""

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any string.
            add_special: put BOS and EOS around it where this model wants them.
            parse_special: read `<|im_end|>` as the token rather than as characters.
        """

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The chat template applied to messages, as this engine applies it."""

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The token ids this engine feeds to the model to answer the messages."""

    def generate(self, messages: Messages, sampling: Sampling = GREEDY) -> Generator[str]:
        """The answer to a conversation, in pieces as they come; closing the generator stops the work."""

    def complete_many(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        on_done: Callable[[int], None] | None = None,
    ) -> list[str]:
        """The answers to many conversations, in their order, computed side by side.

        Args:
            conversations: one list of messages each.
            sampling: for all of them; the i-th draws with seed + i.
            on_done: called with how many are done, from any thread.
        """

    def top_logprobs(self, ids: Sequence[int], k: int) -> dict[int, float]:
        """The k likeliest next tokens after `ids`, with their log-probabilities in nats."""

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every token given those before it: one list per sequence, one shorter than it."""

    def close(self) -> None:
        """Free the model; nothing may be asked afterwards."""


class LlamaCppEngine:
    """A GGUF file in llama.cpp's own server, inside this process.

    Answers are computed in `parallel` slots that share one batch. The server listens on a free port of the
    loopback interface, for callers who hold this process's random key; the methods here mostly call
    into it directly.

    Args:
        path: the GGUF file.
        parallel: how many conversations to work on at once.
        context: the most tokens of one conversation, prompt and answer together.
        threads: for one token; the physical cores if None.
        exact: keep the attention cache in 32 bits, for comparing numbers.

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
    ) -> None:
        self.path = Path(path)
        check_gguf(self.path)
        import xllamacpp

        key = secrets.token_urlsafe()
        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_ctx, params.n_parallel = context * parallel, parallel
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or _cores()
        params.verbosity = -1  # nothing of its own on our stdout and stderr
        params.warmup = params.fit_params = params.ui = params.endpoint_slots = False
        params.cache_ram_mib = 0  # prompts are seldom seen twice: no second cache in memory
        params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [key]
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError:
            raise EngineError(f"{self.path}: llama.cpp cannot load it: {_ailment(self.path)}") from None
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

    def complete_many(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        on_done: Callable[[int], None] | None = None,
    ) -> list[str]:
        """The answers in order, `parallel` of them in the making at any time."""

        def answer(index: int) -> str:
            request = {
                "prompt": self.prompt_ids(conversations[index]),
                **_llama_sampling(sampling),
                "seed": sampling.seed + index,
            }
            return self._complete(request)["choices"][0]["text"]

        return self._in_slots(answer, len(conversations), on_done)

    def top_logprobs(self, ids: Sequence[int], k: int) -> dict[int, float]:
        """The k likeliest next tokens, from the logits before any sampling."""
        # The server reports nothing for a token that ends inside a UTF-8 character, so a plain one is drawn.
        return {c["id"]: c["logprob"] for c in self._next(ids, self._plain_token, k)["top_logprobs"]}

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Every token's log-probability: each is forced in turn, and the cache makes it one evaluation."""

        def score(index: int) -> list[float]:
            ids = list(sequences[index])
            return [self._logprob(ids[:i], ids[i]) for i in range(1, len(ids))]

        return self._in_slots(score, len(sequences))

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


class TransformersEngine:
    """A transformers model and tokenizer that are already in memory.

    Args:
        model: a causal language model, on any device.
        tokenizer: its tokenizer, with a chat template.
        batch: how many conversations to answer at once.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch: int = 8) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        ends = model.generation_config.eos_token_id if model.generation_config else None
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer(
            text, add_special_tokens=add_special, split_special_tokens=not parse_special, verbose=False
        )["input_ids"]

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The tokenizer's chat template applied to messages."""
        if not self.tokenizer.chat_template:
            raise EngineError("this tokenizer has no chat template; use an instruct model")
        return self.tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The rendered template's ids: the template itself brings a BOS where the model wants one."""
        return self.tokenize(self.render(messages))

    def generate(self, messages: Messages, sampling: Sampling = GREEDY) -> Generator[str]:
        """The answer in pieces as they come."""
        import torch

        ids, shown, text, cache = self.prompt_ids(messages), 0, "", None
        answer: list[int] = []
        generator = torch.Generator().manual_seed(sampling.seed)
        fresh = ids
        while len(answer) < sampling.max_tokens:
            with torch.inference_mode():
                tokens = torch.tensor([fresh], device=self.model.device)
                output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            token = _draw(output.logits[0, -1].float().cpu(), sampling, generator)
            if token in self._ends:
                break
            answer.append(token)
            fresh = [token]
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            cut = _stop_at(text, sampling.stop)
            if cut is not None:
                text = text[:cut]
                break
            # The tail may turn into another character, or into a stop text, with the next token.
            held = max((len(s) - 1 for s in sampling.stop), default=0)
            ready = len(text.rstrip("\N{REPLACEMENT CHARACTER}")) - held
            if ready > shown:
                yield text[shown:ready]
                shown = ready
        if text[shown:]:
            yield text[shown:]

    def complete_many(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        on_done: Callable[[int], None] | None = None,
    ) -> list[str]:
        """The answers in order; greedy ones in batches of similar length, sampled ones one by one."""
        answers = [""] * len(conversations)
        done = 0
        if sampling.temperature > 0:
            for i, messages in enumerate(conversations):
                drawn = Sampling(**{**sampling.__dict__, "seed": sampling.seed + i})
                answers[i] = "".join(self.generate(messages, drawn))
                if on_done is not None:
                    on_done(i + 1)
            return answers
        prompts = [self.prompt_ids(messages) for messages in conversations]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            for i, text in zip(chosen, self._greedy([prompts[i] for i in chosen], sampling), strict=True):
                answers[i] = text
            done += len(chosen)
            if on_done is not None:
                on_done(done)
        return answers

    def top_logprobs(self, ids: Sequence[int], k: int) -> dict[int, float]:
        """The k likeliest next tokens, in fp32 from the model's logits."""
        import torch

        with torch.inference_mode():
            tokens = torch.tensor([list(ids)], device=self.model.device)
            logits = self.model(input_ids=tokens, logits_to_keep=1).logits[0, -1]
            top = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]))
        return dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Every token's log-probability, one forward pass per sequence."""
        import torch

        scores = []
        for ids in sequences:
            with torch.inference_mode():
                tokens = torch.tensor([list(ids)], device=self.model.device)
                logps = self.model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
                scores.append(logps.gather(-1, tokens[0, 1:, None])[:, 0].tolist())
        return scores

    def close(self) -> None:
        """Nothing to do: the model belongs to the caller."""

    def _greedy(self, prompts: list[list[int]], sampling: Sampling) -> list[str]:
        """Greedy answers to prompts padded on the left to one length."""
        import torch

        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self._ends)
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=sampling.max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                eos_token_id=sorted(self._ends) or None,
            )
        texts = self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return [text[: _stop_at(text, sampling.stop)] for text in texts]


def neutral_nll(engine: Engine, texts: Sequence[str]) -> tuple[float, int]:
    """How surprised a model is by plain texts: (nats in total, tokens counted).

    The first token of a text has nothing before it and is not counted, unless the model adds a BOS.
    """
    ids = [engine.tokenize(text, add_special=True, parse_special=False) for text in texts]
    scores = engine.logprobs([sequence for sequence in ids if len(sequence) > 1])
    return -sum(map(sum, scores)), sum(map(len, scores))


def check_gguf(path: Path | str) -> None:
    """Refuse what is not GGUF at all, with a reason; reads only the file's head.

    Raises:
        EngineError: no such file, not a file, not GGUF, or of another version.
    """
    path = Path(path)
    if not path.exists():
        raise EngineError(f"{path}: no such file")
    if not path.is_file():
        raise EngineError(f"{path}: is not a file; name the .gguf inside it")
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}") from error
    if head[:4] != GGUF_MAGIC:
        raise EngineError(f"{path}: is not a GGUF file; make one with `buleyean export`")
    if int.from_bytes(head[4:], "little") not in (2, 3):
        raise EngineError(f"{path}: GGUF version {int.from_bytes(head[4:], 'little')} is not 2 or 3")


def _ailment(path: Path) -> str:
    """Why llama.cpp may have refused a file whose head is fine."""
    from gguf import GGUFReader

    try:
        GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError):
        # The reader maps the whole file and slices it: what lies beyond the end has the wrong shape.
        return "the file is cut short or damaged; copy or export it again"
    return "an architecture or tensor it does not know, or too little free memory"


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


def _draw(logits: Any, sampling: Sampling, generator: Any) -> int:
    """One token of a vector of logits. Shape: (vocabulary,)."""
    import torch

    if sampling.temperature <= 0:
        return int(logits.argmax())
    probabilities, tokens = logits.softmax(-1).sort(descending=True)
    inside = probabilities.cumsum(-1) - probabilities < sampling.top_p  # the token that crosses top_p stays in
    weights = torch.where(inside, probabilities, 0.0) ** (1.0 / sampling.temperature)
    return int(tokens[torch.multinomial(weights, 1, generator=generator)])


def _stop_at(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop texts begins; None if there is none."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=None)


def _cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
