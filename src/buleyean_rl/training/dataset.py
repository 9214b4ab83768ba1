"""Records to what is trained on: tokenised, split, with the base model's own samples where asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
from rich.console import Console

from buleyean_rl.data.encode import encode_prompts
from buleyean_rl.data.records import read_records, records_sha256, write_records
from buleyean_rl.data.token_store import BoundaryFile, tokenise
from buleyean_rl.data.trie import Boundary
from buleyean_rl.errors import RecordError
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.model import Model
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.own_samples import add_own_samples

OWN_SAMPLES = "with-own-samples.jsonl"
SAMPLE_BATCH = 32
MEASURED_RECORDS = 32  # enough to see a gap, few enough not to be waited for


@dataclass(frozen=True)
class RecordsFile:
    """A records file.

    Args:
        path: of the file.
        sha256: of its content.
        skip_bad: leave out malformed records instead of stopping at the first.
    """

    path: Path
    sha256: str
    skip_bad: bool = False


@dataclass(frozen=True)
class Dataset:
    """What a run is trained and measured on.

    Args:
        sha256: of the records file it was read from.
        training: to train on.
        held_out: to measure on only.
        counts: records read, dropped, and responses cut.
    """

    sha256: str
    training: BoundaryFile
    held_out: BoundaryFile
    counts: dict[str, int]

    @property
    def measured(self) -> Sequence[Boundary]:
        """What the objective is measured on: held-out records, or where there are none some of those trained on."""
        return (self.held_out or self.training)[:MEASURED_RECORDS]

    def describe(self) -> str:
        """How many records there are, in a line."""
        training, held_out = len(self.training), len(self.held_out)
        parts = [f"{training:,} record{'s' * (training != 1)} to train on, {held_out:,} held out"]
        if self.counts["dropped"]:
            parts.append(f"{self.counts['dropped']:,} dropped: no room for a response, or nothing in it")
        if self.counts["truncated_responses"]:
            parts.append(f"{self.counts['truncated_responses']:,} responses cut")
        return "; ".join(parts)


def load_dataset(records: RecordsFile, model: Model, config: BuleyeanConfig, console: Console) -> Dataset:
    """Read, tokenise and split a records file; for a ranking, with answers of the base model's own.

    Args:
        records: the file.
        model: the base model.
        config: the settings.
        console: where progress goes.

    Raises:
        RecordError: the records cannot be used.
        ModelError: the model cannot be used.
    """
    if config.loss.is_listwise and config.own_samples:
        records = _with_own_samples(records, model, config, console)
    boundaries = _tokenise(records, model, config, console)
    training, held_out = split(len(boundaries), config.held_out, config.seed)
    return Dataset(records.sha256, boundaries.select(training), boundaries.select(held_out), boundaries.data)


def split(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a random share of some records from training.

    Args:
        count: how many records there are; at least one.
        share: to hold out; at least one record is always left to train on.
        seed: decides which.

    Returns:
        The numbers of the records to train on and of those held out, each in ascending order.
    """
    chosen = np.zeros(count, dtype=bool)
    chosen[random.Random(seed).sample(range(count), min(int(count * share), count - 1))] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _tokenise(records: RecordsFile, model: Model, config: BuleyeanConfig, console: Console) -> BoundaryFile:
    """The records that can be trained on; at least one."""
    # A file that is good only without its bad lines must not count as good.
    source = f"{records.sha256} without bad lines" if records.skip_bad else records.sha256
    with console.status("tokenising") as status:
        boundaries = tokenise(
            read_records(records.path, skip_bad=records.skip_bad),
            source,
            model.tokenizer,
            config.max_length,
            progress=lambda count: status.update(f"tokenising: {count:,} records"),
        )
    if not boundaries:
        raise RecordError(
            f"none of the {boundaries.data['read']} records can be trained on: no prompt leaves room for a response in "
            f"{config.max_length} tokens; raise --max-length",
            path=records.path,
        )
    return _with_a_choice(boundaries, records.path) if config.loss.is_listwise else boundaries


def _with_own_samples(records: RecordsFile, model: Model, config: BuleyeanConfig, console: Console) -> RecordsFile:
    """The records with answers of the base model's own beside the rejected ones, in a file of the run folder."""
    file = Path(str(config.output_dir)) / OWN_SAMPLES
    if not file.exists():
        originals = list(read_records(records.path, skip_bad=records.skip_bad))
        prompts = encode_prompts(model.tokenizer, [record.prompt for record in originals])
        has_room = [len(prompt) < config.max_length for prompt in prompts]  # the others are dropped and counted later
        what = "drawing the base model's own answers"
        with console.status(f"loading {model.source.name}"):
            engine = TransformersEngine(model.module, model.tokenizer, batch=SAMPLE_BATCH)
        with console.status(what) as status:
            extended = iter(
                add_own_samples(
                    list(compress(originals, has_room)),
                    engine,
                    config.own_samples,
                    config.seed,
                    lambda done: status.update(f"{what}: {done:,}"),
                )
            )
        pairs = zip(originals, has_room, strict=True)
        write_records(file, (next(extended) if room else record for record, room in pairs))
    return RecordsFile(file, records_sha256(file))


def _with_a_choice(boundaries: BoundaryFile, path: Path) -> BoundaryFile:
    """The records with at least two different answers: one alone cannot be ranked."""
    places = [place for place, boundary in enumerate(boundaries) if len(set(boundary.ends)) > 1]
    if not places:
        raise RecordError("no record has two answers to rank: raise own_samples, or train another objective", path=path)
    return boundaries.select(np.array(places))
