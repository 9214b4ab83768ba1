"""A model that is measured: it scores texts and answers prompts, and is loaded once for both."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from buleyean_rl.data.importers import Preference
from buleyean_rl.data.records import Prompt, as_messages
from buleyean_rl.errors import ModelError
from buleyean_rl.evaluation.scoring import AnswerScore, EngineScorer, OnDone, PackedScorer, Scorer, Text, TextScore
from buleyean_rl.inference.open import Location, engine_of, is_gguf_file, open_engine
from buleyean_rl.inference.progress import answer_all
from buleyean_rl.inference.protocol import Engine, Outcome, Sampling
from buleyean_rl.models.model import Model
from buleyean_rl.models.source import Source
from buleyean_rl.system.progress import ProgressBar, working


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Args:
        max_length: maximum tokens of a prompt and one answer, or of a text; longer ones are truncated.
        samplings: how answers are drawn, each in turn; the figures of the first have no suffix.
        engine: auto, transformers or llama.cpp.
        context: see `open_engine`.
        key_url: see `open_engine`; None for no endpoint.
    """

    max_length: int = 1024
    samplings: tuple[Sampling, ...] = (Sampling(max_tokens=128),)
    engine: str = "auto"
    context: int | None = None
    key_url: str | None = None


def make_samplings(temperatures: Sequence[float], max_tokens: Sequence[int], seed: int = 0) -> tuple[Sampling, ...]:
    """Every temperature with every number of tokens, from the whole distribution; repeats once."""
    return tuple(
        Sampling(tokens, temperature, top_p=1.0, seed=seed)
        for temperature in dict.fromkeys(temperatures)
        for tokens in dict.fromkeys(max_tokens)
    )


class Bases:
    """Base models in memory, each loaded once for all that is measured on it, while it is among the last that were.

    Args:
        capacity: number of bases that are kept.
    """

    def __init__(self, capacity: int = 1) -> None:
        self._capacity = capacity
        self._models: dict[tuple[str, str | None], Model] = {}  # by place, the last used at the end

    def open(self, source: Source) -> Model:
        """A model on its base in memory, with the adapter of a run kept; nothing is loaded before it is needed."""
        base = source.base or source
        place = os.path.realpath(base.location) if os.path.exists(base.location) else base.location, base.gguf
        model = self._models.pop(place) if place in self._models else Model(base)
        self._models[place] = model
        while len(self._models) > self._capacity:
            self._models.pop(next(iter(self._models)))
        return model.with_source(source)


class MeasuredModel:
    """A model for scoring, then for answering: one in transformers is in memory for both."""

    def __init__(self, model: Location | Model, settings: Settings, console: Console, bases: Bases) -> None:
        self.location = model.source if isinstance(model, Model) else model
        self.settings, self.console = settings, console
        self.name = self.location if isinstance(self.location, str) else self.location.name
        self._model: Model | None = model if isinstance(model, Model) else None
        self._bases, self._is_printed = bases, False
        self._is_scored_in_memory: bool | None = None  # once it is known

    def score(
        self, questions: Sequence[Preference], texts: Sequence[Text], notes: list[str]
    ) -> tuple[list[list[AnswerScore]], list[TextScore | None]]:
        """Score answers and texts; notes on how are appended to `notes`."""
        with self._scorer(notes) as scorer:
            with self._progress_bar("scoring answers", len(questions)) as on_done:
                answers = scorer.answers([(question.prompt, question.answers) for question in questions], on_done)
            with self._progress_bar("scoring texts", len(texts)) as on_done:
                return answers, scorer.texts(texts, on_done)

    def answer(self, prompts: Sequence[Prompt]) -> list[list[Outcome]]:
        """Answers, or why there are none, drawn in each of the ways of the settings."""
        conversations = [as_messages(prompt) for prompt in prompts]
        with self._engine() as engine:
            return [
                answer_all(engine, conversations, sampling, self.console, f"{self.name} answers")
                for sampling in self.settings.samplings
            ]

    def in_memory(self, notes: list[str]) -> Model | None:
        """The model that scores; None where an engine has to. Notes on how are appended to `notes` the first time."""
        if self.settings.engine == "llama.cpp" or not isinstance(self.location, Source):
            return None
        model = self._open(self.location)
        if self._is_scored_in_memory is None:
            self._is_scored_in_memory = self._load(model, is_gguf_file(self.location), notes)
        return model if self._is_scored_in_memory else None

    def _load(self, model: Model, is_gguf: bool, notes: list[str]) -> bool:
        """Load a model and its tokenizer; whether transformers can read it."""
        try:
            with self._loading():
                model.module, model.tokenizer  # noqa: B018 - load both
        except ModelError:
            if not is_gguf or self.settings.engine == "transformers":
                raise
            notes.append(f"{self.name}: transformers cannot read it, so llama.cpp scores it, token by token")
            return False
        if is_gguf:
            notes.append(f"{self.name}: its weights are scored in transformers, its answers come from llama.cpp")
        return True

    @contextmanager
    def _scorer(self, notes: list[str]) -> Iterator[Scorer]:
        """A scorer; a GGUF file is scored in transformers where it can be, a hundred times as fast as in llama.cpp."""
        if (model := self.in_memory(notes)) is not None:
            scorer = PackedScorer(model, self.settings.max_length)
            self._describe(model)
            yield scorer
            return
        with self._engine() as engine:
            notes.append(f"{self.name}: an engine has no full distributions, so there are no KL and entropy")
            yield EngineScorer(engine, self.settings.max_length)

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        settings, location = self.settings, self.location
        kinds = ("transformers",) if is_gguf_file(location) else ("transformers", "auto")
        engine: Engine
        if isinstance(location, Source) and settings.engine in kinds:
            model = self._open(location)
            with self._loading():  # scoring packs, answering does not
                engine = engine_of(model.with_source(location), settings.context)
            self._describe(model)
        else:
            with working(self.console, f"opening {self.name}"):
                engine = open_engine(location, settings.engine, context=settings.context, key_url=settings.key_url)
        try:
            yield engine
        finally:
            engine.close()

    def _loading(self) -> AbstractContextManager[object]:
        """Says that the model is loaded, the first time."""
        return nullcontext() if self._is_printed else working(self.console, f"loading {self.name}")

    def _open(self, source: Source) -> Model:
        if self._model is None:
            self._model = self._bases.open(source)
        return self._model

    def _describe(self, model: Model) -> None:
        if not self._is_printed:
            self.console.print(escape(model.describe()))
        self._is_printed = True

    @contextmanager
    def _progress_bar(self, label: str, total: int) -> Iterator[OnDone | None]:
        """A progress bar, where there is something to do."""
        if not total:
            yield None
            return
        with ProgressBar(self.console, f"{self.name}: {label}", total) as bar:
            yield lambda done: bar.update(done, total, f"{done:,} of {total:,}")
