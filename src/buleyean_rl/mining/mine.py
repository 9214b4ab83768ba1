"""Mine rejections: a model answers, judges reject, what they rejected and accepted becomes records.

    prompts --engine--> answers --judges--> verdicts --votes--> records
                           \\____ journal ____/

Of several processes, which a launcher has started, each draws its share of the answers; the first has the journal,
judges, and writes. What they draw together is what one draws alone.

The journal, beside the records, holds every answer and every verdict as they fall. Mining again with the
same settings resumes from it; with other judges it judges the same answers. A prompt that has no answer is counted
and left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from buleyean_rl.data.records import Prompt, RejectionRecord, format_record, read_records
from buleyean_rl.errors import EngineError, UsageError
from buleyean_rl.inference.protocol import Completer, ServerReport, Unanswered
from buleyean_rl.mining.draws import MineSettings, draw_answers, find_distinct
from buleyean_rl.mining.journal import Journal, journal_path, read_answers
from buleyean_rl.mining.judges import OUTCOMES, Answer, Judge
from buleyean_rl.mining.votes import record_votes
from buleyean_rl.system.lazy import Lazy
from buleyean_rl.system.outputs import check_output_file, open_output
from buleyean_rl.system.progress import ProgressBar
from buleyean_rl.system.wording import counted
from buleyean_rl.training.processes import join


@dataclass(frozen=True)
class Mined:
    """The result of mining, which is in two files.

    Args:
        report: its counts.
    """

    report: MineReport

    @property
    def records(self) -> list[RejectionRecord]:
        """Of what was rejected, and of what was accepted where that is kept; read from the records file."""
        return list(read_records(self.report.output)) if self.report.records else []

    @property
    def answers(self) -> list[list[str]]:
        """Per prompt, the distinct answers; read from the journal."""
        return read_answers(_journal_of(Path(self.report.output)), self.report.prompts)


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

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MineReport:
        """What `asdict` gave."""
        return cls(**{**value, "servers": [ServerReport(**server) for server in value["servers"]]})

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
    console = console or Console(quiet=True)
    if not judges:
        raise UsageError("no judge: name at least one")
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise UsageError("the same judge is named twice: its vote would count twice")
    drawn_by = {**(policy or {"model": identity}), "temperature": settings.temperature, "top_p": settings.top_p}
    header = _journal_header(prompts, identity, settings)
    with join() as processes:
        processes.check_same("prompts and settings", header)
        draw = partial(draw_answers, prompts, engine, settings, processes=processes)
        if processes.is_first:
            report = _mine(prompts, draw, header, judges, output, settings, drawn_by, keep_accepted, overwrite, console)
            processes.once(lambda: asdict(report))
        else:
            draw(None, Console(quiet=True))
            report = MineReport.from_json(processes.once(dict))
    return Mined(report)


def _mine(
    prompts: Sequence[Prompt],
    draw: Callable[[Journal, Console], tuple[list[Unanswered], list[ServerReport]]],
    header: Mapping[str, Any],
    judges: Sequence[Judge],
    output: Path,
    settings: MineSettings,
    drawn_by: Mapping[str, Any],
    keep_accepted: bool,
    overwrite: bool,
    console: Console,
) -> MineReport:
    """See `mine`; in the first process, or the only one."""
    started, names, file = time.monotonic(), [judge.name for judge in judges], _journal_of(output)
    if not file.exists():
        check_output_file(output, overwrite=overwrite, streams=False)
    with Journal(file, header, overwrite=overwrite) as journal:
        check_output_file(output, overwrite=overwrite, is_ours=journal.has_written, streams=False)
        answers_reused = len(find_distinct(len(prompts), settings, journal))
        failed, servers = draw(journal, console)
        draws = find_distinct(len(prompts), settings, journal)
        if not draws and (unanswered := [*journal.unanswered.values(), *failed]):
            raise EngineError(f"no prompt has an answer: {unanswered[0].cause}: {unanswered[0].detail}")
        for judge in judges:
            _collect_verdicts(judge, draws, journal, prompts, settings, console)
        check_output_file(output, overwrite=overwrite, is_ours=journal.has_written, streams=False)
        counts, verdicts = Counter[str](), {name: dict.fromkeys(OUTCOMES, 0) for name in names}
        with open_output(output) as target:
            digest = hashlib.sha256()
            for record in _make_records(prompts, draws, journal, settings, verdicts, drawn_by, keep_accepted):
                line = format_record(record).encode() + b"\n"
                digest.update(line)
                target.write(line)
                accepted = record.count_answers()[1]
                counts["records"] += 1
                counts["accepted"] += accepted
                counts["rejected"] += len(set(record.rejected_responses)) - accepted
            journal.add_records(digest.hexdigest())  # before the file takes its name
        causes = Counter(outcome.cause for outcome in [*journal.unanswered.values(), *failed])
    return MineReport(
        output=str(output),
        prompts=len(prompts),
        answers=len(draws),
        rejected=counts["rejected"],
        accepted=counts["accepted"],
        records=counts["records"],
        verdicts=verdicts,
        answers_reused=answers_reused,
        unanswered=dict(causes),
        asked_again=len(failed),
        servers=servers,
        seconds=time.monotonic() - started,
    )


def _journal_of(output: Path) -> Path:
    return journal_path(Path(os.path.realpath(output)))


def _journal_header(prompts: Sequence[Prompt], identity: str, settings: MineSettings) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    return {"model": identity, "prompts": digest, **asdict(settings)}


def _collect_verdicts(
    judge: Judge,
    draws: Sequence[int],
    journal: Journal,
    prompts: Sequence[Prompt],
    settings: MineSettings,
    console: Console,
) -> None:
    """Collect the verdicts that the journal lacks."""
    verdicts = journal.verdicts_of(judge.name)
    unjudged = array("q", (draw for draw in draws if draw not in verdicts))
    if not unjudged:
        return

    def find_answer(number: int) -> Answer:
        draw = unjudged[number]
        return Answer(prompts[draw // settings.samples], journal.answers[draw].text)

    done, total = len(draws) - len(unjudged), len(draws)
    with ProgressBar(Console(quiet=True) if judge.asks_person else console, judge.name, total, done) as progress:
        for number, verdict in judge.judge(Lazy(len(unjudged), find_answer)):
            journal.add_verdict(judge.name, unjudged[number], verdict)
            done += 1
            progress.update(done, total, f"{done:,} of {total:,} answers")
    left = sum(draw not in verdicts for draw in unjudged)
    if left:
        raise EngineError(
            f"judge {judge.name} gave no verdict on {counted(left, 'answer')}: the same command asks for the rest again"
        )


def _make_records(
    prompts: Sequence[Prompt],
    draws: Sequence[int],
    journal: Journal,
    settings: MineSettings,
    verdicts: Mapping[str, dict[str, int]],
    policy: Mapping[str, Any],
    keep_accepted: bool,
) -> Iterator[RejectionRecord]:
    """A record for each prompt with an answer that is kept; the judges' verdicts are counted."""
    for index, group in groupby(draws, key=lambda draw: draw // settings.samples):
        prompt_draws = list(group)
        votes = [[journal.verdicts_of(name)[draw] for name in verdicts] for draw in prompt_draws]
        for row in votes:
            for name, verdict in zip(verdicts, row, strict=True):
                verdicts[name][verdict.outcome] += 1
        record = record_votes(
            prompts[index],
            [journal.answers[draw] for draw in prompt_draws],
            votes,
            tokenizer=journal.tokenizer,
            policy=policy,
            keep_accepted=keep_accepted,
        )
        if record is not None:
            yield record
