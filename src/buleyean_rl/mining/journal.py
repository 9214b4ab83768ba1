"""Answers and verdicts on disk as they fall, so that mining can be killed and go on."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from buleyean_rl.data.records import decode_json
from buleyean_rl.errors import UsageError
from buleyean_rl.mining.judges import Verdict


def journal_path(output: Path) -> Path:
    """Where the journal of a records file stands."""
    return output.with_name(f"{output.stem}.mined.jsonl")


class Journal:
    """Answers and verdicts on disk, a JSON line each; nobody else may write it meanwhile.

    Args:
        path: the file; an earlier one is read first, without the half line that killing may leave.
        header: what the answers depend on.

    Raises:
        UsageError: an earlier journal has another header, or another process writes it.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.answers: dict[int, list[str]] = {}
        self.verdicts: dict[tuple[str, int, int], Verdict] = {}
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UsageError(f"{path} is being written by another process: wait for it, or stop it") from None
        try:
            self._read(header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add_answers(self, answers: Mapping[int, list[str]]) -> None:
        """Keep the answers to some prompts, all of them or none."""
        self._write([{"prompt": index, "answers": texts} for index, texts in answers.items()])
        self.answers |= answers

    def add_verdict(self, judge: str, index: int, k: int, verdict: Verdict) -> None:
        """Keep what a judge says of a prompt's k-th answer."""
        self._write([{"judge": judge, "prompt": index, "answer": k, **asdict(verdict)}])
        self.verdicts[judge, index, k] = verdict

    def _read(self, header: Mapping[str, Any]) -> None:
        self._file.seek(0)
        whole = 0
        for raw in self._file:
            if not raw.endswith(b"\n"):
                break
            row: Any = decode_json(raw)
            if whole == 0:
                differing = [name for name in header if row.get(name) != header[name]]
                if differing:
                    raise UsageError(
                        f"{self.path} was mined with another {', '.join(differing)}: name another output, or delete it"
                    )
            elif "answers" in row:
                self.answers[row["prompt"]] = row["answers"]
            else:
                spans = tuple((start, end) for start, end in row["spans"])
                verdict = Verdict(row["rejected"], spans, row["reason"])
                self.verdicts[row["judge"], row["prompt"], row["answer"]] = verdict
            whole += len(raw)
        self._file.truncate(whole)
        if whole == 0:
            self._write([header])

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file.flush()  # from here on killing the process loses nothing
