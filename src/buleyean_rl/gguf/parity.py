"""The parity gate: does a GGUF file behave in llama.cpp like the model it was made from?

Each check compares what transformers does with what llama.cpp does, from the outside in:

    tokens     the whole vocabulary, and the ids of texts that tokenizers trip over
    tensors    bit for bit what quantising the model gives, every one of them
    chat       the rendered template and the ids fed to the model
    ends       BOS before a text or not, EOS after it or not, generation stops where it should
    numbers    next-token log-probabilities at many positions

The numbers are compared with transformers running the *stored* weights, quantised and turned back, so the
tolerance has to cover llama.cpp's arithmetic only: it is as tight at four bits as at sixteen.
"""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jinja2 import TemplateError

from buleyean_rl.errors import EngineError, ExportError, ParityError
from buleyean_rl.gguf.adapters import Adapter
from buleyean_rl.gguf.architectures import original_context
from buleyean_rl.gguf.blueprint import Blueprint, of_model, parameters_of
from buleyean_rl.gguf.parity_probes import CHATS, TEXTS
from buleyean_rl.gguf.parity_report import ParityReport
from buleyean_rl.gguf.quantise import quantise
from buleyean_rl.gguf.reference import Reference
from buleyean_rl.gguf.tensors import Rows, in_gguf
from buleyean_rl.gguf.vocabulary import added_ends, chat_template
from buleyean_rl.inference.gguf_engines import DEFAULT, open_gguf
from buleyean_rl.inference.gguf_file import check_gguf
from buleyean_rl.inference.protocol import Adapter as Applied
from buleyean_rl.inference.protocol import GgufEngine
from gguf import GGMLQuantizationType, GGUFReader

POSITIONS = 8  # per sequence
TOP = 20  # log-probabilities per position
LONGEST = 160  # tokens per sequence
CONTEXT = 512  # tokens: room for the chats
# Mean KL, in nats, by which llama.cpp may differ from transformers on the same weights. It rounds activations
# to the type its kernels multiply with: 8 bits for quantised weights, half precision for f16. Measured on the
# bundled model: 0.0043 at most for the quantised types, 0.0001 for bf16; on random tiny models a tenth of that.
# Faults are far off: 0.04 for a rotation base ten times too large, 0.3 to 1.4 for unpermuted q and k.
TOLERANCE = {"F32": 1e-4, "F16": 1e-3, "BF16": 3e-3}
QUANTISED_TOLERANCE = 2e-2


class Computes(Protocol):
    """What knows a model's log-probabilities: `reference.Reference`, or a model in memory."""

    def logprobs(self, sequences: list[list[int]], lengths: list[list[int]]) -> list[np.ndarray]:
        """Of the next token after beginnings of sequences. Shape: per sequence (lengths, vocabulary)."""


def check_parity(model: Any, tokenizer: Any, path: Path | str, *, tolerance: float | None = None) -> ParityReport:
    """Compare a GGUF file, in llama.cpp, with the transformers model it was made from.

    Args:
        model: the merged model, in memory.
        tokenizer: its tokenizer.
        path: the GGUF file.
        tolerance: for the divergence, in nats; by the file's coarsest type if None.

    Raises:
        ParityError: something differs; the message says what, with the numbers.
    """
    return check_blueprint(of_model(model, tokenizer), path, tolerance=tolerance)


def check_blueprint(
    blueprint: Blueprint, path: Path | str, *, engine: str = DEFAULT, tolerance: float | None = None
) -> ParityReport:
    """Compare a GGUF file, in llama.cpp, with what it should be.

    Memory: transformers reads its weights from the file as it comes to them, so one weight in fp32 and the
    activations; besides that what llama.cpp needs, the file.

    Args:
        blueprint: what should be in the file.
        path: the GGUF file.
        engine: what to run it in, one of `engines.ENGINES`.
        tolerance: for the divergence, in nats; by the file's coarsest type if None.

    Raises:
        ParityError: something differs; the message says what, with the numbers.
    """
    with reading(path) as reader:
        tensors = {t.name: t for t in reader.tensors}
        _check_vocabulary(blueprint.tokenizer, reader)
        _check_tensors(blueprint.tensors, tensors)
        stored = {name: in_gguf(tensor) for name, tensor in tensors.items()}
        reference = None if blueprint.proof else Reference(blueprint.config, parameters_of(stored, blueprint.layouts))
        if tolerance is None:
            tolerance = _tolerance({t.tensor_type for t in tensors.values() if t.data.ndim > 1})
        with closing(open_gguf(path, engine, context=_context(blueprint.config), exact=True)) as llama:
            return compare(blueprint, reference, llama, reader, tolerance)


