"""A tokenizer for text in which people's words and a chat template's control tokens stand side by side.

    people's text --protect--> chat template --mark--> marked text --encode--> ids, in one pass

A control token is one that no text may spell: what the tokenizer marks as special, and other added tokens that the
chat template writes around its turns (`<|im_end|>`, `<s>`, `<|User|>`). In a copy of the tokenizer each has a name
with a random number in it, which no text can hold. `mark` writes these names where the template wrote the token; where
a person wrote `<|im_end|>` it stays ten characters. Added tokens that are neither, such as `<think>`, are vocabulary
that the model itself writes: they stay tokens wherever they stand, as in every inference engine.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from buleyean_rl.errors import ModelError

CHARACTERS_PER_TOKEN = 8  # of the piece of a long text that is tokenised first
UNSTABLE_TOKENS = 32  # at the end of a piece, which the rest of the text could change
TAIL_CHARACTERS = 200

_NUMBER = secrets.token_hex(8)
# Private use characters: normalizers leave them alone.
_GAP = f"\U0010fffc{_NUMBER}"
_MARK = f"\U0010fffd{_NUMBER}:"


class TokenizedText(NamedTuple):
    """A text in tokens.

    Args:
        ids: of all of it, or of a piece at its beginning.
        offsets: [start, end) characters of each token, if asked for.
        length: tokens of the whole text, estimated where only a piece was tokenised.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    length: int


class ControlTokens:
    """A fast tokenizer in which no text spells a control token.

    Args:
        tokenizer: of transformers.
        turns: what its chat template writes around turns; added tokens in it are control tokens.

    Attributes:
        names: of the control tokens.
        prefix: ids that the tokenizer puts before a text that no template has rendered, such as BOS.

    Raises:
        ModelError: it is no fast tokenizer.
    """

    def __init__(self, tokenizer: Any, turns: str = "") -> None:
        self._original = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(self._original, Tokenizer):
            raise ModelError("this tokenizer has no tokenizer.json: only fast tokenizers can be used")
        spec = json.loads(self._original.to_str())
        added = {token["content"] for token in spec["added_tokens"]}
        special = {token["content"] for token in spec["added_tokens"] if token["special"]}
        control = special | {content for content in added if content in turns}
        self.names = frozenset(control - _ordinary_tokens(spec["model"], control))
        self._marked = {name: f"{_MARK}{index}\U0010fffd" for index, name in enumerate(sorted(self.names))}
        self._lengths = sorted({len(name) for name in self.names}, reverse=True)
        self._first = re.compile(f"[{re.escape(''.join({name[0] for name in self.names}))}]" if self.names else "(?!)")
        self._backend = _rename_tokens(spec, self._marked)
        bare, full = (self._original.encode("a", add_special_tokens=special).ids for special in (False, True))
        self.prefix = full[: full.index(bare[0])] if bare and bare[0] in full else []
        for name, marked in self._marked.items():
            if self._backend.token_to_id(marked) != self._original.token_to_id(name):
                raise ModelError(f"the tokenizer has two ids for {name!r}: save it anew with transformers")

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """The [start, end) characters of the control tokens that a text spells."""
        last = 0
        for match in self._first.finditer(text):
            start = match.start()
            if start < last:
                continue
            # The tokenizer takes the leftmost and longest.
            ends = (start + length for length in self._lengths)
            if end := next((end for end in ends if text[start:end] in self.names), 0):
                yield start, end
                last = end

    def protect(self, text: str) -> str:
        """A person's text, with a gap in each control token that it spells, so that `mark` does not see it."""
        pieces, last = [], 0
        for start, _ in self.spans(text):
            pieces += [text[last : start + 1], _GAP]
            last = start + 1
        return "".join([*pieces, text[last:]])

    def mark(self, rendered: str) -> str:
        """The output of a chat template over protected texts, ready for `encode`."""
        pieces, last = [], 0
        for start, end in self.spans(rendered):
            pieces += [rendered[last:start], self._marked[rendered[start:end]]]
            last = end
        return "".join([*pieces, rendered[last:]]).replace(_GAP, "")

    def encode(self, texts: Sequence[str], limit: int, *, offsets: bool = False) -> list[TokenizedText]:
        """Tokenise people's texts and marked ones; of long texts the beginning.

        Args:
            texts: any number of them.
            limit: tokens of each that are wanted; where there are more, at least so many are right.
            offsets: whether to find the tokens' characters.
        """
        results: list[TokenizedText | None] = [None] * len(texts)
        characters = CHARACTERS_PER_TOKEN * (limit + UNSTABLE_TOKENS)
        while missing := [number for number, result in enumerate(results) if result is None]:
            pieces = [texts[number][:characters] for number in missing]
            encode_batch = self._backend.encode_batch if offsets else self._backend.encode_batch_fast
            for number, piece, encoding in zip(
                missing, pieces, encode_batch(pieces, add_special_tokens=False), strict=True
            ):
                whole, ids = len(texts[number]), encoding.ids
                if len(piece) < whole:
                    ids = ids[: max(0, len(ids) - UNSTABLE_TOKENS)]
                    if len(ids) < limit:
                        continue
                length = len(ids) if len(piece) == whole else round(len(encoding.ids) * whole / len(piece))
                results[number] = TokenizedText(ids, encoding.offsets[: len(ids)] if offsets else [], length)
            characters *= 4
        return [result for result in results if result is not None]


def tail(marked: str) -> str:
    """The end of a marked text, from its last control token on: how what follows is tokenised depends on it alone."""
    start = marked.rfind(_MARK)
    if start < 0 or len(marked) - start > TAIL_CHARACTERS + 2 * len(_MARK):
        start = max(0, len(marked) - TAIL_CHARACTERS)
    return marked[start:]


def _ordinary_tokens(model: dict[str, Any], names: Collection[str]) -> set[str]:
    """Those that ordinary text is made of, such as a "!" that pads: they cannot be told from text."""
    vocabulary = model.get("vocab", {})
    if model["type"] == "Unigram":  # what text is made of has a log-probability; control tokens have 0
        return {token for token, score in vocabulary if score < 0 and token in names}
    in_vocabulary = {name for name in names if name in vocabulary}
    merges = model.get("merges", []) if in_vocabulary else []
    merged = {"".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges}
    return {name for name in in_vocabulary if len(name) == 1 or name in merged}


def _rename_tokens(spec: dict[str, Any], new_names: dict[str, str]) -> Tokenizer:
    """A copy of a tokenizer in which some tokens have other names and the same ids."""
    model, vocabulary = spec["model"], spec["model"].get("vocab", {})
    if model["type"] == "Unigram":
        model["vocab"] = [[new_names.get(token, token), score] for token, score in vocabulary]
    else:
        model["vocab"] = {new_names.get(token, token): index for token, index in vocabulary.items()}
    if model.get("unk_token") in new_names:
        model["unk_token"] = new_names[model["unk_token"]]
    for token in spec["added_tokens"]:
        token["content"] = new_names.get(token["content"], token["content"])
    # The post-processor would put BOS around pieces and trim offsets.
    return Tokenizer.from_str(json.dumps(spec | {"post_processor": None, "truncation": None, "padding": None}))
