"""Records in temporary files, to be read again prompt by prompt: neither they nor an index of them are in memory.

    record that is kept --its line--> lines      record that is compared --its fields--> compared
    of each of its answers a row --by prompt--> who belongs together --by the first of them--> groups

A record that is only compared matters for texts that others reject. Most never do: they are looked up by hash, and
only those that are found are read again. Two texts of one hash come out together; the reader compares them.
"""

from __future__ import annotations

import marshal  # of this process, by this process: the quickest
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from buleyean_rl.data.records.files import decode_json, format_record
from buleyean_rl.data.records.record import RejectionRecord, parse_record
from buleyean_rl.data.records.sorted_rows import SortedRows

HASHES = -(1 << 63), (1 << 63) - 1

# Whether a record is kept, and where it stands in its file.
Place = tuple[bool, int]


class Spool:
    """Records that were written away.

    Args:
        folder: where the temporary files are; None for the system's.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._lines = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - until `close`
        self._compared = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._lines_end = self._compared_end = self._count = 0
        self._answers = SortedRows(4, *HASHES, folder)  # prompt, answer, number and whether it is kept, place

    def close(self) -> None:
        """Delete the files."""
        for file in (self._lines, self._compared, self._answers):
            file.close()

    def add(self, record: RejectionRecord, is_kept: bool) -> None:
        """Write a record away.

        Args:
            record: any.
            is_kept: false where it is only compared with those that are.
        """
        prompt, number = hash(record.prompt), 2 * self._count + is_kept
        self._count += 1
        if is_kept:
            place = self._lines_end
            self._lines_end += self._lines.write(format_record(record).encode() + b"\n")
        else:
            place = self._compared_end
            self._compared_end += self._compared.write(marshal.dumps(tuple(vars(record).values())))
        for text in record.rejected_responses:
            self._answers.add(prompt, hash((prompt, text)), number, place)

    def read_line(self, place: Place) -> bytes:
        """The line of a record that is kept."""
        self._lines.seek(place[1])
        return self._lines.readline()

    def read(self, place: Place) -> RejectionRecord:
        """A record."""
        if place[0]:
            return parse_record(decode_json(self.read_line(place)))
        self._compared.seek(place[1])
        return RejectionRecord(*marshal.load(self._compared))

    def groups(self) -> Iterator[Sequence[Place]]:
        """Where the records stand that share the hash of a prompt of which one is kept.

        In the order of each prompt's first record. Of those that are compared only those come that have an answer
        of one that is kept.
        """
        places = SortedRows(3, 0, 2 * self._count, self._folder)  # the group's first number, own number, place
        try:
            for rows in self._answers.read():
                places.add_all(_group_by_prompt(rows))
            for rows in places.read():
                starts = np.flatnonzero(np.diff(rows[:, 0], prepend=-1))
                sizes = np.diff(starts, append=len(rows)).tolist()
                found = list(zip((rows[:, 1] % 2 == 1).tolist(), rows[:, 2].tolist(), strict=True))
                for start, size in zip(starts.tolist(), sizes, strict=True):
                    group = found[start : start + size]
                    if group[0][0] or any(is_kept for is_kept, _ in group):
                        yield group
        finally:
            places.close()


def _group_by_prompt(rows: np.ndarray) -> np.ndarray:
    """Rows of answers, in the order of their prompts' hashes, as those of the records that matter."""
    prompts, answers, numbers, places = rows.T
    is_first = np.concatenate([[True], prompts[1:] != prompts[:-1]])
    first_numbers = numbers[is_first][np.cumsum(is_first) - 1]
    is_kept = numbers % 2 == 1
    matters = is_kept | np.isin(answers, answers[is_kept])
    grouped = np.stack([first_numbers, numbers, places], axis=1)[matters]
    is_new = np.concatenate([[True], grouped[1:, 1] != grouped[:-1, 1]])  # a record has a row for each of its answers
    return grouped[is_new[: len(grouped)]]
