"""The parity gate: does a GGUF file behave in llama.cpp like the model it was made from?

    file, Blueprint --parity_checks--> ParityReport, or a ParityError that says what differs

Each check compares transformers with llama.cpp:

    vocabulary  every token at its id, BOS and EOS
    tensors     each bit for bit what quantising the model's gives
    texts       the ids of texts that tokenizers trip over
    chats       the rendered template, and the ids fed to the model
    ends        BOS before a text or not, EOS after it or not; generation stops where it should
    numbers     next-token log-probabilities at many positions

The numbers are compared with transformers running the *stored* weights, quantised and turned back, so the tolerance
covers llama.cpp's arithmetic only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from buleyean_rl.errors import EngineError, ExportError, ParityError
from buleyean_rl.gguf import parity_checks as checks
from buleyean_rl.gguf.adapters import LoraAdapter
from buleyean_rl.gguf.architectures import original_context
from buleyean_rl.gguf.blueprint import Blueprint, blueprint_from_model, gguf_to_parameters
from buleyean_rl.gguf.parity_report import ParityReport
from buleyean_rl.gguf.streaming_model import StreamingModel
from buleyean_rl.gguf.tensors import open_gguf_tensor
from buleyean_rl.inference.gguf_engines import DEFAULT_ENGINE, open_gguf
from buleyean_rl.inference.gguf_file import check_gguf
from buleyean_rl.inference.protocol import Adapter, GgufEngine
from gguf import GGMLQuantizationType, GGUFReader

CONTEXT = 512  # tokens: room for the chats
# Mean KL in nats by which llama.cpp's arithmetic may differ on the same weights, by the coarsest type: it rounds
# activations to the type its kernels multiply with, 8 bits for quantised weights. A wrong rotation or row order is
# above 0.04.
TOLERANCE = {"F32": 1e-4, "F16": 1e-3, "BF16": 3e-3}
QUANTISED_TOLERANCE = 2e-2


def check_parity(model: Any, tokenizer: Any, path: Path | str, *, tolerance: float | None = None) -> ParityReport:
    """Compare a GGUF file, in llama.cpp, with the transformers model it was made from.

    Args:
        model: the merged model, in memory.
        tokenizer: its tokenizer.
        path: the GGUF file.
        tolerance: for the divergence, in nats; by the file's coarsest type if None.

    Raises:
        ParityError: something differs; the message says what, with the numbers.
    """
    return check_blueprint(blueprint_from_model(model, tokenizer), path, tolerance=tolerance)


def check_blueprint(
    blueprint: Blueprint, path: Path | str, *, engine: str = DEFAULT_ENGINE, tolerance: float | None = None
) -> ParityReport:
    """Compare a GGUF file, in llama.cpp, with its blueprint.

    Memory: one weight in fp32 and the activations in transformers; the file in llama.cpp.

    Args:
        blueprint: what should be in the file.
        path: the GGUF file.
        engine: what to run it in, one of `gguf_engines.ENGINES`.
        tolerance: for the divergence, in nats; by the file's coarsest type if None.

    Raises:
        ParityError: something differs; the message says what, with the numbers.
    """
    with open_written_file(path) as reader:
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        checks.check_vocabulary(blueprint.tokenizer, reader)
        checks.check_tensors(blueprint.tensors, tensors)
        reference = None
        if blueprint.proof is None:
            stored = {name: open_gguf_tensor(tensor) for name, tensor in tensors.items()}
            reference = StreamingModel.from_config(blueprint.config, gguf_to_parameters(stored, blueprint.layouts))
        if tolerance is None:
            tolerance = _tolerance(reader)
        with closing(open_gguf(path, engine, context=_context(blueprint.config), exact=True)) as llama:
            return compare_behaviour(blueprint, reference, llama, reader, tolerance)


def check_adapter(
    base: Blueprint,
    blueprint: Blueprint,
    adapter: LoraAdapter,
    base_path: Path,
    path: Path,
    *,
    engine: str = DEFAULT_ENGINE,
) -> ParityReport:
    """Compare an adapter's file, applied to its base in llama.cpp, with the base's weights and the adapter merged.

    The adapter is merged as it was trained, not as its file has it: a wrong file would agree with itself.

    Args:
        base: what should be in the base model's file.
        blueprint: what should be in the adapter's file.
        adapter: as trained.
        base_path: the base model's file.
        path: the adapter's file.
        engine: what to run them in, one of `gguf_engines.ENGINES`.

    Raises:
        ParityError: something differs; the message says what, with the numbers.
    """
    with open_written_file(base_path) as reader, open_written_file(path, model=False) as adapter_reader:
        checks.check_tensors(blueprint.tensors, {tensor.name: tensor for tensor in adapter_reader.tensors})
        stored = {tensor.name: open_gguf_tensor(tensor) for tensor in reader.tensors}
        reference = StreamingModel.from_config(
            base.config, adapter.merge_into(gguf_to_parameters(stored, base.layouts))
        )
        settings = {"context": _context(base.config), "exact": True, "adapter": Adapter(path)}
        with closing(open_gguf(base_path, engine, **settings)) as llama:
            return compare_behaviour(base, reference, llama, reader, _tolerance(reader, adapter_reader))


def compare_behaviour(
    blueprint: Blueprint,
    reference: checks.LogprobModel | None,
    engine: GgufEngine,
    reader: GGUFReader,
    tolerance: float = QUANTISED_TOLERANCE,
) -> ParityReport:
    """Compare what an engine shows: texts, chats, ends and numbers.

    Args:
        blueprint: what should be in the file.
        reference: computes the numbers to compare with; None where the blueprint has a proof.
        engine: that has loaded the file.
        reader: of the file.
        tolerance: for the divergence, in nats.

    Raises:
        ParityError: something differs.
    """
    started, notes = time.monotonic(), list[str]()
    texts = checks.check_texts(blueprint.tokenizer, engine, notes)
    chats = checks.check_chats(blueprint.tokenizer, engine, notes)
    checks.check_ends(blueprint.tokenizer, blueprint.end_tokens, engine, reader)
    if reference is None:
        assert blueprint.proof is not None
        notes.append("log-probabilities were compared in full precision; the tensors here are those, quantised")
        seconds = time.monotonic() - started
        return replace(blueprint.proof, texts=texts, chats=chats, notes=tuple(notes), seconds=seconds)
    positions, divergence, largest = checks.check_numbers(reference, blueprint.tokenizer, engine, reader, tolerance)
    return ParityReport(
        texts=texts,
        chats=chats,
        tensors=len(blueprint.tensors),
        positions=positions,
        divergence=divergence,
        tolerance=tolerance,
        largest=largest,
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


@contextmanager
def open_written_file(path: Path | str, *, model: bool = True) -> Iterator[GGUFReader]:
    """A reader of a GGUF file; every failure to read it is a ParityError."""
    try:
        check_gguf(path, model=model)
        yield GGUFReader(path)
    except EngineError as error:
        raise ParityError(f"llama.cpp cannot run the written file: {error}") from error
    except ParityError:
        raise
    except ExportError as error:
        raise ParityError(str(error)) from error
    except (ValueError, IndexError, KeyError) as error:
        raise ParityError(f"{path}: is not a GGUF file that can be read: {error}") from error


def _context(config: Any) -> int:
    """Room for the chats, where rope scaling has no effect yet."""
    return min(CONTEXT, original_context(config))


def _tolerance(*readers: GGUFReader) -> float:
    """The tolerance of the coarsest type among the files' matrices."""
    types: set[GGMLQuantizationType] = {
        tensor.tensor_type for reader in readers for tensor in reader.tensors if tensor.data.ndim > 1
    }
    return max((TOLERANCE.get(t.name, QUANTISED_TOLERANCE) for t in types), default=QUANTISED_TOLERANCE)
