"""Void walking: mine, train on everything rejected so far, measure, and again with the trained model.

    round 0     base --measure--> loop rate, drift
    round r     model r-1 --mine--> rejections --with earlier ones--> train the base --> model r --measure-->

Every round trains a new adapter on the base: the reference stays the same, so drift does not accumulate. A walk's
folder has all of its state; the same command resumes it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from buleyean_rl.data.records import Prompt, fold_records, read_records, write_records
from buleyean_rl.errors import UsageError
from buleyean_rl.evaluation.drift import find_moved_text, largest_kl, measure_drift
from buleyean_rl.evaluation.repetition import loop_rate
from buleyean_rl.inference.open import answers_key, describe_policy, is_endpoint
from buleyean_rl.inference.protocol import Completer
from buleyean_rl.mining.draws import MineSettings
from buleyean_rl.mining.judges import Judge
from buleyean_rl.mining.mine import Mined, mine
from buleyean_rl.mining.walk_engines import InProcess, RoundEngines
from buleyean_rl.mining.walk_report import Round, plot_walk, rounds_table
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.models.run_files import is_finished, is_run
from buleyean_rl.models.source import Source, resolve
from buleyean_rl.system.disk import name_full_disk
from buleyean_rl.system.files import read_json_object, write_json
from buleyean_rl.system.outputs import claim_folder
from buleyean_rl.system.progress import working
from buleyean_rl.system.wording import counted
from buleyean_rl.training.config import BuleyeanConfig, load_config
from buleyean_rl.training.run import train
from buleyean_rl.training.run_state import can_resume, clean_finished

WALK_FORMAT = 4  # of walk.json; in 3 the rounds did not say how many answers they were measured on
MAX_ENTROPY_CHANGE = 0.1  # of plain text, as a share of the base's; a round that exceeds it is the last
MIN_NEW_SHARE = 0.1  # of the first round's rejections; fewer change a new model only by chance


def walk(
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    model: str,
    folder: Path,
    judges: Sequence[Judge],
    configure: Callable[[Path], BuleyeanConfig],
    *,
    rounds: int = 3,
    settings: MineSettings | None = None,
    max_drift: float = 0.05,
    engines: RoundEngines | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Start or resume a walk.

    Args:
        prompts: to mine, without those in `held_out`.
        held_out: prompts to measure on.
        model: the base model.
        folder: of the walk.
        judges: of the answers.
        configure: run folder -> settings of its training.
        rounds: maximum number of rounds.
        settings: of the mining; None for greedy answers.
        max_drift: KL from the base on each kind of plain text, in nats per token; a round that exceeds it is the last.
        engines: that answer; None for transformers in this process.
        console: for progress; None for no output.

    Returns:
        The contents of `walk.json`.

    Raises:
        UsageError: no prompt to mine or to measure on; the folder has something else, a walk with other settings, or
            one that another process is at; or the model cannot be trained.
    """
    console, settings = console or Console(quiet=True), settings or MineSettings()
    if is_endpoint(model) or is_run(model):
        raise UsageError(f"{model} cannot be trained: give a base model, as for `buleyean train`")
    held_out_set = set(held_out)
    prompts = [prompt for prompt in prompts if prompt not in held_out_set]
    if not prompts:
        raise UsageError("every prompt is held out: there are none to mine")
    if not held_out:
        raise UsageError("no prompt is held out: there are none to measure on")
    current = _Walk(prompts, list(held_out), resolve(model), folder, judges, configure, settings, engines, console)
    with claim_folder(folder, _has_walk, "walk"), name_full_disk(folder):
        return _take_rounds(current, rounds, max_drift, console)


def _take_rounds(current: _Walk, rounds: int, max_drift: float, console: Console) -> dict[str, Any]:
    folder = current.folder
    current.open()
    if not current.rounds:
        current.measure(0, 0, 0)
    stop = reason_to_stop(current.rounds, max_drift)  # a walk that has ended stays so
    while stop is None and len(current.rounds) <= rounds:
        number = len(current.rounds)
        console.print(f"[bold]round {number}[/]")
        rejected = current.mine(number)
        stop = reason_not_to_train(current.rounds, rejected)
        if stop:
            break
        records = current.train(number)
        current.measure(number, rejected, records)
        stop = reason_to_stop(current.rounds, max_drift)
    current.close_engine()
    best = best_round(current.rounds, max_drift)
    current.write(stop, best)
    plot_walk(folder / "walk.png", current.rounds, max_drift)
    console.print(rounds_table(current.rounds))
    if stop:
        console.print(f"stopped after round {len(current.rounds) - 1}: {stop}")
    if best:
        run = escape(str(folder / str(current.rounds[best].run)))
        console.print(f"the best is round {best}: {run}", soft_wrap=True)
    return current.summary(stop, best)


