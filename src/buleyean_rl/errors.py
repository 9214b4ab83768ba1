"""Every error this package raises on purpose.

    BuleyeanError                 exit code 1: the input or the result is bad
    ├── RecordError               a rejection record, with the file and line it came from
    │   └── UnsupportedContent    a row that is sound, but more than text
    ├── ModelError                a base model or run folder that cannot be loaded or trained
    ├── TrainingError             training could not start or continue, or did not change the model
    ├── ProcessError              another process of the same run failed
    ├── EngineError               an inference engine failed or gave an invalid answer
    ├── ExportError               a GGUF file that cannot be written
    │   ├── UnsupportedArchitecture
    │   └── ParityError           the written file does not behave like the model it came from
    ├── HubError                  nothing could be uploaded
    └── UsageError                exit code 2: the request itself is wrong

A message says what is wrong, where, and what to do, in one or two lines. Any other exception is a bug.
"""

from __future__ import annotations

from pathlib import Path


class BuleyeanError(Exception):
    """Base of all errors; `exit_code` is what the command returns for it."""

    exit_code = 1


class RecordError(BuleyeanError):
    """A bad rejection record or records file.

    Args:
        problem: what is wrong and what to do.
        path: the file it was read from, if any.
        line: its line in that file, counted from 1, if any.
    """

    def __init__(self, problem: str, *, path: Path | str | None = None, line: int | None = None) -> None:
        self.problem, self.path, self.line = problem, path, line
        where = "" if path is None else f"{path}:{line}: " if line is not None else f"{path}: "
        super().__init__(where + problem)


class UnsupportedContent(RecordError):
    """A row that is sound, but is more than training on text can use: a call of a tool, an image."""


class NothingRejected(RecordError):
    """Rows in which nothing was rejected.

    Args:
        problem: what they are instead.
        path: where they were read from.
        skipped: bad rows among them.
    """

    def __init__(self, problem: str, *, path: Path | str, skipped: int) -> None:
        super().__init__(problem, path=path)
        self.skipped = skipped


class ModelError(BuleyeanError):
    """A base model or a run folder that cannot be loaded, or cannot be trained."""


class TrainingError(BuleyeanError):
    """Training could not start or continue, or did not change the model."""


class ProcessError(BuleyeanError):
    """Another process of the same run failed, or cannot be reached.

    Args:
        problem: which, and why.
        is_told: whether it was printed on this host already.
    """

    def __init__(self, problem: str, *, is_told: bool = False) -> None:
        super().__init__(problem)
        self.is_told = is_told


class EngineError(BuleyeanError):
    """An inference engine failed or gave an invalid answer."""


class ExportError(BuleyeanError):
    """A model that cannot be written as GGUF."""


class UnsupportedArchitecture(ExportError):
    """An architecture that the exporter does not support."""


class ParityError(ExportError):
    """A written GGUF that does not behave like the model it was made from."""


class HubError(BuleyeanError):
    """The Hub could not be reached, or refused the upload."""


class UsageError(BuleyeanError):
    """A request that contradicts itself or names something that does not exist."""

    exit_code = 2