def check_adapter(
    base: Blueprint, planned: Blueprint, adapter: Adapter, base_path: Path, path: Path, *, engine: str = DEFAULT
) -> ParityReport:
    """Compare an adapter's file, applied to its base in llama.cpp, with the base's weights and the adapter merged.

    What is merged is the adapter as it was trained, and not what the file says of it: a file that is wrong in
    itself would otherwise agree with itself.

    Args:
        base: the base model's file.
        planned: what should be in the adapter's file.
        adapter: as trained.
        base_path: the base model's file.
        path: the adapter's file.
        engine: what to run them in, one of `engines.ENGINES`.

    Raises:
        ParityError: something differs; the message says what, with the numbers.
    """
    with reading(base_path) as reader, reading(path) as adapter_reader:
        _check_tensors(planned.tensors, {tensor.name: tensor for tensor in adapter_reader.tensors})
        stored = {tensor.name: in_gguf(tensor) for tensor in reader.tensors}
        reference = Reference(base.config, adapter.merged(parameters_of(stored, base.layouts)))
        kinds = {t.tensor_type for t in (*reader.tensors, *adapter_reader.tensors) if t.data.ndim > 1}
        settings = {"context": _context(base.config), "exact": True, "adapter": Applied(path)}
        with closing(open_gguf(base_path, engine, **settings)) as llama:
            return compare(base, reference, llama, reader, _tolerance(kinds))


