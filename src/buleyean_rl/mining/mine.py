"""Mine rejections: a model answers, judges reject, what they rejected and accepted becomes records.

    prompts --engine--> answers --judges--> verdicts --votes--> records
                           \\____ journal ____/

The journal, beside the records, holds every answer and every verdict as they fall. Mining again with the
same settings resumes from it; with other judges it judges the same answers. A prompt that has no answer is counted
and left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from buleyean_rl.data.encode import tokenizer_hash
from buleyean_rl.data.records import Prompt, RejectionRecord, as_messages, format_record
from buleyean_rl.errors import EngineError, UsageError
from buleyean_rl.inference.progress import AnswerProgress
from buleyean_rl.inference.protocol import Answer as DrawnAnswer
from buleyean_rl.inference.protocol import Completer, Messages, Outcome, Sampling, ServerReport, Unanswered
from buleyean_rl.mining.journal import Journal, journal_path
from buleyean_rl.mining.judges import OUTCOMES, Answer, Judge
from buleyean_rl.mining.votes import record_votes
from buleyean_rl.system.outputs import check_output_file, open_output
from buleyean_rl.system.progress import ProgressBar, working
from buleyean_rl.system.wording import counted

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


@dataclass(frozen=True)
class Mined:
    """The result of mining.

    Args:
        report: its counts.
        records: of what was rejected, and of what was accepted where that is kept.
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
        accepted: answers that every judge accepted, kept as anchors.
        records: written, one per prompt with an answer that is kept.
        verdicts: per judge, how many answers it rejected, accepted and abstained from.
        answers_reused: distinct answers that the journal already had.
        unanswered: by cause, how many answers are missing.
        asked_again: how many of those the next mining asks for again.
        servers: what each of them did in this mining; none where the model ran in this process.
        seconds: of this mining alone.
    """

    output: str
    prompts: int
    answers: int
    rejected: int
    accepted: int
    records: int
    verdicts: dict[str, dict[str, int]]
    answers_reused: int
    unanswered: dict[str, int]
    asked_again: int
    servers: list[ServerReport]
    seconds: float

    def lines(self) -> list[str]:
        """The report for a person."""
        by_judge = (
            f"  {judge}: " + ", ".join(f"{number:,} {outcome}" for outcome, number in outcomes.items() if number)
            for judge, outcomes in self.verdicts.items()
        )
        reused = f", {self.answers_reused:,} of them from its journal" if self.answers_reused else ""
        anchors = f", {counted(self.accepted, 'accepted answer')} kept as anchors" if self.accepted else ""
        missing = ", ".join(f"{number:,} {cause}" for cause, number in self.unanswered.items())
        again = f"; the same command asks for {self.asked_again:,} of them again" if self.asked_again else ""
        return [
            f"{counted(self.prompts, 'prompt')}, {counted(self.answers, 'answer')}{reused}; "
            f"{self.rejected:,} rejected{anchors}: {counted(self.records, 'record')} in {self.output}",
            *by_judge,
            *([f"  without an answer: {missing}{again}"] if missing else []),
            *(_describe_server(server) for server in self.servers if len(self.servers) > 1),
        ]


def _describe_server(server: ServerReport) -> str:
    notes = [
        f"{counted(server.failures, 'attempt')} failed" if server.failures else "",
        f"{counted(server.passed_on, 'prompt')} went to others" if server.passed_on else "",
        f"given up: {server.given_up.removeprefix(f'{server.url}: ')}" if server.given_up else "",
    ]
    return "; ".join([f"  {server.url}: {counted(server.answers, 'answer')}", *filter(None, notes)])


def mine(
    prompts: Sequence[Prompt],
    engine: Callable[[], Completer],
    identity: str,
    judges: Sequence[Judge],
    output: Path,
    settings: MineSettings,
    *,
    policy: Mapping[str, str] | None = None,
    keep_accepted: bool = True,
    overwrite: bool = False,
    console: Console | None = None,
) -> Mined:
    """Draw answers, judge them and write the records of what was rejected and accepted.

    Args:
        prompts: distinct.
        engine: makes the engine, if an answer is missing.
        identity: of the engine's model: the journal of another one is refused.
        judges: at least one.
        output: the records file; the journal stands beside it.
        settings: how answers are drawn.
        policy: model and adapter, as the records name them; None for `identity`.
        keep_accepted: keep the answers that no judge rejected, as anchors.
        overwrite: replace a records file, and the journal of other settings.
        console: where progress goes; None for nowhere.

    Returns:
        The records and their counts. The records file is written even if no record is left.

    Raises:
        UsageError: no judge, a journal of other settings, or a file that would be replaced.
        EngineError: the engine failed, or gave no answer at all; its answers so far are in the journal.
    """
    console, started = console or Console(quiet=True), time.monotonic()
    if not judges:
        raise UsageError("no judge: name at least one")
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise UsageError("the same judge is named twice: its vote would count twice")
    file = journal_path(Path(os.path.realpath(output)))
    if not file.exists():
        check_output_file(output, overwrite=overwrite, streams=False)
    with Journal(file, _journal_header(prompts, identity, settings), overwrite=overwrite) as journal, _tell(console):
        check_output_file(output, overwrite=overwrite, is_ours=journal.has_written, streams=False)
        answers_reused = len(_distinct(prompts, settings, journal))
        failed, servers = _draw_answers(prompts, engine, settings, journal, console)
        answers = _distinct(prompts, settings, journal)
        refused = [outcome for outcome in journal.outcomes.values() if isinstance(outcome, Unanswered)]
        if not answers and (unanswered := [*refused, *failed]):
            raise EngineError(f"no prompt has an answer: {unanswered[0].cause}: {unanswered[0].detail}")
        for judge in judges:
            _collect_verdicts(judge, answers, journal, prompts, console)
        drawn_by = {**(policy or {"model": identity}), "temperature": settings.temperature, "top_p": settings.top_p}
        records = _make_records(prompts, answers, names, journal, drawn_by, keep_accepted)
        lines = b"".join(format_record(record).encode() + b"\n" for record in records)
        check_output_file(output, overwrite=overwrite, is_ours=journal.has_written, streams=False)
        journal.add_records(hashlib.sha256(lines).hexdigest())
        with open_output(output) as target:
            target.write(lines)
    outcomes = {name: Counter(journal.verdicts[name, *draw].outcome for draw in answers) for name in names}
    texts: list[list[str]] = [[] for _ in prompts]
    for (index, _), answer in answers.items():
        texts[index].append(answer.text)
    report = MineReport(
        output=str(output),
        prompts=len(prompts),
        answers=len(answers),
        rejected=sum(len(set(record.rejected_responses)) - record.count_answers()[1] for record in records),
        accepted=sum(record.count_answers()[1] for record in records),
        records=len(records),
        verdicts={name: {outcome: outcomes[name][outcome] for outcome in OUTCOMES} for name in names},
        answers_reused=answers_reused,
        unanswered=dict(Counter(outcome.cause for outcome in [*refused, *failed])),
        asked_again=len(failed),
        servers=servers,
        seconds=time.monotonic() - started,
    )
    return Mined(report, records, texts)


@contextmanager
def _tell(console: Console) -> Iterator[None]:
    """Tell somebody who stops mining that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("stopped: the same command goes on from here")
        raise


