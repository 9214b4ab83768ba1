"""GGUF files in llama-cpp-python, the engine of the published model card; an optional extra, compiled on installation.

Answers come from `Llama.create_completion` on the ids of the file's chat template, as in `create_chat_completion`,
one conversation at a time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from buleyean_rl.errors import EngineError
from buleyean_rl.inference.context import fit_prompt
from buleyean_rl.inference.gguf_context import gguf_context
from buleyean_rl.inference.gguf_file import LOAD_FAILURE, check_gguf
from buleyean_rl.inference.protocol import (
    GREEDY,
    Adapter,
    Answer,
    BaseEngine,
    Messages,
    OnTokens,
    Outcome,
    RefusedPrompt,
    Sampling,
    Unanswered,
)
from buleyean_rl.system.host import available_cores
from buleyean_rl.system.wording import counted

INSTALL_HINT = "pip install llama-cpp-python (it compiles for some minutes)"


def is_installed() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCppPythonEngine(BaseEngine):
    """A GGUF file in `llama_cpp.Llama`, inside this process.

    Args:
        path: the GGUF file.
        parallel: ignored; answers are computed one after the other.
        context: maximum tokens of a conversation, prompt and answer; None, and at most, for the model's own, as memory
            allows.
        threads: None for the available cores.
        exact: KV cache in fp32, for comparing numbers.
        adapter: a LoRA GGUF to apply.

    Raises:
        EngineError: llama-cpp-python is not installed; the file is missing, is not GGUF, is truncated, or
            llama.cpp cannot run it.
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
    ) -> None:
        self.path, self.parallel = Path(path), parallel
        if not is_installed():
            raise EngineError(f"llama-cpp-python is not installed: {INSTALL_HINT}")
        self.context, _ = gguf_context(check_gguf(self.path), context, exact=exact)
        self._settings: dict[str, Any] = {
            "model_path": str(self.path),
            "n_ctx": self.context,
            "n_threads": threads or available_cores(),
            "n_threads_batch": threads or available_cores(),
            "swa_full": True,  # or a cached prefix could not be reused
            "verbose": False,
        }
        if exact:
            self._settings |= {"type_k": 0, "type_v": 0}  # GGML_TYPE_F32
        if adapter is not None:
            check_gguf(adapter.path, model=False)
            self._settings |= {"lora_path": str(adapter.path), "lora_scale": adapter.scale}
        self._scorer: Any = None
        self._scored_ids: list[int] = []
        self._llama: Any = self._open()

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text."""
        return list(self._model().tokenize(text.encode(), add_bos=add_special, special=parse_special))

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The chat template as llama-cpp-python renders it, with its BOS where it has one."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = self._model().metadata.get("tokenizer.chat_template")
        if template is None:
            raise EngineError(f"{self.path}: has no chat template; use an instruct model")
        formatter = Jinja2ChatFormatter(
            template=template,
            eos_token=self._token_text(self._llama.token_eos()),
            bos_token=self._token_text(self._llama.token_bos()),
            add_generation_prompt=add_generation_prompt,
        )
        try:
            return formatter(messages=[dict(m) for m in messages]).prompt
        except ValueError as error:
            raise RefusedPrompt(f"{self.path}: its chat template refuses these messages: {error}") from error

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The ids `create_chat_completion` would evaluate: a BOS only from the template."""
        return self.tokenize(self.render(messages))

    def generate(self, messages: Messages, sampling: Sampling = GREEDY) -> Generator[str, None, Answer]:
        """The answer, streamed in pieces. See `Engine.generate`."""
        ids = fit_prompt(self, messages)
        if isinstance(ids, Unanswered):
            raise EngineError(ids.detail)
        text, ended = "", False
        for chunk in self._stream_chunks(ids, sampling):
            if piece := chunk["choices"][0]["text"]:
                text += piece
                yield piece
            ended = chunk["choices"][0]["finish_reason"] == "stop"
        return Answer(text, None, ended)

    def answers(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generator[tuple[int, Outcome]]:
        """The answers in order, one after the other, without log-probabilities."""
        for index, messages in enumerate(conversations):
            ids = fit_prompt(self, messages)
            if isinstance(ids, Unanswered):
                yield index, ids
                continue
            seed = seeds[index] if seeds else sampling.seed + index
            limit = min(sampling.max_tokens, self.context - len(ids))
            chunks = []
            for chunk in self._stream_chunks(ids, replace(sampling, seed=seed, max_tokens=limit)):
                chunks.append(chunk)
                if on_tokens is not None:
                    on_tokens(1)
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            ended = chunks[-1]["choices"][0]["finish_reason"] == "stop"
            yield index, Answer(text, len(self.tokenize(text)) if ended else limit, ended)

    def top_logprobs(self, ids: Sequence[int], k: int) -> dict[int, float]:
        """The k likeliest next tokens with their log-probabilities, before any sampling."""
        row = _log_softmax(self._logits(ids)[-1])
        best = np.argsort(-row, kind="stable")[:k]
        return {int(token): float(row[token]) for token in best}

    def logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[float]]:
        """The tokens' log-probabilities, one evaluation per sequence."""
        scores = []
        for ids, start in zip(sequences, starts or [1] * len(sequences), strict=True):
            rows = _log_softmax(self._logits(ids)[start - 1 : -1])
            scores.append([float(row[token]) for row, token in zip(rows, ids[start:], strict=True)])
            if on_done is not None:
                on_done(len(scores))
        return scores

    def is_end_token(self, token: int) -> bool:
        """Whether `token` ends an answer."""
        import llama_cpp

        return bool(llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(self._model().model), token))

    def close(self) -> None:
        """Free the model."""
        for llama in (self._llama, self._scorer):
            if llama is not None:
                llama.close()
        self._llama = self._scorer = None

    def _stream_chunks(self, ids: list[int], sampling: Sampling) -> Iterator[dict[str, Any]]:
        """The chunks of an answer; the last has its finish reason."""
        yield from self._llama.create_completion(
            prompt=ids,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            min_p=0.0,
            seed=sampling.seed,
            stop=list(sampling.stop),
            stream=True,
        )

    def _open(self, **settings: Any) -> Any:
        """Load the file; several loads share the mapped weights."""
        from llama_cpp import Llama

        try:
            with _amx_disabled():
                return Llama(**self._settings, **settings)
        except (ValueError, RuntimeError):
            raise EngineError(f"{self.path}: llama.cpp cannot load it: {LOAD_FAILURE}") from None

    def _model(self) -> Any:
        if self._llama is None:
            raise EngineError(f"{self.path}: this engine is closed")
        return self._llama

    def _token_text(self, token: int) -> str:
        """The vocabulary's text of a token; empty for a negative one, which is undefined."""
        import llama_cpp

        if token < 0:
            return ""
        vocabulary = llama_cpp.llama_model_get_vocab(self._model().model)
        return (llama_cpp.llama_vocab_get_text(vocabulary, token) or b"").decode(errors="replace")

    def _logits(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after each token of a sequence. Shape: (tokens, vocabulary)."""
        self._model()
        if self._scorer is None:  # a second one: answers need the last token's logits only
            self._scorer = self._open(logits_all=True)
        if len(ids) > self.context:
            raise EngineError(f"{counted(len(ids), 'token')} to score exceed the context of {self.context}")
        pairs = zip(self._scored_ids, ids, strict=False)
        shared_length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._scored_ids), len(ids)))
        self._scorer.n_tokens = min(shared_length, len(ids) - 1)
        try:
            self._scorer.eval(list(ids)[self._scorer.n_tokens :])
        except RuntimeError as error:
            raise EngineError(f"{self.path}: llama.cpp: {error}") from error
        self._scored_ids = list(ids)
        return self._scorer.scores[: len(ids)]


@contextmanager
def _amx_disabled() -> Generator[None]:
    """Load weights without llama.cpp's AMX kernels within.

    Compiled by GCC they kill the process (SIGILL, SIGSEGV): the tile configuration is optimised away, see
    llama.cpp's pull request 26954. `Llama` has no argument for it.
    """
    import llama_cpp.llama_cpp as library

    default_params = library.llama_model_default_params

    def make_params() -> Any:
        parameters = default_params()
        parameters.use_extra_bufts = False
        return parameters

    if b"AMX_INT8 = 1" in library.llama_print_system_info():
        library.llama_model_default_params = make_params
    try:
        yield
    finally:
        library.llama_model_default_params = default_params


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, in fp64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