def compare(
    blueprint: Blueprint,
    reference: Computes | None,
    engine: GgufEngine,
    reader: GGUFReader,
    tolerance: float = QUANTISED_TOLERANCE,
) -> ParityReport:
    """Everything that is seen from outside: text, chats, ends and numbers.

    Args:
        blueprint: what is to be seen.
        reference: what computes the numbers; None where the blueprint brings a proof of its own.
        engine: with the file in it.
        reader: of the file.
        tolerance: for the divergence, in nats.

    Raises:
        ParityError: something differs.
    """
    started, notes = time.monotonic(), list[str]()
    texts = _check_texts(blueprint.tokenizer, engine, notes)
    chats = _check_chats(blueprint.tokenizer, engine, notes)
    _check_ends(blueprint, engine, reader)
    if reference is None:
        assert blueprint.proof is not None
        notes.append("log-probabilities were compared in full precision; the tensors here are those, quantised")
        seconds = time.monotonic() - started
        return replace(blueprint.proof, texts=texts, chats=chats, notes=tuple(notes), seconds=seconds)
    sequences = [ids[: _longest(reader)] for ids in _sequences(blueprint.tokenizer, engine)]
    positions, divergence, largest = _check_numbers(reference, engine, sequences, tolerance)
    return ParityReport(
        texts=texts,
        chats=chats,
        tensors=len(blueprint.tensors),
        positions=positions,
        divergence=divergence,
        tolerance=tolerance,
        largest=largest,
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


@contextmanager
def reading(path: Path | str) -> Iterator[GGUFReader]:
    """A GGUF file, and whatever fails because it is none or a bad one as a ParityError."""
    try:
        check_gguf(path)
        yield GGUFReader(path)
    except EngineError as error:
        raise ParityError(f"llama.cpp cannot run the written file: {error}") from error
    except ParityError:
        raise
    except ExportError as error:
        raise ParityError(str(error)) from error
    except (ValueError, IndexError, KeyError) as error:
        raise ParityError(f"{path}: is not a GGUF file that can be read: {error}") from error


def _check_vocabulary(tokenizer: Any, reader: GGUFReader) -> None:
    """Every token of the tokenizer stands in the file at its id, and BOS and EOS are the same."""
    field = reader.fields.get("tokenizer.ggml.tokens")
    stored = field.contents() if field is not None else []
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if index >= len(stored) or stored[index] != token:
            found = repr(stored[index]) if index < len(stored) else "nothing"
            raise ParityError(f"vocabulary differs: token {index} is {token!r}, and {found} in the file")
    for name, expected in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        field = reader.fields.get(f"tokenizer.ggml.{name}_token_id")
        there = None if field is None else int(field.contents())
        if expected is not None and there != expected:
            raise ParityError(f"{name.upper()} differs: token {expected}, and {there} in the file")


def _check_texts(tokenizer: Any, engine: GgufEngine, notes: list[str]) -> int:
    """Token ids of the tricky texts and of every special token, as text and as tokens."""
    composes = _composes(tokenizer)
    if composes:
        notes.append("the tokenizer composes characters (NFC) before it splits them, llama.cpp does not")
    specials = sorted(set(tokenizer.all_special_tokens))
    texts = [*TEXTS, *specials, "x".join(specials), f" {' '.join(specials)}\n"]
    for text in texts:
        given = unicodedata.normalize("NFC", text) if composes else text
        for add_special in (False, True):
            expected = tokenizer(given, add_special_tokens=add_special, verbose=False)["input_ids"]
            _same_ids(given, expected, engine.tokenize(given, add_special=add_special))
    return len(texts)


def _check_chats(tokenizer: Any, engine: GgufEngine, notes: list[str]) -> int:
    """The rendered template, and the ids that are fed to the model."""
    if chat_template(tokenizer) is None:
        notes.append("there is no chat template; llama.cpp will use its own")
        return 0
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
            # llama.cpp takes a leading BOS away where it will add one itself.
            if rendered != text and (not added_ends(tokenizer)[0] or bos + rendered != text):
                raise ParityError(f"chat template renders differently: {_first_difference(text, rendered)}")
            compared += 1
        wanted = tokenizer(expected[-1], add_special_tokens=False)["input_ids"]
        fed = engine.prompt_ids(messages)
        if fed[1:] == wanted and fed[:1] == [tokenizer.bos_token_id]:
            note = "llama.cpp puts BOS before a chat; the chat template does not"
            if note not in notes:
                notes.append(note)
        else:
            _same_ids(expected[-1], wanted, fed)
    return compared


def _check_ends(blueprint: Blueprint, engine: GgufEngine, reader: GGUFReader) -> None:
    """Generation stops at every token that ends an answer, and not at others."""
    tokenizer, ends = blueprint.tokenizer, blueprint.ends
    expected = added_ends(tokenizer)
    for name, wanted in zip(("bos", "eos"), expected, strict=True):
        field = reader.fields.get(f"tokenizer.ggml.add_{name}_token")
        if field is not None and bool(field.contents()) != wanted:
            raise ParityError(f"add_{name}_token differs: {wanted}, and {field.contents()} in the file")
    for token in sorted(ends):
        if not engine.ends_at(token):
            raise ParityError(f"llama.cpp does not end an answer at token {token} ({_piece(tokenizer, token)})")
    for text in ("a", " the", "."):
        token = tokenizer(text, add_special_tokens=False)["input_ids"][-1]
        if token not in ends and engine.ends_at(token):
            raise ParityError(f"llama.cpp ends an answer at token {token} ({_piece(tokenizer, token)})")


def _sequences(tokenizer: Any, engine: GgufEngine) -> list[list[int]]:
    """Token ids to compare log-probabilities on: prose, code, chat, and one long enough for rotations to drift."""
    prose, code = engine.tokenize(TEXTS[1]), engine.tokenize(TEXTS[7])
    long = engine.tokenize(" ".join(TEXTS[1:3]) * 8)
    chat = engine.prompt_ids(CHATS[1]) if chat_template(tokenizer) else engine.tokenize(CHATS[1][0]["content"])
    bos = [tokenizer.bos_token_id] if added_ends(tokenizer)[0] else []
    return [bos + prose, bos + code, chat, bos + long]


def _check_numbers(
    reference: Computes, engine: GgufEngine, sequences: list[list[int]], tolerance: float
) -> tuple[int, float, float]:
    """Next-token log-probabilities: (positions compared, mean divergence, largest difference)."""
    lengths = [np.unique(np.linspace(1, len(ids), POSITIONS).astype(int)).tolist() for ids in sequences]
    divergences, largest, where = [], 0.0, ""
    for ids, chosen, expected in zip(sequences, lengths, reference.logprobs(sequences, lengths), strict=True):
        for length, row in zip(chosen, expected, strict=True):
            top = engine.top_logprobs(ids[:length], TOP)
            found, wanted = np.array(list(top.values())), row[list(top)]
            divergences.append(_divergence(found, wanted))
            at = int(np.abs(found - wanted).argmax())
            if not abs(found[at] - wanted[at]) <= largest:  # NaN is the largest
                largest = float(abs(found[at] - wanted[at]))
                where = f"token {list(top)[at]} after {length}: {wanted[at]:.4f}, and {found[at]:.4f} in llama.cpp"
    divergence = float(np.mean(divergences))
    if not divergence <= tolerance:
        raise ParityError(
            f"log-probabilities differ: {divergence:.5f} nats of KL on average, allowed are {tolerance:.5f}; "
            f"the largest difference is {largest:.4f} ({where})"
        )
    return len(divergences), divergence, largest


def _check_tensors(expected: Mapping[str, Rows], tensors: Mapping[str, Any]) -> None:
    """The file holds these tensors and no others, each bit for bit what quantising it gives."""
    for name, rows in expected.items():
        if name not in tensors:
            raise ParityError(f"tensor {name} is missing in the file")
        shape = tuple(int(n) for n in reversed(tensors[name].shape))
        if shape != rows.shape:
            raise ParityError(f"tensor {name} has shape {rows.shape}, and {shape} in the file")
        _same_bytes(name, rows, tensors[name])
    if extra := sorted(set(tensors) - set(expected)):
        raise ParityError(f"the file has tensors the model lacks: {', '.join(extra[:3])}")


def _same_bytes(name: str, rows: Rows, stored: Any) -> None:
    """Refuse a tensor of the file that is not what quantising the model's gives."""
    found = np.ascontiguousarray(stored.data).reshape(-1).view(np.uint8)
    at = wrong = 0
    for block in rows.blocks():
        try:
            wanted = np.ascontiguousarray(quantise(block, stored.tensor_type)).reshape(-1).view(np.uint8)
        except ExportError as error:
            raise ParityError(f"tensor {name}: {error}") from error
        part = found[at : at + wanted.size]
        wrong += int((wanted != part).sum()) if part.size == wanted.size else wanted.size
        at += wanted.size
    if wrong or at != found.size:
        raise ParityError(
            f"tensor {name} ({stored.tensor_type.name}) differs from the model's in {wrong} of {found.size} bytes"
        )


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) of log-probabilities, generalised to a part of the vocabulary: 0 only where they agree.

    Shape: (tokens,) each.
    """
    return float((np.exp(p) * (p - q) - np.exp(p) + np.exp(q)).sum())


def _longest(reader: GGUFReader) -> int:
    """The most tokens of a sequence: the model's context, less one to draw, if that is short."""
    arch = reader.fields["general.architecture"].contents()
    return min(LONGEST, int(reader.fields[f"{arch}.context_length"].contents()) - 1)


