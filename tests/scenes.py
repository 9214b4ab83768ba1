"""Every state of the page: what the server says in it, where to look, and what a person did to get there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from browsers import Browser
from stage import NAMES, NOON, Row, Scene, Stage, answer, conversation, turn

SLEEP = "Give me two tips for sleeping better."
LOOPS = (
    "Sleep is important. Here are two tips:\n\nKeep a schedule. Go to bed at the same time. "
    "Go to bed at the same time. Go to bed at the same time. Go to bed at the same time."
)
TIPS = (
    "Two things help most people:\n\nKeep a schedule. The same hour every night, weekends too.\n\n"
    "Dim the lights. Put screens away an hour before bed."
)
LOOPED = [LOOPS.index("Go to bed", 80), len(LOOPS)]
WHY = "repeats itself"
PAIR = [{"model": model, "name": name} for model, name in NAMES.items()]
NEWEST = [
    {"id": 3, "text": "…Go to bed at the same time. Go to bed at the same time. Go to bed…", "reason": WHY},
    {"id": 2, "text": "As an AI language model, I cannot have a favourite dish, but…", "reason": "preachy"},
    {"id": 1, "text": "…add the eggs, add the eggs, add the eggs…", "reason": ""},
]
THREE: Row = {
    "rejections": 3,
    "conversations": 3,
    "newest": NEWEST,
    "plan": {"rejections": 3, "records": 3, "steps": 12, "seconds": 50, "problem": None},
}
TALKS = {
    "conversations": [
        {"id": "talk-0001", "title": SLEEP, "created": NOON, "changed": NOON, "turns": 1, "rejected": True},
        {"id": "talk-0002", "title": "What should I cook tonight?", "changed": NOON - 60, "rejected": True},
        {"id": "talk-0003", "title": "Explain a rainbow to a child", "changed": NOON - 90_000, "rejected": False},
    ],
    "more": False,
}
DRIFT = {"own": {"kl": 0.021, "entropy": [2.31, 2.33]}, "bundled": {"kl": 0.034, "entropy": [2.6, 2.64]}}
SAMPLES = [
    {
        "prompt": prompt,
        "before": before,
        "after": after,
        "before_html": f"<p>{before}</p>",
        "after_html": f"<p>{after}</p>",
        "rejected": before,
        "whole": True,
    }
    for prompt, before, after in (
        (SLEEP, LOOPS, TIPS),
        ("What is your favourite dish?", "As an AI language model, I cannot have one.", "Soup, on a cold day."),
        ("How do I bake a cake?", "Add the eggs, add the eggs, add the eggs.", "Beat the eggs, then add flour."),
    )
]
VERDICT: Row = {
    "outcome": "good",
    "unlearned": 3,
    "asked": 3,
    "other_text": "unchanged",
    "pairs": SAMPLES,
    "details": {"rejected_nll": [0.41, 3.92], "drift": DRIFT, "stop_reason": None},
}
RUN: Row = {
    "id": 1,
    "model": "run-1",
    "name": NAMES["run-1"],
    "created": NOON,
    "ended": NOON + 50,
    "state": "done",
    "phase": None,
    "step": 12,
    "steps": 12,
    "records": 3,
    "rejections": 3,
    "seconds_left": None,
    "error": "",
    "usable": True,
    "problem": None,
    "in_pair": True,
    "decision": None,
    "verdict": VERDICT,
    "curve": [2.4 / (1 + 0.4 * step) for step in range(12)],
}
POINTS = [{"step": n + 1, "loss": loss, "floor": 0.0, "gap": loss} for n, loss in enumerate(RUN["curve"])]
TRAINING = RUN | {
    "state": "running",
    "phase": "training",
    "step": 7,
    "seconds_left": 19,
    "usable": False,
    "verdict": None,
}
FILES = [
    ("q8_0", "sleep-tips-Q8_0.gguf", 144_000_000, "ready", None, None),
    ("q4_0", "sleep-tips-Q4_0.gguf", None, "making", "writing", 0.4),
    ("f16", "sleep-tips-F16.gguf", None, "missing", None, None),
    ("q4_k_m", "sleep-tips-Q4_K_M.gguf", None, "missing", None, None),
    ("modelfile", "Modelfile", 400, "ready", None, None),
    ("adapter", "sleep-tips-adapter.zip", 19_500_000, "ready", None, None),
    ("records", "records.jsonl", 2_400, "ready", None, None),
    ("card", "README.md", 3_100, "ready", None, None),
]
FILE_ROWS = [
    dict(zip(("kind", "name", "bytes", "state", "phase", "progress"), row, strict=True))
    | {"error": "", "possible": row[0] != "q4_k_m", "problem": "K-quants need llama.cpp's tools" * (row[0] == "q4_k_m")}
    for row in FILES
]
MARKDOWN = """## Bake a cake

