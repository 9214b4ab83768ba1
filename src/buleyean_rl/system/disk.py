"""Room on the disk: taken before a file is mapped, and a full disk named by whoever meets it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # as safetensors and tokenizers end their messages
_SHORT_WRITES = ("PytorchStreamWriter failed", "unexpected pos", " requested and ")  # torch's and numpy's, no number


def allocate(file: BinaryIO, size: int) -> None:
    """Grow a file to a size, on the disk and not only in name: writing to a sparse mapping of it could end in SIGBUS.

    Args:
        file: open for writing.
        size: in bytes; a larger file stays as it is.

    Raises:
        OSError: the disk is full.
    """
    if size <= 0:
        return
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    file.seek(0, os.SEEK_END)  # macOS, Windows
    while (missing := size - file.tell()) > 0:
        file.write(bytes(min(missing, 1 << 20)))
    file.flush()


def full_disk(error: BaseException) -> int | None:
    """The system's number of a full disk, a quota or a limit of a file's size; None for any other error.

    Args:
        error: also of safetensors, torch and numpy, which have words of their own for it.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in FULL_DISK else None
    text = str(error)
    if (match := _RUST_ERROR.search(text)) is not None:
        return int(match[1]) if int(match[1]) in FULL_DISK else None
    is_short_write = isinstance(error, (OSError, RuntimeError)) and any(words in text for words in _SHORT_WRITES)
    return errno.ENOSPC if is_short_write else None


@contextmanager
def name_full_disk(path: Path) -> Iterator[None]:
    """Name in the error of a full disk what was being written, which the system does not.

    Args:
        path: the file or folder.

    Raises:
        OSError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        number = full_disk(error)
        if number is None or (isinstance(error, OSError) and error.filename):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
