"""A records file to training and held-out boundaries; for a ranking, with samples of the base model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from buleyean_rl.data.chat_template import TemplateRefusal
from buleyean_rl.data.encode import COUNT_LABELS, Encoder, describe_template
from buleyean_rl.data.records import (
    RejectionRecord,
    as_messages,
    fold_records,
    fold_stream,
    parse_record,
    read_records,
    read_rows,
    records_sha256,
    write_records,
)
from buleyean_rl.data.token_store import BoundaryFile, tokenise
from buleyean_rl.data.trie import Boundary
from buleyean_rl.errors import RecordError
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.model import Model
from buleyean_rl.system.cache import cache_folder
from buleyean_rl.system.progress import working
from buleyean_rl.system.wording import counted
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.own_samples import add_own_samples

OWN_SAMPLES_FILE = "with-own-samples.jsonl"
SAMPLE_BATCH = 32
MEASURED_RECORDS = 32  # enough for the gap


@dataclass(frozen=True)
class RecordsFile:
    """A records file.

    Args:
        path: of the file.
        sha256: of its content.
        skip_bad: skip malformed records instead of raising at the first.
    """

    path: Path
    sha256: str
    skip_bad: bool = False


@dataclass(frozen=True)
class Dataset:
    """The boundaries a run is trained and measured on.

    Args:
        sha256: of the records file.
        training: for training; each rejects something.
        held_out: for measuring only.
        anchors: accepted answers to other prompts.
        counts: of records read and dropped, of responses truncated, and what the encoder counted.
    """

    sha256: str
    training: BoundaryFile
    held_out: BoundaryFile
    anchors: BoundaryFile
    counts: dict[str, int]

    @property
    def measured_boundaries(self) -> Sequence[Boundary]:
        """The boundaries the objective is measured on: held-out ones, or without any some of the training ones."""
        return (self.held_out or self.training)[:MEASURED_RECORDS]

    def describe(self) -> str:
        """The numbers of records, and below them what was noticed in their text, a line each."""
        training, held_out = len(self.training), len(self.held_out)
        parts = [f"{counted(training, 'record')} to train on, {held_out:,} held out"]
        if anchors := int(self.anchors.accepted_answers.sum()):
            parts.append(f"{counted(anchors, 'accepted answer')} to other prompts as anchors")
        if self.counts["dropped"]:
            parts.append(f"{self.counts['dropped']:,} dropped")
        if self.counts["truncated_responses"]:
            parts.append(f"{counted(self.counts['truncated_responses'], 'response')} cut")
        return "\n".join(["; ".join(parts), *_describe_counts(self.counts)])


def load_dataset(records: RecordsFile, model: Model, config: BuleyeanConfig, console: Console) -> Dataset:
    """Read, tokenise and split a records file; for a ranking, add samples of the base model.

    Args:
        records: the file.
        model: the base model.
        config: the settings.
        console: for progress.

    Raises:
        RecordError: the records cannot be used.
        ModelError: the model cannot be used.
    """
    source = records
    for remark in describe_template(model.tokenizer):
        console.print(f"[yellow]note:[/] {escape(remark)}")
    if config.loss.is_listwise and config.own_samples:
        records = _add_own_samples(records, model, config, console)
    try:
        boundaries = _tokenise(records, model, config, console)
    except TemplateRefusal as refusal:
        raise _locate(refusal, source.path) from refusal
    rejecting = boundaries.select(np.flatnonzero(boundaries.rejected_answers))
    anchors = boundaries.select(np.flatnonzero(boundaries.rejected_answers == 0))
    training, held_out = split_records(len(rejecting), config.held_out, config.seed)
    return Dataset(records.sha256, rejecting.select(training), rejecting.select(held_out), anchors, boundaries.data)


def split_records(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a random share of some records from training.

    Args:
        count: number of records, at least one.
        share: of the records to hold out; at least one remains for training.
        seed: of the random choice.

    Returns:
        Ascending indices of the training records and of the held-out ones.
    """
    is_held_out = np.zeros(count, dtype=bool)
    is_held_out[random.Random(seed).sample(range(count), min(int(count * share), count - 1))] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _tokenise(records: RecordsFile, model: Model, config: BuleyeanConfig, console: Console) -> BoundaryFile:
    """The boundaries of the usable records, at least one of which rejects something."""
    # With skip_bad the cached tokens must not pass for those of a file without bad lines.
    source = f"{records.sha256} without bad lines" if records.skip_bad else records.sha256
    with config.processes.host_first(), working(console, "tokenising") as show:
        boundaries = tokenise(
            fold_stream(_read_unchanged(records), cache_folder()),  # a prompt is one trie
            source,
            model.tokenizer,
            config.max_length,
            max_rejected=config.max_rejected,
            skip_refused=records.skip_bad,
            progress=lambda count: show(counted(count, "record")),
        )
    if not boundaries:
        raise RecordError(_explain_nothing_left(boundaries.data, config.max_length), path=records.path)
    if not boundaries.rejected_answers.any():
        problem = f"nothing is rejected in its {counted(len(boundaries), 'record')}: training needs one rejected answer"
        raise RecordError(problem, path=records.path)
    if config.loss.is_listwise:
        return _select_rankable(boundaries, records.path)
    if not config.loss.uses_reference:  # without one there is nothing to anchor to
        return boundaries.select(np.flatnonzero(boundaries.rejected_answers))
    return boundaries


