"""Everything a GGUF file will hold, before a byte of it is written.

    model in memory ------ of_model ---+
    folder of safetensors --+          +--> Blueprint: metadata, tensors by GGUF name, what the gate needs
    GGUF file --------------+ of_run --+

A base model in safetensors gets its metadata from its configuration and tokenizer. A GGUF base keeps its own:
only the tensors an adapter changes are replaced. Nothing here reads a tensor's numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buleyean_rl.errors import ExportError, UnsupportedArchitecture
from buleyean_rl.gguf import architectures
from buleyean_rl.gguf.adapters import Adapter, read_adapter
from buleyean_rl.gguf.architectures import Layout
from buleyean_rl.gguf.metadata import Field, Value, fields_of, typed
from buleyean_rl.gguf.skeleton import HEAD, skeleton_parameters
from buleyean_rl.gguf.tensors import Rows, in_gguf, in_memory, in_safetensors
from buleyean_rl.gguf.vocabulary import vocabulary
from buleyean_rl.models.run_folder import is_run, merge_run, run_base, run_tokenizer
from buleyean_rl.models.source import resolve
from buleyean_rl.models.weights import eos_token_ids, load_config, load_tokenizer, weight_files
from gguf import GGUFReader

if TYPE_CHECKING:
    from buleyean_rl.gguf.parity_report import ParityReport


EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"
_NO_PARAMETERS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Of a GGUF base's metadata, what is no longer true of a file made from it.
_NOT_KEPT = ("general.file_type", "general.quantization_version", "general.base_model.", "split.", "quantize.")


@dataclass(frozen=True)
class Blueprint:
    """A GGUF file to be.

    Args:
        config: of transformers.
        tokenizer: of transformers.
        ends: tokens at which an answer ends.
        architecture: llama.cpp's name.
        metadata: by key, in order.
        tensors: by name, in order.
        layouts: which tensor each parameter of the transformers model is; empty where that is not known.
        notes: what llama.cpp does differently, in sentences.
        proof: that these tensors, unquantised, behave like the model; for one without layouts.
    """

    config: Any
    tokenizer: Any
    ends: frozenset[int]
    architecture: str
    metadata: dict[str, Field]
    tensors: dict[str, Rows]
    layouts: dict[str, Layout]
    notes: tuple[str, ...] = ()
    proof: ParityReport | None = None


def of_model(model: Any, tokenizer: Any) -> Blueprint:
    """The file of a transformers model without adapters, in memory.

    Raises:
        UnsupportedArchitecture: the model is of a kind that is not supported.
        ExportError: it has an adapter, or a tensor or tokenizer that GGUF has no place for.
    """
    if hasattr(model, "peft_config"):
        raise ExportError("the model still has an adapter beside its weights; merge the adapter first")
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = output is None or output.weight is embedding.weight
    ends = getattr(model.generation_config, "eos_token_id", None) if model.generation_config else None
    tensors = {name: in_memory(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    return _rebuilt(model.config, tokenizer, as_set(ends), tensors, tied=tied)


def of_run(name: str) -> Blueprint:
    """The file of a run folder with its adapter merged in, or of any model that trains.

    Args:
        name: a run folder, or what `models.resolve` takes.

    Raises:
        ModelError: the run or its base model cannot be found.
        ExportError: as `of_model`.
    """
    if not is_run(name):
        return of_base(name, load_tokenizer(name), None)
    run = Path(name)
    adapter = adapter_of(run)
    if adapter.extras:  # seldom: PEFT knows how, with the whole model in memory
        return of_model(*merge_run(run))
    return of_base(run_base(run), run_tokenizer(run), adapter)


def adapter_of(run: Path) -> Adapter:
    """The adapter of a run folder."""
    return read_adapter(run, json.loads((run / "adapter_config.json").read_text(encoding="utf-8")))


def of_base(name: str, tokenizer: Any, adapter: Adapter | None) -> Blueprint:
    """The file of a base model, with an adapter merged in tensor by tensor.

    Args:
        name: see `models.resolve`.
        tokenizer: of transformers.
        adapter: what to merge; without extras.

    Raises:
        ModelError: the base model cannot be found.
        ExportError: as `of_model`.
    """
    source = resolve(name)
    config = load_config(name)
    architectures.architecture_of(config)
    if getattr(config, "quantization_config", None) is not None and source.gguf is None:
        raise UnsupportedArchitecture(f"cannot export {name!r}: its weights are packed; take the unpacked model")
    ends = frozenset(eos_token_ids(name, config))
    if source.gguf_path is not None:
        return _kept(source.gguf_path, config, tokenizer, ends, adapter)
    tensors: dict[str, Rows] = {}
    for path in weight_files(name):
        tensors |= in_safetensors(path)
    tied = bool(config.tie_word_embeddings)
    # like transformers, take what the model has and leave what it has not (old files hold the rotation's frequencies)
    wanted = [parameter for parameter in skeleton_parameters(config) if not (tied and parameter == HEAD)]
    if missing := [parameter for parameter in wanted if parameter not in tensors]:
        raise ExportError(f"{name}: the model's {missing[0]} is in none of its files")
    tensors = {parameter: tensors[parameter] for parameter in wanted}
    if adapter is not None:
        tensors = adapter.merged(tensors)
    return _rebuilt(config, tokenizer, ends, tensors, tied=tied)


def _rebuilt(
    config: Any, tokenizer: Any, ends: frozenset[int], tensors: Mapping[str, Rows], *, tied: bool
) -> Blueprint:
    """A file whose metadata comes from a transformers configuration and tokenizer."""
    values, notes = architectures.hyperparameters(config)
    # llama.cpp uses the embedding where there is no output matrix
    parameters = {name: rows for name, rows in tensors.items() if not (tied and name == HEAD)}
    layouts = architectures.layouts(config, list(parameters))
    stored = {layouts[name].name: layouts[name].store(rows) for name, rows in parameters.items()}
    stored |= architectures.computed(config)
    arch = architectures.architecture_of(config).gguf
    rows = stored[EMBEDDING].shape[0]
    values |= {f"{arch}.vocab_size": rows} | vocabulary(tokenizer, rows) | _turn_end(ends, tokenizer)
    return Blueprint(
        config=config,
        tokenizer=tokenizer,
        ends=_ends(ends, tokenizer),
        architecture=arch,
        metadata={key: typed(value) for key, value in values.items()},
        tensors=stored,
        layouts=layouts,
        notes=tuple(notes),
    )


def of_file(path: Path, config: Any, tokenizer: Any, ends: frozenset[int]) -> Blueprint:
    """A GGUF file as it is, whatever its tensors mean.

    Args:
        path: the file.
        config: of the transformers model it is of.
        tokenizer: of transformers.
        ends: tokens at which generation stops.
    """
    reader = GGUFReader(path)
    metadata = {key: field for key, field in fields_of(reader).items() if not key.startswith(_NOT_KEPT)}
    architecture = metadata.pop("general.architecture").value
    tensors = {tensor.name: in_gguf(tensor) for tensor in reader.tensors}
    return Blueprint(config, tokenizer, _ends(ends, tokenizer), architecture, metadata, tensors, layouts={})


def _kept(path: Path, config: Any, tokenizer: Any, ends: frozenset[int], adapter: Adapter | None) -> Blueprint:
    """A GGUF file as it is, but for the tensors that an adapter changes."""
    whole = of_file(path, config, tokenizer, ends)
    tensors = dict(whole.tensors)
    parameters = [name for name in skeleton_parameters(config) if OUTPUT in tensors or name != HEAD]
    layouts = architectures.layouts(config, parameters)
    known = {layout.name for layout in layouts.values()}
    if missing := sorted(known - set(tensors)):
        raise ExportError(f"{path}: has no tensor {missing[0]}")
    if strange := sorted(set(tensors) - known - set(_NO_PARAMETERS)):
        raise ExportError(f"{path}: transformers does not read its tensor {strange[0]}; take the original model")
    if adapter is not None:
        changed = adapter.merged(parameters_of(tensors, layouts))
        tensors |= {layouts[name].name: layouts[name].store(changed[name]) for name in adapter.changes}
    return replace(whole, tensors=tensors, layouts=layouts)


def parameters_of(tensors: Mapping[str, Rows], layouts: Mapping[str, Layout]) -> dict[str, Rows]:
    """A file's tensors as the parameters of the transformers model.

    Raises:
        ExportError: one of them is missing.
    """
    if missing := [layout.name for layout in layouts.values() if layout.name not in tensors]:
        raise ExportError(f"tensor {missing[0]} is missing in the file")
    return {name: layout.load(tensors[layout.name]) for name, layout in layouts.items()}


def _ends(ends: frozenset[int], tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: those generation stops at, and the tokenizer's EOS."""
    return (ends | {tokenizer.eos_token_id}) - {None}


def _turn_end(ends: frozenset[int], tokenizer: Any) -> dict[str, Value]:
    """A second token that ends an answer, where generation knows of one besides the tokenizer's EOS."""
    others = sorted(ends - {tokenizer.eos_token_id})
    return {"tokenizer.ggml.eot_token_id": others[0]} if others else {}


def as_set(ends: Any) -> frozenset[int]:
    """The tokens at which generation stops, however a generation configuration says so."""
    return frozenset(ends if isinstance(ends, list) else [ends]) - {None}
