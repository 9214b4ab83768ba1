"""What transformers loads without a word is refused: weights missing, left over, of another shape, not finite.

what from_pretrained reports --check_report--> --check_tied, check_finite--> the model that its files mean
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from buleyean_rl.errors import ModelError
from buleyean_rl.models.model_folder import StoredTensor
from buleyean_rl.system.wording import counted

# Saved by old versions, or of parts that a causal language model does without.
_NO_WEIGHT = re.compile(r"rotary_emb\.inv_freq|masked_bias|\.attn(ention)?\.bias$|vision|visual|audio|mtp")
_OF_A_LAYER = re.compile(r"(^|\.)(layers|h|blocks|block)\.\d+\.")


def check_report(name: str, report: Mapping[str, Any]) -> None:
    """Check what `from_pretrained` says of the weights it loaded.

    Args:
        name: of the model.
        report: its `output_loading_info`.

    Raises:
        ModelError: weights are missing, left over or of another shape.
    """
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{name}: its files lack {list_names(missing)}: copy or download it again")
    for tensor, stored, expected in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"{name}: {tensor} is {tuple(stored)} in its files, and {tuple(expected)} by its configuration: "
            "they do not belong together"
        )
    surplus = sorted(key for key in report["unexpected_keys"] if _OF_A_LAYER.search(key) and not _NO_WEIGHT.search(key))
    if surplus:
        raise ModelError(
            f"{name}: its files hold {list_names(surplus)}, which its configuration has no place for: "
            "they do not belong together"
        )
    if report["error_msgs"]:
        raise ModelError(f"{name}: {str(report['error_msgs'][0]).splitlines()[0]}")


def list_names(names: Collection[str], shown: int = 3) -> str:
    """A few of the names, and how many others there are."""
    few = ", ".join(sorted(names)[:shown])
    return few if len(names) <= shown else f"{few} and {counted(len(names) - shown, 'other')}"


def check_tied(name: str, model: Any, stored: Mapping[str, StoredTensor]) -> None:
    """Check that a model whose configuration ties its output head to its embedding has no other head in its files.

    Raises:
        ModelError: it has, so that its configuration and its weights mean two models.
    """
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): path for path, module in model.named_modules()}
    if head is None or id(head) not in names or id(embedding) not in names:
        return
    head_name, embedding_name = f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight"
    if head_name in stored and embedding_name in stored and not _are_equal(head_name, embedding_name, stored):
        raise ModelError(
            f"{name}: config.json ties the output head to the embedding, and its files hold another head, {head_name}: "
            'set "tie_word_embeddings": false there to keep it, or take it out of the file'
        )


def _are_equal(first: str, second: str, stored: Mapping[str, StoredTensor]) -> bool:
    if stored[first].shape != stored[second].shape:
        return False
    parts = []
    for tensor in (first, second):
        with safe_open(stored[tensor].path, framework="pt") as file:
            parts.append(file.get_tensor(tensor))
    return bool(torch.equal(*parts))


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that all numbers of a model are finite.

    Raises:
        ModelError: a tensor holds NaN or infinity.
    """
    for tensor, values in tensors.items():
        if not is_finite(values):
            raise ModelError(f"{name}: {tensor} holds NaN or infinity: copy or download it again")


def is_finite(values: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity: in one pass, without a tensor of its size."""
    if not values.numel() or values.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return True
    return bool(torch.stack(torch.aminmax(values.detach())).isfinite().all())


def check_token_ids(name: str, tokenizer: Any, rows: int) -> None:
    """Check that every token of a tokenizer has a row in the embedding.

    Raises:
        ModelError: it has more.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"{name}: its tokenizer has {counted(largest + 1, 'token')}, such as {token!r}, and its embedding "
            f"{counted(rows, 'row')}: "
            "they do not belong together"
        )
