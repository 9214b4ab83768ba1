"""What follows a run: its model is opened, asked again what was rejected, and takes its place beside the base."""

from __future__ import annotations

import json

from buleyean_rl.errors import BuleyeanError, EngineError
from buleyean_rl.inference.open import describe_policy, engine_of
from buleyean_rl.inference.protocol import Answer, Messages, Sampling
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.model import Model
from buleyean_rl.models.run_files import read_run
from buleyean_rl.models.source import Source
from buleyean_rl.void.models import BASE, Models, ServedModel, key_of
from buleyean_rl.void.store import Row, Store
from buleyean_rl.void.store.rejections import text_of_prompt
from buleyean_rl.void.store.runs import Sample
from buleyean_rl.void.store.subject import messages_of
from buleyean_rl.void.training import Training
from buleyean_rl.void.verdict import is_unlearned

SAMPLES = 6  # rejected prompts that a model is asked again
NO_ANSWER = Answer("", 0, ended=True)
MAX_SAMPLE_TOKENS = 512  # as long as the rejected answer was, within this


class RunModels:
    """Opens the models of runs on one base in memory.

    Args:
        base: the base model.
        source: of it.
        training: knows the folders.
        drawn: what records say of answers, see `ServedModel`.
    """

    def __init__(self, base: Model, source: Source, training: Training, drawn: Row) -> None:
        self._base, self._source, self._training, self._drawn = base, source, training, drawn

    def open(self, run: Row) -> ServedModel:
        """The model of a run.

        Raises:
            BuleyeanError: it cannot be loaded.
        """
        source = self._source.with_adapter(self._training.folder(run))
        drawn = self._drawn | {"policy": describe_policy(source)}
        return ServedModel(key_of(run["id"]), engine_of(self._base.with_source(source)), drawn)

    def problem(self, run: Row) -> str:
        """Why the model of a run cannot be used; empty if it can."""
        folder = self._training.folder(run)
        if not (folder / "run.json").exists():
            return "it has not learnt anything"
        try:
            trained_on = read_run(folder)["model"]
        except BuleyeanError as error:
            return str(error)
        return "" if trained_on == self._source.absolute_name else f"it was trained on {trained_on}"


class PutToUse:
    """Asks a run's model what was rejected, and puts it beside the base.

    Args:
        store: gets the samples.
        models: gets the pair.
    """

    def __init__(self, store: Store, models: Models) -> None:
        self._store, self._models = store, models
        self._base_answers: dict[tuple[str, int], Answer] = {}  # which are the same for every run

    def __call__(self, run: int) -> None:
        """Put a run to use that has ended with a model.

        Raises:
            ModelError: it cannot be used.
        """
        trained, examples = self._models.get(key_of(run)), self._store.rejections.examples(SAMPLES)
        limit = self._longest([answer.text for _, answers in examples for answer in answers])
        after = _answers(trained.engine, [prompt for prompt, _ in examples], limit)
        unsure = [prompt for prompt, answers in examples if not any(answer.is_greedy for answer in answers)]
        before = self._answers_of_base(unsure, limit)
        samples = [
            Sample(
                text_of_prompt(prompt),
                answers[0].text,
                now.text,
                is_unlearned(answers, now, before.get(prompt)),
                answers[0].spans,
            )
            for (prompt, answers), now in zip(examples, after, strict=True)
            if now is not None
        ]
        self._store.runs.add_samples(run, samples)
        self._store.runs.set(run, pair_before=json.dumps(self._models.pair))
        self._models.set_pair([BASE, trained.key])

    def _longest(self, texts: list[str]) -> int:
        """Tokens of the longest of some answers, within bounds."""
        engine = self._models.base.engine
        longest = max((len(engine.tokenize(text, parse_special=False)) for text in texts), default=1)
        return min(MAX_SAMPLE_TOKENS, max(1, longest))

    def _answers_of_base(self, contexts: list[str], limit: int) -> dict[str, Answer]:
        new = [context for context in contexts if (context, limit) not in self._base_answers]
        for context, answer in zip(new, _answers(self._models.base.engine, new, limit), strict=True):
            self._base_answers[context, limit] = answer or NO_ANSWER
        return {context: self._base_answers[context, limit] for context in contexts}


def _answers(engine: TransformersEngine, contexts: list[str], limit: int) -> list[Answer | None]:
    """The same as the page gives, computed beside others only where that is so; None where there is none."""
    sampling, conversations = Sampling(max_tokens=limit), [messages_of(context) for context in contexts]
    if engine.is_batched:
        return [_answer(engine, messages, sampling) for messages in conversations]
    outcomes = engine.answer_many(conversations, sampling)
    return [outcome if isinstance(outcome, Answer) else None for outcome in outcomes]


def _answer(engine: TransformersEngine, messages: Messages, sampling: Sampling) -> Answer | None:
    pieces = engine.generate(messages, sampling)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            answer: Answer = end.value
            return answer
        except EngineError:  # too long for the context
            return None
