"""Architectures this package has no row for, through llama.cpp's own converter, behind the same gate.

    run --PEFT--> merged model --convert_hf_to_gguf.py--> F32 file --numbers against the model--> Blueprint

The converter comes from a checkout that LLAMA_CPP_DIR names; nothing is fetched. Its file is proven in full
precision, against the model in memory; what is quantised from it is then checked against it, tensor by tensor.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from buleyean_rl.errors import ExportError
from buleyean_rl.gguf.blueprint import Blueprint, as_set, of_file
from buleyean_rl.gguf.parity import CONTEXT, TOLERANCE, compare, reading
from buleyean_rl.inference.gguf_engines import DEFAULT, open_gguf
from buleyean_rl.models.run_folder import is_run, merge_run
from buleyean_rl.models.weights import load_base, load_tokenizer

VARIABLE = "LLAMA_CPP_DIR"
_SCRIPT = "convert_hf_to_gguf.py"


def checkout() -> Path | None:
    """The converter of the checkout the user named; None where none was named.

    Raises:
        ExportError: it is not there.
    """
    if not (folder := os.environ.get(VARIABLE)):
        return None
    script = Path(folder) / _SCRIPT
    if not script.is_file():
        raise ExportError(f"{VARIABLE}={folder}: has no {_SCRIPT}; name a checkout of llama.cpp")
    return script


@contextmanager
def converted(name: str, script: Path, folder: Path, engine: str = DEFAULT) -> Iterator[Blueprint]:
    """The file llama.cpp's converter makes of a run or model, proven; gone when the block ends.

    Args:
        name: a run folder, or what `models.resolve` takes. The model is merged in memory.
        script: the converter.
        folder: where there is room for the model twice.
        engine: what the file is proven in, one of `engines.ENGINES`.

    Raises:
        ExportError: the converter failed; with its last words.
        ParityError: its file does not behave like the model.
    """
    if is_run(name):
        model, tokenizer = merge_run(Path(name))
    else:
        model, tokenizer = load_base(name), load_tokenizer(name)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".convert-") as temporary:
        source, path = Path(temporary) / "model", Path(temporary) / "model.gguf"
        for part in (model, tokenizer):
            part.save_pretrained(source)
        words = [sys.executable, str(script), str(source), "--outfile", str(path), "--outtype", "f32"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise ExportError(f"{script} failed: {said[-1].strip() if said else 'it said nothing'}")
        ends = as_set(model.generation_config.eos_token_id if model.generation_config else None)
        blueprint = of_file(path, model.config, tokenizer, ends)
        with reading(path) as reader, closing(open_gguf(path, engine, context=CONTEXT, exact=True)) as llama:
            proof = compare(blueprint, _InMemory(model), llama, reader, TOLERANCE["F32"])
        yield replace(blueprint, proof=proof)


class _InMemory:
    """A reference that is the model itself."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def logprobs(self, sequences: list[list[int]], lengths: list[list[int]]) -> list[np.ndarray]:
        """See `reference.Reference.logprobs`."""
        found = []
        for ids, chosen in zip(sequences, lengths, strict=True):
            with torch.inference_mode():
                logits = self._model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            found.append(logits[[length - 1 for length in chosen]].numpy())
        return found
