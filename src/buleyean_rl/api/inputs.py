"""What people hand over, as a file, a name or the thing itself, made into what the package works on."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from buleyean_rl import demo_data
from buleyean_rl.data.prompts import read_prompts
from buleyean_rl.data.records import Prompt, read_text
from buleyean_rl.evaluation.texts import read_texts
from buleyean_rl.mining.judges import Judge, find_judge
from buleyean_rl.mining.judges.protocol import FunctionJudge

BUNDLED = "bundled"  # the word for data that comes with the package
JudgeLike = str | Judge | Callable[[str, str], Any]
Prompts = Path | str | Iterable[Prompt]
Texts = Path | str | Iterable[str]


def find_prompts(prompts: Prompts, bundled: Literal["mine", "held out"]) -> list[Prompt]:
    """Distinct prompts.

    Args:
        prompts: a file of them, themselves, or the word `bundled`.
        bundled: which of the bundled ones.
    """
    if prompts == BUNDLED:
        return list(demo_data.mine_prompts() if bundled == "mine" else demo_data.held_out_prompts())
    return read_prompts(Path(prompts)) if isinstance(prompts, str | Path) else list(dict.fromkeys(prompts))


def find_texts(texts: Texts) -> tuple[str, ...]:
    """Neutral texts: of a file, themselves, or the word `bundled`."""
    if texts == BUNDLED:
        return tuple(demo_data.neutral_texts())
    return read_texts(Path(texts)) if isinstance(texts, str | Path) else tuple(texts)


def find_judges(judges: JudgeLike | Sequence[JudgeLike], rubric: Path | str | None = None) -> list[Judge]:
    """Judges by their names, or from functions of a prompt and an answer.

    Args:
        judges: one or several; see `FunctionJudge` for functions.
        rubric: a file for LLM judges, of which the first has a key of its own.
    """
    several = judges if isinstance(judges, list | tuple) else [judges]
    first_endpoint = next((name[4:] for name in several if isinstance(name, str) and name.startswith("llm:")), None)
    text = None if rubric is None else read_text(Path(rubric))
    return [_find_judge(judge, text, first_endpoint) for judge in several]


def _find_judge(judge: Any, rubric: str | None, first_endpoint: str | None) -> Judge:
    if isinstance(judge, str):
        return find_judge(judge, rubric=rubric, key_url=first_endpoint)
    return judge if hasattr(judge, "judge") else FunctionJudge(_name_function(judge), judge)


def _name_function(function: Callable[..., Any]) -> str:
    """A name that changes with the function's text, so that a journal's verdicts are those of this one."""
    name = f"python:{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', repr(function))}"
    with suppress(OSError, TypeError):  # no text: typed at a prompt, or not a function
        name += f" {hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:8]}"
    return name


def default_temperature(samples: int, temperature: float | None) -> float:
    """The temperature given, or without one 0 for one sample and 0.8 for several."""
    return temperature if temperature is not None else 0.0 if samples == 1 else 0.8
