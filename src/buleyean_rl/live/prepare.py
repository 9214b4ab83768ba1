"""The process that makes the files of a target: it loads what the front must not wait for.

stdin: a query, as JSON; stdout: its target, or {"error"}.

    run     its base as GGUF, its adapter as GGUF, proven against the trained model
    model   the model as GGUF

What is made is kept in the cache, by the hashes of what it was made from.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from buleyean_rl.data.encode import tokenizer_hash
from buleyean_rl.errors import BuleyeanError, ModelError, UsageError
from buleyean_rl.gguf import write_adapter
from buleyean_rl.gguf.export import export
from buleyean_rl.live.target import Target, TargetQuery, file_target
from buleyean_rl.models.run_files import is_run
from buleyean_rl.models.run_folder import find_model
from buleyean_rl.models.source import Source, resolve
from buleyean_rl.models.weights import load_tokenizer
from buleyean_rl.system.cache import cache_key, evict_lru, make_cache_folder
from buleyean_rl.system.disk import full_disk
from buleyean_rl.system.module_process import take_stdout

FOLDER = "served"  # in the cache
MAX_CACHE_BYTES = 16 << 30
QUANT = "q8_0"  # of a base that is no GGUF
FORMAT = 1  # of the files: another when they are made otherwise


def prepare(query: TargetQuery) -> Target:
    """The target of a query.

    Raises:
        BuleyeanError: there is no such model, or it cannot be written as GGUF.
    """
    target = _find(query)
    if not query.tokenizer:
        return target
    try:
        return replace(target, tokenizer=tokenizer_hash(load_tokenizer(target.gguf)))
    except ModelError:  # a tokenizer that transformers does not know
        return target


def _find(query: TargetQuery) -> Target:
    name = os.path.expanduser(query.name)
    if Path(name).suffix == ".gguf" or os.path.isfile(name):
        return file_target(replace(query, name=name))
    if not is_run(name):
        whole = file_target(TargetQuery(_base_file(resolve(name)), query.lora))
        return replace(whole, base=Path(name).name, name=whole.name if query.lora else Path(name).name)
    if query.lora is not None:
        raise UsageError(f"--lora goes with a GGUF file, and {name} is a run, which has its adapter already")
    run = find_model(name)
    assert run.base is not None
    adapter = _cached(run, "adapter", lambda path: write_adapter(run, path))
    return Target(Path(name).resolve().name, Path(run.base.name).stem, _base_file(run.base), adapter)


def _base_file(source: Source) -> str:
    """The path of a base model as GGUF."""
    if source.gguf_path is not None:
        return str(source.gguf_path.absolute())
    return _cached(source, QUANT, lambda path: export(source.name, path, [QUANT]))


def _cached(source: Source, kind: str, make: Callable[[Path], object]) -> str:
    folder = make_cache_folder(FOLDER)
    path = folder / f"{cache_key([FORMAT, kind, source.fingerprint])}.gguf"
    try:
        os.utime(path)
    except FileNotFoundError:
        make(path)
        evict_lru(folder, MAX_CACHE_BYTES)
    return str(path)


def main() -> None:
    """Answer the one query on stdin."""
    out = take_stdout()
    try:
        reply = asdict(prepare(TargetQuery(**json.load(sys.stdin))))
    except BuleyeanError as error:
        reply = {"error": str(error), "usage": isinstance(error, UsageError)}
    except OSError as error:
        problem = "the disk is full" if full_disk(error) is not None else error.strerror or str(error)
        reply = {"error": f"{error.filename or 'a file'}: {problem}", "usage": False}
    print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