def _journal_header(prompts: Sequence[Prompt], identity: str, settings: MineSettings) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    return {"model": identity, "prompts": digest, **asdict(settings)}


def _distinct(
    prompts: Sequence[Prompt], settings: MineSettings, journal: Journal
) -> dict[tuple[int, int], DrawnAnswer]:
    """By the draw that came first, the distinct answers to each prompt."""
    distinct = {}
    for index in range(len(prompts)):
        texts = set()
        for sample in range(settings.samples):
            answer = journal.outcomes.get((index, sample))
            if isinstance(answer, DrawnAnswer) and answer.text not in texts:
                texts.add(answer.text)
                distinct[index, sample] = answer
    return distinct


def _draw_answers(
    prompts: Sequence[Prompt],
    engine: Callable[[], Completer],
    settings: MineSettings,
    journal: Journal,
    console: Console,
) -> tuple[list[Unanswered], list[ServerReport]]:
    """Draw the answers that the journal lacks, each written as it comes; returns the failures, and who drew them."""
    samples, total = settings.samples, len(prompts) * settings.samples
    missing = [draw for draw in range(total) if divmod(draw, samples) not in journal.outcomes]
    if not missing:
        return [], []
    failed: list[Unanswered] = []
    with working(console, "loading the model"):
        running = engine()
    try:
        journal.add_tokenizer(None if running.tokenizer is None else tokenizer_hash(running.tokenizer))
        sampling = Sampling(settings.max_tokens, settings.temperature, settings.top_p, settings.seed)
        windows = list(_windows(missing, total)) if running.is_batched else [missing]
        answers = sum(map(len, windows))
        bar = AnswerProgress(console, "answering", answers, settings.max_tokens, total - answers, running.servers)
        with closing(bar) as progress:
            for draws in windows:
                conversations = _Conversations(prompts, [draw // samples for draw in draws])
                seeds = [settings.seed + draw for draw in draws]
                for number, outcome in running.answers(conversations, sampling, seeds, progress.add_tokens):
                    progress.add_outcome(outcome)
                    index, sample = divmod(draws[number], samples)
                    if (index, sample) in journal.outcomes:
                        continue
                    if isinstance(outcome, Unanswered) and not outcome.is_permanent:
                        failed.append(outcome)
                    else:
                        journal.add_outcome(index, sample, _blank_as_empty(outcome))
    finally:
        running.close()
    for outcome in failed[:1]:
        console.print(f"{len(failed):,} without an answer, such as: {outcome.detail}", markup=False)
    return failed, list(running.servers)


class _Conversations(Sequence[Messages]):
    """Prompts as messages, each made when it is asked for: all of them would be as much again in memory."""

    def __init__(self, prompts: Sequence[Prompt], indices: Sequence[int]) -> None:
        self._prompts, self._indices = prompts, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return _Conversations(self._prompts, self._indices[number])
        return as_messages(self._prompts[self._indices[number]])


def _windows(missing: Sequence[int], total: int) -> Iterator[range]:
    """Whole windows in which some draws are missing: what is computed beside an answer may change its last digits."""
    for start in dict.fromkeys(draw - draw % WINDOW for draw in missing):
        yield range(start, min(start + WINDOW, total))


def _blank_as_empty(outcome: Outcome) -> Outcome:
    """An answer of nothing but space as the empty one."""
    is_blank = isinstance(outcome, DrawnAnswer) and not outcome.text.strip()
    return outcome._replace(text="", token_ids=None) if is_blank else outcome  # type: ignore[call-arg]


def _collect_verdicts(
    judge: Judge,
    answers: Mapping[tuple[int, int], DrawnAnswer],
    journal: Journal,
    prompts: Sequence[Prompt],
    console: Console,
) -> None:
    """Collect the verdicts that the journal lacks."""
    unjudged = [draw for draw in answers if (judge.name, *draw) not in journal.verdicts]
    if not unjudged:
        return
    done, total = len(answers) - len(unjudged), len(answers)
    with ProgressBar(Console(quiet=True) if judge.asks_person else console, judge.name, total, done) as progress:
        for i, verdict in judge.judge([Answer(prompts[draw[0]], answers[draw].text) for draw in unjudged]):
            journal.add_verdict(judge.name, *unjudged[i], verdict)
            done += 1
            progress.update(done, total, f"{done:,} of {total:,} answers")
    left = sum((judge.name, *draw) not in journal.verdicts for draw in unjudged)
    if left:
        raise EngineError(
            f"judge {judge.name} gave no verdict on {counted(left, 'answer')}: the same command asks for the rest again"
        )


def _make_records(
    prompts: Sequence[Prompt],
    answers: Mapping[tuple[int, int], DrawnAnswer],
    judges: Sequence[str],
    journal: Journal,
    policy: Mapping[str, Any],
    keep_accepted: bool,
) -> list[RejectionRecord]:
    """A record for each prompt with an answer that is kept."""
    by_prompt: dict[int, list[tuple[int, int]]] = {}
    for draw in answers:
        by_prompt.setdefault(draw[0], []).append(draw)
    records = []
    for index, draws in by_prompt.items():
        votes = [[journal.verdicts[name, *draw] for name in judges] for draw in draws]
        drawn = [answers[draw] for draw in draws]
        record = record_votes(
            prompts[index],
            drawn,
            votes,
            tokenizer=journal.tokenizer,
            policy=policy,
            keep_accepted=keep_accepted,
        )
        if record is not None:
            records.append(record)
    return records
