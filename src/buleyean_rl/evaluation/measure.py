"""Measure a model: figures, each with the items it is computed from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from buleyean_rl.data.importers import Preference, Preferences
from buleyean_rl.data.records import Prompt, as_messages
from buleyean_rl.errors import EngineError, ModelError, UsageError
from buleyean_rl.evaluation.answers import answer_figures, describe_unanswered, regeneration_figures
from buleyean_rl.evaluation.scoring import AnswerScore, EngineScorer, OnDone, PackedScorer, Scorer, TextScore
from buleyean_rl.evaluation.statistics import UNCOUNTED, Figure, kendall_tau, ndcg, preferred
from buleyean_rl.inference.open import Location, engine_of, is_gguf_file, locate, open_engine
from buleyean_rl.inference.protocol import Engine, Outcome, Sampling
from buleyean_rl.models.model import Model
from buleyean_rl.models.source import Source
from buleyean_rl.system.terminal import can_redraw

LENGTH_TOLERANCE = 0.2  # difference of two answers' lengths, as a share of the longer, within which they match


@dataclass(frozen=True)
class Material:
    """The data that models are measured on.

    Args:
        pairs: preferences to rank.
        records: rejected answers with counts; None uses those of the pairs.
        texts: neutral texts.
        prompts: for greedy answers.
    """

    pairs: Preferences | None = None
    records: Preferences | None = None
    texts: tuple[str, ...] = ()
    prompts: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Args:
        max_length: maximum tokens of a prompt and one answer, or of a text; longer ones are truncated.
        max_tokens: maximum tokens of a greedy answer.
        engine: auto, transformers or llama.cpp.
        context: see `open_engine`.
        key_url: see `open_engine`; None for no endpoint.
    """

    max_length: int = 1024
    max_tokens: int = 128
    engine: str = "auto"
    context: int | None = None
    key_url: str | None = None


@dataclass
class Evaluation:
    """The figures of one model.

    Args:
        model: its name.
        reference: name of the reference model pi_ref, if any.
        figures: by name, as far as material and model allow.
        distinct_4: distinct 4-grams over all 4-grams of the answers to the prompts.
        counts: of items left out or truncated.
        notes: on how it was measured.
    """

    model: str
    reference: str | None = None
    figures: dict[str, Figure] = field(default_factory=dict)
    distinct_4: float | None = None
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def evaluate(
    name: str | Source | Model,
    material: Material,
    settings: Settings | None = None,
    *,
    reference: str | Source | None = None,
    console: Console | None = None,
    bases: Bases | None = None,
) -> Evaluation:
    """Measure a model.

    Args:
        name: a base model as for `train`, a run folder, a GGUF file, or an endpoint, which only answers prompts; or its
            source; or a model in memory, with its adapter kept.
        material: to measure on.
        settings: None for the defaults.
        reference: the reference model pi_ref; that of a run is its base.
        console: for progress; None for no output.
        bases: those in memory, for several measurements; None for those of this one.

    Raises:
        UsageError: a reference for a run.
        ModelError: a model cannot be loaded.
        EngineError: an engine failed.
    """
    settings, console = settings or Settings(), console or Console(quiet=True)
    bases = bases or Bases(1 if reference is None else 2)
    model = _MeasuredModel(locate(name) if isinstance(name, str) else name, settings, console, bases)
    source = model.location if isinstance(model.location, Source) else None
    base = None if source is None else source.base
    if reference is not None and base is not None:
        raise UsageError(f"{model.name} is a run, whose reference is its base: leave --reference out")
    reference_model = None
    if reference is not None:
        reference_model = _MeasuredModel(
            locate(reference) if isinstance(reference, str) else reference, settings, console, bases
        )
    result = Evaluation(model.name, base.name if base else reference_model.name if reference_model else None)
    for preferences in filter(None, (material.pairs, material.records)):
        for reason, number in (("empty_answers", preferences.empty), ("bad_rows", preferences.skipped)):
            result.counts[reason] = result.counts.get(reason, 0) + number
    questions = _Questions(material)
    if questions.all or material.texts:
        answers, texts = model.score(questions.all, material.texts, result.notes)
        if reference_model is not None:
            base_answers, base_texts = reference_model.score(questions.all, material.texts, result.notes)
            answers = [
                [score._replace(reference_nats=base.nats) for score, base in zip(*scores, strict=True)]
                for scores in zip(answers, base_answers, strict=True)
            ]
            texts = [
                score._replace(reference_nats=base.nats) if score and base else score
                for score, base in zip(texts, base_texts, strict=True)
            ]
        _add_rankings(result, questions, answers)
        if material.texts:
            _add_neutral(result, texts)
    regenerated = [preference.prompt for preference in material.records.items] if material.records else []
    if material.prompts or regenerated:
        replies = model.answer([*material.prompts, *regenerated])
        result.counts["prompts_unanswered"], notes = describe_unanswered(result.model, replies)
        result.notes.extend(notes)
        if material.prompts:
            figures, result.distinct_4 = answer_figures(replies[: len(material.prompts)])
            result.figures |= figures
        if material.records:
            result.figures |= regeneration_figures(material.records.items, replies[len(material.prompts) :])
    return result


