"""Everything a GGUF file will hold, before a byte of it is written.

    model in memory ------- blueprint_from_model --+
    folder of safetensors --+                      +--> Blueprint: metadata, lazy tensors, what the gate compares with
    GGUF file --------------+ blueprint_from_run --+

A base model in safetensors gets its metadata from its configuration and tokenizer. A GGUF base keeps its own: only the
tensors an adapter changes are replaced. Nothing here reads a tensor's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buleyean_rl.data.encode import template_end_token
from buleyean_rl.errors import ExportError, UnsupportedArchitecture
from buleyean_rl.gguf.adapters import LoraAdapter, read_adapter
from buleyean_rl.gguf.architectures import (
    TensorLayout,
    find_architecture,
    hyperparameters,
    rope_factors,
    tensor_layouts,
)
from buleyean_rl.gguf.metadata import Field, make_field, read_fields
from buleyean_rl.gguf.tensors import LazyTensor, open_gguf_tensor, open_safetensors, wrap_tensor
from buleyean_rl.gguf.vocabulary import tokenizer_metadata
from buleyean_rl.models.run_folder import check_files, find_model, merge_run, run_tokenizer
from buleyean_rl.models.skeleton import EMBED_TOKENS, LM_HEAD, parameter_names
from buleyean_rl.models.source import Source
from buleyean_rl.models.weights import check_model, eos_token_ids, load_config, load_tokenizer, weight_files
from gguf import GGUFReader

if TYPE_CHECKING:
    from buleyean_rl.gguf.parity_report import ParityReport


EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"
END_OF_TURN = "tokenizer.ggml.eot_token_id"
_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Metadata of a GGUF base that is not true of a file made from it.
_STALE_METADATA = ("general.file_type", "general.quantization_version", "general.base_model.", "split.", "quantize.")


@dataclass(frozen=True)
class Blueprint:
    """The content of a GGUF file.

    Args:
        config: of transformers.
        tokenizer: of transformers.
        end_tokens: ids at which an answer ends.
        architecture: llama.cpp's name.
        metadata: by key, in order.
        tensors: by name, in order.
        layouts: how each parameter of the transformers model is stored; empty where no row of `ARCHITECTURES` says.
        notes: what llama.cpp does differently, in sentences.
        proof: that these tensors, unquantised, behave like the model; for a blueprint without layouts.
    """

    config: Any
    tokenizer: Any
    end_tokens: frozenset[int]
    architecture: str
    metadata: dict[str, Field]
    tensors: dict[str, LazyTensor]
    layouts: dict[str, TensorLayout]
    notes: tuple[str, ...] = ()
    proof: ParityReport | None = None


def blueprint_from_model(model: Any, tokenizer: Any) -> Blueprint:
    """The blueprint of a transformers model without adapters, in memory.

    Raises:
        UnsupportedArchitecture: a model type that is not supported.
        ExportError: it has an adapter, or a tensor or tokenizer that GGUF has no place for.
    """
    if hasattr(model, "peft_config"):
        raise ExportError("the model still has an adapter beside its weights; merge the adapter first")
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = output is None or output.weight is embedding.weight
    parameters = {name: wrap_tensor(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    return _from_parameters(model.config, tokenizer, generation_ends(model), parameters, is_tied=is_tied)


def blueprint_from_run(run: str | Path | Source) -> Blueprint:
    """The blueprint of a run folder with its adapter merged in, or of any model that trains.

    Args:
        run: what `models.run_folder.find_model` takes.

    Raises:
        ModelError: the run or its base model cannot be read.
        ExportError: as `blueprint_from_model`.
    """
    source = find_model(run)
    if source.run is None or source.base is None:
        return blueprint_from_base(source, load_tokenizer(source))
    adapter = read_adapter(source.run)
    check_files(source)
    if adapter.other_features:  # PEFT merges these, with the whole model in memory
        return blueprint_from_model(*merge_run(source))
    return blueprint_from_base(source.base, run_tokenizer(source), adapter)


def blueprint_from_base(source: Source, tokenizer: Any, adapter: LoraAdapter | None = None) -> Blueprint:
    """The blueprint of a base model, with an adapter merged in tensor by tensor.

    Args:
        source: where the base model is.
        tokenizer: of transformers.
        adapter: to merge; low-rank updates and whole tensors only.

    Raises:
        ModelError: the base model cannot be read.
        ExportError: as `blueprint_from_model`.
    """
    check_model(source)
    config = load_config(source)
    find_architecture(config)
    if getattr(config, "quantization_config", None) is not None and source.gguf is None:
        raise UnsupportedArchitecture(f"cannot export {source.name!r}: its weights are packed; take the unpacked model")
    end_tokens = frozenset(eos_token_ids(source, config))
    if source.gguf_path is not None:
        return _from_gguf_base(source.gguf_path, config, tokenizer, end_tokens, adapter)
    stored: dict[str, LazyTensor] = {}
    for path in weight_files(source):
        stored |= open_safetensors(path)
    is_tied = bool(config.tie_word_embeddings)
    # as transformers does: only what the model has (old files hold rotary frequencies too)
    names = [parameter for parameter in parameter_names(config) if not (is_tied and parameter == LM_HEAD)]
    if missing := [parameter for parameter in names if parameter not in stored]:
        raise ExportError(f"{source.name}: the model's {missing[0]} is in none of its files")
    parameters = {parameter: stored[parameter] for parameter in names}
    if adapter is not None:
        if is_tied and adapter.unties:
            parameters[LM_HEAD], is_tied = parameters[EMBED_TOKENS], False
        parameters = adapter.merge_into(parameters)
    return _from_parameters(config, tokenizer, end_tokens, parameters, is_tied=is_tied)


def blueprint_from_file(path: Path, config: Any, tokenizer: Any, end_tokens: frozenset[int]) -> Blueprint:
    """The blueprint of a GGUF file as it is, without layouts.

    Args:
        path: the file.
        config: of the transformers model.
        tokenizer: of transformers.
        end_tokens: at which generation stops.
    """
    reader = GGUFReader(path)
    metadata = {key: field for key, field in read_fields(reader).items() if not key.startswith(_STALE_METADATA)}
    architecture = metadata.pop("general.architecture").value
    tensors = {tensor.name: open_gguf_tensor(tensor) for tensor in reader.tensors}
    ends = _with_eos(end_tokens, tokenizer)
    return Blueprint(config, tokenizer, ends, architecture, metadata, tensors, layouts={})


def gguf_to_parameters(tensors: Mapping[str, LazyTensor], layouts: Mapping[str, TensorLayout]) -> dict[str, LazyTensor]:
    """A file's tensors as the parameters of the transformers model.

    Raises:
        ExportError: one of them is missing.
    """
    if missing := [layout.name for layout in layouts.values() if layout.name not in tensors]:
        raise ExportError(f"tensor {missing[0]} is missing in the file")
    return {name: layout.from_gguf(tensors[layout.name]) for name, layout in layouts.items()}


def generation_ends(model: Any) -> frozenset[int]:
    """The tokens at which a transformers model's generation stops."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    return frozenset(eos if isinstance(eos, list) else [eos]) - {None}


