"""A model measured on material: figures, each with the items it was computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from buleyean_rl.data.importers import Preference, Preferences
from buleyean_rl.data.records import Prompt, as_messages, handle_bad_row, parse_text, read_rows
from buleyean_rl.errors import EngineError, ModelError, RecordError, UsageError
from buleyean_rl.evaluation.repetition import distinct, is_looping, overlap, prefix_match
from buleyean_rl.evaluation.scoring import AnswerScore, EngineScorer, OnDone, PackedScorer, Scorer, TextScore
from buleyean_rl.evaluation.statistics import Figure, kendall_tau, ndcg, preferred
from buleyean_rl.inference.open import Location, is_gguf_file, locate, open_engine
from buleyean_rl.inference.protocol import Answer, Engine, Sampling
from buleyean_rl.models.model import Model
from buleyean_rl.models.source import Source

MATCHED = 0.2  # answers match in length if the shorter one lacks at most this share of the longer one's tokens
WEIGHTLESS = (0.0, 0.0)  # an item that does not count: all models have the same items, whatever their answers


@dataclass(frozen=True)
class Material:
    """What models are measured on.

    Args:
        pairs: to rank.
        records: rejected answers with counts; None takes those of the pairs.
        texts: plain texts.
        prompts: to be answered greedily.
    """

    pairs: Preferences | None = None
    records: Preferences | None = None
    texts: tuple[str, ...] = ()
    prompts: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    Args:
        max_length: tokens of a prompt and one answer, or of a text, at most; longer ones are cut at the end.
        max_tokens: of an answer, at most.
        engine: auto, transformers or llama.cpp.
    """

    max_length: int = 1024
    max_tokens: int = 128
    engine: str = "auto"


