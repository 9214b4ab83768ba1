"""`mine`, `evaluate`, `export` and `chat`, with the command's defaults, and silent unless given a console."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from buleyean_rl import demo_data
from buleyean_rl.api.results import Comparison, Conversation, Exported, Mining
from buleyean_rl.data.importers import read_preferences
from buleyean_rl.data.prompts import read_prompts
from buleyean_rl.data.records import Prompt
from buleyean_rl.evaluation.drift import PASSAGES
from buleyean_rl.evaluation.measure import Material, plain_texts
from buleyean_rl.evaluation.measure import evaluate as measure
from buleyean_rl.evaluation.measured_model import Settings, make_samplings
from buleyean_rl.evaluation.texts import read_texts
from buleyean_rl.gguf import About, ExportReport, ParityReport
from buleyean_rl.gguf import export as exporting
from buleyean_rl.inference.gguf_engines import DEFAULT_ENGINE
from buleyean_rl.inference.open import answers_key, describe_policy, locate, open_engine
from buleyean_rl.inference.protocol import Sampling
from buleyean_rl.mining.judges import Judge, find_judge
from buleyean_rl.mining.judges.protocol import FunctionJudge
from buleyean_rl.mining.mine import MineSettings
from buleyean_rl.mining.mine import mine as draw_and_judge
from buleyean_rl.models.run_files import is_run
from buleyean_rl.models.source import BUNDLED

JudgeLike = str | Judge | Callable[[str, str], Any]


def mine(
    prompts: Path | str | Iterable[Prompt],
    model: str = BUNDLED,
    output: Path | str = "records.jsonl",
    *,
    judges: JudgeLike | Sequence[JudgeLike] = "loops",
    samples: int = 1,
    temperature: float | None = None,
    max_tokens: int = 256,
    seed: int = 0,
    context: int | None = None,
    engine: str = "auto",
    overwrite: bool = False,
    console: Console | None = None,
) -> Mining:
    """Let a model answer prompts, judge the answers, and write the rejected ones as records.

    Args:
        prompts: a file of them, or the prompts themselves: texts or (role, content) messages.
        model: a base model as for `train`, a run folder, or an endpoint (URL#MODEL).
        output: the records file; beside it a journal, from which the same call goes on.
        judges: names as of `--judge`, or functions of a prompt and an answer, see `FunctionJudge`; several vote.
        samples: answers to each prompt.
        temperature: None for 0 with one sample, 0.8 with several.
        max_tokens: of an answer.
        seed: same seed, same records.
        context: maximum tokens of a conversation; None for the model's own, as memory allows.
        engine: auto, transformers or llama.cpp.
        overwrite: replace a file of other settings.
        console: for progress; None for no output.

    Raises:
        UsageError: a file would be replaced, or a judge is none.
        ModelError: the model cannot be loaded.
        EngineError: the model gave no answer.
    """
    default = 0.0 if samples == 1 else 0.8
    settings = MineSettings(
        samples, max_tokens, default if temperature is None else temperature, seed=seed, context=context
    )
    location = locate(model)
    mined = draw_and_judge(
        _read_prompts(prompts),
        lambda: open_engine(location, engine, console, context=context),
        answers_key(location, engine),
        _find_judges(judges),
        Path(output),
        settings,
        policy=describe_policy(location),
        overwrite=overwrite,
        console=console,
    )
    return Mining(**vars(mined))


def evaluate(
    model: str,
    *,
    compare: str | Sequence[str] = (),
    pairs: Path | str | None = None,
    records: Path | str | None = None,
    neutral: Path | str | Iterable[str] | None = None,
    prompts: Path | str | Iterable[Prompt] | None = None,
    reference: str | None = None,
    limit: int | None = None,
    max_length: int = 1024,
    max_tokens: int | Sequence[int] = 128,
    temperature: float | Sequence[float] = 0.0,
    context: int | None = None,
    engine: str = "auto",
    seed: int = 0,
    console: Console | None = None,
) -> Comparison:
    """Measure a model without a judge: rankings, drift, answers, loops; by default on bundled data.

    Args:
        model: a base model as for `train`, a run folder or a GGUF file.
        compare: other models, on the same items.
        pairs: a file or Hub data set of preferences.
        records: the same of held-out rejections with counts.
        neutral: a file of neutral texts, or the texts.
        prompts: a file of prompts to answer, or the prompts.
        reference: pi_ref of a model that is not a run.
        limit: maximum number of preferences, of records, of texts and of prompts.
        max_length: maximum tokens of a prompt and one answer.
        max_tokens: maximum tokens of an answer; of several, each at each temperature.
        temperature: of the answers, or several; 0 is greedy.
        context: maximum tokens of a conversation; None for the model's own, as memory allows.
        engine: auto, transformers or llama.cpp.
        seed: of sampled answers and of the bootstrap intervals.
        console: for progress; None for no output.

    Raises:
        RecordError: a file cannot be read.
        ModelError: a model cannot be loaded.
        EngineError: an engine failed.
    """
    if pairs is None and records is None and neutral is None and prompts is None:
        neutral, prompts = demo_data.neutral_texts(), demo_data.held_out_prompts()
    texts = _read_texts(() if neutral is None else neutral)
    preferences, rejections = (
        None if name is None else read_preferences(str(name), limit=limit) for name in (pairs, records)
    )
    asked = [] if prompts is None else _read_prompts(prompts)
    passages = min(PASSAGES, limit or PASSAGES) if texts else 0
    material = Material(preferences, rejections, plain_texts(texts, limit), passages, tuple(asked[:limit]))
    temperatures = [temperature] if isinstance(temperature, (int, float)) else temperature
    samplings = make_samplings(temperatures, [max_tokens] if isinstance(max_tokens, int) else max_tokens, seed)
    settings = Settings(max_length, samplings, engine, context, model)
    evaluations = [measure(model, material, settings, reference=reference, console=console)]
    for name in [compare] if isinstance(compare, str) else compare:
        own = None if is_run(name) or name == reference else reference  # a run has its base
        evaluations.append(measure(name, material, settings, reference=own, console=console))
    return Comparison(tuple(evaluations), seed)


def export(
    run: Path | str,
    output: Path | str,
    quant: str | Sequence[str] | None = None,
    *,
    adapter: bool = False,
    ollama: bool = False,
    about: About | None = None,
    engine: str = DEFAULT_ENGINE,
    overwrite: bool = False,
    console: Console | None = None,
) -> Exported:
    """Merge a run into its base model and write GGUF files, checked in llama.cpp before they get their names.

    Args:
        run: a run folder, or a base model as for `train`.
        output: the .gguf file to write; each of several quantisations gets its own name beside it.
        quant: of `gguf.QUANTS` and `K_QUANTS`, None for q8_0; of an adapter, of `ADAPTER_QUANTS`, None for f16.
        adapter: the adapter alone, for llama.cpp's --lora.
        ollama: write a Modelfile for Ollama, too.
        about: what the files say about themselves; None for what run and base say.
        engine: what the files are checked in.
        overwrite: replace a file that no export of ours wrote.
        console: for progress; None for no output.

    Raises:
        ExportError: it cannot be written, or a file does not behave like the model.
        ModelError: the model cannot be loaded.
        UsageError: a file is there already and may not be replaced.
    """
    path, quants = Path(output), [quant] if isinstance(quant, str) else list(quant or ["f16" if adapter else "q8_0"])
    options: dict[str, Any] = {"overwrite": overwrite, "engine": engine, "about": about, "console": console}
    if adapter:
        written = exporting.export_adapter(str(run), path, *quants, **options)
    else:
        written = exporting.export(str(run), path, quants, ollama=ollama, **options)
    return Exported(tuple(_read_report(file) for file in written["files"]))


def chat(
    model: str,
    prompt: str | None = None,
    *,
    system: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    context: int | None = None,
    engine: str = "auto",
) -> Conversation:
    """Begin a conversation with a model.

    Args:
        model: a base model as for `train`, a run folder, a GGUF file, or an endpoint (URL#MODEL).
        prompt: what is said first; None for nothing yet.
        system: the system message.
        max_tokens: maximum tokens of an answer.
        temperature: 0 is greedy.
        seed: of the sampling.
        context: maximum tokens of the conversation; None for the model's own, as memory allows.
        engine: auto, transformers or llama.cpp.

    Raises:
        ModelError: the model cannot be loaded.
        EngineError: the engine failed.
    """
    opened = open_engine(model, engine, context=context)
    conversation = Conversation(opened, system, Sampling(max_tokens, temperature, seed=seed))
    if prompt is not None:
        try:
            conversation.say(prompt)
        except BaseException:
            opened.close()
            raise
    return conversation


def _read_prompts(prompts: Path | str | Iterable[Prompt]) -> list[Prompt]:
    return read_prompts(Path(prompts)) if isinstance(prompts, str | Path) else list(dict.fromkeys(prompts))


def _read_texts(texts: Path | str | Iterable[str]) -> tuple[str, ...]:
    return read_texts(Path(texts)) if isinstance(texts, str | Path) else tuple(texts)


def _find_judges(judges: Any) -> list[Judge]:
    several = judges if isinstance(judges, list | tuple) else [judges]
    first_endpoint = next((name[4:] for name in several if isinstance(name, str) and name.startswith("llm:")), None)
    return [_find_judge(judge, first_endpoint) for judge in several]


def _find_judge(judge: Any, first_endpoint: str | None) -> Judge:
    if isinstance(judge, str):
        return find_judge(judge, key_url=first_endpoint)
    return judge if hasattr(judge, "judge") else FunctionJudge(_name_function(judge), judge)


def _name_function(function: Callable[..., Any]) -> str:
    """A name that changes with the function's text, so that a journal's verdicts are those of this one."""
    name = f"python:{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', repr(function))}"
    with suppress(OSError, TypeError):  # no text: typed at a prompt, or not a function
        name += f" {hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:8]}"
    return name


def _read_report(file: dict[str, Any]) -> ExportReport:
    parity = file["parity"]
    report = file | {"path": Path(file["path"]), "parity": None if parity is None else ParityReport(**parity)}
    return ExportReport(**report)
