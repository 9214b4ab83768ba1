"""The checks of the parity gate, one function each: what transformers does against what the file or llama.cpp does.

A check raises ParityError where they differ. See `parity` for the list, and for what calls them.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
from jinja2 import TemplateError

from buleyean_rl.errors import ExportError, ParityError
from buleyean_rl.gguf.parity_probes import CHATS, TEXTS
from buleyean_rl.gguf.quantise import quantise
from buleyean_rl.gguf.tensors import LazyTensor, torch_shape
from buleyean_rl.gguf.vocabulary import adds_bos_and_eos, chat_template
from buleyean_rl.inference.protocol import GgufEngine
from gguf import GGUFReader

POSITIONS = 8  # compared per sequence
TOP_TOKENS = 20  # compared per position
MAX_TOKENS = 160  # of a sequence


class LogprobModel(Protocol):
    """Computes log-probabilities: a `StreamingModel`, or a model in memory."""

    def logprobs(self, sequences: list[list[int]], lengths: list[list[int]]) -> list[np.ndarray]:
        """Of the next token after prefixes of sequences. Shape: per sequence (lengths, vocabulary)."""


def check_vocabulary(tokenizer: Any, reader: GGUFReader) -> None:
    """Every token of the tokenizer stands in the file at its id, and BOS and EOS are the same."""
    field = reader.fields.get("tokenizer.ggml.tokens")
    stored = field.contents() if field is not None else []
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if index >= len(stored) or stored[index] != token:
            other = repr(stored[index]) if index < len(stored) else "nothing"
            raise ParityError(f"vocabulary differs: token {index} is {token!r}, and {other} in the file")
    for name, expected in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        field = reader.fields.get(f"tokenizer.ggml.{name}_token_id")
        actual = None if field is None else int(field.contents())
        if expected is not None and actual != expected:
            raise ParityError(f"{name.upper()} differs: token {expected}, and {actual} in the file")


def check_tensors(expected: Mapping[str, LazyTensor], tensors: Mapping[str, Any]) -> None:
    """The file holds these tensors and no others, each bit for bit what quantising it gives.

    Args:
        expected: by name.
        tensors: the file's, of a `gguf.GGUFReader`.
    """
    for name, tensor in expected.items():
        if name not in tensors:
            raise ParityError(f"tensor {name} is missing in the file")
        shape = torch_shape(tensors[name])
        if shape != tensor.shape:
            raise ParityError(f"tensor {name} has shape {tensor.shape}, and {shape} in the file")
        _check_bytes(name, tensor, tensors[name])
    if extra := sorted(set(tensors) - set(expected)):
        raise ParityError(f"the file has tensors the model lacks: {', '.join(extra[:3])}")


def check_texts(tokenizer: Any, engine: GgufEngine, notes: list[str]) -> int:
    """Token ids of the tricky texts and of every special token, as text and as tokens; the number of texts."""
    composes = _composes_characters(tokenizer)
    if composes:
        notes.append("the tokenizer composes characters (NFC) before it splits them, llama.cpp does not")
    specials = sorted(set(tokenizer.all_special_tokens))
    texts = [*TEXTS, *specials, "x".join(specials), f" {' '.join(specials)}\n"]
    for original in texts:
        text = unicodedata.normalize("NFC", original) if composes else original
        for add_special in (False, True):
            expected = tokenizer(text, add_special_tokens=add_special, verbose=False)["input_ids"]
            _check_ids(text, expected, engine.tokenize(text, add_special=add_special))
    return len(texts)


def check_chats(tokenizer: Any, engine: GgufEngine, notes: list[str]) -> int:
    """The rendered template, and the ids that are fed to the model; the number of renderings compared."""
    if chat_template(tokenizer) is None:
        notes.append("there is no chat template; llama.cpp will use its own")
        return 0
    adds_bos, _ = adds_bos_and_eos(tokenizer)
    compared = 0
    for messages in CHATS:
        try:
            expected = [
                tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=prompt)
                for prompt in (False, True)
            ]
        except TemplateError:
            continue  # a template may refuse a system message
        for prompt, text in enumerate(expected):
            rendered = engine.render(messages, add_generation_prompt=bool(prompt))
            bos = tokenizer.bos_token or ""
            # llama.cpp takes a leading BOS away where it will add one itself
            if rendered != text and (not adds_bos or bos + rendered != text):
                raise ParityError(f"chat template renders differently: {_first_difference(text, rendered)}")
            compared += 1
        expected_ids = tokenizer(expected[-1], add_special_tokens=False)["input_ids"]
        ids = engine.prompt_ids(messages)
        if ids[1:] == expected_ids and ids[:1] == [tokenizer.bos_token_id]:
            note = "llama.cpp puts BOS before a chat; the chat template does not"
            if note not in notes:
                notes.append(note)
        else:
            _check_ids(expected[-1], expected_ids, ids)
    return compared


def check_ends(tokenizer: Any, end_tokens: Collection[int], engine: GgufEngine, reader: GGUFReader) -> None:
    """Generation stops at every token that ends an answer, and not at others."""
    for name, expected in zip(("bos", "eos"), adds_bos_and_eos(tokenizer), strict=True):
        field = reader.fields.get(f"tokenizer.ggml.add_{name}_token")
        if field is not None and bool(field.contents()) != expected:
            raise ParityError(f"add_{name}_token differs: {expected}, and {field.contents()} in the file")
    for token in sorted(end_tokens):
        if not engine.is_end_token(token):
            text = tokenizer.convert_ids_to_tokens(token)
            raise ParityError(f"llama.cpp does not end an answer at token {token} ({text!r})")
    for probe in ("a", " the", "."):
        token = tokenizer(probe, add_special_tokens=False)["input_ids"][-1]
        if token not in end_tokens and engine.is_end_token(token):
            text = tokenizer.convert_ids_to_tokens(token)
            raise ParityError(f"llama.cpp ends an answer at token {token} ({text!r})")


def check_numbers(
    reference: LogprobModel, tokenizer: Any, engine: GgufEngine, reader: GGUFReader, tolerance: float
) -> tuple[int, float, float]:
    """Next-token log-probabilities of the likeliest tokens.

    Returns:
        Positions compared; mean KL(llama.cpp || reference) in nats; largest difference of a log-probability in nats.
    """
    sequences = [ids[: _max_tokens(reader)] for ids in _sequences(tokenizer, engine)]
    lengths = [np.unique(np.linspace(1, len(ids), POSITIONS).astype(int)).tolist() for ids in sequences]
    divergences, largest, place = [], 0.0, ""
    for ids, prefixes, rows in zip(sequences, lengths, reference.logprobs(sequences, lengths), strict=True):
        for length, row in zip(prefixes, rows, strict=True):
            top = engine.top_logprobs(ids[:length], TOP_TOKENS)
            tokens, actual = list(top), np.array(list(top.values()))
            expected = row[tokens]
            divergences.append(_kl(actual, expected))
            worst = int(np.abs(actual - expected).argmax())
            difference = float(abs(actual[worst] - expected[worst]))
            if not difference <= largest:  # NaN is the largest
                largest = difference
                place = (
                    f"token {tokens[worst]} after {length}: {expected[worst]:.4f}, and {actual[worst]:.4f} in llama.cpp"
                )
    divergence = float(np.mean(divergences))
    if not divergence <= tolerance:
        raise ParityError(
            f"log-probabilities differ: {divergence:.5f} nats of KL on average, allowed are {tolerance:.5f}; "
            f"the largest difference is {largest:.4f} ({place})"
        )
    return len(divergences), divergence, largest


def _check_bytes(name: str, tensor: LazyTensor, stored: Any) -> None:
    """A tensor of the file is what quantising the model's gives."""
    stored_bytes = np.ascontiguousarray(stored.data).reshape(-1).view(np.uint8)
    start = wrong = 0
    for block in tensor.blocks():
        try:
            expected = np.ascontiguousarray(quantise(block, stored.tensor_type)).reshape(-1).view(np.uint8)
        except ExportError as error:
            raise ParityError(f"tensor {name}: {error}") from error
        part = stored_bytes[start : start + expected.size]
        wrong += int((expected != part).sum()) if part.size == expected.size else expected.size
        start += expected.size
    if wrong or start != stored_bytes.size:
        raise ParityError(
            f"tensor {name} ({stored.tensor_type.name}) differs from the model's in {wrong} of "
            f"{stored_bytes.size} bytes"
        )


