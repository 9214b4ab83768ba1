"""The shapes rejections come in, one small generator each: a row in, its records out.

A converter checks only what it uses: the text of an answer nobody rejected is never looked at. What it
leaves out on purpose it counts in `Discards`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

from buleyean_rl.errors import UsageError
from buleyean_rl.importers.scores import (
    Choices,
    cells,
    is_bad,
    trace_answer,
    trace_prompt,
    trace_scores,
    without_last_answers,
)
from buleyean_rl.records import (
    Messages,
    RejectionRecord,
    Row,
    make_record,
    parse_messages,
    parse_record,
    parse_text,
    pick,
    rejected_answers,
)
from buleyean_rl.records.record import fail, keys_of, kind_of

DEFAULT = Choices()
PROMPTS = ("prompt", "instruction", "question", "messages")


@dataclass
class Discards:
    """What importing left out on purpose.

    Args:
        chosen_discarded: answers that were chosen, accepted, or never rejected.
        ties: pairs of answers with equal scores, which are no rejection.
        without_rejection: rows in which nothing was rejected.
        duplicates_folded: rejected answers that repeat another one of their row.
        same_as_chosen: rows that reject the very text they choose.
    """

    chosen_discarded: int = 0
    ties: int = 0
    without_rejection: int = 0
    duplicates_folded: int = 0
    same_as_chosen: int = 0


@dataclass(frozen=True)
class Format:
    """One shape of row.

    Args:
        name: what `--format` calls it.
        keys: the keys it is known by, for error messages.
        matches: whether a row looks like it.
        convert: the records of a row, given the row and the `Discards` to count in.
    """

    name: str
    keys: str
    matches: Callable[[Row], bool]
    convert: Callable[..., Iterator[RejectionRecord]]


def from_record(row: Row, discards: Discards) -> Iterator[RejectionRecord]:
    """Canonical records, and the data card's `rejected` without counts."""
    record = parse_record(row)
    discards.duplicates_folded += len(rejected_answers(row)) - len(record.rejected_responses)
    yield record


def from_pair(row: Row, discards: Discards) -> Iterator[RejectionRecord]:
    """A chosen and a rejected answer: the chosen one is discarded.

    Answers are texts beside a prompt, message lists beside a prompt, or whole conversations that share
    everything but their last message, as messages or as a text of `Human:` and `Assistant:` (HH-RLHF).
    """
    row = conversing(row)
    prompt, answers = pair_answers(row)
    yield _record(discards, prompt, answers)
    chosen = pick(row, "chosen")
    if chosen is not None:
        discards.chosen_discarded += 1
        discards.same_as_chosen += _last_text(chosen) in answers


def pair_answers(row: Row, name: str = "rejected", other: str = "chosen") -> tuple[Any, list[Any]]:
    """The prompt of a pair, and the answers of one of its two sides, unchecked.

    Args:
        row: see `from_pair`.
        name: of that side.
        other: of the other, which is looked at only where the prompt is the part that both share.
    """
    answer, beside = pick(row, name), pick(row, other)
    if answer is None:
        fail(f"has no {name} answer (its keys: {keys_of(row)})")
    if not _is_messages(answer):
        return prompt_of(row), [answer] if isinstance(answer, str) else answer
    context, text = _split_answer(answer, name)
    if context and context[0][0] == "assistant":
        fail(f"{name} is more than one answer: which of them was {name} is unclear")
    if context and beside is not None and _split_answer(beside, other)[0] != context:
        fail(f"{other} and {name} part ways before their last answers: which was {name} is unclear")
    return _as_prompt(context) if context else prompt_of(row), [text]


def conversing(row: Row) -> Row:
    """A pair without a prompt, its texts that are whole conversations as messages."""
    if not row.keys().isdisjoint(PROMPTS):
        return row
    return {**row, **{side: _messages_of(row[side]) for side in ("chosen", "rejected") if side in row}}