Beat **two eggs**, then add *slowly*:

1. flour
2. sugar

```python
def bake(minutes=35, degrees=180, cake="a rather long line"):
    return cake
```

| what | much |
|---|---|
| flour | 250 g |

> Do not open the oven.
"""


def talking(*answers: Row, state: Row | None = None, prompt: str = SLEEP, **replies: Any) -> Scene:
    """A conversation of one question."""
    both = {"pair": PAIR} if len(answers) > 1 else {}
    shown = {f"conversations/{'talk-0001'}": conversation(turn(prompt, *answers)), "conversations": TALKS}
    return Scene(THREE | both | {"models": len(answers) - 1} | (state or {}), **(shown | replies))


def selecting(browser: Browser) -> None:
    browser.select(0, 18)


@dataclass(frozen=True)
class State:
    """A state of the page.

    Args:
        scene: what the server says.
        place: what the address ends with.
        sight: what is there once the page is drawn.
        act: what a person did, or what happened to the server.
    """

    scene: Callable[[], Scene]
    place: str = "#talk/talk-0001"
    sight: str = ".answer"
    act: Callable[[Browser, Stage], Any] | None = None


def click(css: str, sight: str) -> Callable[[Browser, Stage], None]:
    def act(browser: Browser, _stage: Stage) -> None:
        browser.click(css)
        browser.until(lambda: browser.all(sight))

    return act


def open_details(browser: Browser, stage: Stage) -> None:
    click("#details summary", "#details[open]")(browser, stage)
    browser.run("document.getElementById('details').scrollIntoView()")


def go_away(browser: Browser, stage: Stage) -> None:
    stage.scene.away = True
    browser.until(lambda: browser.find("#away").is_displayed())


def come_back(browser: Browser, stage: Stage) -> None:
    go_away(browser, stage)
    stage.scene.away = False
    browser.until(lambda: not browser.find("#away").is_displayed())


def reject_elsewhere(browser: Browser, stage: Stage) -> None:
    """In another tab: this one is told."""
    stage.scene.replies["conversations/talk-0001"] = conversation(turn(SLEEP, WHOLE, TRAINED))
    stage.tell()
    browser.until(lambda: browser.all(".answer.rejected"))


def pick_file(browser: Browser, _stage: Stage) -> None:
    path = Path(browser.folder) / "ours.csv"
    path.write_text("question,reply,stars\nWhy?,Because.,1\n")
    browser.find("#import-file").send_keys(str(path))
    browser.until(lambda: browser.all("dialog[open]"))


def wrong_token(browser: Browser, _stage: Stage) -> None:
    browser.until(lambda: browser.all("dialog[open] #token"))
    browser.find("#token").send_keys("the-wrong-one\n")
    browser.until(lambda: browser.all("#token-problem"))


BASE = answer(1, 0, LOOPS)
TRAINED = answer(2, 1, TIPS)
PART = answer(1, 0, LOOPS, rejected=[([LOOPED], WHY)])
WHOLE = answer(1, 0, LOOPS, rejected=[([], WHY)])
BOTH = answer(1, 0, LOOPS, rejected=[([LOOPED], WHY), ([], "")])
NOTHING = {"rejections": 0, "newest": [], "plan": {"rejections": 0, "seconds": None, "problem": "no_rejections"}}
NONE_LEARNED = VERDICT | {"outcome": "nothing", "unlearned": 0}
GUARDED = VERDICT | {"outcome": "guard", "unlearned": 2, "other_text": "slightly"}
FAILED = RUN | {"state": "failed", "usable": False, "verdict": None, "in_pair": False}
FULL = "the server's disk is full: nothing was changed; free some space, then try again"
MANY_TALKS = [
    {
        "id": f"talk-{n:04}",
        "title": f"Question {n}: what is it about?",
        "changed": NOON - n * 20_000,
        "rejected": n % 3 == 0,
    }
    for n in range(1, 41)
]
ROWS = [
    {
        "id": n,
        "prompt": f"{SLEEP} ({n})",
        "answer": LOOPS,
        "spans": [LOOPED] if n % 2 else [],
        "reason": WHY if n % 3 else "",
        "source": "import" if n % 5 else "page",
        "created": NOON,
        "cut": False,
    }
    for n in range(10_000, 9_950, -1)
]
PREVIEW = {
    "uid": "import-01",
    "name": "ours.csv",
    "format": "a table of scores",
    "records": 40,
    "rejections": 38,
    "notes": ["2 rows left out: the answer is empty", "5 rows are rated well: they are kept as anchors"],
    "sample": [{"prompt": SLEEP, "answer": LOOPS}, {"prompt": "Why?", "answer": "Because."}],
    "columns": [],
    "earlier": None,
}
IMPORTED = {"id": 1, "uid": "i", "name": "ours.csv", "format": "csv", "records": 40, "rejections": 38, "created": NOON}
TABLE = [{"question": "Why is the sky blue?", "reply": "Because it is.", "stars": "1"}]
UNNAMED = {"error": "which columns hold what?", "columns": ["question", "reply", "stars"], "sample": TABLE * 2}
REJECTIONS = {"rejections": {"rows": ROWS, "total": 10_000, "page": 0, "page_size": 50}}
MODEL = {
    "runs/1": RUN | {"points": POINTS, "samples": SAMPLES, "card_html": ""},
    "runs/1/files": {"files": FILE_ROWS, "ollama": "ollama create sleep-tips -f Modelfile"},
}
MODELS = {
    "models": {
        "base": {"model": "base", "name": NAMES["base"]},
        "runs": [
            FAILED | {"id": 3, "model": "run-3", "name": "run 3", "error": FULL, "curve": []},
            RUN | {"id": 2, "model": "run-2", "name": "a second try", "in_pair": False, "verdict": GUARDED},
            RUN,
        ],
    }
}
BATCH = {
    "id": "batch-001",
    "name": "Forty questions of last week",
    "created": NOON,
    "state": "answering",
    "prompts": 40,
    "answered": 12,
    "judged": 5,
    "rejected": 2,
    "models": [PAIR[0]],
}
CARD = {"card": turn(SLEEP, BASE, position=5, verdict=None), "waiting": False}
RUNNING = {"pair": PAIR, "models": 1, "run": TRAINING}
ENDED = {"pair": PAIR, "models": 1, "verdict": RUN}


def importing_scene(reply: Any) -> Callable[[], Scene]:
    state = THREE | {"rejections": 10_000}
    return lambda: Scene(state, **(REJECTIONS | {"POST imports": reply, "conversations": TALKS}))  # type: ignore[arg-type]


STATES: dict[str, State] = {
    "first-visit": State(Scene, "#talk", ".start"),
    "loading": State(
        lambda: Scene({"loading": {"what": NAMES["base"], "share": 0.4, "seconds_left": 4}}), "#talk", ".meter"
    ),
    "loading-failed": State(
        lambda: Scene(
            {"loading": {"what": "/models/mine", "error": "/models/mine: holds no model: name another with --model"}}
        ),
        "#talk",
        ".card.bad",
    ),
    "answers-coming": State(lambda: talking(answer(1, 0, LOOPS[:60], "writing"), answer(2, 1, "", "waiting"))),
    "markdown": State(lambda: talking(answer(1, 0, MARKDOWN), TRAINED, prompt="How do I bake a cake?")),
    "cut": State(lambda: talking(answer(1, 0, LOOPS, "cut"), answer(2, 1, TIPS, "stopped"))),
    "failed": State(
        lambda: talking(
            answer(1, 0, "", "failed", error="the model ran out of memory: ask again, or a shorter question"), TRAINED
        )
    ),
    "marking": State(lambda: talking(BASE, TRAINED), act=lambda browser, _: selecting(browser)),
    "rejected-whole": State(lambda: talking(WHOLE, TRAINED)),
    "rejected-part": State(lambda: talking(PART, TRAINED)),
    "rejected-both": State(lambda: talking(BOTH, TRAINED)),
    "undo-part": State(lambda: talking(PART, TRAINED), act=click("del[tabindex]", "#marking")),
    "blind": State(
        lambda: Scene(
            THREE | {"pair": PAIR},
            **{
                "conversations": TALKS,
                "conversations/talk-0001": conversation(
                    turn(
                        SLEEP,
                        *({k: v for k, v in a.items() if k not in ("model", "name")} for a in (BASE, TRAINED)),
                        blind=True,
                        revealed=False,
                    )
                ),
            },
        )
    ),
    "options": State(lambda: talking(BASE), act=click("#options", "dialog[open]")),
    "train-not-yet": State(lambda: talking(BASE, state=NOTHING)),
    "training": State(lambda: talking(PART, TRAINED, state=RUNNING)),
    "training-stopping": State(
        lambda: talking(PART, TRAINED, state=RUNNING | {"run": TRAINING | {"state": "stopping"}})
    ),
    "verdict-good": State(lambda: talking(PART, TRAINED, state=ENDED)),
    "verdict-nothing": State(
        lambda: talking(PART, TRAINED, state=ENDED | {"verdict": RUN | {"verdict": NONE_LEARNED}})
    ),
    "verdict-guard": State(lambda: talking(PART, TRAINED, state=ENDED | {"verdict": RUN | {"verdict": GUARDED}})),
    "training-failed": State(
        lambda: talking(
            PART, state={"verdict": FAILED | {"error": "the disk is full: free some space, then train again"}}
        )
    ),
    "training-stopped": State(lambda: talking(PART, state={"verdict": FAILED | {"state": "stopped"}})),
    "side-open": State(
        lambda: talking(PART, TRAINED, state=ENDED),
        act=lambda browser, _: browser.run(
            "const open = document.getElementById('open-side'); if (open.offsetWidth) open.click()"
        ),
    ),
    "history-open": State(
        lambda: talking(PART, TRAINED),
        act=lambda browser, _: browser.run(
            "const open = document.getElementById('open-history'); if (open.offsetWidth) open.click()"
        ),
    ),
    "server-gone": State(lambda: talking(PART, TRAINED), act=go_away),
    "server-back": State(lambda: talking(PART, TRAINED), act=come_back),
    "two-tabs": State(lambda: talking(BASE, TRAINED), act=reject_elsewhere),
    "wrong-token": State(lambda: Scene(token="the-token"), "#talk", "dialog[open]", wrong_token),
    "disk-full": State(
        lambda: talking(BASE, TRAINED, **{"POST rejections": (507, {"error": FULL})}),
        act=click(".answer [data-do=reject]", "#toast:not([hidden])"),
    ),
    "forty-conversations": State(
        lambda: talking(
            PART, TRAINED, state={"conversations": 40}, conversations={"conversations": MANY_TALKS, "more": True}
        )
    ),
    "ten-thousand": State(importing_scene(PREVIEW), "#rejections", "#rows tr"),
    "chosen": State(
        importing_scene(PREVIEW),
        "#rejections",
        "#rows tr",
        click("#rows tr:nth-child(2) input[type=checkbox]", ".several:not([hidden])"),
    ),
    "no-rejections": State(
        lambda: Scene(rejections={"rows": [], "total": 0, "page": 0, "page_size": 50}),
        "#rejections",
        "#nothing:not([hidden])",
    ),
    "import-preview": State(importing_scene(PREVIEW), "#rejections", "#rows tr", pick_file),
    "import-earlier": State(importing_scene(PREVIEW | {"earlier": IMPORTED}), "#rejections", "#rows tr", pick_file),
    "import-columns": State(importing_scene((400, UNNAMED)), "#rejections", "#rows tr", pick_file),
    "no-model": State(lambda: Scene(THREE, models={"base": PAIR[0], "runs": []}), "#models", "#models li"),
    "models": State(lambda: Scene(THREE | {"models": 2, "pair": PAIR}, **MODELS), "#models", "#models li"),
    "model": State(lambda: Scene(THREE | {"models": 2, "pair": PAIR}, **MODELS, **MODEL), "#models/1", "#files li"),
    "model-details": State(
        lambda: Scene(THREE | {"models": 2, "pair": PAIR}, **MODELS, **MODEL),
        "#models/1",
        "#files li",
        open_details,
    ),
    "compare": State(
        lambda: Scene(THREE | {"models": 2, "pair": PAIR}, **MODELS),
        "#models",
        "#models li",
        click("#models li:nth-child(2) [data-do=compare]", "dialog[open]"),
    ),
    "delete-asks": State(
        lambda: Scene(THREE | {"models": 2, "pair": PAIR}, **MODELS),
        "#models",
        "#models li",
        click("#models li:nth-child(2) [data-do=delete]", "dialog[open]"),
    ),
    "judge": State(lambda: Scene(THREE | {"batches": 1}, batches={"batches": [BATCH]}), "#judge", "#batches li"),
    "judge-card": State(
        lambda: Scene(
            THREE | {"batches": 1},
            **{"batches/batch-001": BATCH, "batches/batch-001/next": CARD},
        ),
        "#judge/batch-001",
        ".answer",
    ),
    "judge-compare": State(
        lambda: Scene(
            THREE | {"batches": 1},
            **{
                "batches/batch-001": BATCH | {"models": PAIR},
                "batches/batch-001/next": {"card": turn(SLEEP, BASE, TRAINED, position=5), "waiting": False},
            },
        ),
        "#judge/batch-001",
        ".answer",
    ),
    "judge-done": State(
        lambda: Scene(
            THREE | {"batches": 1},
            **{
                "batches/batch-001": BATCH | {"state": "done", "answered": 40, "judged": 40},
                "batches/batch-001/next": {"card": None, "waiting": False},
            },
        ),
        "#judge/batch-001",
        ".nothing",
    ),
}


def enter(browser: Browser, stage: Stage, state: State) -> None:
    """Bring the page into a state."""
    stage.show(state.scene())
    browser.driver.get("about:blank")
    browser.driver.get(f"{stage.url}/{state.place}")
    browser.until(lambda: browser.all(state.sight))
    if state.act is not None:
        state.act(browser, stage)
