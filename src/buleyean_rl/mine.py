"""Make rejections: let a model answer, judge the answers, keep what was wrong with them.

    prompts --engine--> answers --judges--> verdicts --votes--> records
                           \\____ journal ____/

The journal, beside the records, holds every answer and every verdict as they fall. Mining again with the
same settings goes on from it, with other judges it judges the same answers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from buleyean_rl.cache import kept
from buleyean_rl.engines import Completer, Sampling
from buleyean_rl.errors import RecordError, UsageError
from buleyean_rl.evaluate import is_looping, repeated_spans
from buleyean_rl.judges import Answer, Judge, Verdict
from buleyean_rl.records import (
    Prompt,
    RejectionRecord,
    Spans,
    as_messages,
    decode_json,
    make_record,
    parse_prompt,
    pick,
    read_rows,
    reject_row,
    write_records,
)

ROUNDS = 60  # a verdict that is certain: of T = 60 rounds every one rejects, and 1/61 of the weight is left
OWN_TOKENS = 256  # most of a sample that is only there to be ranked
BATCH = 64  # answers asked for at once: what killing the command may lose


@dataclass(frozen=True)
class MineSettings:
    """How answers are drawn.

    Args:
        samples: answers to each prompt.
        max_tokens: of an answer.
        temperature: 0 takes the likeliest token every time, which is one answer.
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
    """What mining found.

    Args:
        report: in numbers.
        records: of what was rejected.
        answers: per prompt, the distinct answers.
    """

    report: MineReport
    records: list[RejectionRecord]
    answers: list[list[str]]