def _messages_of(value: Any) -> Any:
    """The messages of a text in which each turn starts with its speaker; anything else as it is."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", value) if isinstance(value, str) else (value,)
    if before or not turns:
        return value
    roles = ({"Human": "user", "Assistant": "assistant"}[speaker] for speaker in turns[::2])
    return [{"role": role, "content": text.strip()} for role, text in zip(roles, turns[1::2], strict=True)]


def from_label(row: Row, discards: Discards) -> Iterator[RejectionRecord]:
    """An answer and a label (KTO): true is discarded, false is a rejection."""
    if label_of(row):
        discards.chosen_discarded += 1
        discards.without_rejection += 1
        return
    prompt, answer = labelled_answer(row)
    yield _record(discards, prompt, [answer])


def label_of(row: Row) -> bool:
    """The label of a KTO row: whether its answer was accepted."""
    label = row.get("label")
    if not isinstance(label, bool):
        fail(f"label is {kind_of(label)}: it must be true (accepted) or false (rejected)")
    return label


def labelled_answer(row: Row) -> tuple[Any, str]:
    """The prompt of a KTO row, unchecked, and its answer."""
    completion = pick(row, "completion", "response")
    if completion is not None:
        return prompt_of(row), _only_answer(completion, "completion")
    context, answer = _split_answer(pick(row, "messages", "prompt"), "messages")
    return _as_prompt(context), answer


def from_candidates(row: Row, discards: Discards) -> Iterator[RejectionRecord]:
    """Several answers to one prompt, with the rejections of each already counted, or with scores."""
    yield from _counted(row, discards, *tallied(row, discards))


def tallied(row: Row, discards: Discards) -> tuple[list[Row], list[int], Any]:
    """The candidates of a row, how often each was rejected, and in how many rounds; by scores without counts."""
    candidates = candidates_of(row)
    tallies = [pick(candidate, "rejection_count", "rejectionCount") for candidate in candidates]
    if all(tally is None for tally in tallies):
        return scored(row, discards)
    for k, tally in enumerate(tallies):
        if not isinstance(tally, int) or isinstance(tally, bool) or tally < 0:
            fail(f"rejection_count of candidate {k} is {kind_of(tally)}: it must be a whole number, 0 or more")
    return candidates, tallies, pick(row, "total_rounds", "totalRounds")


def from_scores(row: Row, discards: Discards) -> Iterator[RejectionRecord]:
    """Several scored answers to one prompt."""
    yield from _counted(row, discards, *scored(row, discards))


def scored(row: Row, discards: Discards) -> tuple[list[Row], list[int], int]:
    """The candidates of a row by their scores: each pair is a round, and the lower score loses it.

    With K answers each takes part in K - 1 rounds, so T = K - 1. A tie rejects neither.
    """
    candidates = candidates_of(row)
    scores = [_score(candidate, k, row) for k, candidate in enumerate(candidates)]
    losses = [sum(score < other for other in scores) for score in scores]
    discards.ties += sum(a == b for a, b in combinations(scores, 2))
    return candidates, losses, max(1, len(candidates) - 1)


def from_open_webui(row: Row, discards: Discards) -> Iterator[RejectionRecord]:
    """Open WebUI: a row of its feedback export, or of its chat export; thumbs down are the rejections."""
    feedback = row.get("data")
    if isinstance(feedback, Mapping):
        snapshot = row.get("snapshot")
        places = (_path(snapshot, "chat", "chat"), _path(snapshot, "chat"), snapshot)  # by version
        chat = next((place for place in places if _path(place, "history")), None)
        messages = _path(chat, "history", "messages")
        rated = [(_path(row, "meta", "message_id"), feedback.get("rating"))]
    else:
        chat = row.get("chat")
        messages = _path(chat, "history", "messages")
        named = messages.items() if isinstance(messages, Mapping) else ()
        rated = [(name, _path(message, "annotation", "rating")) for name, message in named]
    down = [name for name, rating in rated if rating in (-1, "-1")]
    system = _path(chat, "params", "system")
    discards.chosen_discarded += sum(rating in (1, "1") for _, rating in rated)
    discards.without_rejection += not down
    for name in down:
        if not isinstance(messages, Mapping) or not isinstance(name, str) or name not in messages:
            fail("is a thumbs down without its conversation: export the feedback with its chat snapshots")
        thread = _thread(messages, name)
        if isinstance(system, str) and system.strip():
            thread.insert(0, {"role": "system", "content": system})
        context, answer = _split_answer(thread, "the conversation")
        yield _record(discards, _as_prompt(context), [answer])


def from_trace(row: Row, discards: Discards, choices: Choices = DEFAULT) -> Iterator[RejectionRecord]:
    """A logged call with scores, as LangSmith and Langfuse export them: of its n scores, those that are bad count."""
    scores = trace_scores(row, choices)
    bad = sum(is_bad(value, choices.below, f"the score {name}") for name, value in scores)
    if not bad:
        discards.chosen_discarded += bool(scores)
        discards.without_rejection += 1
        return
    answer = trace_answer(pick(row, "output", "outputs"))
    prompt = without_last_answers(trace_prompt(pick(row, "input", "inputs")))
    yield _record(discards, prompt, [answer], [bad], len(scores))


def from_columns(row: Row, discards: Discards, choices: Choices = DEFAULT) -> Iterator[RejectionRecord]:
    """A table's row, its columns named by the user; without a score every row is a rejection."""
    found = dict(cells(row, choices))
    if "score" in found and not is_bad(found["score"], choices.below, f"column {choices.columns['score']!r}"):
        discards.chosen_discarded += 1
        discards.without_rejection += 1
        return
    prompt = found["prompt"]
    if found.get("system"):
        prompt = [{"role": "system", "content": found["system"]}, {"role": "user", "content": prompt}]
    yield _record(discards, prompt, [found["answer"]])