# --- models -------------------------------------------------------------------------------------------


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


class _MeasuredModel:
    """A model for scoring, then for answering: one in transformers is in memory for both."""

    def __init__(self, model: Location | Model, settings: Settings, console: Console, bases: Bases) -> None:
        self.location = model.source if isinstance(model, Model) else model
        self.settings, self.console = settings, console
        self.name = self.location if isinstance(self.location, str) else self.location.name
        self._model: Model | None = model if isinstance(model, Model) else None
        self._bases, self._is_printed = bases, False

    def score(
        self, questions: Sequence[Preference], texts: Sequence[str], notes: list[str]
    ) -> tuple[list[list[AnswerScore]], list[TextScore | None]]:
        """Score answers and texts; notes on how are appended to `notes`."""
        with self._scorer(notes) as scorer:
            with self._progress_bar("scoring answers", len(questions)) as on_done:
                answers = scorer.answers([(question.prompt, question.answers) for question in questions], on_done)
            with self._progress_bar("scoring neutral texts", len(texts)) as on_done:
                return answers, scorer.texts(texts, on_done)

    def answer(self, prompts: Sequence[Prompt]) -> list[Outcome]:
        """Greedy answers, or why there are none."""
        with self._engine() as engine, self._progress_bar("answering prompts", len(prompts)) as on_done:
            sampling = Sampling(max_tokens=self.settings.max_tokens)
            return engine.answer_many([as_messages(prompt) for prompt in prompts], sampling, on_done)

    @contextmanager
    def _scorer(self, notes: list[str]) -> Iterator[Scorer]:
        """A scorer; a GGUF file is scored in transformers where it can be, a hundred times as fast as in llama.cpp."""
        if self.settings.engine != "llama.cpp" and isinstance(self.location, Source):
            is_gguf = is_gguf_file(self.location)
            model = self._open(self.location)
            try:
                model.module, model.tokenizer  # noqa: B018 - load both
            except ModelError:
                if not is_gguf or self.settings.engine == "transformers":
                    raise
                notes.append(f"{self.name}: transformers cannot read it, so llama.cpp scores it, token by token")
            else:
                if is_gguf:
                    notes.append(
                        f"{self.name}: its weights are scored in transformers, its answers come from llama.cpp"
                    )
                scorer = PackedScorer(model, self.settings.max_length)
                self._describe(model)
                yield scorer
                return
        with self._engine() as engine:
            notes.append(f"{self.name}: an engine has no full distributions, so there are no neutral_kl and entropy")
            yield EngineScorer(engine, self.settings.max_length)

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        settings, location = self.settings, self.location
        kinds = ("transformers",) if is_gguf_file(location) else ("transformers", "auto")
        engine: Engine
        if isinstance(location, Source) and settings.engine in kinds:
            model = self._open(location)
            engine = engine_of(model.with_source(location), settings.context)  # scoring packs, answering does not
            self._describe(model)
        else:
            engine = open_engine(location, settings.engine, context=settings.context, key_url=settings.key_url)
        try:
            yield engine
        finally:
            engine.close()

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
        """A progress bar, if the console can show one."""
        if not can_redraw(self.console) or not total:
            yield None
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(f"{self.name}: {label}", total=total)
            yield lambda done: progress.update(task, completed=done)


# --- figures ------------------------------------------------------------------------------------------


class _Questions:
    """The preferences to score: indices of those whose pairs are ranked, and of those whose rejected answers count."""

    def __init__(self, material: Material) -> None:
        pairs = material.pairs.items if material.pairs else ()
        records = material.records.items if material.records else ()
        self.all = (*pairs, *records)
        self.pairs = range(len(pairs)) if material.pairs else None
        self.records = range(len(pairs), len(self.all)) if material.records else self.pairs


