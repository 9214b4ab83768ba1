"""The model that was trained: its base as it was loaded and its adapter beside it, against what an export merged.

    base's files, adapter's file --PEFT, streamed--> log-probabilities --KL--> those of the blueprint, unquantised

The parity gate proves that a file is its blueprint. This proves that the blueprint is the model: the weights are read
anew by the names transformers has for them, and PEFT computes with the adapter unmerged. Training may round the base to
another precision than the export does; then the KL between the two is measured, and has a limit of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from buleyean_rl.errors import ParityError
from buleyean_rl.gguf.adapters import read_adapter
from buleyean_rl.gguf.blueprint import Blueprint, gguf_to_parameters
from buleyean_rl.gguf.parity_probes import CHATS, TEXTS
from buleyean_rl.gguf.streaming_model import ModelInMemory, StreamingModel
from buleyean_rl.gguf.tensors import Index, LazyTensor, open_safetensors
from buleyean_rl.kernels.quantised import OF_BITS, quantise
from buleyean_rl.models.adapter_folder import build_adapted_skeleton
from buleyean_rl.models.gguf_weights import is_known, stored_weights
from buleyean_rl.models.run_files import is_finished, read_run
from buleyean_rl.models.run_folder import load_run
from buleyean_rl.models.skeleton import LM_HEAD, build_skeleton
from buleyean_rl.models.source import Source
from buleyean_rl.models.weights import load_config, weight_files

TOLERANCE = 1e-4  # nats of KL: the arithmetic of a merged weight
ROUNDED_TOLERANCE = 2e-2  # where the base was trained in another precision
QUANTISED_TOLERANCE = 1e-2  # where it was quantised for training
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_TOKENS = 96  # of a text


@dataclass(frozen=True)
class TrainedComparison:
    """How close the merged model is to the one that was trained.

    Args:
        divergence: KL(trained || merged) in nats, the mean of positions.
        tolerance: the largest that passes.
        precision: of the base in training, where the merged one is more exact; None where they are the same.
        positions: compared.
    """

    divergence: float
    tolerance: float
    precision: str | None
    positions: int


def compare_with_trained(source: Source, blueprint: Blueprint) -> TrainedComparison:
    """Compare what an export merged with the model that was trained.

    Args:
        source: of a run.
        blueprint: of its export, with layouts.

    Raises:
        ParityError: they differ by more than arithmetic.
    """
    merged = StreamingModel.from_config(blueprint.config, gguf_to_parameters(blueprint.tensors, blueprint.layouts))
    # PEFT reads these weights other than by calling the modules that have them
    is_read_by_transformers = source.gguf_path is not None and not is_known(source.gguf_path)
    in_memory = bool(read_adapter(Path(str(source.run))).other_features) or is_read_by_transformers
    precision, bits = (None, 16) if in_memory else _trained_precision(source)
    trained = ModelInMemory(load_run(source)[0]) if in_memory else _stream_trained(source, precision, bits)
    sequences = _sequences(blueprint.tokenizer)
    lengths = [list(range(1, len(ids) + 1)) for ids in sequences]
    expected = trained.logprobs(sequences, lengths)
    actual = merged.logprobs(sequences, lengths)
    divergences = [_kl(p, q) for p, q in zip(expected, actual, strict=True)]
    divergence = float(np.concatenate(divergences).mean())
    tolerance = QUANTISED_TOLERANCE if bits in OF_BITS else TOLERANCE if precision is None else ROUNDED_TOLERANCE
    quantised = f"its base was quantised to {bits} bits; train with --base-bits 8 or 16" if bits in OF_BITS else None
    if not divergence <= tolerance:
        remedy = quantised or (precision and f"its base was trained in {precision}")
        raise ParityError(
            f"the merged model is not the one that was trained: {divergence:.5f} nats of KL on average, allowed are "
            f"{tolerance:.5f}" + (f"; {remedy}" if remedy else "")
        )
    precision = f"{bits} bits" if quantised else precision
    return TrainedComparison(divergence, tolerance, precision, sum(map(len, divergences)))


def _trained_precision(source: Source) -> tuple[str | None, int]:
    """The type of a run's base in training, where it is coarser than that of the base's files, and its bits."""
    run = Path(str(source.run))
    if not is_finished(run):
        return None, 16
    report = read_run(run)
    bits = report.get("config", {}).get("base_bits") or 16
    precision = str(report.get("compute", "")).split(",")[0].split(" ")[0]
    is_exact = precision in DTYPES and source.gguf is None and _are_exact(weight_files(source), DTYPES[precision])
    return (precision if precision in DTYPES and not is_exact else None), bits


def _are_exact(paths: list[Path], dtype: torch.dtype) -> bool:
    """Whether all numbers of some files are of a dtype already."""
    from safetensors import safe_open

    for path in paths:
        with safe_open(path, framework="pt") as file:
            if any(file.get_slice(name)[:0].dtype != dtype for name in file.keys()):  # noqa: SIM118
                return False
    return True


def _stream_trained(source: Source, precision: str | None, bits: int) -> StreamingModel:
    """The base in the precision it was trained in, with its adapter unmerged, streamed from their files."""
    run, config = Path(str(source.run)), load_config(source)
    base, dtype = _open_base(source, config), DTYPES.get(precision or "", torch.float32)
    quantised = _quantised_names(source, config) if bits in OF_BITS else set()
    base = {name: _round(tensor, dtype, bits if name in quantised else 16) for name, tensor in base.items()}
    base.setdefault(LM_HEAD, base["model.embed_tokens.weight"])
    adapter = open_safetensors(run / "adapter_model.safetensors")
    adapted = build_adapted_skeleton(run, config).eval()
    parameters = {}
    for name, _ in adapted.named_parameters(remove_duplicate=False):
        saved = name.replace(".default.", ".").replace(".modules_to_save.", ".")
        original = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        parameters[name] = adapter[saved] if saved in adapter else base[original]
    return StreamingModel(adapted, parameters)


def _open_base(source: Source, config: Any) -> dict[str, LazyTensor]:
    """A base model's weights, as transformers names them."""
    if source.gguf_path is not None:
        stored = stored_weights(source.gguf_path, build_skeleton(config))
        return {name: LazyTensor(weight.info.shape, weight.numbers) for name, weight in stored.items()}
    tensors: dict[str, LazyTensor] = {}
    for path in weight_files(source):
        tensors |= open_safetensors(path)
    return tensors