# The order is the order in which `auto` tries them.
FORMATS = (
    Format(
        "records",
        "prompt, rejected_responses (or rejected without chosen)",
        lambda row: (
            not row.keys().isdisjoint({"rejected_responses", "rejectedResponses"})
            or ("rejected" in row and "chosen" not in row)
        ),
        from_record,
    ),
    Format("pairs", "prompt, chosen, rejected", lambda row: {"chosen", "rejected"} <= row.keys(), from_pair),
    Format(
        "kto",
        "messages (or prompt, completion), label",
        lambda row: "label" in row and not row.keys().isdisjoint({"messages", "completion", "response"}),
        from_label,
    ),
    Format(
        "candidates",
        "prompt, candidates[response, rejection_count or score]",
        lambda row: isinstance(row.get("candidates"), list),
        from_candidates,
    ),
    Format(
        "scored",
        "prompt, completions[response, score]",
        lambda row: (
            isinstance(row.get("completions"), list) or (isinstance(row.get("responses"), list) and "scores" in row)
        ),
        from_scores,
    ),
    Format(
        "openwebui",
        "data.rating, meta.message_id, snapshot.chat; or chat.history",
        lambda row: _path(row, "data", "rating") is not None or _path(row, "chat", "history") is not None,
        from_open_webui,
    ),
    Format(
        "traces",
        "input, output, scores[name, value] (or feedback_stats, score)",
        lambda row: (
            not row.keys().isdisjoint({"input", "inputs"})
            and not row.keys().isdisjoint({"output", "outputs"})
            and not row.keys().isdisjoint({"scores", "score", "feedback", "feedback_stats"})
        ),
        from_trace,
    ),
    Format("columns", "those that --column names", lambda _row: False, from_columns),
)


def find_format(name: str, choices: Choices = DEFAULT) -> Format:
    """The format of a name.

    Args:
        name: of one of `FORMATS`.
        choices: what the user says of the rows.

    Raises:
        UsageError: there is none; says which there are. Or it needs columns, and none are named.
    """
    for known in FORMATS:
        if known.name == name:
            return _choosing(known, choices)
    raise UsageError(f"no format {name!r}: choose auto, {', '.join(known.name for known in FORMATS)}")


def detect_format(rows: Sequence[Row], choices: Choices = DEFAULT) -> Format:
    """The format of the first row that looks like one; `columns` where the user names some.

    Args:
        rows: some rows from the start of the data.
        choices: what the user says of the rows.

    Raises:
        RecordError: none does; says which keys the first row has and which formats there are.
    """
    if choices.columns:
        return find_format("columns", choices)
    for row in rows:
        for known in FORMATS:
            if known.matches(row):
                return _choosing(known, choices)
    known_formats = "; ".join(f"{known.name}: {known.keys}" for known in FORMATS)
    seen = f"its first row has the keys {keys_of(rows[0])}" if rows else "it has no good row"
    fail(f"is in no known format: {seen}.\nKnown are {known_formats}")


def _choosing(known: Format, choices: Choices) -> Format:
    """A format that goes by the user's choices, if it asks for any."""
    if known.name == "columns" and not choices.columns:
        raise UsageError("the format `columns` needs their names: --column prompt=NAME --column answer=NAME")
    if known.name in ("columns", "traces"):
        return replace(known, convert=partial(known.convert, choices=choices))
    return known


# --- parts of rows ------------------------------------------------------------------------------------


def _record(
    discards: Discards,
    prompt: object,
    answers: object,
    counts: Sequence[int] | None = None,
    rounds: object = None,
) -> RejectionRecord:
    record = make_record(prompt, answers, counts, rounds)
    if isinstance(answers, list):
        discards.duplicates_folded += len(answers) - len(record.rejected_responses)
    return record