def _sequences(tokenizer: Any, engine: GgufEngine) -> list[list[int]]:
    """Prose, code, a chat, and a text long enough for rotations to drift."""
    prose, code = engine.tokenize(TEXTS[1]), engine.tokenize(TEXTS[7])
    long = engine.tokenize(" ".join(TEXTS[1:3]) * 8)
    chat = engine.prompt_ids(CHATS[1]) if chat_template(tokenizer) else engine.tokenize(CHATS[1][0]["content"])
    bos = [tokenizer.bos_token_id] if adds_bos_and_eos(tokenizer)[0] else []
    return [bos + prose, bos + code, chat, bos + long]


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) of log-probabilities, generalised to a part of the vocabulary: 0 only where they agree.

    Shape: (tokens,) each.
    """
    return float((np.exp(p) * (p - q) - np.exp(p) + np.exp(q)).sum())


def _max_tokens(reader: GGUFReader) -> int:
    """Of a sequence: at most the model's context, less the token that is drawn."""
    architecture = reader.fields["general.architecture"].contents()
    return min(MAX_TOKENS, int(reader.fields[f"{architecture}.context_length"].contents()) - 1)


def _check_ids(text: str, expected: list[int], actual: list[int]) -> None:
    if list(expected) != list(actual):
        raise ParityError(f"token ids of {text[:60]!r} differ: {_first_difference(list(expected), list(actual))}")


def _first_difference(expected: Any, actual: Any) -> str:
    """Where two sequences part, with a little of what follows."""
    at = next((i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b), None)
    if at is None:
        at = min(len(expected), len(actual))
    return f"at {at}, {expected[at : at + 24]!r} in transformers and {actual[at : at + 24]!r} in llama.cpp"


def _composes_characters(tokenizer: Any) -> bool:
    return '"NFC"' in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("normalizer"))