def _add_rankings(result: Evaluation, questions: _Questions, scores: Sequence[Sequence[AnswerScore]]) -> None:
    flat = [score for answers in scores for score in answers]
    result.counts |= {
        "answers_cut": sum(score.cut and score.tokens > 0 for score in flat),
        "answers_without_room": sum(score.tokens == 0 for score in flat),
    }
    has_reference = any(score.reference_nats is not None for score in flat)
    if questions.pairs is not None:
        pairs = [
            [(scores[k][better], scores[k][worse]) for better, worse in questions.all[k].pairs()]
            for k in questions.pairs
        ]
        result.figures["accuracy"] = _pair_accuracy(pairs, _mean)
        if has_reference:
            result.figures["accuracy_reference"] = _pair_accuracy(pairs, _reference_mean)
            result.figures["accuracy_vs_reference"] = _pair_accuracy(pairs, _log_ratio)
        result.figures["accuracy_length_matched"] = _pair_accuracy(pairs, _mean, length_matched=True)
    if questions.records is None:
        return
    scored = [(questions.all[k], scores[k]) for k in questions.records]
    with_counts = [(question, answers) for question, answers in scored if question.rounds > 1]
    if with_counts:
        result.figures["kendall_tau"] = Figure([_make_item(_tau(*item)) for item in with_counts])
        result.figures["ndcg"] = Figure([_make_item(_ndcg(*item)) for item in with_counts])
    rejected = [
        [score for score, rejections in zip(answers, question.rejections, strict=True) if rejections]
        for question, answers in scored
    ]
    tokens = [sum(score.tokens for score in answers) for answers in rejected]
    for name, part in (("rejected_nll", "nats"), ("rejected_nll_reference", "reference_nats")):
        if part == "nats" or has_reference:
            nats = [sum(getattr(score, part) or 0.0 for score in answers) for answers in rejected]
            result.figures[name] = Figure(list(zip(nats, map(float, tokens), strict=True)))


def _pair_accuracy(
    questions: Sequence[Sequence[tuple[AnswerScore, AnswerScore]]],
    score: Callable[[AnswerScore], float],
    *,
    length_matched: bool = False,
) -> Figure:
    """Share of pairs in which the better answer has the higher score; an item is a prompt with its pairs."""
    items = []
    for pairs in questions:
        results = [
            preferred(score(better), score(worse))
            for better, worse in pairs
            if better.tokens
            and worse.tokens
            and (not length_matched or _have_similar_length(better.tokens, worse.tokens))
        ]
        items.append((sum(results), float(len(results))))
    return Figure(items)


def _have_similar_length(a: int, b: int) -> bool:
    return abs(a - b) <= LENGTH_TOLERANCE * max(a, b)


def _mean(score: AnswerScore) -> float:
    return -score.nats / score.tokens


def _reference_mean(score: AnswerScore) -> float:
    return -(score.reference_nats or 0.0) / score.tokens


def _log_ratio(score: AnswerScore) -> float:
    return (score.reference_nats or 0.0) - score.nats


def _scores_and_rejections(question: Preference, scores: Sequence[AnswerScore]) -> tuple[list[float], list[int]]:
    """Mean log-probabilities and rejections of the answers that have tokens."""
    pairs = [(_mean(score), v) for score, v in zip(scores, question.rejections, strict=True) if score.tokens]
    return [mean for mean, _ in pairs], [v for _, v in pairs]


def _tau(question: Preference, scores: Sequence[AnswerScore]) -> float | None:
    means, rejections = _scores_and_rejections(question, scores)
    return kendall_tau(means, [-v for v in rejections])


def _ndcg(question: Preference, scores: Sequence[AnswerScore]) -> float | None:
    means, rejections = _scores_and_rejections(question, scores)
    return ndcg(means, [(question.rounds - v) / question.rounds for v in rejections])


def _make_item(value: float | None) -> tuple[float, float]:
    return UNCOUNTED if value is None else (value, 1.0)


def _add_neutral(result: Evaluation, scores: Sequence[TextScore | None]) -> None:
    """Figures of neutral texts, per token."""
    scored = [score for score in scores if score is not None]
    if not scored:
        raise EngineError("no neutral text has two tokens: give longer ones")
    for figure, part in (
        ("neutral_nll", "nats"),
        ("neutral_nll_reference", "reference_nats"),
        ("neutral_kl", "kl"),
        ("entropy", "entropy"),
    ):
        if all(getattr(score, part) is not None for score in scored):
            items = [UNCOUNTED if score is None else (getattr(score, part), score.tokens) for score in scores]
            result.figures[figure] = Figure(items)
    result.counts["neutral_tokens"] = sum(score.tokens for score in scored)