def _counted(
    row: Row, discards: Discards, candidates: Sequence[Row], tallies: Sequence[int], rounds: object
) -> Iterator[RejectionRecord]:
    """The record of candidates with rejection counts: those at 0 are discarded."""
    rejected = [k for k, tally in enumerate(tallies) if tally]
    if rejected:
        answers = [answer_of(candidates[k], k) for k in rejected]
        yield _record(discards, prompt_of(row), answers, [tallies[k] for k in rejected], rounds)
    else:
        discards.without_rejection += 1
    discards.chosen_discarded += len(candidates) - len(rejected)


def prompt_of(row: Row) -> Any:
    """The prompt of a row, unchecked."""
    prompt = pick(row, *PROMPTS)
    if prompt is None:
        fail(f"has no prompt (its keys: {keys_of(row)})")
    # The Alpaca layout keeps the text an instruction is about in a field of its own.
    extra = row.get("input") if "instruction" in row else None
    if isinstance(prompt, str) and isinstance(extra, str) and extra.strip():
        return f"{prompt}\n{extra}"
    return prompt


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _split_answer(value: object, name: str) -> tuple[Messages, str]:
    """A conversation as what came before its last answer, and that answer."""
    *context, (role, answer) = parse_messages(value, name)
    if role != "assistant":
        fail(f"{name} ends with a {role} message: its last message must be the assistant's answer")
    return tuple(context), answer


def _only_answer(value: object, name: str) -> str:
    """An answer that is a text, or a list of one assistant message."""
    if not _is_messages(value):
        return parse_text(value, name)
    context, answer = _split_answer(value, name)
    return fail(f"{name} is {len(context) + 1} messages: one answer is wanted") if context else answer


def _as_prompt(context: Messages) -> list[Row]:
    if not context:
        fail("the conversation is an answer without a prompt")
    return [{"role": role, "content": content} for role, content in context]


def _last_text(value: Any) -> Any:
    return _path(value[-1], "content") if _is_messages(value) else value


def candidates_of(row: Row) -> list[Row]:
    """The answers of a row as objects, their texts unchecked."""
    value = pick(row, "completions", "candidates", "responses")
    if not isinstance(value, list):
        fail(f"has no list of completions or candidates (its keys: {keys_of(row)})")
    scores = row.get("scores")
    if isinstance(scores, list) and all(isinstance(text, str) for text in value):
        if len(scores) != len(value):
            fail(f"has {len(scores)} scores for {len(value)} answers: give each a score")
        return [{"response": text, "score": score} for text, score in zip(value, scores, strict=True)]
    for k, candidate in enumerate(value):
        if not isinstance(candidate, Mapping):
            fail(f"candidate {k} is {kind_of(candidate)}: it must be an object with a response")
    return value


def answer_of(candidate: Row, k: int) -> str:
    """The text of the k-th candidate."""
    answer = pick(candidate, "response", "completion", "text", "answer", "content")
    if answer is None:
        fail(f"candidate {k} has no response (its keys: {keys_of(candidate)})")
    return _only_answer(answer, f"the response of candidate {k}")


def _score(candidate: Row, k: int, row: Row) -> float:
    """A candidate's score: one number, or the mean rating of UltraFeedback's aspects."""
    for name in ("score", "overall_score", "rating"):
        value = candidate.get(name)
        if value is not None:
            return _number(value, f"{name} of candidate {k}")
    aspects = candidate.get("annotations")
    if isinstance(aspects, Mapping):
        ratings = [_path(aspect, "Rating") for aspect in aspects.values()]
        numbers = [float(rating) for rating in ratings if re.fullmatch(r"\d+(\.\d+)?", str(rating))]
        if numbers:  # an aspect that does not apply is rated "N/A"
            return sum(numbers) / len(numbers)
    fail(f"candidate {k} has no score (its keys: {keys_of(candidate)}; the row's: {keys_of(row)})")


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        fail(f"{name} is {kind_of(value)}: it must be a finite number")
    return value


def _path(value: Any, *names: str) -> Any:
    """What stands at the end of a path of keys, None where it breaks off."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


# Open WebUI keeps reasoning and tool calls inside the message, as folded HTML that no model wrote so.
_FOLDED_HTML = re.compile(r'<details type="(?:reasoning|tool_calls|code_interpreter)".*?</details>\s*', re.DOTALL)


def _thread(messages: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The conversation that led to a message, from its first message to itself."""
    thread: list[dict[str, Any]] = []
    step: Any = name
    while isinstance(step, str) and step in messages and len(thread) <= len(messages):  # a loop ends too
        content = _path(messages[step], "content")
        if isinstance(content, str):
            content = _FOLDED_HTML.sub("", content)
        thread.append({"role": _path(messages[step], "role"), "content": content})
        step = _path(messages[step], "parentId")
    return thread[::-1]
