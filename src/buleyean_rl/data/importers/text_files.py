"""Open a file of text, however it is packed or encoded, as UTF-8 bytes."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from buleyean_rl.errors import RecordError, UsageError

HEAD_BYTES = 8192
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
CHUNK_BYTES = 1 << 20
MAX_IN_MEMORY = 1 << 31  # bytes of text that is read as a whole
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@contextmanager
def open_text(path: str, encoding: str | None = None) -> Iterator[io.BufferedReader[Any]]:
    """A file of text as UTF-8 bytes without a byte-order mark.

    Args:
        path: the file; unpacked if it is gzip or zstd.
        encoding: what Python calls the file's encoding; None for UTF-8, or what its byte-order mark says.

    Raises:
        RecordError: missing, a folder, unreadable, binary, damaged, or not in this encoding.
        UsageError: no such encoding.
    """
    try:
        with open(path, "rb") as raw:
            magic = raw.peek(4)[:4]
            if magic.startswith(GZIP):
                with gzip.open(raw) as unpacked, io.BufferedReader(unpacked, CHUNK_BYTES) as file:
                    yield _to_utf8(file, path, encoding)
            elif magic == ZSTD:
                with _open_zstd(raw) as unpacked, io.BufferedReader(unpacked, CHUNK_BYTES) as file:
                    yield _to_utf8(file, path, encoding)
            else:
                yield _to_utf8(raw, path, encoding)
    except FileNotFoundError as error:
        raise RecordError("no such file: check the path", path=path) from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise RecordError(f"is a damaged .gz file: {error}", path=path) from error
    except OSError as error:
        if error.errno is None:  # of the unpacking, not of the system
            raise RecordError(f"is a damaged .zst file: {error}", path=path) from error
        raise RecordError(f"cannot be read: {error.strerror or error}", path=path) from error


def read_to_end(file: io.BufferedReader[Any], path: str) -> bytes:
    """All that is left of a file.

    Raises:
        RecordError: more than fits.
    """
    content = bytearray()  # in chunks: to read so many bytes at once would allocate them all
    while chunk := file.read(CHUNK_BYTES):
        content += chunk
        if len(content) > MAX_IN_MEMORY:
            raise RecordError("holds more than 2 GiB as one piece: write it as JSON Lines, an object a line", path=path)
    return bytes(content)


def decode_utf8(content: bytes, path: str, first_line: int) -> str:
    """UTF-8 as text.

    Raises:
        RecordError: it is none; says on which line, and what to do.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise RecordError(NOT_UTF8, path=path, line=line) from error


NOT_UTF8 = "is not UTF-8 text: convert it, or name its encoding, such as --encoding cp1252 for Windows"


def _open_zstd(raw: io.BufferedReader[Any]) -> Any:
    import pyarrow  # brings zstd along

    return pyarrow.CompressedInputStream(raw, "zstd")


def _to_utf8(file: io.BufferedReader[Any], path: str, encoding: str | None) -> io.BufferedReader[Any]:
    head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
    bom, marked = next(((bom, name) for bom, name in _BOMS if head.startswith(bom)), (b"", None))
    if encoding is None and marked in (None, "utf-8"):
        if b"\0" in head or head.startswith(b"PK\x03\x04"):
            hint = "save the sheet as CSV" if Path(path).suffix.lower() in (".xlsx", ".ods") else "text is wanted"
            raise RecordError(f"is a binary file: {hint}", path=path)
        file.read(len(bom))
        return file
    name = encoding or str(marked)
    try:
        text = read_to_end(file, path).decode(name)
    except LookupError as error:
        raise UsageError(f"no encoding {name!r}: such as utf-8, cp1252 or utf-16") from error
    except UnicodeError as error:
        raise RecordError(f"is not {name} text: {error}", path=path) from error
    return io.BufferedReader(io.BytesIO(text.removeprefix("\ufeff").encode(errors="replace")))
