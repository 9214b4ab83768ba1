"""Measure a model: figures, each with the items it is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from buleyean_rl import demo_data
from buleyean_rl.data.importers import Preference, Preferences
from buleyean_rl.data.records import Prompt
from buleyean_rl.errors import EngineError, UsageError
from buleyean_rl.evaluation.answers import answer_figures, describe_unanswered, regeneration_figures
from buleyean_rl.evaluation.drift import BUNDLED, OWN, PASSAGE_TOKENS, PASSAGES
from buleyean_rl.evaluation.kept_answers import kept_answers, unchanged_share
from buleyean_rl.evaluation.measured_model import Bases, MeasuredModel, Settings
from buleyean_rl.evaluation.neutral_text import Passage
from buleyean_rl.evaluation.scoring import AnswerScore, Text, TextScore
from buleyean_rl.evaluation.statistics import UNCOUNTED, Figure, kendall_tau, ndcg, preferred
from buleyean_rl.inference.open import locate
from buleyean_rl.inference.own_text import own_passages
from buleyean_rl.inference.protocol import Outcome, Sampling
from buleyean_rl.models.model import Model
from buleyean_rl.models.source import Source
from buleyean_rl.system.progress import working

NEUTRAL, KEPT = "neutral", "kept"  # kinds of text, beside those of `drift`
TEXT_FIGURES = {  # of texts, and what each is a sum of
    "nll": "nats",
    "nll_reference": "reference_nats",
    "kl": "kl",
    "entropy": "entropy",
    "entropy_reference": "reference_entropy",
}
LENGTH_TOLERANCE = 0.2  # difference of two answers' lengths, as a share of the longer, within which they match


@dataclass(frozen=True)
class Material:
    """The data that models are measured on.

    Args:
        pairs: preferences to rank.
        records: rejected answers with counts; None uses those of the pairs.
        texts: plain texts by kind, see `plain_texts`.
        passages: number of passages that the base writes, at most `PASSAGES`.
        prompts: to answer.
    """

    pairs: Preferences | None = None
    records: Preferences | None = None
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    passages: int = 0
    prompts: tuple[Prompt, ...] = ()


def plain_texts(neutral: Sequence[str], limit: int | None = None) -> dict[str, Sequence[str]]:
    """Texts by kind: some, and beside them the bundled ones unless they are those; none for none."""
    bundled = demo_data.neutral_texts()
    if not neutral or list(neutral) == bundled:
        return {NEUTRAL: neutral[:limit]} if neutral else {}
    return {BUNDLED: bundled[:limit], NEUTRAL: neutral[:limit]}


@dataclass
class Evaluation:
    """The figures of one model.

    Args:
        model: its name.
        base: what its own passages and the answers to keep are of: its name, or its base's.
        reference: name of the reference model pi_ref, if any.
        figures: by name, as far as material and model allow.
        distinct: distinct 4-grams over all 4-grams of the answers to the prompts, as `distinct_4` and a suffix.
        counts: of items left out or truncated.
        notes: on how it was measured.
    """

    model: str
    base: str = ""
    reference: str | None = None
    figures: dict[str, Figure] = field(default_factory=dict)
    distinct: dict[str, float | None] = field(default_factory=dict)
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
    model = MeasuredModel(locate(name) if isinstance(name, str) else name, settings, console, bases)
    source = model.location if isinstance(model.location, Source) else None
    base = None if source is None else source.base
    if reference is not None and base is not None:
        raise UsageError(f"{model.name} is a run, whose reference is its base: leave --reference out")
    reference_model = None
    if reference is not None:
        reference_model = MeasuredModel(
            locate(reference) if isinstance(reference, str) else reference, settings, console, bases
        )
    reference_name = base.name if base else reference_model.name if reference_model else None
    result = Evaluation(model.name, base.name if base else model.name, reference_name)
    for preferences in filter(None, (material.pairs, material.records)):
        for reason, number in (("empty_answers", preferences.empty), ("bad_rows", preferences.skipped)):
            result.counts[reason] = result.counts.get(reason, 0) + number
    replies = _answer(result, model, material)
    texts: dict[str, Sequence[Text]] = {**material.texts}
    if material.passages and (in_memory := model.in_memory(result.notes)) is not None:
        with working(console, "drawing the base model's own text"):
            own = own_passages(in_memory, PASSAGES, PASSAGE_TOKENS)
        texts[OWN] = [Passage(ids) for ids in own[: material.passages]]
    if base is not None and material.prompts and (in_memory := model.in_memory(result.notes)) is not None:
        max_tokens = settings.samplings[0].max_tokens
        kept = kept_answers(in_memory, material.prompts, max_tokens, settings.context, console)
        texts[KEPT] = kept
        if settings.samplings[0].temperature == 0:
            result.figures["kept_share"] = unchanged_share(kept, replies[: len(kept)])
    questions = _Questions(material)
    if questions.all or any(texts.values()):
        _score(result, model, reference_model, questions, texts)
    return result


def _answer(result: Evaluation, model: MeasuredModel, material: Material) -> list[Outcome]:
    """Add the figures of answers; returns those of the first sampling."""
    regenerated = [preference.prompt for preference in material.records.items] if material.records else []
    count = len(material.prompts)
    if not count and not regenerated:
        return []
    by_sampling = model.answer([*material.prompts, *regenerated])
    for number, (sampling, replies) in enumerate(zip(model.settings.samplings, by_sampling, strict=True)):
        suffix = sampling_suffix(sampling) if number else ""
        unanswered, notes = describe_unanswered(result.model, replies)
        result.counts[f"prompts_unanswered{suffix}"] = unanswered
        result.notes.extend(note for note in notes if note not in result.notes)
        figures: dict[str, Figure] = {}
        if count:
            figures, result.distinct[f"distinct_4{suffix}"] = answer_figures(replies[:count])
        if material.records:
            figures |= regeneration_figures(material.records.items, replies[count:])
        result.figures |= {f"{name}{suffix}": figure for name, figure in figures.items()}
    return by_sampling[0]


def sampling_suffix(sampling: Sampling) -> str:
    """What ends the name of a figure of answers that were drawn otherwise than the first ones."""
    return f"_t{sampling.temperature:g}_{sampling.max_tokens}"


def _score(
    result: Evaluation,
    model: MeasuredModel,
    reference: MeasuredModel | None,
    questions: _Questions,
    texts: Mapping[str, Sequence[Text]],
) -> None:
    """Add the figures of answers' and texts' probabilities, all from one pass."""
    flat = [text for members in texts.values() for text in members]
    answers, scores = model.score(questions.all, flat, result.notes)
    if reference is not None:
        plain = [text if isinstance(text, str) else "" for text in flat]  # token ids may be another tokenizer's
        base_answers, base_scores = reference.score(questions.all, plain, result.notes)
        answers = [
            [score._replace(reference_nats=base.nats) for score, base in zip(*pair, strict=True)]
            for pair in zip(answers, base_answers, strict=True)
        ]
        scores = [
            score._replace(reference_nats=base.nats) if score and base else score
            for score, base in zip(scores, base_scores, strict=True)
        ]
    _add_rankings(result, questions, answers)
    remaining = iter(scores)
    for kind, members in texts.items():
        _add_texts(result, kind, [next(remaining) for _ in members])


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


def _add_texts(result: Evaluation, kind: str, scores: Sequence[TextScore | None]) -> None:
    """Figures of a kind of text, per token."""
    scored = [score for score in scores if score is not None]
    if not scored and kind == NEUTRAL:
        raise EngineError("no neutral text has two tokens: give longer ones")
    for part, field_name in TEXT_FIGURES.items():
        if scored and all(getattr(score, field_name) is not None for score in scored):
            items = [UNCOUNTED if score is None else (getattr(score, field_name), score.tokens) for score in scores]
            result.figures[text_figure(kind, part)] = Figure(items)
    result.counts[f"{kind}_tokens"] = sum(score.tokens for score in scored)


def text_figure(kind: str, part: str) -> str:
    """The name of a figure of a kind of text; the entropies of neutral texts have no prefix."""
    return part if kind == NEUTRAL and part.startswith("entropy") else f"{kind}_{part}"
