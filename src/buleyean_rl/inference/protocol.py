"""What an engine is: the protocol, and what is drawn from it the same way whatever runs the model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

Messages = Sequence[Mapping[str, str]]

CONTEXT = 2048  # tokens per conversation, unless asked for more: the cache is memory


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


class Answer(NamedTuple):
    """An answer, and how it came to its end.

    Args:
        text: of the answer.
        tokens: how many tokens were drawn, the one that ends it not counted; None where the engine does not tell.
        ended: whether it ended by itself, rather than at `Sampling.max_tokens`.
    """

    text: str
    tokens: int | None
    ended: bool


@dataclass(frozen=True)
class Adapter:
    """A LoRA in a GGUF file of its own, applied to a model as it is loaded.

    Args:
        path: the file.
        scale: 1 is as it was trained, 0 is not at all.
    """

    path: Path
    scale: float = 1.0


class Completer(Protocol):
    """What answers many conversations. Every method raises EngineError where the engine fails."""

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

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""


@runtime_checkable
class Engine(Completer, Protocol):
    """What runs a model."""

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

    def answer_many(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """What `complete_many` gives, and how each answer ended."""

    def top_logprobs(self, ids: Sequence[int], k: int) -> dict[int, float]:
        """The k likeliest next tokens after `ids`, with their log-probabilities in nats."""

    def logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[float]]:
        """Log-probability of each token, conditional on those before it.

        Args:
            sequences: token ids.
            starts: of each, the first position to score, at least 1; None for 1 in all.
            on_done: called with how many sequences are done, from any thread.

        Returns:
            One list per sequence, shorter than it by its start.
        """


class Completing:
    """What every engine's `complete_many` is: its answers without how they ended."""

    def answer_many(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """See `Engine.answer_many`."""
        raise NotImplementedError

    def complete_many(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        on_done: Callable[[int], None] | None = None,
    ) -> list[str]:
        """See `Engine.complete_many`."""
        return [answer.text for answer in self.answer_many(conversations, sampling, on_done)]


@runtime_checkable
class GgufEngine(Engine, Protocol):
    """What runs a GGUF file."""

    def ends_at(self, token: int) -> bool:
        """Whether drawing `token` ends an answer."""


def neutral_nll(engine: Engine, texts: Sequence[str]) -> tuple[float, int]:
    """Negative log-likelihood of plain texts: (nats in total, tokens counted).

    The first token of a text has nothing before it and is not counted, unless the model adds a BOS.
    """
    ids = [engine.tokenize(text, add_special=True, parse_special=False) for text in texts]
    scores = engine.logprobs([sequence for sequence in ids if len(sequence) > 1])
    return -sum(map(sum, scores)), sum(map(len, scores))


def stop_at(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop texts begins; None if there is none."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
