"""Architectures this package has no row for, through llama.cpp's own converter, behind the same gate.

    run --PEFT--> merged model --convert_hf_to_gguf.py--> F32 file --log-probabilities against the model--> Blueprint

The converter comes from a checkout that LLAMA_CPP_DIR names; nothing is downloaded. Its file is proven in full
precision against the model in memory; what is quantised from it is then checked against it, tensor by tensor.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from buleyean_rl.errors import ExportError
from buleyean_rl.gguf.blueprint import Blueprint, blueprint_from_file, generation_ends
from buleyean_rl.gguf.parity import CONTEXT, TOLERANCE, compare_behaviour, open_written_file
from buleyean_rl.gguf.program import run_program
from buleyean_rl.gguf.streaming_model import ModelInMemory
from buleyean_rl.inference.gguf_engines import DEFAULT_ENGINE, open_gguf
from buleyean_rl.models.run_folder import merge_run
from buleyean_rl.models.source import Source
from buleyean_rl.models.weights import load_base, load_tokenizer
from buleyean_rl.system.files import temporary_folder

VARIABLE = "LLAMA_CPP_DIR"
_SCRIPT = "convert_hf_to_gguf.py"


def find_converter() -> Path | None:
    """The converter in the checkout that LLAMA_CPP_DIR names; None where it is not set.

    Raises:
        ExportError: the checkout has no converter.
    """
    if not (folder := os.environ.get(VARIABLE)):
        return None
    script = Path(folder) / _SCRIPT
    if not script.is_file():
        raise ExportError(f"{VARIABLE}={folder}: has no {_SCRIPT}; name a checkout of llama.cpp")
    return script


@contextmanager
def convert(source: Source, script: Path, target: Path, engine: str = DEFAULT_ENGINE) -> Iterator[Blueprint]:
    """The blueprint of the file that llama.cpp's converter makes, proven; the file is deleted when the block ends.

    Args:
        source: of a run or a base model. The model is merged in memory.
        script: the converter.
        target: the file to be made in the end, on a disk with room for the model twice.
        engine: what the file is proven in, one of `gguf_engines.ENGINES`.

    Raises:
        ExportError: the converter failed; with the last line it printed.
        ParityError: its file does not behave like the model.
    """
    if source.run is None:
        model, tokenizer = load_base(source), load_tokenizer(source)
    else:
        model, tokenizer = merge_run(source)
    with temporary_folder(target) as temporary:
        saved, path = temporary / "model", temporary / "model.gguf"
        for part in (model, tokenizer):
            part.save_pretrained(saved)
        run_program([sys.executable, str(script), str(saved), "--outfile", str(path), "--outtype", "f32"], str(script))
        if not path.exists():
            raise ExportError(f"{script} failed: it wrote no file")
        blueprint = blueprint_from_file(path, model.config, tokenizer, generation_ends(model))
        with open_written_file(path) as reader, closing(open_gguf(path, engine, context=CONTEXT, exact=True)) as llama:
            proof = compare_behaviour(blueprint, ModelInMemory(model), llama, reader, TOLERANCE["F32"])
        yield replace(blueprint, proof=proof)