def _has_walk(folder: Path) -> bool:
    return (folder / "walk.json").is_file() and "rounds" in _read_walk(folder / "walk.json")


def _read_walk(file: Path) -> dict[str, Any]:
    value = read_json_object(file)
    if value is None:
        raise UsageError(f"{file} is damaged: name another folder, or delete this one")
    return value


def _sha256(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def walk_config(file: Path | None, options: dict[str, Any]) -> Callable[[Path], BuleyeanConfig]:
    """Settings of a walk's training: the preset `loops`, overridden by a YAML file's, overridden by options.

    Args:
        file: see `config.load_config`.
        options: settings by name.

    Returns:
        Run folder -> its settings.
    """

    def configure(folder: Path) -> BuleyeanConfig:
        return load_config(file, folder, options, preset="loops")

    return configure


def reason_not_to_train(rounds: Sequence[Round], rejected: int) -> str | None:
    """Why a round has mined too few rejections to train on; None if it has enough.

    Args:
        rounds: the earlier ones, from the base on.
        rejected: number of newly rejected answers.
    """
    if not rejected:
        return "nothing was rejected any more"
    first = rounds[1].rejected if len(rounds) > 1 else 0
    if rejected < MIN_NEW_SHARE * first:
        return f"rejected answers: {rejected:,}, and {first:,} in the first round: too few to train another model"
    return None


def reason_to_stop(rounds: Sequence[Round], max_drift: float) -> str | None:
    """Why the last round should end the walk; None to continue.

    Args:
        rounds: from the base on.
        max_drift: KL, in nats per token.
    """
    if len(rounds) < 2:
        return None
    previous, last = rounds[-2], rounds[-1]
    if moved := find_moved_text(last.drift, max_drift, MAX_ENTROPY_CHANGE):
        return moved
    if last.rejection_rate > previous.rejection_rate:
        return "more held-out answers are rejected than in the round before"
    if last.rejection_rate == 0:
        return "none of the held-out answers is rejected any more"
    fewer_mined = len(rounds) == 2 or last.rejected < previous.rejected
    if last.rejection_rate == previous.rejection_rate and not fewer_mined:
        return "it did not improve"
    return None


def best_round(rounds: Sequence[Round], max_drift: float) -> int:
    """The round with the lowest rejection rate among those whose drift is within the limits; the later of equals."""
    within_limit = [r for r in rounds if find_moved_text(r.drift, max_drift, MAX_ENTROPY_CHANGE) is None]
    return min(within_limit, key=lambda r: (r.rejection_rate, -r.round)).round


@dataclass
class _Walk:
    """The state of a walk: its folder, its rounds, and one round's model in memory."""

    prompts: list[Prompt]
    held_out: list[Prompt]
    base: Source
    folder: Path
    judges: Sequence[Judge]
    configure: Callable[[Path], BuleyeanConfig]
    settings: MineSettings
    engines: RoundEngines | None
    console: Console

    def open(self) -> None:
        """Read the rounds of the same walk, or start one."""
        self.rounds: list[Round] = []
        self._engine: tuple[int, Completer] | None = None
        self._current: tuple[Source, Model] | None = None
        config = self.configure(self.folder / "run")
        # whose weights are loaded once, for all rounds and their training
        self._base_model = open_model(self.base, base_bits=config.base_bits)
        self._engines = self.engines or InProcess(self._find_model, self.settings.context, self.console)
        self.header = {
            "format": WALK_FORMAT,
            "model": answers_key(self.base, self._engines.kind),
            "prompts": len(self.prompts),
            "prompts_sha256": _sha256(self.prompts),
            "held_out": len(self.held_out),
            "held_out_sha256": _sha256(self.held_out),
            "judges": [judge.name for judge in self.judges],
            "mining": asdict(self.settings),
            "training": config.settings(),
        }
        file = self.folder / "walk.json"
        if file.exists():
            earlier = _read_walk(file)
            if earlier.get("format", 1) != WALK_FORMAT:
                raise UsageError(f"{self.folder} has a walk of another version of buleyean-rl: name another folder")
            expected = json.loads(json.dumps(self.header))
            differences = [name for name in expected if earlier.get(name) != expected[name]]
            if differences:
                raise UsageError(f"{self.folder} has a walk with another {', '.join(differences)}: name another folder")
            try:
                self.rounds = [Round.from_json(entry) for entry in earlier["rounds"]]
            except TypeError:
                raise UsageError(f"{file} is damaged: name another folder, or delete this one") from None
        else:
            self.write(None, 0)

    def write(self, stop: str | None, best: int) -> None:
        """Write `walk.json`."""
        write_json(self.folder / "walk.json", self.summary(stop, best))

    def summary(self, stop: str | None, best: int) -> dict[str, Any]:
        """The contents of `walk.json`."""
        return {**self.header, "rounds": [r.as_json() for r in self.rounds], "stopped": stop, "best": best}

    def mine(self, number: int) -> int:
        """Mine a round and write the records of all rounds so far; returns the number of new rejections."""
        folder = self._round_folder(number)
        with self._measure_time(number):
            mined = self._mine(self.prompts, number - 1, folder / "mined.jsonl", self.settings)
            self.console.print(f"{mined.report.rejected:,} of {counted(mined.report.answers, 'answer')} rejected")
            earlier = [self._round_folder(i) / "mined.jsonl" for i in range(1, number)]
            records = [*(record for path in earlier for record in read_records(path)), *mined.records]
            if mined.report.records:
                write_records(folder / "records.jsonl", fold_records(records))
        return mined.report.rejected

    def train(self, number: int) -> int:
        """Train a round's run; returns the number of its records."""
        folder = self._round_folder(number)
        with self._measure_time(number):
            if is_finished(folder / "run"):
                clean_finished(folder / "run")
            else:
                self._make_room()
                train(
                    folder / "records.jsonl",
                    self._base_model,
                    self.configure(folder / "run"),
                    resume=can_resume(folder / "run"),
                    console=self.console,
                )
        return sum(1 for _ in read_records(folder / "records.jsonl"))

    def measure(self, number: int, rejected: int, records: int) -> None:
        """Measure a round's model on the held-out prompts, and its drift."""
        folder = self._round_folder(number)
        with self._measure_time(number) as seconds:
            greedy = MineSettings(max_tokens=self.settings.max_tokens, context=self.settings.context)
            mined = self._mine(self.held_out, number, folder / "held-out.jsonl", greedy)
            self._make_room()
            with working(self.console, "measuring drift"):
                drift = measure_drift(self._find_model(self._source(number)))
            result = Round(
                round=number,
                loop_rate=loop_rate([answer for answers in mined.answers for answer in answers]),
                rejection_rate=mined.report.rejected / mined.report.answers,
                answers=mined.report.answers,
                records=records,
                rejected=rejected,
                seconds=seconds(),
                run=f"{folder.name}/run" if number else None,
                drift=drift,
            )
        self.rounds.append(result)
        self.write(None, 0)
        self.console.print(
            f"round {number}: {result.loop_rate:.1%} of the held-out answers loop, "
            f"KL from the base at most {largest_kl(drift):.3f} nats per token"
        )

    def _mine(self, prompts: Sequence[Prompt], number: int, output: Path, settings: MineSettings) -> Mined:
        return mine(
            prompts,
            lambda: _SharedEngine(self._open_engine(number)),
            answers_key(self._source(number), self._engines.kind),
            self.judges,
            output,
            settings,
            policy=describe_policy(self._source(number)),
            console=self.console,
        )

    def _open_engine(self, number: int) -> Completer:
        """A round's engine, opened once for mining and measuring."""
        if self._engine is None or self._engine[0] != number:
            self._make_room()
            engine = self._engines.open(self._source(number))
            self.close_engine()
            self._engine = number, engine
        return self._engine[1]

    def _find_model(self, source: Source) -> Model:
        """A round's model, which answers and is scored; all of them share the weights of the base."""
        if self._current is None or self._current[0] != source:
            self._current = source, self._base_model.with_source(source)
        return self._current[1]

    def _make_room(self) -> None:
        """Free the engine's memory, where it is needed for something else."""
        if not self._engines.stays:
            self.close_engine()

    def close_engine(self) -> None:
        """Close the engine."""
        if self._engine is not None:
            self._engine[1].close()
            self._engine = None

    def _source(self, number: int) -> Source:
        return self.base.with_adapter(self._round_folder(number) / "run") if number else self.base

    def _round_folder(self, number: int) -> Path:
        folder = self.folder / f"round-{number}"
        folder.mkdir(exist_ok=True)
        return folder

    @contextmanager
    def _measure_time(self, number: int) -> Iterator[Callable[[], float]]:
        """A clock of the seconds spent on a round, over all processes."""
        file, started = self._round_folder(number) / "seconds.json", time.monotonic()
        earlier_seconds = 0.0
        with suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: the round has less time
            earlier_seconds = float(json.loads(file.read_bytes())["seconds"])

        def seconds() -> float:
            return earlier_seconds + time.monotonic() - started

        try:
            yield seconds
        finally:
            write_json(file, {"seconds": seconds()})


class _SharedEngine:
    """An engine that `mine` does not close."""

    def __init__(self, engine: Completer) -> None:
        self.is_batched, self.tokenizer, self.answers = engine.is_batched, engine.tokenizer, engine.answers
        self.servers = engine.servers

    def close(self) -> None:
        """Do nothing: the engine is reused."""