def _context(config: Any) -> int:
    """Room for the chats, within the part of the context where a stretched rotation is still the original one."""
    return min(CONTEXT, original_context(config))


def _tolerance(kinds: set[GGMLQuantizationType]) -> float:
    """The tolerance of the coarsest type among the matrices."""
    return max((TOLERANCE.get(kind.name, QUANTISED_TOLERANCE) for kind in kinds), default=QUANTISED_TOLERANCE)


def _same_ids(text: str, expected: list[int], found: list[int]) -> None:
    """Refuse different token ids."""
    if list(expected) != list(found):
        raise ParityError(f"token ids of {text[:60]!r} differ: {_first_difference(list(expected), list(found))}")


def _first_difference(expected: Any, found: Any) -> str:
    """Where two sequences part, in words, with a little of what follows."""
    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    if at is None:
        at = min(len(expected), len(found))
    return f"at {at}, {expected[at : at + 24]!r} in transformers and {found[at : at + 24]!r} in llama.cpp"


def _composes(tokenizer: Any) -> bool:
    """Whether a tokenizer normalises text to NFC."""
    return '"NFC"' in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("normalizer"))


def _piece(tokenizer: Any, token: int) -> str:
    """A token's text, for messages."""
    return repr(tokenizer.convert_ids_to_tokens(token))
