"""An adapter as a GGUF of its own: a few megabytes that llama.cpp applies to the base model with a scale.

    run folder --pairs--> name.lora_a, name.lora_b --write--> file --gate: base + file against the merged weights

llama.cpp adds `scale alpha / rank B A` to a weight, with one alpha for the file. Where an adapter scales otherwise
(rsLoRA, alpha by module), the difference goes into B. Only low-rank updates have a place in such a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from buleyean_rl.errors import ExportError
from buleyean_rl.gguf.adapters import LoraAdapter, LoraPair, read_adapter
from buleyean_rl.gguf.blueprint import OUTPUT, Blueprint, blueprint_from_base
from buleyean_rl.gguf.metadata import About, make_field, override_fields
from buleyean_rl.gguf.parity import check_adapter
from buleyean_rl.gguf.parity_report import ParityReport
from buleyean_rl.gguf.tensors import LazyTensor, scale
from buleyean_rl.gguf.write import ExportReport, write_files, write_gguf
from buleyean_rl.inference.gguf_engines import DEFAULT_ENGINE
from buleyean_rl.models.run_folder import check_files, find_model, run_tokenizer
from buleyean_rl.models.source import Source
from buleyean_rl.system.files import temporary_folder
from gguf import GGUFType, Keys

ADAPTER_QUANTS = ("f32", "f16", "bf16")
_REMEDY = "export the merged model instead (without --adapter)"


def write_adapter(
    run: Path | Source,
    path: Path,
    quant: str = "f16",
    *,
    gate: bool = True,
    engine: str = DEFAULT_ENGINE,
    about: About | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write a run's adapter as GGUF and prove that with it the base behaves like the merged model.

    The gate applies it to the base model's GGUF; a base in safetensors is written at Q8_0 beside the file for this,
    and removed afterwards.

    Args:
        run: a run folder, or its source.
        path: the file to write.
        quant: one of `ADAPTER_QUANTS`.
        gate: run the parity gate before the file gets its name.
        engine: what the gate runs in, one of `gguf_engines.ENGINES`.
        about: what the file says about itself.
        progress: called with tensors written and tensors in all.

    Raises:
        ExportError: there is no adapter, it does what such a file cannot say, or cannot be written.
        ParityError: base and file together do not behave like the merged model.
    """
    if quant not in ADAPTER_QUANTS:
        raise ExportError(f"an adapter file is written as {', '.join(ADAPTER_QUANTS)}, not as {quant!r}")
    source = find_model(run)
    if source.run is None or source.base is None:
        raise ExportError(f"{source.name}: has no adapter; name a run folder")
    base_source = source.base
    base, adapter = blueprint_from_base(base_source, run_tokenizer(source)), read_adapter(source.run)
    blueprint = blueprint_from_adapter(base, adapter)
    check_files(source)
    general = (about or About()).fields(GGUFType.ADAPTER)
    blueprint = replace(blueprint, metadata=override_fields(blueprint.metadata, general))

    def prove(written: Path) -> ParityReport:
        with _base_file(base_source, base, path) as base_path:
            return check_adapter(base, blueprint, adapter, base_path, written, engine=engine)

    return write_files(blueprint, {quant: path}, prove if gate else None, progress)[0]


def blueprint_from_adapter(base: Blueprint, adapter: LoraAdapter) -> Blueprint:
    """The blueprint of an adapter's file.

    Args:
        base: the base model's, without the adapter.
        adapter: low-rank updates of it.

    Raises:
        ExportError: the adapter does what such a file cannot say, or belongs to another model.
    """
    if adapter.other_features:
        raise ExportError(
            f"an adapter file holds low-rank updates, and this adapter has {adapter.other_features[0]}: {_REMEDY}"
        )
    if adapter.whole_tensors:
        raise ExportError(
            f"an adapter file holds low-rank updates, and this adapter replaces {next(iter(adapter.whole_tensors))} "
            f"whole (modules_to_save): {_REMEDY}"
        )
    tensors: dict[str, LazyTensor] = {}
    for module, pair in adapter.pairs.items():
        layout = base.layouts.get(f"{module}.weight")
        if layout is None and module == "lm_head":
            raise ExportError(
                f"the adapter updates the output matrix, which llama.cpp takes from {OUTPUT!r}: {_REMEDY}"
            )
        if layout is None or base.tensors[layout.name].shape != (pair.b.shape[0], pair.a.shape[1]):
            raise ExportError(f"the adapter updates {module}, which the base model lacks or has in another shape")
        tensors[f"{layout.name}.lora_a"] = pair.a
        tensors[f"{layout.name}.lora_b"] = _rescale_b(layout.to_gguf(pair.b), pair, adapter.alpha)
    metadata = {Keys.Adapter.TYPE: make_field("lora"), Keys.Adapter.LORA_ALPHA: make_field(adapter.alpha)}
    return replace(base, metadata=metadata, tensors=tensors, layouts={})


def _rescale_b(b: LazyTensor, pair: LoraPair, alpha: float) -> LazyTensor:
    """B times what llama.cpp's `alpha / rank` lacks of the pair's own scaling."""
    factor = pair.scaling * pair.a.shape[0] / alpha
    return b if abs(factor - 1) < 1e-12 else scale(b, factor)


@contextmanager
def _base_file(source: Source, base: Blueprint, target: Path) -> Iterator[Path]:
    """The base model as a GGUF file: its own, or one in a temporary folder."""
    if source.gguf_path is not None:
        yield source.gguf_path
        return
    with temporary_folder(target) as temporary:
        path = temporary / "base.gguf"
        write_gguf(base, {"q8_0": path}, gate=False)
        yield path
