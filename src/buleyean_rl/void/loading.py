"""Load the models, and put the parts of the server together: what takes long, while the page is served already."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from buleyean_rl.data.encode import tokenizer_hash
from buleyean_rl.errors import BuleyeanError
from buleyean_rl.inference.open import describe_policy, engine_of
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.model import open_model
from buleyean_rl.models.source import Source
from buleyean_rl.void.answering import Answering
from buleyean_rl.void.files import ModelFiles
from buleyean_rl.void.importing import Importer
from buleyean_rl.void.models import BASE, Models, ServedModel
from buleyean_rl.void.services import Void
from buleyean_rl.void.store import Store
from buleyean_rl.void.timing import Timing, Timings
from buleyean_rl.void.trained import PutToUse, RunModels
from buleyean_rl.void.training import Training

RUNS, FILES = "runs", "files"  # in the folder
TIMED_TOKENS = 64


def load(model: str, source: Source, store: Store, opened: ExitStack, console: Console | None = None) -> Void:
    """Load the base model and what goes with it; what an earlier server left unfinished goes on.

    Args:
        model: the base model, as for `train`.
        source: of it.
        store: of the folder.
        opened: gets what is to be closed.
        console: where the base model says what it computes with, and runs that cannot be used; None for nowhere.

    Raises:
        BuleyeanError: the model cannot be loaded.
    """
    folder = store.database.path.parent
    base_model = open_model(source)
    engine = engine_of(base_model)
    if console is not None:
        console.print(escape(base_model.describe()))
    drawn = {"tokenizer": tokenizer_hash(engine.tokenizer)}
    base = ServedModel(BASE, engine, drawn | {"policy": describe_policy(source)})

    timings = Timings(store.settings, Timing.from_pass(_pass_seconds(engine)))
    training = Training(store, folder / RUNS, model, lambda run, _folder: put_to_use(run), timings)
    run_models = RunModels(base_model, source, training, drawn)
    models = Models(store, base, shown_name(model), run_models.open, run_models.problem)
    put_to_use = PutToUse(store, models)
    opened.callback(training.close)
    answering = Answering(store, models)
    opened.callback(answering.close)
    files = ModelFiles(folder / FILES, sum(weight.numel() for weight in engine.model.parameters()))
    opened.callback(files.close)
    importer = Importer(folder)
    opened.callback(importer.close)
    _open_pair(models, console)
    answering.begin()
    training.resume()
    training.warm_up()
    return Void(store, models, answering, training, files, importer)


def shown_name(model: str) -> str:
    """A model's name without a path of this machine."""
    return Path(model).name if Path(model).exists() else model


def _open_pair(models: Models, console: Console | None) -> None:
    """Open who answers now, rather than at the first question; say who cannot."""
    for key in models.pair:
        try:
            models.get(key)
        except BuleyeanError as error:
            if console is not None:
                console.print(f"[yellow]{key} cannot be used:[/] {escape(str(error))}")
            models.set_pair([BASE])
            return


def _pass_seconds(engine: TransformersEngine) -> float:
    """Seconds of a forward pass of 64 tokens, the quickest one: the first sets things up, others may be disturbed."""
    ids = (engine.tokenize("a " * TIMED_TOKENS) * TIMED_TOKENS)[:TIMED_TOKENS]
    took = []
    for _ in range(4):
        started = time.perf_counter()
        engine.logprobs([ids])
        took.append(time.perf_counter() - started)
    return min(took)
