"""Results that are printed as the command prints them, and in a notebook as HTML."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from buleyean_rl.evaluation import forest_plot, show
from buleyean_rl.evaluation.differences import verdict
from buleyean_rl.evaluation.measure import Evaluation
from buleyean_rl.gguf import ExportReport
from buleyean_rl.inference.protocol import Engine, Sampling
from buleyean_rl.mining.mine import Mined
from buleyean_rl.system.outputs import check_output_file

WIDTH = 100  # characters of a printed result
SHOWN_RECORDS = 10  # of what was mined
SHOWN_CHARACTERS = 160  # of a prompt or an answer


class Shown:
    """A result that is printed as rich shows it, and in a notebook as HTML."""

    def __rich__(self) -> RenderableType:
        """What is shown."""
        raise NotImplementedError

    def __repr__(self) -> str:
        console = Console(file=StringIO(), width=WIDTH)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def _repr_html_(self) -> str:
        console = Console(file=StringIO(), width=WIDTH, record=True)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


@dataclass(frozen=True, repr=False)
class Mining(Shown, Mined):
    """What was mined, see `Mined`: `report`, `records` and `answers`."""

    def __rich__(self) -> RenderableType:
        table = Table("prompt", "rejected")
        for record in self.records[:SHOWN_RECORDS]:
            prompt = record.prompt if isinstance(record.prompt, str) else record.prompt[-1][1]
            answers = zip(record.rejected_responses, record.rejection_counts, strict=True)
            rejected = [_shorten(text) for text, count in answers if count]
            table.add_row(Text(_shorten(prompt)), Text("\n".join(rejected)))
        lines = [Text(line) for line in self.report.lines()]
        return Group(*lines, *([table] if self.records else []))


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """The figures of one or several models, on the same items.

    Args:
        evaluations: of each model; the others are compared with the first.
        seed: of the bootstrap intervals.
    """

    evaluations: tuple[Evaluation, ...]
    seed: int = 0

    @property
    def figures(self) -> dict[str, float | None]:
        """The first model's, by name."""
        return {name: figure.value for name, figure in self.evaluations[0].figures.items()}

    def as_json(self) -> dict[str, Any]:
        """What `buleyean evaluate --json` writes: all figures, intervals, counts and differences."""
        return show.as_json(self.evaluations, self.seed)

    def plot(self, path: Path | str, *, overwrite: bool = False) -> None:
        """Draw a forest plot: differences from the others with their intervals, or without others the figures.

        Args:
            path: of the picture: .png, .svg or .pdf.
            overwrite: replace a file that is no such plot.

        Raises:
            UsageError: a file is there already and may not be replaced.
        """
        check_output_file(Path(path), overwrite=overwrite, is_ours=forest_plot.is_our_plot)
        forest_plot.plot(Path(path), self.evaluations, self.seed)

    def lines(self) -> list[str]:
        """The figures, what a reader should know of them, and last a verdict on each of the others."""
        first, *others = self.evaluations
        remarks = [note for evaluation in self.evaluations for note in show.notes(evaluation)]
        verdicts = [verdict(first, other, self.seed) for other in others]
        return [*show.table(self.evaluations, self.seed), *remarks, *verdicts]

    def __rich__(self) -> RenderableType:
        return Group(*(Text(line) for line in self.lines()))


@dataclass(frozen=True, repr=False)
class Exported(Shown):
    """GGUF files that behave like their model.

    Args:
        files: a report of each, with what the check measured.
        report: the same, and more, as `buleyean export --json` prints it.
    """

    files: tuple[ExportReport, ...]
    report: dict[str, Any]

    @property
    def path(self) -> Path:
        """The first file."""
        return self.files[0].path

    def __rich__(self) -> RenderableType:
        table = Table(Column("file", overflow="fold"), "quant", "MB", "KL to the model, nats")
        for file in self.files:
            nats = "" if file.parity is None else f"{file.parity.divergence:.5f}"
            table.add_row(escape(str(file.path)), file.quant, f"{file.bytes / 1e6:,.1f}", nats)
        notes = dict.fromkeys(note for file in self.files for note in file.notes)
        return Group(table, *(Text(f"note: {note}") for note in notes))


class Conversation(Shown):
    """A conversation with a model, which stays loaded until `close`; also a context manager.

    Args:
        engine: runs the model.
        system: the system message; None for none.
        sampling: of every answer.
    """

    def __init__(self, engine: Engine, system: str | None, sampling: Sampling) -> None:
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._engine, self._sampling = engine, sampling

    @property
    def answer(self) -> str:
        """The last answer; "" before the first."""
        answers = [message["content"] for message in self.messages if message["role"] == "assistant"]
        return answers[-1] if answers else ""

    def say(self, text: str) -> str:
        """Say something and return the answer.

        Raises:
            EngineError: the engine failed; nothing was said then.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = "".join(self._engine.generate(messages, self._sampling))
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def close(self) -> None:
        """Free the model."""
        self._engine.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __rich__(self) -> RenderableType:
        return Group(*(Text.assemble((message["role"], "bold"), ": ", message["content"]) for message in self.messages))


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 4] + " ..."