@dataclass(frozen=True)
class MineReport:
    """What mining did.

    Args:
        output: the records file.
        prompts: how many were asked.
        answers: distinct answers to them.
        rejected: answers that some judge rejected.
        records: written, one per prompt with a rejected answer.
        verdicts: per judge, how many answers it rejected, accepted and abstained from.
        answers_kept: answers that an earlier mining had already drawn.
        seconds: spent now.
    """

    output: str
    prompts: int
    answers: int
    rejected: int
    records: int
    verdicts: dict[str, dict[str, int]]
    answers_kept: int
    seconds: float

    def lines(self) -> list[str]:
        """The report for a person."""
        by_judge = (
            f"  {judge}: " + ", ".join(f"{number:,} {said}" for said, number in said_of.items() if number)
            for judge, said_of in self.verdicts.items()
        )
        kept = f", {self.answers_kept:,} of them kept from before" if self.answers_kept else ""
        return [
            f"{self.prompts:,} prompts, {self.answers:,} answers{kept}; {self.rejected:,} rejected: "
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
    """Ask, judge and write the records of what was rejected.

    Args:
        prompts: distinct.
        engine: makes the engine, if there is still something to ask.
        identity: of the engine's model: the journal of another one is refused.
        judges: at least one.
        output: the records file; the journal stands beside it.
        settings: how answers are drawn.
        console: where progress goes; None for nowhere.

    Returns:
        What was found. The records file is written even if it is left without a record.

    Raises:
        UsageError: no judge, or a journal of other settings.
        EngineError: the engine failed; what it had answered is kept.
    """
    console, started = console or Console(quiet=True), time.monotonic()
    if not judges:
        raise UsageError("no judge: name at least one")
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise UsageError("the same judge is named twice: its vote would count twice")
    with Journal(journal_path(output), _header(prompts, identity, settings)) as journal:
        kept = sum(map(len, journal.answers.values()))
        _answer(prompts, engine, settings, journal, console)
        asked = [
            (index, k, Answer(prompt, text))
            for index, prompt in enumerate(prompts)
            for k, text in enumerate(journal.answers[index])
        ]
        for judge in judges:
            _judge(judge, asked, journal, console)
        records = []
        for index, prompt in enumerate(prompts):
            answers = journal.answers[index]
            votes = [[journal.verdicts[name, index, k] for name in names] for k in range(len(answers))]
            if (record := record_votes(prompt, answers, votes)) is not None:
                records.append(record)
        write_records(output, records)
        said = {name: Counter(_said(journal.verdicts[name, index, k]) for index, k, _ in asked) for name in names}
        answers_of = [journal.answers[index] for index in range(len(prompts))]
    report = MineReport(
        output=str(output),
        prompts=len(prompts),
        answers=len(asked),
        rejected=sum(len(set(record.rejected_responses)) for record in records),
        records=len(records),
        verdicts={name: {key: said[name][key] for key in ("rejected", "accepted", "abstained")} for name in names},
        answers_kept=kept,
        seconds=time.monotonic() - started,
    )
    return Mined(report, records, answers_of)


def record_votes(prompt: Prompt, answers: Sequence[str], votes: Sequence[Sequence[Verdict]]) -> RejectionRecord | None:
    """The record of several judges' verdicts on the answers to one prompt.

    All judges together are `ROUNDS` rounds: where two of three reject, 40 of 60 do. A judge that abstains has
    no rounds. Judges that reject other parts of an answer each have their own share of the rounds on it.

    Args:
        prompt: what was asked.
        answers: distinct.
        votes: per answer, one verdict of every judge.

    Returns:
        The record, or None where nothing was rejected.
    """
    texts: list[str] = []
    counts: list[int] = []
    spans: list[Spans] = []
    for text, verdicts in zip(answers, votes, strict=True):
        voters = sum(verdict.rejected is not None for verdict in verdicts)
        parts = Counter(verdict.spans for verdict in verdicts if verdict.rejected)
        for part, judges in parts.items():
            texts.append(text)
            counts.append(max(1, round(ROUNDS * judges / voters)))
            spans.append(part)
    if not texts:
        return None
    raw_prompt = prompt if isinstance(prompt, str) else as_messages(prompt)
    return make_record(raw_prompt, texts, counts, ROUNDS, spans)


def reject_loops(prompts: Sequence[str], answers: Sequence[str]) -> list[RejectionRecord]:
    """One record for every answer that loops; what is rejected are the repeats, not the rest of it."""
    return [
        make_record(prompt, [answer], [ROUNDS], ROUNDS, [repeated_spans(answer)])
        for prompt, answer in zip(prompts, answers, strict=True)
        if is_looping(answer)
    ]


def cached_answers(
    engine: Callable[[], Completer],
    fingerprint: str,
    prompts: Sequence[str],
    max_tokens: int,
    on_done: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy answers to prompts, read from the cache if this model has given them before.

    Args:
        engine: makes the engine, if it is needed.
        fingerprint: of the engine and its model, see `models.fingerprint`.
        prompts: one single-turn conversation each.
        max_tokens: of an answer.
        on_done: called with how many are answered.
    """

    def ask() -> dict[str, Any]:
        running = engine()
        try:
            conversations = [as_messages(prompt) for prompt in prompts]
            return {"answers": running.complete_many(conversations, Sampling(max_tokens=max_tokens), on_done)}
        finally:
            running.close()

    return list(kept("answers", [fingerprint, max_tokens, list(prompts)], ask)["answers"])


def add_own_samples(
    records: Sequence[RejectionRecord],
    engine: Completer,
    samples: int,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> list[RejectionRecord]:
    """Put answers of the model's own, never rejected, beside the rejected ones.

    Args:
        records: what was rejected.
        engine: of the base model.
        samples: for each prompt; those that are blank or stand there already are left out.
        seed: same seed, same answers.
        on_done: called with how many are drawn.

    Returns:
        The records, each with up to `samples` answers more, at count 0.
    """
    conversations = [as_messages(record.prompt) for record in records for _ in range(samples)]
    drawn = engine.complete_many(conversations, Sampling(OWN_TOKENS, temperature=1.0, top_p=1.0, seed=seed), on_done)
    return [
        _with_samples(record, drawn[place * samples : (place + 1) * samples]) for place, record in enumerate(records)
    ]


def _with_samples(record: RejectionRecord, drawn: Sequence[str]) -> RejectionRecord:
    own = [text for text in dict.fromkeys(drawn) if text.strip() and text not in record.rejected_responses]
    return replace(
        record,
        rejected_responses=(*record.rejected_responses, *own),
        rejection_counts=(*record.rejection_counts, *(0 for _ in own)),
        rejected_spans=(*record.rejected_spans, *(() for _ in own)),
    )


def read_prompts(path: Path) -> list[Prompt]:
    """The distinct prompts of a file: a line each, or a JSON object with `prompt` or `messages` a line.

    Args:
        path: `.jsonl` for objects, anything else for lines.

    Raises:
        RecordError: it cannot be read, or holds no prompt.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        found = []
        for line, row in read_rows(path):
            try:
                found.append(parse_prompt(pick(row, "prompt", "messages")))
            except RecordError as error:
                reject_row(error, path, line, False)
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecordError("is not UTF-8 text: convert the file to UTF-8", path=path) from error
        except OSError as error:
            raise RecordError(f"cannot be read: {error.strerror or error}", path=path) from error
        found = [parse_prompt(line.strip()) for line in text.splitlines() if line.strip()]
    if not found:
        raise RecordError("holds no prompt: give one a line", path=path)
    return list(dict.fromkeys(found))


def journal_path(output: Path) -> Path:
    """Where the journal of a records file stands."""
    return output.with_name(f"{output.stem}.mined.jsonl")


class Journal:
    """Answers and verdicts on disk, a JSON line each; nobody else may write it meanwhile.

    Args:
        path: the file; an earlier one is read first, without the half line that killing may leave.
        header: what the answers depend on.

    Raises:
        UsageError: an earlier journal has another header, or another process writes it.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.answers: dict[int, list[str]] = {}
        self.verdicts: dict[tuple[str, int, int], Verdict] = {}
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UsageError(f"{path} is being written by another process: wait for it, or stop it") from None
        try:
            self._read(header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add_answers(self, answers: Mapping[int, list[str]]) -> None:
        """Keep the answers to some prompts, all of them or none."""
        self._write([{"prompt": index, "answers": texts} for index, texts in answers.items()])
        self.answers |= answers

    def add_verdict(self, judge: str, index: int, k: int, verdict: Verdict) -> None:
        """Keep what a judge says of a prompt's k-th answer."""
        self._write([{"judge": judge, "prompt": index, "answer": k, **asdict(verdict)}])
        self.verdicts[judge, index, k] = verdict

    def _read(self, header: Mapping[str, Any]) -> None:
        self._file.seek(0)
        whole = 0
        for raw in self._file:
            if not raw.endswith(b"\n"):
                break
            row: Any = decode_json(raw)
            if whole == 0:
                differing = [name for name in header if row.get(name) != header[name]]
                if differing:
                    raise UsageError(
                        f"{self.path} was mined with another {', '.join(differing)}: name another output, or delete it"
                    )
            elif "answers" in row:
                self.answers[row["prompt"]] = row["answers"]
            else:
                spans = tuple((start, end) for start, end in row["spans"])
                verdict = Verdict(row["rejected"], spans, row["reason"])
                self.verdicts[row["judge"], row["prompt"], row["answer"]] = verdict
            whole += len(raw)
        self._file.truncate(whole)
        if whole == 0:
            self._write([header])

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file.flush()  # from here on killing the process loses nothing


def _header(prompts: Sequence[Prompt], identity: str, settings: MineSettings) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    return {"model": identity, "prompts": digest, **asdict(settings)}


def _answer(
    prompts: Sequence[Prompt],
    engine: Callable[[], Completer],
    settings: MineSettings,
    journal: Journal,
    console: Console,
) -> None:
    """Draw the answers that the journal lacks, batch by batch."""
    size = max(1, BATCH // settings.samples)
    first = next((index for index in range(len(prompts)) if index not in journal.answers), len(prompts))
    if first == len(prompts):
        return
    first -= first % size  # a batch is whole or not there: neighbours may change an answer's last digits
    with console.status("loading the model"):
        running = engine()
    try:
        with _progress(console) as progress:
            total = len(prompts) * settings.samples
            task = progress.add_task("answering", total=total, completed=first * settings.samples)
            for start in range(first, len(prompts), size):
                indices = range(start, min(start + size, len(prompts)))
                begun = start * settings.samples
                sampling = Sampling(
                    max_tokens=settings.max_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    seed=settings.seed + begun,
                )
                texts = running.complete_many(
                    [as_messages(prompts[index]) for index in indices for _ in range(settings.samples)],
                    sampling,
                    lambda done, begun=begun: progress.update(task, completed=begun + done),  # type: ignore[misc]
                )
                drawn = iter(text if text.strip() else "" for text in texts)
                journal.add_answers(
                    {index: list(dict.fromkeys(next(drawn) for _ in range(settings.samples))) for index in indices}
                )
    finally:
        running.close()


def _judge(judge: Judge, asked: Sequence[tuple[int, int, Answer]], journal: Journal, console: Console) -> None:
    """Have the verdicts given that the journal lacks."""
    left = [(index, k, answer) for index, k, answer in asked if (judge.name, index, k) not in journal.verdicts]
    if not left:
        return
    with _progress(console, hidden=judge.asks_person) as progress:
        task = progress.add_task(judge.name, total=len(asked), completed=len(asked) - len(left))
        for i, verdict in judge.judge([answer for _, _, answer in left]):
            journal.add_verdict(judge.name, *left[i][:2], verdict)
            progress.advance(task)


def _progress(console: Console, *, hidden: bool = False) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=console.quiet or hidden)


def _said(verdict: Verdict) -> str:
    return "abstained" if verdict.rejected is None else "rejected" if verdict.rejected else "accepted"
