"""Records to what is trained on: tokenised, split, with the base model's own samples where asked."""

from __future__ import annotations

import random
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from buleyean_rl.data.encode import encode_prompts
from buleyean_rl.data.records import read_records, write_records
from buleyean_rl.data.token_store import BoundaryFile, tokenise
from buleyean_rl.errors import RecordError
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.own_samples import add_own_samples

OWN_SAMPLES = "with-own-samples.jsonl"
SAMPLED_AT_ONCE = 32


def split(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep a random share of some records from training.

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


def _boundaries(
    path: Path, sha256: str, skip_bad: bool, tokenizer: Any, config: BuleyeanConfig, console: Console
) -> BoundaryFile:
    """The records that can be trained on, tokenised; at least one."""
    # A file that is good only without its bad lines must not count as good.
    source = f"{sha256} without bad lines" if skip_bad else sha256
    with console.status("tokenising") as status:
        boundaries = tokenise(
            read_records(path, skip_bad=skip_bad),
            source,
            tokenizer,
            config.max_length,
            progress=lambda count: status.update(f"tokenising: {count:,} records"),
        )
    if not boundaries:
        raise RecordError(
            f"none of the {boundaries.data['read']} records can be trained on: no prompt leaves room for a response in "
            f"{config.max_length} tokens; raise --max-length",
            path=path,
        )
    return _with_a_choice(boundaries, path) if config.loss.is_listwise else boundaries


def _add_own_samples(
    path: Path,
    folder: Path,
    skip_bad: bool,
    base: Any,
    tokenizer: Any,
    config: BuleyeanConfig,
    console: Console,
) -> Path:
    """The records with answers of the base model's own beside the rejected ones, in a file of the run folder."""
    file = folder / OWN_SAMPLES
    if not file.exists():
        records = list(read_records(path, skip_bad=skip_bad))
        prompts = encode_prompts(tokenizer, [record.prompt for record in records])
        fits = [len(prompt) < config.max_length for prompt in prompts]  # the others are dropped, and said to be
        engine = TransformersEngine(base, tokenizer, batch=SAMPLED_AT_ONCE)
        with console.status("drawing the base model's own answers") as status:
            grown = iter(
                add_own_samples(
                    list(compress(records, fits)),
                    engine,
                    config.own_samples,
                    config.seed,
                    lambda done: status.update(f"drawing the base model's own answers: {done:,}"),
                )
            )
        write_records(file, (next(grown) if fit else record for record, fit in zip(records, fits, strict=True)))
    return file


def _with_a_choice(boundaries: BoundaryFile, path: Path) -> BoundaryFile:
    """The records with at least two different answers: one alone cannot be ranked."""
    places = [place for place, boundary in enumerate(boundaries) if len(set(boundary.ends)) > 1]
    if not places:
        raise RecordError("no record has two answers to rank: raise own_samples, or train another objective", path=path)
    return boundaries.select(np.array(places))
