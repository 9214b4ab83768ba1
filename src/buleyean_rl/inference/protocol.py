"""The protocol of engines, and the types and functions they share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from buleyean_rl.errors import EngineError

Messages = Sequence[Mapping[str, str]]

TOO_LONG = "longer than the context"
FILTERED = "content filter"
REFUSED = "refused"
FAILED = "failed"
NO_TEXT = "no text"


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Args:
        max_tokens: maximum tokens of an answer.
        temperature: 0 is greedy.
        top_p: probability of the nucleus, applied before the temperature; ignored at temperature 0.
        seed: same seed, same answer; ignored at temperature 0.
        stop: texts that end the answer and are not part of it.
        logprobs: answers have the log-probabilities of their tokens.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: bool = False


GREEDY = Sampling()


class Answer(NamedTuple):
    """An answer and how it ended.

    Args:
        text: of the answer.
        tokens: number of tokens without the end token; None where the engine does not report it.
        ended: whether it ended by an end token or stop text, not at `Sampling.max_tokens` or the context's end.
        token_ids: the tokens drawn, without the end token; None where the engine does not report them, or where they
            are not exactly the text.
        logprobs: of the tokens drawn, without the end token, in nats at temperature 1; None where `Sampling.logprobs`
            does not ask for them or the engine does not report them.
    """

    text: str
    tokens: int | None
    ended: bool
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None


class Unanswered(NamedTuple):
    """Why a conversation has no answer.

    Args:
        cause: `TOO_LONG`, `FILTERED`, `REFUSED`, `NO_TEXT` or `FAILED`.
        detail: what the engine says about it.
        is_permanent: the conversation is the cause: asked again, the engine would say the same.
    """

    cause: str
    detail: str
    is_permanent: bool = True


Outcome = Answer | Unanswered
OnTokens = Callable[[int], None]


class RefusedPrompt(EngineError):
    """An engine cannot take this conversation, such as one with a role that the chat template refuses."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in a GGUF file, applied to a model when it is loaded.

    Args:
        path: of the file.
        scale: factor of the adapter; 1 is as trained.
    """

    path: Path
    scale: float = 1.0


@dataclass
class ServerReport:
    """What a server did.

    Args:
        url: its address.
        model: the name of its model.
        answers: that it gave.
        tokens: of these, where it reports them.
        failures: attempts that failed.
        passed_on: prompts that went to another server.
        given_up: why it is asked no more; "" where it is.
    """

    url: str
    model: str
    answers: int = 0
    tokens: int = 0
    failures: int = 0
    passed_on: int = 0
    given_up: str = ""


class Endpoint(NamedTuple):
    """Where other processes of this machine reach an engine's server.

    Args:
        url: on the loopback interface.
        key: a bearer token.
    """

    url: str
    key: str


class Completer(Protocol):
    """Answers conversations. Every method raises EngineError where the engine fails.

    Args:
        is_batched: whether an answer may depend, in its last digits, on those that are computed beside it.
        tokenizer: of transformers, whose ids the answers' token ids are; None where they have none.
        servers: that give the answers, and what they did so far; none where it is this process.
    """

    @property
    def is_batched(self) -> bool:
        """See above."""

    @property
    def tokenizer(self) -> Any:
        """See above."""

    @property
    def servers(self) -> Sequence[ServerReport]:
        """See above."""

    def answers(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generator[tuple[int, Outcome]]:
        """The answers to many conversations, each as it comes, with the index of its conversation.

        Closing the generator stops the computation. Where the engine fails, the answers that came before are yielded.

        Args:
            conversations: a list of messages each.
            sampling: for all of them.
            seeds: of each answer; None: the i-th has sampling.seed + i.
            on_tokens: called with the number of tokens that were drawn since, from any thread; those of an answer
                before it is yielded.
        """

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""


@runtime_checkable
class Engine(Completer, Protocol):
    """Runs a model."""

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any string.
            add_special: add BOS and EOS where this model has them.
            parse_special: read `<|im_end|>` as the token, not as characters.
        """

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The chat template applied to messages, as this engine applies it."""

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The token ids this engine feeds to the model to answer the messages."""

    def generate(self, messages: Messages, sampling: Sampling = GREEDY) -> Generator[str, None, Answer]:
        """The answer to a conversation, streamed in pieces; closing the generator stops the computation.

        Returns:
            The whole answer, with its token ids where the engine reports them.
        """

    def answer_many(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Outcome]:
        """As `answers`, in the order of the conversations.

        Args:
            conversations: a list of messages each.
            sampling: for all of them; the i-th has seed + i.
            on_done: called with the number of conversations so far.
        """

    def complete_many(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        on_done: Callable[[int], None] | None = None,
    ) -> list[str]:
        """As `answer_many`, the texts alone; a conversation without an answer is an EngineError."""

    def top_logprobs(self, ids: Sequence[int], k: int) -> dict[int, float]:
        """The k likeliest next tokens after `ids`, with their log-probabilities in nats."""

    def logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[float]]:
        """Log-probability of each token given those before it.

        Args:
            sequences: token ids.
            starts: first position to score of each sequence, at least 1; None is 1 for all.
            on_done: called with the number of sequences so far, from any thread.

        Returns:
            One list per sequence, in nats, of its length less its start.
        """


class BaseEngine:
    """`answer_many` and `complete_many` from an engine's `answers`."""

    tokenizer: Any = None

    @property
    def is_batched(self) -> bool:
        """See `Completer`."""
        return False

    @property
    def servers(self) -> Sequence[ServerReport]:
        """See `Completer`."""
        return ()

    def answers(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generator[tuple[int, Outcome]]:
        """See `Completer.answers`."""
        raise NotImplementedError

    def answer_many(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Outcome]:
        """See `Engine.answer_many`."""
        outcomes: dict[int, Outcome] = {}
        for index, outcome in self.answers(conversations, sampling):
            outcomes[index] = outcome
            if on_done is not None:
                on_done(len(outcomes))
        return [outcomes[index] for index in range(len(conversations))]

    def complete_many(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling = GREEDY,
        on_done: Callable[[int], None] | None = None,
    ) -> list[str]:
        """See `Engine.complete_many`."""
        texts = []
        for outcome in self.answer_many(conversations, sampling, on_done):
            if isinstance(outcome, Unanswered):
                raise EngineError(outcome.detail)
            texts.append(outcome.text)
        return texts


@runtime_checkable
class GgufEngine(Engine, Protocol):
    """Runs a GGUF file."""

    def is_end_token(self, token: int) -> bool:
        """Whether `token` ends an answer."""


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Index at which the first stop text begins; None if there is none."""
    return min((index for stop in stops if (index := text.find(stop)) >= 0), default=None)
