"""`mine`, `evaluate`, `export` and `chat`, with the command's defaults, and silent unless given a console."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from buleyean_rl.api import inputs
from buleyean_rl.api.inputs import JudgeLike, Prompts, Texts
from buleyean_rl.api.results import Comparison, Conversation, Exported, Mining
from buleyean_rl.data.importers import read_preferences
from buleyean_rl.errors import UsageError
from buleyean_rl.evaluation.drift import PASSAGES
from buleyean_rl.evaluation.measure import Material, plain_texts
from buleyean_rl.evaluation.measure import evaluate as measure
from buleyean_rl.evaluation.measured_model import Bases, Settings, make_samplings
from buleyean_rl.gguf import About, ExportReport, ParityReport
from buleyean_rl.gguf import export as exporting
from buleyean_rl.inference.gguf_engines import DEFAULT_ENGINE
from buleyean_rl.inference.open import (
    LLAMA_CPP,
    TRANSFORMERS,
    Location,
    answers_key,
    describe_policy,
    find_endpoints,
    locate,
    open_engine,
)
from buleyean_rl.inference.protocol import Sampling
from buleyean_rl.mining.draws import MineSettings
from buleyean_rl.mining.mine import mine as draw_and_judge
from buleyean_rl.mining.walk_engines import LlamaCpp, RoundEngines, VllmServers
from buleyean_rl.models.run_files import is_run
from buleyean_rl.models.source import BUNDLED, resolve


def mine(
    prompts: Prompts = inputs.BUNDLED,
    model: str | Location | Sequence[str] = BUNDLED,
    output: Path | str = "records.jsonl",
    *,
    judges: JudgeLike | Sequence[JudgeLike] = "loops",
    rubric: Path | str | None = None,
    samples: int = 1,
    temperature: float | None = None,
    max_tokens: int = 256,
    seed: int = 0,
    context: int | None = None,
    engine: str = "auto",
    keep_accepted: bool = True,
    overwrite: bool = False,
    console: Console | None = None,
) -> Mining:
    """Let a model answer prompts, judge the answers, and write them as records.

    Args:
        prompts: a file of them, or the prompts themselves, texts or (role, content) messages; by default bundled ones.
        model: a base model as for `train`, a run folder, or an endpoint (URL#MODEL); or several, or a file of them.
        output: the records file; beside it a journal, from which the same call goes on.
        judges: names as of `--judge`, or functions of a prompt and an answer, see `FunctionJudge`; several vote.
        rubric: the file that LLM judges judge by.
        samples: answers to each prompt.
        temperature: None for 0 with one sample, 0.8 with several.
        max_tokens: of an answer.
        seed: same seed, same records.
        context: maximum tokens of a conversation; None for the model's own, as memory allows.
        engine: auto, transformers or llama.cpp.
        keep_accepted: keep what no judge rejected, as anchors.
        overwrite: replace a file of other settings.
        console: for progress; None for no output.

    Raises:
        UsageError: a file would be replaced, or a judge is none.
        ModelError: the model cannot be loaded.
        EngineError: the model gave no answer.
    """
    drawn_at = inputs.default_temperature(samples, temperature)
    settings = MineSettings(samples, max_tokens, drawn_at, seed=seed, context=context)
    asked, judging = inputs.find_prompts(prompts, "mine"), inputs.find_judges(judges, rubric)
    location = locate(model)
    mined = draw_and_judge(
        asked,
        lambda: open_engine(location, engine, console, context=context),
        answers_key(location, engine),
        judging,
        Path(output),
        settings,
        policy=describe_policy(location),
        keep_accepted=keep_accepted,
        overwrite=overwrite,
        console=console,
    )
    return Mining(**vars(mined))


def find_round_engines(
    model: str, engine: str, servers: Sequence[str], context: int | None, console: Console | None = None
) -> RoundEngines | None:
    """Who answers in a walk.

    Args:
        model: the base model.
        engine: transformers or llama.cpp.
        servers: of vLLM, by URL or in a file, see `read_endpoints`; they answer instead.
        context: maximum tokens of a conversation; None for the model's own, as memory allows.
        console: for progress; None for no output.

    Raises:
        UsageError: no such engine, or not for this model.
    """
    if servers:
        if engine != TRANSFORMERS or context is not None:
            raise UsageError("servers answer by themselves: leave --engine and --context out")
        return VllmServers(find_endpoints(servers).endpoints)
    if engine == LLAMA_CPP:
        return LlamaCpp(
            resolve(model), lambda run, path: exporting.export_adapter(str(run), path, console=console), context
        )
    if engine != TRANSFORMERS:
        raise UsageError(f"no engine {engine!r} for a walk: there are {TRANSFORMERS} and {LLAMA_CPP}")
    return None


def evaluate(
    model: str,
    *,
    compare: str | Sequence[str] = (),
    pairs: Path | str | None = None,
    records: Path | str | None = None,
    neutral: Texts | None = None,
    prompts: Prompts | None = None,
    reference: str | None = None,
    limit: int | None = None,
    max_length: int = 1024,
    max_tokens: int | Sequence[int] = 128,
    temperature: float | Sequence[float] = 0.0,
    context: int | None = None,
    engine: str = "auto",
    seed: int = 0,
    skip_bad: bool = False,
    console: Console | None = None,
) -> Comparison:
    """Measure a model without a judge: rankings, drift, answers, loops; by default on bundled data.

    Args:
        model: a base model as for `train`, a run folder or a GGUF file.
        compare: other models, on the same items.
        pairs: a file or Hub data set of preferences.
        records: the same of held-out rejections with counts.
        neutral: a file of neutral texts, the texts, or the word `bundled`.
        prompts: a file of prompts to answer, the prompts, or the word `bundled`.
        reference: pi_ref of a model that is not a run.
        limit: maximum number of preferences, of records, of texts and of prompts.
        max_length: maximum tokens of a prompt and one answer.
        max_tokens: maximum tokens of an answer; of several, each at each temperature.
        temperature: of the answers, or several; 0 is greedy.
        context: maximum tokens of a conversation; None for the model's own, as memory allows.
        engine: auto, transformers or llama.cpp.
        seed: of sampled answers and of the bootstrap intervals.
        skip_bad: skip and count bad rows.
        console: for progress; None for no output.

    Raises:
        RecordError: a file cannot be read.
        ModelError: a model cannot be loaded.
        EngineError: an engine failed.
    """
    if pairs is None and records is None and neutral is None and prompts is None:
        neutral = prompts = inputs.BUNDLED
    texts = () if neutral is None else inputs.find_texts(neutral)
    asked = [] if prompts is None else inputs.find_prompts(prompts, "held out")
    preferences, rejections = (
        None if name is None else read_preferences(str(name), limit=limit, skip_bad=skip_bad)
        for name in (pairs, records)
    )
    passages = min(PASSAGES, limit or PASSAGES) if texts else 0
    material = Material(preferences, rejections, plain_texts(texts, limit), passages, tuple(asked[:limit]))
    temperatures = [temperature] if isinstance(temperature, (int, float)) else temperature
    samplings = make_samplings(temperatures, [max_tokens] if isinstance(max_tokens, int) else max_tokens, seed)
    settings, bases = Settings(max_length, samplings, engine, context, model), Bases(1 if reference is None else 2)
    others = [compare] if isinstance(compare, str) else compare
    references = [reference, *(None if is_run(name) or name == reference else reference for name in others)]
    evaluations = [
        measure(name, material, settings, reference=paired, console=console, bases=bases)
        for name, paired in zip([model, *others], references, strict=True)  # a run has its base
    ]
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
        if len(quants) > 1:
            raise UsageError("--adapter writes one file: give one quantisation")
        written = exporting.export_adapter(str(run), path, *quants, **options)
    else:
        written = exporting.export(str(run), path, quants, ollama=ollama, **options)
    return Exported(tuple(_read_report(file) for file in written["files"]), written)


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


def _read_report(file: dict[str, Any]) -> ExportReport:
    parity = file["parity"]
    report = file | {"path": Path(file["path"]), "parity": None if parity is None else ParityReport(**parity)}
    return ExportReport(**report)
