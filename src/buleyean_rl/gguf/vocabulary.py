"""A transformers tokenizer as GGUF metadata.

    fast tokenizer's own description --> tokens, types, merges or scores, special ids, chat template

llama.cpp has its own tokenizers: `gpt2` for byte-level BPE, with the name of a pre-tokenizer (how text is split before
merging), and `llama` for BPE on characters with byte fallback. Which one it is is read off the tokenizer's
description; the parity gate compares token ids afterwards.
"""

from __future__ import annotations

import json
import re
from typing import Any

from buleyean_rl.errors import ExportError
from buleyean_rl.gguf.metadata import Value
from buleyean_rl.models import pre_tokenizers
from buleyean_rl.system.wording import counted
from gguf import TokenType

_PHI_3_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>")
_PHI_3 = re.compile(r"(phi)-?3", re.IGNORECASE)


def tokenizer_metadata(tokenizer: Any, size: int) -> dict[str, Value]:
    """The `tokenizer.*` metadata of a tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer.
        size: rows of the embedding matrix; ids beyond the tokenizer's become unused tokens.

    Raises:
        ExportError: a kind of tokenizer that llama.cpp lacks, or more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError("only fast tokenizers can be exported; this one has no tokenizer.json")
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE":
        raise ExportError(f"cannot export a tokenizer of type {spec['model']['type']}; only BPE can be")
    tokens = _tokens(tokenizer, size)
    values: dict[str, Value] = {}
    if spec["model"].get("byte_fallback"):
        values["tokenizer.ggml.model"] = "llama"
        values["tokenizer.ggml.pre"] = "default"
        values["tokenizer.ggml.scores"] = _scores(tokens, spec["model"]["merges"])
        values["tokenizer.ggml.add_space_prefix"] = _adds_space_prefix(spec)
    else:
        values["tokenizer.ggml.model"] = "gpt2"
        values["tokenizer.ggml.pre"] = pre_tokenizer_name(spec)
        merges = spec["model"]["merges"]
        values["tokenizer.ggml.merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        values["tokenizer.ggml.add_space_prefix"] = False
    values["tokenizer.ggml.tokens"] = tokens
    values["tokenizer.ggml.token_type"] = [int(token_type) for token_type in _token_types(tokenizer, tokens)]
    return values | special_token_metadata(tokenizer)


def special_token_metadata(tokenizer: Any) -> dict[str, Value]:
    """The metadata for BOS, EOS, padding and unknown tokens, and the chat template."""
    values: dict[str, Value] = {}
    for key, token in (
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("padding", tokenizer.pad_token_id),
        ("unknown", tokenizer.unk_token_id),
    ):
        if token is not None:
            values[f"tokenizer.ggml.{key}_token_id"] = int(token)
    values["tokenizer.ggml.add_bos_token"], values["tokenizer.ggml.add_eos_token"] = adds_bos_and_eos(tokenizer)
    if (template := chat_template(tokenizer)) is not None:
        values["tokenizer.chat_template"] = template
    return values


def pre_tokenizer_name(spec: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level BPE splits text.

    Args:
        spec: the fast tokenizer's description, as in tokenizer.json.

    Raises:
        ExportError: llama.cpp has no name for it, as far as this package can tell.
    """
    split = spec["pre_tokenizer"]
    if (name := pre_tokenizers.find_name(split)) is None:
        raise ExportError(
            f"cannot export this tokenizer: llama.cpp's name for how it splits text is not known, only those of "
            f"{', '.join(pre_tokenizers.NAMES)}; it has {json.dumps(split)[:200]}"
        )
    return name


def adds_bos_and_eos(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a tokenizer puts BOS before and EOS after a text, by trying it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    adds_bos = full[: max(0, len(full) - len(bare))] == [tokenizer.bos_token_id] or full[:1] != bare[:1]
    return adds_bos, full[-1:] != bare[-1:]


def name_for_llama_cpp(name: str | None, tokenizer: Any) -> str | None:
    """A model's name that has "Phi-3" in it where control tokens take the white space after them, and only there.

    GGUF has no place for that; llama.cpp (`llama-vocab.cpp`) concludes it from phi-3 or phi3 in `general.name`.
    """
    takes_space = any(token.rstrip and token.special for token in tokenizer.added_tokens_decoder.values())
    if takes_space and not all(token in tokenizer.get_vocab() for token in _PHI_3_TOKENS):
        return name  # llama.cpp does not load such a file by that name; the parity gate says what differs
    has_name = name is not None and _PHI_3.search(name) is not None
    if takes_space and not has_name:
        return "Phi-3" if name is None else f"{name} (Phi-3)"
    return _PHI_3.sub(r"\1 3", name) if name is not None and has_name and not takes_space else name


def chat_template(tokenizer: Any) -> str | None:
    """The default chat template; None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _tokens(tokenizer: Any, size: int) -> list[str]:
    """Every token's text by id; ids without a token are filled in."""
    token_by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if token_by_id and max(token_by_id) >= size:
        raise ExportError(
            f"the tokenizer has {counted(max(token_by_id) + 1, 'token')} and the model's embedding "
            f"{counted(size, 'row')}: they do not belong together"
        )
    return [token_by_id.get(index, f"[PAD{index}]") for index in range(size)]


def _token_types(tokenizer: Any, tokens: list[str]) -> list[TokenType]:
    """Every token's type: what llama.cpp parses in text, prints, or never makes."""
    ids = set(tokenizer.get_vocab().values())
    added = tokenizer.added_tokens_decoder
    has_fallback = any(token == "<0x0A>" for token in tokens)
    types = []
    for index, token in enumerate(tokens):
        if index not in ids:
            types.append(TokenType.UNUSED)
        elif has_fallback and index == tokenizer.unk_token_id:
            types.append(TokenType.UNKNOWN)
        elif index in added:
            types.append(TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED)
        elif has_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return types


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Scores that make llama.cpp merge in the order of the merge table: the earlier the higher."""
    rank: dict[str, int] = {}
    for order, merge in enumerate(merges):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), order)
    return [-float(rank[token]) if token in rank else 0.0 for token in tokens]


def _adds_space_prefix(spec: dict[str, Any]) -> bool:
    text = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "always"' in text or '"prepend_scheme": "first"' in text
