"""A transformers tokenizer as GGUF metadata.

llama.cpp has its own tokenizers and is told which one to use: `gpt2` for byte-level BPE, with the name
of a pre-tokenizer (how text is split before merging), and `llama` for BPE on characters with byte
fallback. What a tokenizer does is read off its fast implementation's own description. The parity gate
compares token ids afterwards, so a wrong guess here cannot leave the house.
"""

from __future__ import annotations

import json
from typing import Any

from buleyean_rl.errors import ExportError
from buleyean_rl.gguf.metadata import Value
from buleyean_rl.models import pre_tokenizers
from gguf import TokenType


def vocabulary(tokenizer: Any, rows: int) -> dict[str, Value]:
    """The `tokenizer.*` metadata of a tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer.
        rows: of the embedding matrix; ids beyond the tokenizer's are filled up with unused tokens.

    Raises:
        ExportError: a kind of tokenizer that llama.cpp has no equal of, or more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError("only fast tokenizers can be exported; this one has no tokenizer.json")
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE":
        raise ExportError(f"cannot export a tokenizer of type {spec['model']['type']}; only BPE can be")
    tokens = _tokens(tokenizer, rows)
    kinds = _kinds(tokenizer, tokens)
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    values: dict[str, Value] = {}
    if spec["model"].get("byte_fallback"):
        values["tokenizer.ggml.model"] = "llama"
        values["tokenizer.ggml.pre"] = "default"
        values["tokenizer.ggml.scores"] = _scores(tokens, spec["model"]["merges"])
        values["tokenizer.ggml.add_space_prefix"] = _adds_space(spec)
    else:
        values["tokenizer.ggml.model"] = "gpt2"
        values["tokenizer.ggml.pre"] = pre_tokenizer(spec)
        values["tokenizer.ggml.merges"] = merges
        values["tokenizer.ggml.add_space_prefix"] = False
    values["tokenizer.ggml.tokens"] = tokens
    values["tokenizer.ggml.token_type"] = [int(kind) for kind in kinds]
    return values | special_ids(tokenizer)


def special_ids(tokenizer: Any) -> dict[str, Value]:
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
    values["tokenizer.ggml.add_bos_token"], values["tokenizer.ggml.add_eos_token"] = added_ends(tokenizer)
    if (template := chat_template(tokenizer)) is not None:
        values["tokenizer.chat_template"] = template
    return values


def pre_tokenizer(spec: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level BPE splits text.

    Args:
        spec: the fast tokenizer's description, as in tokenizer.json.

    Raises:
        ExportError: a way of splitting that is not known here.
    """
    split = spec["pre_tokenizer"]
    if (name := pre_tokenizers.name_of(split)) is None:
        raise ExportError(
            f"cannot export this tokenizer: llama.cpp's name for how it splits text is not known, only those of "
            f"{', '.join(pre_tokenizers.NAMES)}; it has {json.dumps(split)[:200]}"
        )
    return name


def added_ends(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a tokenizer puts BOS before and EOS after a text, by trying it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    before = full[: max(0, len(full) - len(bare))] == [tokenizer.bos_token_id] or full[:1] != bare[:1]
    return before, full[-1:] != bare[-1:]


def chat_template(tokenizer: Any) -> str | None:
    """The default chat template; None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _tokens(tokenizer: Any, rows: int) -> list[str]:
    """Every token's text by id, the gaps filled."""
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    if known and max(known) >= rows:
        raise ExportError(
            f"the tokenizer has {max(known) + 1} tokens and the model's embedding {rows} rows: "
            "they do not belong together"
        )
    return [known.get(index, f"[PAD{index}]") for index in range(rows)]


def _kinds(tokenizer: Any, tokens: list[str]) -> list[TokenType]:
    """Every token's type: what llama.cpp parses in text, prints, or never makes."""
    known = set(tokenizer.get_vocab().values())
    added = tokenizer.added_tokens_decoder
    fallback = any(token == "<0x0A>" for token in tokens)
    kinds = []
    for index, token in enumerate(tokens):
        if index not in known:
            kinds.append(TokenType.UNUSED)
        elif fallback and index == tokenizer.unk_token_id:
            kinds.append(TokenType.UNKNOWN)
        elif index in added:
            kinds.append(TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED)
        elif fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds.append(TokenType.BYTE)
        else:
            kinds.append(TokenType.NORMAL)
    return kinds


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Scores that make llama.cpp merge in the order of the merge table: the earlier the higher."""
    rank: dict[str, int] = {}
    for order, merge in enumerate(merges):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), order)
    return [-float(rank[token]) if token in rank else 0.0 for token in tokens]


def _adds_space(spec: dict[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space before the text."""
    text = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "always"' in text or '"prepend_scheme": "first"' in text
