"""Mine rejections: a model answers, judges reject, what they rejected becomes records.

    prompts --engine--> answers --judges--> verdicts --votes--> records
                           \\____ journal ____/

The journal, beside the records, holds every answer and every verdict as they fall. Mining again with the
same settings resumes from it; with other judges it judges the same answers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from buleyean_rl.data.records import Prompt, RejectionRecord, as_messages, write_records
from buleyean_rl.errors import UsageError
from buleyean_rl.inference.protocol import Completer, Sampling
from buleyean_rl.mining.journal import Journal, journal_path
from buleyean_rl.mining.judges import OUTCOMES, Answer, Judge
from buleyean_rl.mining.votes import record_votes

BATCH_ANSWERS = 64  # drawn at once: what killing the command may lose


@dataclass(frozen=True)
class MineSettings:
    """How answers are drawn.

    Args:
        samples: answers to each prompt.
        max_tokens: of an answer.
        temperature: 0 is greedy decoding, which has one answer.
        top_p: the nucleus to draw from.
        seed: same seed, same answers.
    """

    samples: int = 1
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"{self.samples} samples: at least 1 is needed")
        if self.samples > 1 and self.temperature <= 0:
            raise UsageError(f"{self.samples} samples at temperature 0 are the same answer: raise the temperature")


@dataclass(frozen=True)
class Mined:
    """The result of mining.

    Args:
        report: its counts.
        records: of what was rejected.
        answers: per prompt, the distinct answers.
    """

    report: MineReport
    records: list[RejectionRecord]
    answers: list[list[str]]


@dataclass(frozen=True)
class MineReport:
    """The counts of a mining.

    Args:
        output: the records file.
        prompts: how many were asked.
        answers: distinct answers to them.
        rejected: answers that some judge rejected.
        records: written, one per prompt with a rejected answer.
        verdicts: per judge, how many answers it rejected, accepted and abstained from.
        answers_reused: distinct answers that the journal already had.
        seconds: of this mining alone.
    """

    output: str
    prompts: int
    answers: int
    rejected: int
    records: int
    verdicts: dict[str, dict[str, int]]
    answers_reused: int
    seconds: float

    def lines(self) -> list[str]:
        """The report for a person."""
        by_judge = (
            f"  {judge}: " + ", ".join(f"{number:,} {outcome}" for outcome, number in outcomes.items() if number)
            for judge, outcomes in self.verdicts.items()
        )
        reused = f", {self.answers_reused:,} of them from its journal" if self.answers_reused else ""
        return [
            f"{self.prompts:,} prompts, {self.answers:,} answers{reused}; {self.rejected:,} rejected: "
            f"{self.records:,} records in {self.output}",
            *by_judge,
        ]


def mine(
    prompts: Sequence[Prompt],
    engine: Callable[[], Completer],
    identity: str,
    judges: Sequence[Judge],
    output: Path,
    settings: MineSettings,
    *,
    console: Console | None = None,
) -> Mined:
    """Draw answers, judge them and write the records of what was rejected.

    Args:
        prompts: distinct.
        engine: makes the engine, if an answer is missing.
        identity: of the engine's model: the journal of another one is refused.
        judges: at least one.
        output: the records file; the journal stands beside it.
        settings: how answers are drawn.
        console: where progress goes; None for nowhere.

    Returns:
        The records and their counts. The records file is written even if no record is left.

    Raises:
        UsageError: no judge, or a journal of other settings.
        EngineError: the engine failed; its answers so far are in the journal.
    """
    console, started = console or Console(quiet=True), time.monotonic()
    if not judges:
        raise UsageError("no judge: name at least one")
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise UsageError("the same judge is named twice: its vote would count twice")
    with Journal(journal_path(output), _journal_header(prompts, identity, settings)) as journal:
        answers_reused = sum(map(len, journal.answers.values()))
        _draw_answers(prompts, engine, settings, journal, console)
        numbered = [
            (index, k, Answer(prompt, text))
            for index, prompt in enumerate(prompts)
            for k, text in enumerate(journal.answers[index])
        ]
        for judge in judges:
            _collect_verdicts(judge, numbered, journal, console)
        answers = [journal.answers[index] for index in range(len(prompts))]
        records = []
        for index, prompt in enumerate(prompts):
            votes = [[journal.verdicts[name, index, k] for name in names] for k in range(len(answers[index]))]
            if (record := record_votes(prompt, answers[index], votes)) is not None:
                records.append(record)
        write_records(output, records)
    outcomes = {name: Counter(journal.verdicts[name, index, k].outcome for index, k, _ in numbered) for name in names}
    report = MineReport(
        output=str(output),
        prompts=len(prompts),
        answers=len(numbered),
        rejected=sum(len(set(record.rejected_responses)) for record in records),
        records=len(records),
        verdicts={name: {outcome: outcomes[name][outcome] for outcome in OUTCOMES} for name in names},
        answers_reused=answers_reused,
        seconds=time.monotonic() - started,
    )
    return Mined(report, records, answers)


def _journal_header(prompts: Sequence[Prompt], identity: str, settings: MineSettings) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    return {"model": identity, "prompts": digest, **asdict(settings)}


def _draw_answers(
    prompts: Sequence[Prompt],
    engine: Callable[[], Completer],
    settings: MineSettings,
    journal: Journal,
    console: Console,
) -> None:
    """Draw the answers that the journal lacks, batch by batch."""
    batch = max(1, BATCH_ANSWERS // settings.samples)  # prompts
    first = next((index for index in range(len(prompts)) if index not in journal.answers), len(prompts))
    if first == len(prompts):
        return
    first -= first % batch  # whole batches only: batch neighbours may change an answer's last digits
    with console.status("loading the model"):
        running = engine()
    try:
        with _progress(console) as progress:
            total = len(prompts) * settings.samples
            task = progress.add_task("answering", total=total, completed=first * settings.samples)
            for start in range(first, len(prompts), batch):
                indices = range(start, min(start + batch, len(prompts)))
                answers_before = start * settings.samples
                sampling = Sampling(
                    max_tokens=settings.max_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    seed=settings.seed + answers_before,
                )
                texts = running.complete_many(
                    [as_messages(prompts[index]) for index in indices for _ in range(settings.samples)],
                    sampling,
                    lambda done, before=answers_before: progress.update(task, completed=before + done),  # type: ignore[misc]
                )
                drawn = iter(text if text.strip() else "" for text in texts)
                journal.add_answers(
                    {index: list(dict.fromkeys(next(drawn) for _ in range(settings.samples))) for index in indices}
                )
    finally:
        running.close()


def _collect_verdicts(
    judge: Judge, numbered: Sequence[tuple[int, int, Answer]], journal: Journal, console: Console
) -> None:
    """Collect the verdicts that the journal lacks.

    Args:
        judge: who is asked.
        numbered: (number of the prompt, number of the answer, answer).
        journal: where verdicts go.
        console: where progress goes.
    """
    unjudged = [(index, k, answer) for index, k, answer in numbered if (judge.name, index, k) not in journal.verdicts]
    if not unjudged:
        return
    with _progress(console, hidden=judge.asks_person) as progress:
        task = progress.add_task(judge.name, total=len(numbered), completed=len(numbered) - len(unjudged))
        for i, verdict in judge.judge([answer for _, _, answer in unjudged]):
            index, k, _ = unjudged[i]
            journal.add_verdict(judge.name, index, k, verdict)
            progress.advance(task)


def _progress(console: Console, *, hidden: bool = False) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=console.quiet or hidden)
