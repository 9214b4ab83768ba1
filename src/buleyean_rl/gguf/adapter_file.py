"""An adapter as a GGUF of its own: a few megabytes that llama.cpp applies to the base model with a scale.

    run folder --pairs--> name.lora_a, name.lora_b --write--> file --gate: base + file against the merged weights

llama.cpp adds `scale alpha / rank B A` to a weight, with one alpha for the file. Where an adapter scales otherwise
(rsLoRA, alpha by module), the difference goes into B. What is not a low-rank update has no place in such a file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from buleyean_rl.errors import ExportError
from buleyean_rl.gguf.adapters import Adapter, Pair
from buleyean_rl.gguf.blueprint import OUTPUT, Blueprint, adapter_of, of_base
from buleyean_rl.gguf.metadata import About, overridden, typed
from buleyean_rl.gguf.parity import check_adapter
from buleyean_rl.gguf.parity_report import ParityReport
from buleyean_rl.gguf.tensors import Rows, scaled
from buleyean_rl.gguf.write import ExportReport, write_files, write_gguf
from buleyean_rl.inference.gguf_engines import DEFAULT
from buleyean_rl.models.run_folder import run_base, run_tokenizer
from buleyean_rl.models.source import resolve
from gguf import GGUFType, Keys

ADAPTER_QUANTS = ("f32", "f16", "bf16")
_INSTEAD = "export the merged model instead (without --adapter)"


def write_adapter(
    run: Path,
    path: Path,
    quant: str = "f16",
    *,
    gate: bool = True,
    engine: str = DEFAULT,
    about: About | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write a run's adapter as GGUF and prove that with it the base behaves like the merged model.

    The gate applies it to the base model's GGUF; where the base is none, to one at Q8_0 that is made beside the
    file and removed afterwards.

    Args:
        run: a run folder.
        path: the file to write.
        quant: one of `ADAPTER_QUANTS`.
        gate: run the parity gate before the file gets its name.
        engine: what the gate runs in, one of `engines.ENGINES`.
        about: what the file says about itself.
        progress: called with tensors written and tensors in all.

    Raises:
        ExportError: the adapter does what such a file cannot say, or cannot be written.
        ParityError: base and file together do not behave like the merged model.
    """
    if quant not in ADAPTER_QUANTS:
        raise ExportError(f"an adapter file is written as {', '.join(ADAPTER_QUANTS)}, not as {quant!r}")
    base = of_base(run_base(run), run_tokenizer(run), None)
    adapter = adapter_of(run)
    planned = adapter_blueprint(base, adapter)
    planned = replace(planned, metadata=overridden(planned.metadata, (about or About()).fields(GGUFType.ADAPTER)))

    def prove(partial: Path) -> ParityReport:
        with _base_file(run, base, path.parent) as base_path:
            return check_adapter(base, planned, adapter, base_path, partial, engine=engine)

    return write_files(planned, {quant: path}, prove if gate else None, progress)[0]


def adapter_blueprint(base: Blueprint, adapter: Adapter) -> Blueprint:
    """The file of an adapter.

    Args:
        base: the base model's file, without the adapter.
        adapter: low-rank updates of it.

    Raises:
        ExportError: the adapter does what such a file cannot say, or belongs to another model.
    """
    if adapter.extras:
        raise ExportError(
            f"an adapter file holds low-rank updates, and this adapter has {adapter.extras[0]}: {_INSTEAD}"
        )
    if adapter.saved:
        raise ExportError(
            f"an adapter file holds low-rank updates, and this adapter replaces {next(iter(adapter.saved))} "
            f"whole (modules_to_save): {_INSTEAD}"
        )
    tensors: dict[str, Rows] = {}
    for module, pair in adapter.pairs.items():
        layout = base.layouts.get(f"{module}.weight")
        if layout is None and module == "lm_head":
            raise ExportError(
                f"the adapter updates the output matrix, which llama.cpp takes from {OUTPUT!r}: {_INSTEAD}"
            )
        if layout is None or base.tensors[layout.name].shape != (pair.b.shape[0], pair.a.shape[1]):
            raise ExportError(f"the adapter updates {module}, which the base model lacks or has in another shape")
        tensors[f"{layout.name}.lora_a"] = pair.a
        tensors[f"{layout.name}.lora_b"] = _scaled_b(layout.store(pair.b), pair, adapter.alpha)
    metadata = {Keys.Adapter.TYPE: typed("lora"), Keys.Adapter.LORA_ALPHA: typed(adapter.alpha)}
    return Blueprint(base.config, base.tokenizer, base.ends, base.architecture, metadata, tensors, {}, base.notes)


def _scaled_b(b: Rows, pair: Pair, alpha: float) -> Rows:
    """B with what `alpha / rank` lacks of the pair's own scaling."""
    factor = pair.scaling * pair.a.shape[0] / alpha
    return b if abs(factor - 1) < 1e-12 else scaled(b, factor)


@contextmanager
def _base_file(run: Path, base: Blueprint, folder: Path) -> Iterator[Path]:
    """The base model as a GGUF file."""
    if (path := resolve(run_base(run)).gguf_path) is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".base-") as temporary:
        path = Path(temporary) / "base.gguf"
        write_gguf(base, {"q8_0": path}, gate=False)
        yield path
