"""The command: arguments in, one call, a report out.

A command here reads its options, calls one function of the package and prints what comes back: for a
person on stderr, or with `--json` one object on stdout. Everything heavy is imported inside the command
that needs it, so that `--help` is quick.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from buleyean_rl import environment  # noqa: F401 - before torch
from buleyean_rl.errors import BuleyeanError, UsageError

app = typer.Typer(
    name="buleyean",
    help="Fine-tune an open language model from rejections alone, and chat with the result.",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Turn other people's data into rejection records, and check them.", rich_markup_mode=None)
app.add_typer(data_app, name="data")

BUNDLED_DATA = "bundled"

EngineName = Annotated[str, typer.Option("--engine", help="xllamacpp or llama-cpp-python (an extra).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


Prompts = Annotated[
    str | None,
    typer.Argument(
        metavar="[PROMPTS]", help="A prompt a line, or JSON Lines with prompt or messages; else the bundled."
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        help="loops (the default), length:MIN-MAX, refusal, regex:PATTERN, words:FILE, language:CODE, llm:URL#MODEL, "
        "python:MODULE:FUNCTION, person, or an installed one. Several vote.",
    ),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the words after `buleyean`; None takes the process's own.

    Returns:
        The exit code: 0 done, 1 the input or the result is bad, 2 wrong usage, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words  # wherever it stands: one adds it to the end of a line
    words = [word for word in words if word != "--debug"]
    try:
        return app(args=words, prog_name="buleyean", standalone_mode=False) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stdout = None  # or Python would try to flush it on its way out
        return 1
    except Exception as error:
        if debug:
            raise
        problem = _explain(error)
        if problem is None:
            raise
        print(f"error: {problem[0]}", file=sys.stderr)
        return problem[1]


def _explain(error: Exception) -> tuple[str, int] | None:
    """An error as a message and an exit code; None where it is a bug of ours, which deserves its traceback."""
    if isinstance(error, BuleyeanError):
        return str(error), error.exit_code
    if isinstance(error, typer.Abort):
        return "stopped", 130
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 1
    # typer carries its own copy of click, whose base of wrong usage has no public name.
    if isinstance(error, typer.BadParameter.__mro__[1]):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "buleyean"
        problem = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        return f"{problem}. See `{command} --help`.", 2
    return None


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from buleyean_rl import __version__

        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    output: Annotated[str, typer.Option("--output", "-o", help="The folder to write.")] = "buleyean-demo",
    quick: Annotated[bool, typer.Option("--quick", help="Less data and fewer steps: two to three minutes.")] = False,
    engine: EngineName = "xllamacpp",
    as_json: AsJson = False,
) -> None:
    """Do the main job on bundled data and model: mine loops, train, export, measure, compare."""
    from pathlib import Path

    from buleyean_rl.demo import run_demo

    _print_json(run_demo(Path(output), quick=quick, engine=engine, console=_console()), as_json)


@app.command()
def train(
    records: Annotated[str, typer.Argument(metavar="RECORDS", help="A records file.")],
    model: Annotated[str, typer.Option(help="smollm2-135m (bundled), smollm2-360m, a Hub id, a folder or a GGUF.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="RUN", help="The run folder to write.")],
    config: Annotated[str | None, typer.Option(help="A YAML file of settings; options given here win.")] = None,
    objective: Annotated[str | None, typer.Option(help="ratio (default), complement, listwise or published.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the KL (ratio 0.9, the others 0.7).")] = None,
    tau: Annotated[float | None, typer.Option(help="Strength of the complement weights (1).")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Learning rate (2e-4).")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the records (1).")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps, whatever the epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records in a step (4).")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of a prompt and one answer (1024).")] = None,
    row_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens computed at a time (1,280; in fp32 640; GPU 32,000): more is faster, fewer smaller."),
    ] = None,
    guard: Annotated[
        bool | None, typer.Option("--guard/--no-guard", help="End the run before it ruins the model (on).")
    ] = None,
    held_out: Annotated[float | None, typer.Option(help="Share of the records to measure on (0.1).")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the adapter (16).")] = None,
    strength: Annotated[float | None, typer.Option(help="The trained adapter is multiplied by it (1).")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same bytes (42).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count bad records instead of stopping.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on rejections; writes an adapter, run.json, loss.png and a model card."""
    from dataclasses import asdict
    from pathlib import Path

    from buleyean_rl.settings import load_config
    from buleyean_rl.train import train as run

    settings = {
        "objective": objective,
        "alpha": alpha,
        "tau": tau,
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "max_steps": max_steps,
        "per_device_train_batch_size": batch_size,
        "max_length": max_length,
        "row_tokens": row_tokens,
        "guard": guard,
        "held_out": held_out,
        "lora_rank": lora_rank,
        "strength": strength,
        "seed": seed,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    loaded = load_config(Path(config) if config else None, Path(output), given)
    report = run(Path(records), model, loaded, resume=resume, skip_bad=skip_bad, console=_console())
    _print_json(asdict(report), as_json)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or any model that `train` takes.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The .gguf file to write.")],
    quant: Annotated[
        str | None,
        typer.Option(help="q8_0 (default), q6_k, q5_k_m, q4_k_m, q2_k ..., f16, bf16, f32; several with commas."),
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapter alone, for llama.cpp's --lora.")] = False,
    ollama: Annotated[bool, typer.Option("--ollama", help="Write a Modelfile for Ollama beside it.")] = False,
    name: Annotated[str | None, typer.Option(help="What the file calls the model; its own name if not given.")] = None,
    author: Annotated[str | None, typer.Option(help="Who trained it.")] = None,
    license: Annotated[str | None, typer.Option(help="Such as apache-2.0.")] = None,
    url: Annotated[str | None, typer.Option(help="Where the model's card is.")] = None,
    engine: EngineName = "xllamacpp",
    as_json: AsJson = False,
) -> None:
    """Merge a run into its base model and write it as GGUF, checked in llama.cpp before it gets its name."""
    from pathlib import Path

    from buleyean_rl import export as exporting
    from buleyean_rl.errors import UsageError
    from buleyean_rl.gguf_export import About

    about = About(name=name, author=author, license=license, url=url)
    if adapter and ollama:
        raise UsageError("--ollama describes the merged model: leave out --adapter")
    path, console = Path(output), _console()
    with _ended_like_interrupted():
        if adapter:
            written = exporting.export_adapter(run, path, quant or "f16", engine=engine, about=about, console=console)
        else:
            quants = (quant or "q8_0").split(",")
            written = exporting.export(run, path, quants, ollama=ollama, engine=engine, about=about, console=console)
    _print_json(written, as_json)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL.GGUF", help="The model to talk to.")],
    compare: Annotated[str | None, typer.Option(metavar="BASE.GGUF", help="Another one, side by side.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this once and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest word every time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    engine: EngineName = "xllamacpp",
) -> None:
    """Talk to a GGUF model in llama.cpp."""
    from rich.console import Console

    from buleyean_rl import chat as chatting
    from buleyean_rl.engines import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with chatting.open_voices([model] if compare is None else [compare, model], engine=engine) as voices:
        if prompt is None:
            chatting.talk(voices, Console(), system=system, sampling=sampling)
        elif compare is None:
            chatting.ask(voices[0].engine, prompt, sys.stdout, system=system, sampling=sampling)
        else:
            chatting.compare(voices, prompt, Console(), system=system, sampling=sampling)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What `train` takes, a run folder, or a GGUF file.")],
    pairs: Annotated[
        str | None, typer.Option(metavar="FILE", help="Preferences in any format that `data import` reads.")
    ] = None,
    records: Annotated[
        str | None, typer.Option(metavar="FILE", help="Held-out rejections: the same formats, with counts.")
    ] = None,
    neutral: Annotated[
        str | None, typer.Option(metavar="FILE", help="Plain texts, a line each or `text` in JSON Lines; or: bundled.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts to answer, as for `mine`; or: bundled.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base of a model that is no run: log pi/pi_ref needs one.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Another model, on the same items; repeat it.")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the figures as one JSON object; - for stdout.")
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw the figures with their intervals.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first so many of each: preferences, records, texts, prompts.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer given.")] = 128,
    max_length: Annotated[int, typer.Option(min=2, help="The most tokens of a prompt and one answer.")] = 1024,
    engine: Annotated[str, typer.Option(help="auto, transformers or llama.cpp.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count bad rows instead of stopping.")] = False,
) -> None:
    """Measure a model without a judge: rankings, likelihoods, drift, loops; asked for nothing, on bundled data."""
    from pathlib import Path

    from buleyean_rl import demo_data
    from buleyean_rl.evaluate.measure import Material, Settings, read_texts
    from buleyean_rl.evaluate.measure import evaluate as run
    from buleyean_rl.evaluate.show import PICTURES, as_json, lines, table
    from buleyean_rl.evaluate.show import plot as draw
    from buleyean_rl.importers import read_preferences
    from buleyean_rl.json_file import write_json

    for target in (json_file, plot):
        if target is not None and target != "-" and not Path(target).parent.is_dir():
            raise UsageError(f"{target}: there is no folder {Path(target).parent}: make it first")
    if plot is not None and Path(plot).suffix not in PICTURES:
        raise UsageError(f"--plot {plot}: end it in {', '.join(PICTURES)}")
    if not any((pairs, records, neutral, prompts)):
        neutral = prompts = BUNDLED_DATA
    texts: tuple[str, ...] = ()
    if neutral == BUNDLED_DATA:
        texts = tuple(demo_data.neutral_texts()[:limit])
    elif neutral is not None:
        texts = read_texts(Path(neutral), limit)
    asked = [] if prompts is None else _prompts(None if prompts == BUNDLED_DATA else prompts, "held_out")
    preferences, rejections = (
        None if source is None else read_preferences(source, limit=limit, skip_bad=skip_bad)
        for source in (pairs, records)
    )
    material = Material(preferences, rejections, texts, tuple(asked[:limit]))
    settings, console = Settings(max_length, max_tokens, engine), _console()
    evaluations = [run(model, material, settings, reference=reference, console=console)]
    for other in compare or []:
        evaluations.append(run(other, material, settings, reference=_unless_run(other, reference), console=console))
    console.print(table(evaluations, seed))
    _report([line for evaluation in evaluations for line in lines(evaluation)], None)
    result = as_json(evaluations, seed)
    if json_file == "-":
        _print_json(result, True)
    elif json_file is not None:
        write_json(Path(json_file), result)
    if plot is not None:
        draw(Path(plot), evaluations, seed)


def _unless_run(name: str, reference: str | None) -> str | None:
    """The reference of a model beside others: a run has its own, and a reference needs none."""
    from buleyean_rl.models import is_run

    return None if is_run(name) or name == reference else reference


@app.command()
def push(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="A run folder, GGUF files, or a records file.")],
    to: Annotated[str, typer.Option("--to", metavar="OWNER/NAME", help="The repository on the Hub.")],
    run: Annotated[str | None, typer.Option(metavar="RUN", help="The run that GGUF files were made from.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card, such as apache-2.0.")] = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository is for everyone to see.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a run, GGUF files or records to the Hugging Face Hub, with a card; a new repository is private."""
    from pathlib import Path

    from buleyean_rl import hub
    from buleyean_rl.errors import UsageError

    parcel = hub.gather([Path(p) for p in paths], to, run=Path(run) if run else None, license=license)
    for line in (f"to {parcel.kind} {to}, {'public' if public else 'private'} if it is new:", *parcel.lines()):
        print(line, file=sys.stderr)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody is there to be asked: add --yes to upload")
        typer.confirm("upload?", abort=True, err=True)
    address = hub.send(parcel, to, private=not public, message=message)
    print(address, file=sys.stderr)
    _print_json({"url": address, "files": list(parcel.files)}, as_json)


@app.command()
def mine(
    prompts: Prompts = None,
    model: Annotated[
        str, typer.Option(help="What `train` takes, a run folder, or the URL of an endpoint (URL#MODEL).")
    ] = "smollm2-135m",
    output: Annotated[str, typer.Option("--output", "-o", help="The records file to write.")] = "records.jsonl",
    judge: Judges = None,
    rubric: Annotated[str | None, typer.Option(metavar="FILE", help="What an LLM judge goes by.")] = None,
    samples: Annotated[int, typer.Option(help="Answers to each prompt.")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 for one sample, 0.8 for more.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
    seed: Annotated[int, typer.Option(help="Same seed, same records.")] = 0,
    engine: Annotated[str, typer.Option(help="auto, transformers or llama.cpp.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Let a model answer prompts, judge the answers, and write what was rejected as records.

    Stopped or killed, the same command goes on where it was; with other judges it judges the same answers.
    """
    from dataclasses import asdict
    from pathlib import Path

    from buleyean_rl.errors import RecordError
    from buleyean_rl.loading import identity, open_engine
    from buleyean_rl.mine import MineSettings
    from buleyean_rl.mine import mine as run

    settings = MineSettings(samples, max_tokens, _temperature(samples, temperature), seed=seed)
    questions, judges = _prompts(prompts, "mine"), _judges(judge, rubric)
    mined = run(
        questions,
        lambda: open_engine(model, engine),
        identity(model, engine),
        judges,
        Path(output),
        settings,
        console=_console(),
    )
    _report(mined.report.lines(), asdict(mined.report) if as_json else None)
    if not mined.records:
        raise RecordError("nothing was rejected: there is nothing to learn from", path=output)


@app.command()
def walk(
    prompts: Prompts = None,
    model: Annotated[str, typer.Option(help="The base model, as for `train`.")] = "smollm2-135m",
    output: Annotated[str, typer.Option("--output", "-o", help="The folder of the walk.")] = "walk",
    rounds: Annotated[int, typer.Option(min=1, help="To be done in all; more of them go on with a walk.")] = 3,
    held_out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts to measure on, never mined; the bundled ones if left out."),
    ] = None,
    judge: Judges = None,
    rubric: Annotated[str | None, typer.Option(metavar="FILE", help="What an LLM judge goes by.")] = None,
    samples: Annotated[int, typer.Option(help="Answers to each prompt and round.")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 for one sample, 0.8 for more.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
    seed: Annotated[int, typer.Option(help="Same seed, same walk.")] = 0,
    epochs: Annotated[float | None, typer.Option(help="Passes over the records in each round (4).")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Peak learning rate (7e-4).")] = None,
    strength: Annotated[float | None, typer.Option(help="Each round's adapter is multiplied by it (1.7).")] = None,
    config: Annotated[
        str | None, typer.Option(metavar="RUN.YAML", help="Settings of the training, as for `train`.")
    ] = None,
    max_drift: Annotated[
        float, typer.Option(help="Nats per token that neutral text may lose; a round that loses more is the last.")
    ] = 0.02,
    as_json: AsJson = False,
) -> None:
    """Mine, train on everything rejected so far, measure; and again with the trained model.

    Stopped or killed, the same command goes on where it was.
    """
    from pathlib import Path

    from buleyean_rl.mine import MineSettings
    from buleyean_rl.walk import walk as run
    from buleyean_rl.walk import walk_config

    given = {"learning_rate": learning_rate, "num_train_epochs": epochs, "strength": strength}
    result = run(
        _prompts(prompts, "mine"),
        _prompts(held_out, "held_out"),
        model,
        Path(output),
        _judges(judge, rubric),
        walk_config(
            Path(config) if config else None, {name: value for name, value in given.items() if value is not None}
        ),
        rounds=rounds,
        settings=MineSettings(samples, max_tokens, _temperature(samples, temperature), seed=seed),
        max_drift=max_drift,
        console=_console(),
    )
    _print_json(result, as_json)


@app.command()
def void(
    model: Annotated[str, typer.Option(help="The base model, as for `train`.")] = "smollm2-135m",
    output: Annotated[str, typer.Option("--output", "-o", help="The folder of rejections and runs.")] = "void",
    host: Annotated[
        str, typer.Option(help="The address to listen on. Any but this machine's own asks visitors for a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
) -> None:
    """Open a page to talk to base and trained model, say no, and train.

    The token of a public address is BULEYEAN_VOID_TOKEN, or else made up and printed.
    """
    from pathlib import Path

    try:
        from buleyean_rl.void.serve import serve
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is missing: pip install 'buleyean-rl[void]'") from error

    serve(model, Path(output), host, port, console=_console())


@data_app.callback(invoke_without_command=True)
def _data(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@data_app.command("import")
def data_import(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A .jsonl, .json or .csv file, a folder, or a Hub data set id.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The records file to write.")],
    format: Annotated[
        str,
        typer.Option(help="auto, records, pairs, kto, scored, candidates, openwebui, traces or columns."),
    ] = "auto",
    split: Annotated[str | None, typer.Option(help="The split of a Hub data set.")] = None,
    limit: Annotated[int | None, typer.Option(help="Stop once there are so many records.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=NAME", help="The column that is the prompt, answer, score or system; repeat it."),
    ] = None,
    score: Annotated[str | None, typer.Option(metavar="NAME", help="The score of a trace that counts.")] = None,
    below: Annotated[float, typer.Option(help="A score below this is a rejection.")] = 0.5,
    redact: Annotated[
        bool, typer.Option("--redact", help="Take out e-mail addresses, phone numbers and keys.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count bad rows instead of stopping.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn pairs, labels, scores, a table or an export into a records file. Chosen answers are discarded."""
    from buleyean_rl.importers import Choices, import_records

    for named in column or []:
        if not all(named.partition("=")):
            raise UsageError(f"--column {named}: give a role and a column, such as prompt=question")
    choices = Choices({role: name for role, _, name in (named.partition("=") for named in column or [])}, score, below)
    with _counting("rows read") as progress:
        report = import_records(
            source,
            output,
            format=format,
            split=split,
            limit=limit,
            skip_bad=skip_bad,
            choices=choices,
            redact=redact,
            progress=progress,
        )
    _report(report.lines(), report.as_dict() if as_json else None)


@data_app.command("validate")
def data_validate(
    path: Annotated[str, typer.Argument(metavar="RECORDS", help="A records file.")],
    model: Annotated[
        str | None, typer.Option(help="Count its tokens too: a name, a Hub id, a folder or a GGUF.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="The most tokens of a prompt and one answer.")] = 1024,
    as_json: AsJson = False,
) -> None:
    """Say what training would use, fold, cut and drop; exit 1 if the file cannot be trained on."""
    from buleyean_rl.records import validate_records

    measure = _measure(model) if model is not None else None
    with _counting("records checked") as progress:
        report = validate_records(path, measure=measure, max_length=max_length, progress=progress)
    _report(report.lines(), report.as_dict() if as_json else None)
    if not report.usable:
        raise typer.Exit(1)


def _measure(model: str) -> Callable[[Any], tuple[int, list[list[bool]]]]:
    """What `validate_records` counts tokens with: the tokenizer as training uses it."""
    from buleyean_rl.boundary import encode_prompt, encode_response
    from buleyean_rl.models import load_tokenizer
    from buleyean_rl.records import RejectionRecord

    tokenizer = load_tokenizer(model)

    def measure(record: RejectionRecord) -> tuple[int, list[list[bool]]]:
        answers = zip(record.rejected_responses, record.rejected_spans, strict=True)
        return len(encode_prompt(tokenizer, record.prompt)), [
            encode_response(tokenizer, text, spans)[1] for text, spans in answers
        ]

    return measure


@contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """Being told to end (SIGTERM) is Ctrl-C within: what was begun is cleaned up."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _prompts(path: str | None, bundled: str) -> list[Any]:
    """The prompts of a file, or the bundled ones of a split."""
    from pathlib import Path

    from buleyean_rl import demo_data
    from buleyean_rl.mine import read_prompts

    if path is not None:
        return list(read_prompts(Path(path)))
    return demo_data.mine_prompts() if bundled == "mine" else demo_data.held_out_prompts()


def _judges(names: Sequence[str] | None, rubric: str | None) -> list[Any]:
    from pathlib import Path

    from buleyean_rl.judges import find_judge

    text = Path(rubric).read_text(encoding="utf-8") if rubric is not None else None
    return [find_judge(name, rubric=text) for name in names or ["loops"]]


def _temperature(samples: int, given: float | None) -> float:
    return given if given is not None else 0.0 if samples == 1 else 0.8


def _console() -> Any:
    """Where progress goes: stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _print_json(value: dict[str, Any], wanted: bool) -> None:
    if wanted:
        print(json.dumps(value, allow_nan=False))


def _report(lines: Sequence[str], as_json: dict[str, Any] | None) -> None:
    """Print a report: the lines on stderr, the JSON object, if wanted, on stdout."""
    for line in lines:
        print(line, file=sys.stderr)
    if as_json is not None:
        _print_json(as_json, True)


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int], object] | None]:
    """A running count on stderr, if somebody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda count: status.update(f"{count:,} {what}")