def _quantised_names(source: Source, config: Any) -> set[str]:
    """The names of the matrices that training quantised: those that were not in blocks."""
    skeleton = build_skeleton(config)
    modules = [
        (name, module) for name, module in skeleton.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))
    ]
    stored = {} if source.gguf_path is None else stored_weights(source.gguf_path, skeleton)
    return {f"{name}.weight" for name, _ in modules} - {name for name, weight in stored.items() if weight.stays_packed}


def _round(tensor: LazyTensor, dtype: torch.dtype, bits: int) -> LazyTensor:
    """A tensor as training had it: in a type, and quantised if the bits are fewer."""

    def read(index: Index) -> Tensor:
        rows = tensor.read(index).to(dtype)
        quantised = quantise(rows, bits) if bits in OF_BITS else None
        return (rows if quantised is None else quantised.dequantise()).float()

    return LazyTensor(tensor.shape, read)


def _sequences(tokenizer: Any) -> list[list[int]]:
    """Texts and a chat, as ids."""
    texts = [TEXTS[1], TEXTS[7], TEXTS[10]]
    if getattr(tokenizer, "chat_template", None):
        texts.append(tokenizer.apply_chat_template([dict(m) for m in CHATS[1]], tokenize=False))
    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:MAX_TOKENS] for text in texts]


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of log-probabilities. Shape: (positions, vocabulary) each, (positions,) out."""
    return (np.exp(p) * (p - q)).sum(-1)