@dataclass
class Evaluation:
    """One model, measured.

    Args:
        model: its name.
        reference: the name of what pi_ref is; None for nothing.
        figures: by name, those that the material and the model allow.
        distinct_4: different 4-grams over all 4-grams of the answers to the prompts.
        counts: what was left out or cut on the way.
        notes: what a reader should know about how it was measured.
    """

    model: str
    reference: str | None = None
    figures: dict[str, Figure] = field(default_factory=dict)
    distinct_4: float | None = None
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def evaluate(
    name: str | Source,
    material: Material,
    settings: Settings | None = None,
    *,
    reference: str | Source | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Measure a model.

    Args:
        name: what `train` takes, a run folder, a GGUF file, or an endpoint, which only answers prompts; or its source.
        material: on what.
        settings: how; the defaults if None.
        reference: the model that stands for pi_ref; a run has its base for that.
        console: where progress goes; None for nowhere.

    Raises:
        UsageError: a reference for a run.
        ModelError: a model cannot be loaded.
        EngineError: an engine failed.
    """
    settings, console = settings or Settings(), console or Console(quiet=True)
    subject = _Subject(locate(name) if isinstance(name, str) else name, settings, console)
    source = subject.location if isinstance(subject.location, Source) else None
    base = None if source is None else source.base
    if reference is not None and base is not None:
        raise UsageError(f"{subject.name} is a run, and measured against its own base: leave --reference out")
    other = None
    if reference is not None:
        other = _Subject(locate(reference) if isinstance(reference, str) else reference, settings, console)
    result = Evaluation(subject.name, base.name if base else other.name if other else None)
    for read in filter(None, (material.pairs, material.records)):
        for what, number in (("empty_answers", read.empty), ("bad_rows", read.skipped)):
            result.counts[what] = result.counts.get(what, 0) + number
    questions = _Questions(material)
    if questions.all or material.texts:
        answers, texts = subject.score(questions.all, material.texts, result.notes)
        if other is not None:
            base_answers, base_texts = other.score(questions.all, material.texts, result.notes)
            answers = [
                [own._replace(reference_nats=base.nats) for own, base in zip(*both, strict=True)]
                for both in zip(answers, base_answers, strict=True)
            ]
            texts = [
                own._replace(reference_nats=base.nats) if own and base else own
                for own, base in zip(texts, base_texts, strict=True)
            ]
        _add_rankings(result, questions, answers)
        if material.texts:
            _add_neutral(result, texts)
    regenerated = [preference.prompt for preference in material.records.items] if material.records else []
    if material.prompts or regenerated:
        replies = subject.answer([*material.prompts, *regenerated])
        if material.prompts:
            _add_answers(result, replies[: len(material.prompts)])
        if material.records:
            _add_regeneration(result, material.records.items, replies[len(material.prompts) :])
    return result


def read_texts(path: Path, limit: int | None = None) -> tuple[str, ...]:
    """The plain texts of a file.

    Args:
        path: `.jsonl` for objects with `text` (or `content`), anything else for a text a line.
        limit: the first so many.

    Raises:
        RecordError: it cannot be read, or holds no text.
    """
    texts: list[str] = []
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        for line, row in read_rows(path):
            try:
                texts.append(parse_text(row.get("text", row.get("content")), "text"))
            except RecordError as error:
                handle_bad_row(error, path, line, False)
    else:
        try:
            texts = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise RecordError("is not UTF-8 text: convert the file to UTF-8", path=path) from error
        except OSError as error:
            raise RecordError(f"cannot be read: {error.strerror or error}", path=path) from error
    stripped = tuple(text.strip() for text in texts if text.strip())
    if not stripped:
        raise RecordError("holds no text: give one a line, or objects with `text`", path=path)
    return stripped[:limit]


# --- models -------------------------------------------------------------------------------------------


class _Subject:
    """A model that is measured: opened to score, and to answer, and gone from memory afterwards."""

    def __init__(self, location: Location, settings: Settings, console: Console) -> None:
        self.location, self.settings, self.console = location, settings, console
        self.name = location if isinstance(location, str) else location.name
        self._is_described = False

    def score(
        self, questions: Sequence[Preference], texts: Sequence[str], notes: list[str]
    ) -> tuple[list[list[AnswerScore]], list[TextScore | None]]:
        """Log-probabilities of answers and texts; `notes` gets what a reader should know about them."""
        with self._scorer(notes) as scorer:
            with self._bar("scoring answers", len(questions)) as on_done:
                answers = scorer.answers([(question.prompt, question.answers) for question in questions], on_done)
            with self._bar("reading plain texts", len(texts)) as on_done:
                return answers, scorer.texts(texts, on_done)

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Greedy answers."""
        with self._engine() as engine, self._bar("answering prompts", len(prompts)) as on_done:
            sampling = Sampling(max_tokens=self.settings.max_tokens)
            return engine.answer_many([as_messages(prompt) for prompt in prompts], sampling, on_done)

    @contextmanager
    def _scorer(self, notes: list[str]) -> Iterator[Scorer]:
        """A scorer. A GGUF file is read by transformers, a hundred times as fast, if that can be."""
        if self.settings.engine != "llama.cpp" and isinstance(self.location, Source):
            is_file = is_gguf_file(self.location)
            model = Model(self.location, switchable=True)
            try:
                model.module, model.tokenizer  # noqa: B018 - loaded here, where it may fail
            except ModelError:
                if not is_file or self.settings.engine == "transformers":
                    raise
                notes.append(f"{self.name}: transformers cannot read it, so llama.cpp scores it, token by token")
            else:
                if is_file:
                    notes.append(
                        f"{self.name}: its weights are scored in transformers, its answers come from llama.cpp"
                    )
                scorer = PackedScorer(model, self.settings.max_length)
                self.console.print(model.describe())
                self._is_described = True
                yield scorer
                return
        with self._engine() as engine:
            notes.append(f"{self.name}: an engine gives no whole distributions, so there are no neutral_kl and entropy")
            yield EngineScorer(engine, self.settings.max_length)

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        engine = open_engine(self.location, self.settings.engine, None if self._is_described else self.console)
        try:
            yield engine
        finally:
            engine.close()

    @contextmanager
    def _bar(self, what: str, total: int) -> Iterator[OnDone | None]:
        """A progress bar on a console that is seen."""
        if self.console.quiet or not total:
            yield None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(f"{self.name}: {what}", total=total)
            yield lambda done: progress.update(task, completed=done)


# --- figures ------------------------------------------------------------------------------------------


class _Questions:
    """The preferences to score: those whose pairs are ranked, and those whose rejected answers are read."""

    def __init__(self, material: Material) -> None:
        pairs = material.pairs.items if material.pairs else ()
        records = material.records.items if material.records else ()
        self.all = (*pairs, *records)
        self.pairs = range(len(pairs)) if material.pairs else None
        self.records = range(len(pairs), len(self.all)) if material.records else self.pairs


def _add_rankings(result: Evaluation, questions: _Questions, scores: Sequence[Sequence[AnswerScore]]) -> None:
    """The figures of scored answers."""
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
        result.figures["accuracy"] = _accuracy(pairs, _mean)
        if has_reference:
            result.figures["accuracy_reference"] = _accuracy(pairs, _reference_mean)
            result.figures["accuracy_vs_reference"] = _accuracy(pairs, _log_ratio)
        result.figures["accuracy_length_matched"] = _accuracy(pairs, _mean, matched=True)
    if questions.records is None:
        return
    scored = [(questions.all[k], scores[k]) for k in questions.records]
    counted = [(question, own) for question, own in scored if question.rounds > 1]
    if counted:
        result.figures["kendall_tau"] = Figure([_item(_tau(*both)) for both in counted])
        result.figures["ndcg"] = Figure([_item(_ndcg(*both)) for both in counted])
    rejected = [
        [score for score, rejections in zip(own, question.rejections, strict=True) if rejections]
        for question, own in scored
    ]
    tokens = [sum(score.tokens for score in answers) for answers in rejected]
    for name, part in (("rejected_nll", "nats"), ("rejected_nll_reference", "reference_nats")):
        if part == "nats" or has_reference:
            nats = [sum(getattr(score, part) or 0.0 for score in answers) for answers in rejected]
            result.figures[name] = Figure(list(zip(nats, map(float, tokens), strict=True)))


def _accuracy(
    questions: Sequence[Sequence[tuple[AnswerScore, AnswerScore]]],
    score: Callable[[AnswerScore], float],
    *,
    matched: bool = False,
) -> Figure:
    """Share of pairs in which the better answer has the higher score; an item is a prompt, whose pairs go together."""
    items = []
    for pairs in questions:
        right = [
            preferred(score(better), score(worse))
            for better, worse in pairs
            if better.tokens and worse.tokens and (not matched or _are_matched(better.tokens, worse.tokens))
        ]
        items.append((sum(right), float(len(right))))
    return Figure(items)


def _are_matched(one: int, other: int) -> bool:
    return abs(one - other) <= MATCHED * max(one, other)


def _mean(score: AnswerScore) -> float:
    return -score.nats / score.tokens


def _reference_mean(score: AnswerScore) -> float:
    return -(score.reference_nats or 0.0) / score.tokens


def _log_ratio(score: AnswerScore) -> float:
    return (score.reference_nats or 0.0) - score.nats


def _scored(question: Preference, scores: Sequence[AnswerScore]) -> tuple[list[float], list[int]]:
    """The mean log-probabilities of the answers that have any, and their rejections."""
    pairs = [(_mean(score), v) for score, v in zip(scores, question.rejections, strict=True) if score.tokens]
    return [mean for mean, _ in pairs], [v for _, v in pairs]


def _tau(question: Preference, scores: Sequence[AnswerScore]) -> float | None:
    means, rejections = _scored(question, scores)
    return kendall_tau(means, [-v for v in rejections])


def _ndcg(question: Preference, scores: Sequence[AnswerScore]) -> float | None:
    means, rejections = _scored(question, scores)
    return ndcg(means, [(question.rounds - v) / question.rounds for v in rejections])


def _item(value: float | None) -> tuple[float, float]:
    return WEIGHTLESS if value is None else (value, 1.0)


def _add_neutral(result: Evaluation, scores: Sequence[TextScore | None]) -> None:
    """The figures of plain texts, per token."""
    complete = [score for score in scores if score is not None]
    if not complete:
        raise EngineError("no plain text has two tokens: give longer ones")
    for figure, part in (
        ("neutral_nll", "nats"),
        ("neutral_nll_reference", "reference_nats"),
        ("neutral_kl", "kl"),
        ("entropy", "entropy"),
    ):
        if all(getattr(score, part) is not None for score in complete):
            items = [WEIGHTLESS if score is None else (getattr(score, part), score.tokens) for score in scores]
            result.figures[figure] = Figure(items)
    result.counts["neutral_tokens"] = sum(score.tokens for score in complete)


def _add_answers(result: Evaluation, answers: Sequence[Answer]) -> None:
    """The figures of greedy answers to prompts."""
    result.figures["loop_rate"] = Figure([(float(is_looping(answer.text)), 1.0) for answer in answers])
    result.distinct_4 = distinct([answer.text for answer in answers])
    if all(answer.tokens is not None for answer in answers):
        result.figures["mean_length"] = Figure([(float(answer.tokens or 0), 1.0) for answer in answers])
    result.figures["ended_share"] = Figure([(float(answer.ended), 1.0) for answer in answers])


def _add_regeneration(result: Evaluation, records: Sequence[Preference], answers: Sequence[Answer]) -> None:
    """How far greedy answers are what was rejected: of each record, the rejected answer that is closest."""
    figures: dict[str, Callable[[str, str], float]] = {
        "regeneration_prefix": prefix_match,
        "regeneration_overlap": overlap,
    }
    for name, alike in figures.items():
        items = []
        for record, answer in zip(records, answers, strict=True):
            rejected = [text for text, v in zip(record.answers, record.rejections, strict=True) if v]
            items.append(_item(max((alike(answer.text, text) for text in rejected), default=None)))
        result.figures[name] = Figure(items)
