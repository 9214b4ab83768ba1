"""Void walking: mine, train on everything rejected so far, measure, and again with the trained model.

    round 0     base --measure--> loop rate, neutral text
    round r     model r-1 --mine--> rejections --with all before--> train the base --> model r --measure-->

Every round trains a fresh adapter on the base: its reference stays the model that was there first, so drift
does not add up. A walk's folder holds all of its state; the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from buleyean_rl import demo_data
from buleyean_rl.data.records import Prompt, accumulate_records, read_records, write_records
from buleyean_rl.errors import UsageError
from buleyean_rl.evaluation.repetition import loop_rate
from buleyean_rl.inference.open import answers_key, is_endpoint, open_engine
from buleyean_rl.inference.protocol import Engine, neutral_nll
from buleyean_rl.mining.judges import Judge
from buleyean_rl.mining.mine import Mined, MineSettings, mine
from buleyean_rl.mining.walk_report import Round, plot_walk, rounds_table
from buleyean_rl.models.run_folder import is_run
from buleyean_rl.models.source import Source, resolve
from buleyean_rl.system.files import write_json
from buleyean_rl.training.config import BuleyeanConfig, load_config
from buleyean_rl.training.run import train

ENGINE = "transformers"  # a round's model is an adapter on the base, and only there runs without an export
TRAINING = (  # settings that make another walk
    *("objective", "alpha", "tau", "learning_rate", "num_train_epochs", "max_steps", "adapter_scale"),
    *("per_device_train_batch_size", "lora_rank", "seed"),
)
MIN_NEW_SHARE = 0.1  # of the first round's rejections: with fewer, a model trained anew differs by chance


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
    max_drift: float = 0.02,
    console: Console | None = None,
) -> dict[str, Any]:
    """Walk, or go on with a walk.

    Args:
        prompts: to mine; those that are held out are left out.
        held_out: prompts to measure on.
        model: the base model.
        folder: of the walk.
        judges: who rejects.
        configure: a run folder -> the settings of its training.
        rounds: to be done in all.
        settings: how the mined answers are drawn; greedy if None.
        max_drift: nats per token that the neutral texts may lose; a round that exceeds it is the last.
        console: where progress goes; None for nowhere.

    Returns:
        What `walk.json` holds.

    Raises:
        UsageError: the folder holds a walk with other settings, or the model is not one that trains.
    """
    console, settings = console or Console(quiet=True), settings or MineSettings()
    if is_endpoint(model) or is_run(model):
        raise UsageError(f"{model} cannot be walked from: name a base model, as for `buleyean train`")
    unseen = set(held_out)
    prompts = [prompt for prompt in prompts if prompt not in unseen]
    if not prompts:
        raise UsageError("every prompt is held out: nothing is left to mine")
    state = _Walk(prompts, list(held_out), resolve(model), folder, judges, configure, settings, console)
    state.open()
    if not state.rounds:
        state.measure(0, 0, 0)
    stop = None
    while stop is None and len(state.rounds) <= rounds:
        number = len(state.rounds)
        console.print(f"[bold]round {number}[/]")
        rejected = state.mine(number)
        stop = reason_not_to_train(state.rounds, rejected)
        if stop:
            break
        records = state.train(number)
        state.measure(number, rejected, records)
        stop = reason_to_stop(state.rounds, max_drift)
    state.close_engine()
    best = best_round(state.rounds, max_drift)
    state.write(stop, best)
    plot_walk(folder / "walk.png", state.rounds, max_drift)
    console.print(rounds_table(state.rounds))
    if stop:
        console.print(f"stopped after round {len(state.rounds) - 1}: {stop}")
    if best:
        console.print(f"the best is round {best}: {folder / str(state.rounds[best].run)}")
    return state.summary(stop, best)


def walk_config(file: Path | None, options: dict[str, Any]) -> Callable[[Path], BuleyeanConfig]:
    """Settings of a walk's training: the preset `loops`, a YAML file's over it, and options over both.

    Args:
        file: as for `config.load_config`.
        options: settings by name.

    Returns:
        A run folder -> its settings.
    """

    def configure(folder: Path) -> BuleyeanConfig:
        return load_config(file, folder, options, preset="loops")

    return configure


def reason_not_to_train(rounds: Sequence[Round], rejected: int) -> str | None:
    """Why a round that mined so few rejections is not worth training; None if it is.

    Args:
        rounds: those done, from the base on.
        rejected: answers newly rejected.
    """
    if not rejected:
        return "nothing was rejected any more"
    first = rounds[1].rejected if len(rounds) > 1 else 0
    if rejected < MIN_NEW_SHARE * first:
        return f"{rejected} answers were rejected where the first round had {first}: too few to make another model"
    return None


def reason_to_stop(rounds: Sequence[Round], max_drift: float) -> str | None:
    """Why the last of some rounds should stay the last; None to go on.

    Args:
        rounds: from the base on.
        max_drift: nats per token.
    """
    if len(rounds) < 2:
        return None
    base, before, last = rounds[0], rounds[-2], rounds[-1]
    drift = last.drift(base)
    if drift > max_drift:
        return f"neutral text lost {drift:.3f} nats per token, more than {max_drift}"
    if last.rejection_rate > before.rejection_rate:
        return "more of the held-out answers are rejected than before it"
    if last.rejection_rate == 0:
        return "none of the held-out answers is rejected any more"
    fewer_mined = len(rounds) == 2 or last.rejected < before.rejected
    if last.rejection_rate == before.rejection_rate and not fewer_mined:
        return "it no longer helped"
    return None


def best_round(rounds: Sequence[Round], max_drift: float) -> int:
    """The round with the fewest rejections among those that did not drift too far; the later of equals."""
    fit = [r for r in rounds if r.drift(rounds[0]) <= max_drift]
    return min(fit, key=lambda r: (r.rejection_rate, -r.round)).round


@dataclass
class _Walk:
    """A walk: its folder, its rounds, and the model of one round in memory."""

    prompts: list[Prompt]
    held_out: list[Prompt]
    base: Source
    folder: Path
    judges: Sequence[Judge]
    configure: Callable[[Path], BuleyeanConfig]
    settings: MineSettings
    console: Console

    def open(self) -> None:
        """Read the rounds that are done, of the same walk."""
        self.rounds: list[Round] = []
        self._engine: tuple[int, Engine] | None = None
        config = self.configure(self.folder / "run")
        self.header = {
            "model": answers_key(self.base, ENGINE),
            "prompts": len(self.prompts),
            "held_out": len(self.held_out),
            "judges": [judge.name for judge in self.judges],
            "mining": asdict(self.settings),
            "training": {name: getattr(config, name) for name in TRAINING},
        }
        file = self.folder / "walk.json"
        if file.exists():
            earlier = json.loads(file.read_text(encoding="utf-8"))
            plain = json.loads(json.dumps(self.header))
            differing = [name for name in plain if earlier.get(name) != plain[name]]
            if differing:
                raise UsageError(f"{self.folder} holds a walk with another {', '.join(differing)}: name another folder")
            self.rounds = [Round(**entry) for entry in earlier["rounds"]]
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write(None, 0)

    def write(self, stop: str | None, best: int) -> None:
        """Write `walk.json`."""
        write_json(self.folder / "walk.json", self.summary(stop, best))

    def summary(self, stop: str | None, best: int) -> dict[str, Any]:
        """What `walk.json` holds."""
        return {**self.header, "rounds": [asdict(r) for r in self.rounds], "stopped": stop, "best": best}

    def mine(self, number: int) -> int:
        """This round's rejections, and with those before them the records to train on; how many are new."""
        folder = self._round(number)
        with self._clock(number):
            mined = self._mine(self.prompts, number - 1, folder / "mined.jsonl", self.settings)
            self.console.print(f"{mined.report.rejected:,} of {mined.report.answers:,} answers rejected")
            earlier = [self._round(i) / "mined.jsonl" for i in range(1, number)]
            records = [*(record for path in earlier for record in read_records(path)), *mined.records]
            if mined.records:
                write_records(folder / "records.jsonl", accumulate_records(records))
        return mined.report.rejected

    def train(self, number: int) -> int:
        """This round's run; how many records it was trained on."""
        folder = self._round(number)
        with self._clock(number):
            if not (folder / "run" / "run.json").exists():
                self.close_engine()
                train(
                    folder / "records.jsonl",
                    self.base,
                    self.configure(folder / "run"),
                    resume=(folder / "run" / "settings.json").exists(),
                    console=self.console,
                )
        return sum(1 for _ in read_records(folder / "records.jsonl"))

    def measure(self, number: int, rejected: int, records: int) -> None:
        """Round `number`'s model on the held-out prompts and the neutral texts."""
        folder = self._round(number)
        with self._clock(number) as clock:
            greedy = MineSettings(max_tokens=self.settings.max_tokens)
            mined = self._mine(self.held_out, number, folder / "held-out.jsonl", greedy)
            with self.console.status("reading neutral texts"):
                nats, tokens = neutral_nll(self._model(number), demo_data.neutral_texts())
            measured = Round(
                round=number,
                loop_rate=loop_rate([answer for answers in mined.answers for answer in answers]),
                rejection_rate=mined.report.rejected / mined.report.answers,
                neutral_nll=nats / tokens,
                records=records,
                rejected=rejected,
                seconds=clock(),
                run=f"{folder.name}/run" if number else None,
            )
        self.rounds.append(measured)
        self.write(None, 0)
        self.console.print(
            f"round {number}: {measured.loop_rate:.1%} of the held-out answers loop, "
            f"neutral text {measured.neutral_nll:.3f} nats per token"
        )

    def _mine(self, prompts: Sequence[Prompt], number: int, output: Path, settings: MineSettings) -> Mined:
        """Mine with the model of a round."""
        return mine(
            prompts,
            lambda: _Borrowed(self._model(number)),
            answers_key(self._source(number), ENGINE),
            self.judges,
            output,
            settings,
            console=self.console,
        )

    def _model(self, number: int) -> Engine:
        """A round's model, loaded once for measuring it and mining with it."""
        if self._engine is None or self._engine[0] != number:
            self.close_engine()
            self._engine = number, open_engine(self._source(number), ENGINE, self.console)
        return self._engine[1]

    def close_engine(self) -> None:
        """Free the model in memory."""
        if self._engine is not None:
            self._engine[1].close()
            self._engine = None

    def _source(self, number: int) -> Source:
        return self.base.with_adapter(self._round(number) / "run") if number else self.base

    def _round(self, number: int) -> Path:
        folder = self.folder / f"round-{number}"
        folder.mkdir(exist_ok=True)
        return folder

    @contextmanager
    def _clock(self, number: int) -> Iterator[Callable[[], float]]:
        """Seconds spent on a round so far, by every process that worked on it."""
        file, started = self._round(number) / "seconds.json", time.monotonic()
        before = json.loads(file.read_text())["seconds"] if file.exists() else 0.0

        def seconds() -> float:
            return before + time.monotonic() - started

        try:
            yield seconds
        finally:
            write_json(file, {"seconds": seconds()})


class _Borrowed:
    """An engine that stays open when its borrower closes it."""

    def __init__(self, engine: Engine) -> None:
        self.complete_many = engine.complete_many

    def close(self) -> None:
        """Does nothing: the engine is used again."""