def _read_unchanged(records: RecordsFile) -> Iterator[RejectionRecord]:
    """The records, if at their end the file still is the one that names them in the cache: a log may be written to."""
    yield from read_records(records.path, skip_bad=records.skip_bad)
    if records_sha256(records.path) != records.sha256:
        raise RecordError("was changed while it was read: train on a copy that nobody writes to", path=records.path)


def _add_own_samples(records: RecordsFile, model: Model, config: BuleyeanConfig, console: Console) -> RecordsFile:
    """Write the records with samples of the base model added, in the run folder."""
    folder = Path(str(config.output_dir))
    file = folder / OWN_SAMPLES_FILE
    if config.processes.is_first and not file.exists():
        originals = fold_records(read_records(records.path, skip_bad=records.skip_bad))
        encoder = Encoder(model.tokenizer, config.max_length, skip_refused=True)
        prompts = encoder.encode_prompts([record.prompt for record in originals])
        fits = [encoder.has_room(prompt) for prompt in prompts]  # the others are dropped and counted later
        with working(console, f"loading {model.source.name}"):
            engine = TransformersEngine(model.module, model.tokenizer, batch=SAMPLE_BATCH)
        samples, seed = config.own_samples, config.seed
        extended = iter(add_own_samples(list(compress(originals, fits)), engine, samples, seed, console))
        pairs = zip(originals, fits, strict=True)
        write_records(file, (next(extended) if fit else record for record, fit in pairs))
    config.processes.receive(file, folder)
    return RecordsFile(file, records_sha256(file), records.skip_bad)


def _describe_counts(counts: Mapping[str, int]) -> list[str]:
    return [f"{label}: {counts[key]:,}" for key, label in COUNT_LABELS.items() if counts.get(key)]


def _explain_nothing_left(counts: Mapping[str, int], max_length: int) -> str:
    """Why no record can be trained on, by what the encoder counted."""
    problem = f"of {counted(counts['read'], 'record')}, none can be trained on"
    if counts.get("no_room") == counts["read"]:
        return f"{problem}: no prompt leaves room for a response in {max_length} tokens; raise --max-length"
    if counts.get("nothing_rejected") == counts["read"] and not counts["truncated_responses"]:
        return f"{problem}: every answer is empty, and an answer without a token cannot be rejected"
    return f"{problem}: {'; '.join(_describe_counts(counts))}"


def _locate(refusal: TemplateRefusal, path: Path) -> RecordError:
    """A template's refusal with the line of the record it is about."""
    for line, row in read_rows(path, skip_bad=True):
        with suppress(RecordError):
            if as_messages(parse_record(row).prompt) == refusal.messages:
                return RecordError(refusal.problem, path=path, line=line)
    return refusal


def _select_rankable(boundaries: BoundaryFile, path: Path) -> BoundaryFile:
    """Select records with at least two different answers, one of them rejected."""
    rejecting = boundaries.select(np.flatnonzero(boundaries.rejected_answers))
    indices = [index for index, boundary in enumerate(rejecting) if len(set(boundary.ends)) > 1]
    if not indices:
        raise RecordError("no record has two answers to rank: raise own_samples, or use another objective", path=path)
    return rejecting.select(np.array(indices))