def _from_parameters(
    config: Any, tokenizer: Any, end_tokens: frozenset[int], parameters: Mapping[str, LazyTensor], *, is_tied: bool
) -> Blueprint:
    """A blueprint whose metadata comes from a transformers configuration and tokenizer."""
    values, notes = hyperparameters(config)
    # llama.cpp uses the embedding where there is no output matrix
    parameters = {name: tensor for name, tensor in parameters.items() if not (is_tied and name == LM_HEAD)}
    layouts = tensor_layouts(config, list(parameters))
    tensors = {layouts[name].name: layouts[name].to_gguf(tensor) for name, tensor in parameters.items()}
    tensors |= rope_factors(config)
    architecture = find_architecture(config).name
    size = tensors[EMBEDDING].shape[0]
    values |= {f"{architecture}.vocab_size": size} | tokenizer_metadata(tokenizer, size)
    if others := sorted(end_tokens - {tokenizer.eos_token_id}):
        values[END_OF_TURN] = others[0]
    blueprint = Blueprint(
        config=config,
        tokenizer=tokenizer,
        end_tokens=_with_eos(end_tokens, tokenizer),
        architecture=architecture,
        metadata={key: make_field(value) for key, value in values.items()},
        tensors=tensors,
        layouts=layouts,
        notes=tuple(notes),
    )
    return _with_template_end(blueprint)


def _from_gguf_base(
    path: Path, config: Any, tokenizer: Any, end_tokens: frozenset[int], adapter: LoraAdapter | None
) -> Blueprint:
    """A GGUF file's own blueprint, but for the tensors that an adapter changes."""
    blueprint = blueprint_from_file(path, config, tokenizer, end_tokens)
    tensors = dict(blueprint.tensors)
    if adapter is not None and adapter.unties:
        tensors.setdefault(OUTPUT, tensors[EMBEDDING])
    parameters = [name for name in parameter_names(config) if OUTPUT in tensors or name != LM_HEAD]
    layouts = tensor_layouts(config, parameters)
    names = {layout.name for layout in layouts.values()}
    if missing := sorted(names - set(tensors)):
        raise ExportError(f"{path}: has no tensor {missing[0]}")
    if unread := sorted(set(tensors) - names - set(_ROPE_FACTORS)):
        raise ExportError(f"{path}: transformers does not read its tensor {unread[0]}; take the original model")
    if adapter is not None:
        merged = adapter.merge_into(gguf_to_parameters(tensors, layouts))
        tensors |= {layouts[name].name: layouts[name].to_gguf(merged[name]) for name in adapter.changed_tensors}
    return _with_template_end(replace(blueprint, tensors=tensors, layouts=layouts))


def _with_template_end(blueprint: Blueprint) -> Blueprint:
    """A blueprint whose answers also end where its chat template ends them, though no setting of the model says so."""
    token = template_end_token(blueprint.tokenizer)
    if token is None or token in blueprint.end_tokens:
        return blueprint
    note = (
        f"the chat template ends an answer with {blueprint.tokenizer.convert_ids_to_tokens(token)!r}, which is not the "
        "model's end token: the file has it as its end of turn"
    )
    return replace(
        blueprint,
        end_tokens=blueprint.end_tokens | {token},
        metadata={**blueprint.metadata, END_OF_TURN: make_field(token)},
        notes=(*blueprint.notes, note),
    )


def _with_eos(end_tokens: frozenset[int], tokenizer: Any) -> frozenset[int]:
    return (end_tokens | {tokenizer.eos_token_id}) - {None}
