"""Rows of the store as the page may see them."""

from __future__ import annotations

import json

from buleyean_rl.void.answering import Answering
from buleyean_rl.void.markdown import render
from buleyean_rl.void.models import key_of
from buleyean_rl.void.services import Void
from buleyean_rl.void.store import Row
from buleyean_rl.void.store.rejections import rejected_words
from buleyean_rl.void.verdict import read_verdict

CURVE_POINTS = 40
PAIRS = 3  # of a verdict


def show_answer(answering: Answering, answer: Row, revealed: bool) -> Row:
    """An answer as it stands: of one under way, what is written by now; who gave a blind one is not told."""
    partial = answering.partial(answer["id"])
    text, state, error = answer["text"], answer["state"], answer["error"]
    if partial is not None:
        text, state, error = partial.text, partial.state, partial.error
    spans = tuple(tuple(span) for rejection in answer["rejections"] for span in rejection["spans"])
    shown = {name: answer[name] for name in ("id", "turn", "slot", "attempt", "rejections")}
    shown |= {"state": state, "text": text, "error": error, "html": render(text, spans)}
    return shown | ({"model": answer["model"], "name": answer["name"]} if revealed else {})


def show_answer_of(void: Void, identity: int) -> Row | None:
    """An answer by its id; None where there is none."""
    answer = void.store.conversations.answer(identity)
    turn = answer and void.store.conversations.turn(answer["turn"])
    return answer and turn and show_answer(void.answering, answer, bool(turn["revealed"]))


def show_turn(answering: Answering, turn: Row) -> Row:
    """A turn with its answers."""
    revealed = bool(turn["revealed"])
    shown = {name: turn[name] for name in ("id", "conversation", "prompt", "created")}
    shown |= {"settings": {name: turn[name] for name in ("system", "temperature", "max_tokens")}}
    shown |= {"blind": bool(turn["blind"]), "revealed": revealed}
    shown |= {"batch": turn["batch"], "position": turn["position"], "verdict": turn["verdict"]} if turn["batch"] else {}
    return shown | {"answers": [show_answer(answering, answer, revealed) for answer in turn["answers"]]}


def show_run(void: Void, run: Row) -> Row:
    """A run of the store with its points and samples, in short."""
    run = void.training.describe(run)
    problem = void.models.problem(run) if run["state"] in ("done", "stopped") else "it has no model"
    verdict = None if problem else read_verdict(void.training.folder(run), run["samples"])
    if verdict is not None:
        verdict["pairs"] = [show_sample(sample) for sample in _telling(run["samples"])[:PAIRS]]
    columns = ("id", "name", "created", "ended", "state", "phase", "steps", "records", "rejections", "seconds_left")
    losses = [point["loss"] for point in run["points"]]
    stride = -(-len(losses) // CURVE_POINTS) or 1
    return {
        **{name: run[name] for name in columns},
        "step": run["step"] or 0,
        "model": key_of(run["id"]),
        "error": run["error"],
        "usable": not problem,
        "problem": problem or None,
        "in_pair": key_of(run["id"]) in void.models.pair,
        "decision": run["decision"],
        "verdict": verdict,
        "curve": losses[::stride],
    }


def show_runs(void: Void) -> list[Row]:
    """All runs, the newest first."""
    runs = (void.store.runs.get(run["id"]) for run in void.store.runs.list())
    return [show_run(void, run) for run in runs if run is not None]


def show_sample(sample: Row) -> Row:
    """A prompt asked again, before and after."""
    shown = {name: sample[name] for name in ("prompt", "before", "after")}
    spans = [(start, end) for start, end in json.loads(sample["spans"])]
    html = {"before_html": render(sample["before"], tuple(spans)), "after_html": render(sample["after"])}
    return shown | html | {"rejected": rejected_words(sample["before"], spans), "whole": not spans}


def show_pair(void: Void) -> list[Row]:
    """Who answers."""
    return [{"model": key, "name": name} for key, name in void.models.slots(void.models.pair)]


def undecided(void: Void) -> Row | None:
    """The newest run, if it has ended and neither Keep nor Go back was said."""
    newest = next(iter(void.store.runs.list()), None)
    if newest is None or newest["decision"] is not None or newest["ended"] is None:
        return None
    run = void.store.runs.get(newest["id"])
    return run and show_run(void, run)


def _telling(samples: list[Row]) -> list[Row]:
    """Samples, first those that show most: what was unlearned."""
    return sorted(samples, key=lambda sample: (sample["unlearned"] == 0, sample["unlearned"] is None))
