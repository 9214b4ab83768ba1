"""Answers to prompts, drawn where the journal lacks them and written there as they come.

Several processes go through windows of 64, each through one of its own at a time; the first writes what all have drawn.
A window is the same whoever draws it, so the answers do not depend on how many there are.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from buleyean_rl.data.encode import tokenizer_hash
from buleyean_rl.data.records import Prompt, as_messages
from buleyean_rl.errors import UsageError
from buleyean_rl.inference.progress import AnswerProgress
from buleyean_rl.inference.protocol import (
    Answer,
    Completer,
    Messages,
    OnTokens,
    Outcome,
    Sampling,
    ServerReport,
    Unanswered,
)
from buleyean_rl.mining.journal import Journal
from buleyean_rl.system.lazy import Lazy
from buleyean_rl.system.progress import working
from buleyean_rl.system.wording import counted
from buleyean_rl.training.processes import Processes

WINDOW = 64  # answers that engines which batch may compute side by side


@dataclass(frozen=True)
class MineSettings:
    """How answers are drawn.

    Args:
        samples: answers to each prompt.
        max_tokens: of an answer.
        temperature: 0 is greedy decoding, which has one answer.
        top_p: the nucleus to draw from.
        seed: same seed, same answers.
        context: maximum tokens of a conversation; None for the model's own, as memory allows.
    """

    samples: int = 1
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0
    context: int | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"{counted(self.samples, 'sample')}: at least 1 is needed")
        if self.samples > 1 and self.temperature <= 0:
            raise UsageError(f"{self.samples} samples at temperature 0 are the same answer: raise the temperature")


def find_distinct(prompts: int, settings: MineSettings, journal: Journal) -> array[int]:
    """Of the distinct answers to each prompt, the draws that came first.

    Args:
        prompts: number of them.
        settings: of the journal.
        journal: with the answers.
    """
    samples = settings.samples
    if samples == 1:
        return array("q", (draw for draw in range(prompts) if draw in journal.answers))
    distinct = array("q")
    for first in range(0, prompts * samples, samples):
        texts = set()
        for draw in range(first, first + samples):
            if draw in journal.answers and (text := journal.answers[draw].text) not in texts:
                texts.add(text)
                distinct.append(draw)
    return distinct


def draw_answers(
    prompts: Sequence[Prompt],
    engine: Callable[[], Completer],
    settings: MineSettings,
    journal: Journal | None,
    console: Console,
    processes: Processes,
) -> tuple[list[Unanswered], list[ServerReport]]:
    """Draw the answers that the journal lacks, each written as it comes.

    Args:
        prompts: distinct.
        engine: makes the engine, if an answer is missing.
        settings: how answers are drawn.
        journal: of the same settings; None in a process that is not the first.
        console: where progress goes.
        processes: that share the answers; each calls this.

    Returns:
        The failures, which the next mining asks for again; and the servers that answered.

    Raises:
        EngineError: the engine failed.
    """
    total = len(prompts) * settings.samples
    missing: list[int] = processes.once(
        lambda: [draw for draw in range(total) if journal is not None and not journal.has_outcome(draw)]
    )
    if not missing:
        return [], []
    failed: list[Unanswered] = []
    with working(console, "loading the model"):
        running = engine()
    try:
        if journal is not None:
            journal.add_tokenizer(None if running.tokenizer is None else tokenizer_hash(running.tokenizer))
        in_windows = running.is_batched or processes.size > 1
        windows = list(_windows(missing, total)) if in_windows else [missing]
        answers = sum(map(len, windows))
        bar = AnswerProgress(console, "answering", answers, settings.max_tokens, total - answers, running.servers)
        with closing(bar) as progress:
            draw_window = partial(_draw_window, running, prompts, settings, progress.add_tokens)
            for draw, outcome in _share(windows, draw_window, processes):
                progress.add_outcome(outcome)
                if journal is None or journal.has_outcome(draw):
                    continue
                if isinstance(outcome, Unanswered) and not outcome.is_permanent:
                    failed.append(outcome)
                else:
                    journal.add_outcome(draw, _blank_as_empty(outcome))
    finally:
        running.close()
    for outcome in failed[:1]:
        console.print(f"{len(failed):,} without an answer, such as: {outcome.detail}", markup=False)
    return failed, list(running.servers)


def _draw_window(
    running: Completer, prompts: Sequence[Prompt], settings: MineSettings, on_tokens: OnTokens, draws: Sequence[int]
) -> Iterator[tuple[int, Outcome]]:
    """Draws and their outcomes, as they come."""
    sampling = Sampling(settings.max_tokens, settings.temperature, settings.top_p, settings.seed)
    conversations = Lazy(len(draws), partial(_conversation, prompts, settings.samples, draws))
    seeds = [settings.seed + draw for draw in draws]
    for number, outcome in running.answers(conversations, sampling, seeds, on_tokens):
        yield draws[number], outcome


def _share(
    windows: Sequence[Sequence[int]],
    draw_window: Callable[[Sequence[int]], Iterator[tuple[int, Outcome]]],
    processes: Processes,
) -> Iterator[tuple[int, Outcome]]:
    """The outcomes of all windows: of one process as they come, of several once each has gone through one."""
    for start in range(0, len(windows), processes.size):
        own = start + processes.rank
        drawn = (pair for window in windows[own : own + 1] for pair in draw_window(window))
        if processes.size == 1:
            yield from drawn
            continue
        for pairs in processes.all([[draw, isinstance(outcome, Answer), *outcome] for draw, outcome in drawn]):
            for draw, is_answer, *fields in pairs:
                yield draw, _as_answer(*fields) if is_answer else Unanswered(*fields)


def _as_answer(text: str, tokens: int | None, ended: bool, ids: list[int] | None, *_: object) -> Answer:
    return Answer(text, tokens, ended, None if ids is None else tuple(ids))


def _conversation(prompts: Sequence[Prompt], samples: int, draws: Sequence[int], number: int) -> Messages:
    return as_messages(prompts[draws[number] // samples])


def _windows(missing: Sequence[int], total: int) -> Iterator[range]:
    """Whole windows in which some draws are missing: what is computed beside an answer may change its last digits."""
    for start in dict.fromkeys(draw - draw % WINDOW for draw in missing):
        yield range(start, min(start + WINDOW, total))


def _blank_as_empty(outcome: Outcome) -> Outcome:
    """An answer of nothing but space as the empty one."""
    is_blank = isinstance(outcome, Answer) and not outcome.text.strip()
    return outcome._replace(text="", token_ids=None) if is_blank else outcome  # type: ignore[call-arg]
