"""Talk to models in the terminal, one or several side by side, and reject their answers.

    open_models(names)     any model that `train` takes, a run, or a GGUF file, closed at the end
    ask(models, ...)       one answer of each
    talk(models, ...)      a conversation; `/no` adds the last answer to a records file

Every model has a conversation of its own and does not see the others' answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from buleyean_rl.data.encode import tokenizer_hash
from buleyean_rl.data.records import make_record
from buleyean_rl.data.records.rejecting import append_record, find_part
from buleyean_rl.errors import BuleyeanError, EngineError, UsageError
from buleyean_rl.inference.chat_screen import Stream, show_one, show_side_by_side
from buleyean_rl.inference.gguf_engines import DEFAULT_ENGINE, open_gguf
from buleyean_rl.inference.protocol import Adapter, Answer, Engine, Sampling
from buleyean_rl.models.source import public_name_and_license
from buleyean_rl.system.progress import working

CHAT_SAMPLING = Sampling(max_tokens=512, temperature=0.7)
SHORT_HELP = "/no rejects an answer, /help lists the rest"
HELP = """\
/no                reject the last answer
/no WHY            the same, with a remark for people
/no "WORDS" [WHY]  reject only that part of it
/new               a new conversation
/exit or Ctrl-D    leave; Ctrl-C stops an answer"""
_QUOTED = re.compile(r'["“”]([^"“”]*)["“”]\s*')


@dataclass
class ChatModel:
    """A model in a conversation.

    Args:
        name: for people.
        engine: runs it.
        policy: what records say of it: model and adapter.
        messages: so far.
        answer: the last one, to the messages before it; None before the first.
        rejections: of the last answer so far: its parts, None for all of it.
    """

    name: str
    engine: Engine
    policy: Mapping[str, str] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    answer: Answer | None = None
    rejections: set[tuple[int, int] | None] = field(default_factory=set)


@contextmanager
def open_models(
    names: Sequence[str],
    context: int | None = None,
    engine: str = DEFAULT_ENGINE,
    *,
    lora: str | None = None,
    console: Console | None = None,
) -> Iterator[list[ChatModel]]:
    """Open models; they are freed when the block ends.

    Args:
        names: base models as for `train`, run folders, or GGUF files.
        context: maximum tokens of a conversation; None for the model's own, as memory allows.
        engine: of GGUF files, one of `gguf_engines.ENGINES`.
        lora: an adapter GGUF for the last model, which is a GGUF file.
        console: says what is loaded; None for nowhere.

    Raises:
        ModelError: nothing of a name can exist, or it cannot be loaded.
        EngineError: a file is not GGUF or damaged, or llama.cpp cannot run it.
        UsageError: an adapter or an engine for a model that is no GGUF file.
    """
    with ExitStack() as stack:
        models = []
        for number, name in enumerate(names, start=1):
            with working(console or Console(quiet=True), f"loading {name}"):
                model = _open_model(name, context, engine, lora if number == len(names) else None)
            stack.callback(model.engine.close)
            models.append(model)
        yield models


def base_name(name: str) -> str:
    """The name of the base model that the rejections of a model's answers are trained on: its own, or its run's base's.

    Raises:
        ModelError: nothing of that name can exist.
    """
    from buleyean_rl.models.run_folder import find_model

    source = find_model(name)
    return (source.base or source).name


def _open_model(name: str, context: int | None, engine: str, lora: str | None) -> ChatModel:
    path = Path(name)
    if path.suffix == ".gguf" or path.is_file():
        return _open_file(path.stem, {"model": public_name_and_license(name)[0]}, path, context, engine, lora)
    from buleyean_rl.inference.open import describe_policy, open_engine
    from buleyean_rl.models.run_folder import find_model

    source = find_model(name)
    shown, policy = path.name if path.is_dir() else name, describe_policy(source)
    if lora is not None:
        if source.run is not None:
            raise UsageError(f"--lora goes with a GGUF file, and {name} is a run, which has its adapter already")
        if source.gguf_path is None:
            raise UsageError(f"--lora goes with a GGUF file, which {name} is not")
        return _open_file(shown, policy, source.gguf_path, context, engine, lora)
    if engine != DEFAULT_ENGINE:
        raise UsageError(f"--engine {engine} goes with a GGUF file, which {name} is not")
    return ChatModel(shown, open_engine(source, context=context), policy)


def _open_file(
    shown: str, policy: Mapping[str, str], path: Path, context: int | None, engine: str, lora: str | None
) -> ChatModel:
    """A GGUF file in llama.cpp, which needs no torch."""
    if lora is None:
        return ChatModel(shown, open_gguf(path, engine, context=context), policy)
    opened = open_gguf(path, engine, context=context, adapter=Adapter(Path(lora)))
    return ChatModel(f"{shown} + {Path(lora).stem}", opened, {**policy, "adapter": Path(lora).name})


def ask(
    models: Sequence[ChatModel],
    prompt: str,
    console: Console,
    *,
    system: str | None = None,
    sampling: Sampling = CHAT_SAMPLING,
) -> list[str]:
    """Show one answer of every model as it comes; of one model, piped, the answer and nothing else.

    Returns:
        The answers, in the order of the models.
    """
    for model in models:
        model.messages = [*_system_messages(system), {"role": "user", "content": prompt}]
    return [answer.text for answer in _show_answers(models, console, sampling)]


def talk(
    models: Sequence[ChatModel],
    console: Console,
    *,
    rejections: Path,
    system: str | None = None,
    sampling: Sampling = CHAT_SAMPLING,
    read: Callable[[], str] | None = None,
) -> int:
    """Hold a conversation until `/exit` or the end of input.

    Args:
        models: all of them answer; `/no` is about the last one.
        console: to print on.
        rejections: the records file that `/no` adds to.
        system: the system message.
        sampling: of every answer.
        read: returns the next line, raises EOFError at the end; None reads from the console.

    Returns:
        The number of rejections.
    """
    read = read or (lambda: console.input("[bold]> [/bold]"))
    _remark(console, f"{' and '.join(model.name for model in models)}. {SHORT_HELP}")
    _reset(models, system)
    rejected = 0
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return rejected
        command, _, argument = line.partition(" ")
        match command:
            case "/exit" | "/quit" | "/bye":
                return rejected
            case "/new":
                _reset(models, system)
                _remark(console, "a new conversation")
            case "/no":
                try:
                    _remark(console, _reject(models[-1], argument.strip(), rejections, sampling))
                    rejected += 1
                except (BuleyeanError, OSError) as error:
                    console.print(Text(str(error), style="red"))
            case "/help":
                _remark(console, f"{HELP}\nRejections go to {rejections}.")
            case _ if line.startswith("/"):
                _remark(console, f"no command {command}: {SHORT_HELP}")
            case _ if line:
                _answer_line(models, line, console, sampling)


def _reject(model: ChatModel, argument: str, path: Path, sampling: Sampling) -> str:
    """Add the last answer, or a part of it, to a records file; returns what to say of it."""
    answer = model.answer
    if answer is None:
        raise UsageError("there is no answer to reject yet")
    span, why = None, argument
    if quoted := _QUOTED.match(argument):
        why = argument[quoted.end() :]
        span = find_part(answer.text, quoted[1])
        if span is None:
            raise UsageError(f"the last answer has no {quoted[0].strip()}: nothing is rejected")
    if span in model.rejections:
        raise UsageError("that is rejected already")
    is_blank = not answer.text.strip()
    has_ids = answer.token_ids is not None and not is_blank and model.engine.tokenizer is not None
    record = make_record(
        model.messages[:-1],
        ["" if is_blank else answer.text],
        spans=None if span is None else [[list(span)]],
        token_ids=[answer.token_ids] if has_ids else None,
        ended=[answer.ended],
        tokenizer=tokenizer_hash(model.engine.tokenizer) if has_ids else None,
        policy={**model.policy, "temperature": sampling.temperature, "top_p": sampling.top_p},
    )
    is_new = not path.exists()
    append_record(path, record, why)
    model.rejections.add(span)
    what = "the answer" if span is None else f'"{answer.text[slice(*span)]}"'
    return f"rejected: {what} of {model.name}, in {path}{', a new file' if is_new else ''}"


def _system_messages(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _reset(models: Sequence[ChatModel], system: str | None) -> None:
    for model in models:
        model.messages, model.answer = _system_messages(system), None


def _answer_line(models: Sequence[ChatModel], line: str, console: Console, sampling: Sampling) -> None:
    """Add the user's line and the answers to the conversations; after an error, restore them."""
    previous = [list(model.messages) for model in models]
    for model in models:
        model.messages.append({"role": "user", "content": line})
    try:
        answers = _show_answers(models, console, sampling)
    except EngineError as error:
        console.print(Text(f"{error} (/new starts over)", style="red"))
        for model, messages in zip(models, previous, strict=True):
            model.messages = messages
        return
    for model, answer in zip(models, answers, strict=True):
        model.messages.append({"role": "assistant", "content": answer.text})
        model.answer, model.rejections = answer, set()


def _show_answers(models: Sequence[ChatModel], console: Console, sampling: Sampling) -> list[Answer]:
    """Show every model's answer as it comes; Ctrl-C ends it early, and those of the models after it."""
    answers: list[Answer] = []
    is_stopped = False

    def stream_of(model: ChatModel) -> Stream:
        def stream(show: Callable[[str], None]) -> None:
            nonlocal is_stopped
            text = ""
            whole: Answer | None = None
            try:
                if not is_stopped:
                    with closing(model.engine.generate(model.messages, sampling)) as pieces:
                        while True:
                            piece = next(pieces)
                            text += piece
                            show(piece)
            except StopIteration as end:
                whole = end.value
            except KeyboardInterrupt:
                is_stopped = True
            if whole is None or whole.text != text:  # stopped, or not all of it was streamed
                whole = Answer(text, None, whole is not None and whole.ended)
            answers.append(whole)

        return stream

    if len(models) == 1:
        show_one(console, stream_of(models[0]))
    else:
        show_side_by_side(console, [model.name for model in models], [stream_of(model) for model in models])
    return answers


def _remark(console: Console, text: str) -> None:
    console.print(Text(text, style="dim"))
