"""Records in temporary files, to be read again prompt by prompt: only an index of them is in memory.

    record that is kept --its line--> lines      record that is compared --its fields--> compared

A record that is only compared matters for texts that others reject. Most never do: they are looked up by hash, and
only those that are found are read again. Two texts of one hash come out together; the reader compares them.
"""

from __future__ import annotations

import marshal  # of this process, by this process: the quickest
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from buleyean_rl.data.records.files import decode_json, format_record
from buleyean_rl.data.records.record import RejectionRecord, parse_record


class Spool:
    """Records that were written away.

    A record is named by its number, in the order in which they came. The index are arrays: of each record the hash of
    its prompt, whether it is kept and where it stands; of each answer the hash of it and its prompt.

    Args:
        folder: where the temporary files are; None for the system's.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._lines = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - until `close`
        self._compared = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._lines_end = self._compared_end = 0
        self._prompts, self._retained, self._offsets = array("q"), array("b"), array("q")
        self._retained_answers = array("q")
        self._compared_answers, self._compared_in = array("q"), array("q")  # and the numbers of their records

    def close(self) -> None:
        """Delete the files."""
        self._lines.close()
        self._compared.close()

    def add(self, record: RejectionRecord, is_retained: bool) -> None:
        """Write a record away.

        Args:
            record: any.
            is_retained: false where it is only compared with those that are.
        """
        prompt = hash(record.prompt)
        if is_retained:
            for text in record.rejected_responses:
                self._retained_answers.append(hash((prompt, text)))
            self._offsets.append(self._lines_end)
            self._lines_end += self._lines.write(format_record(record).encode() + b"\n")
        else:
            for text in record.rejected_responses:
                self._compared_answers.append(hash((prompt, text)))
                self._compared_in.append(len(self._prompts))
            self._offsets.append(self._compared_end)
            self._compared_end += self._compared.write(marshal.dumps(tuple(vars(record).values())))
        self._prompts.append(prompt)
        self._retained.append(is_retained)

    def read_line(self, number: int) -> bytes:
        """The line of a record that is kept."""
        self._lines.seek(self._offsets[number])
        return self._lines.readline()

    def read(self, number: int) -> RejectionRecord:
        """A record."""
        if self._retained[number]:
            return parse_record(decode_json(self.read_line(number)))
        self._compared.seek(self._offsets[number])
        return RejectionRecord(*marshal.load(self._compared))

    def groups(self) -> Iterator[Sequence[int]]:
        """The numbers of the records that share the hash of a prompt of which one is kept.

        In the order of each prompt's first record. Of those that are compared only those come that have an answer
        of one that is kept.
        """
        retained = set(self._retained_answers)
        compared = zip(self._compared_answers, self._compared_in, strict=True)
        shared = {number for answer, number in compared if answer in retained}
        # before the next large one
        del retained, self._retained_answers[:], self._compared_answers[:], self._compared_in[:]
        by_prompt: dict[int, int | list[int] | None] = {}  # a list of one takes three times as much memory
        for number, (prompt, is_retained) in enumerate(zip(self._prompts, self._retained, strict=True)):
            numbers = by_prompt.setdefault(prompt, None)
            if not is_retained and number not in shared:
                continue
            if numbers is None:
                by_prompt[prompt] = number
            elif isinstance(numbers, int):
                by_prompt[prompt] = [numbers, number]
            else:
                numbers.append(number)
        for numbers in by_prompt.values():
            group = [numbers] if isinstance(numbers, int) else numbers or []
            if any(map(self._retained.__getitem__, group)):
                yield group
