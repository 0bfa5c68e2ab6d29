"""Text files, one document each, and the UTF-8 decoding that the other file readers share."""

import gzip
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from ml_collections import ConfigDict

from jaxllm.data.documents import Document

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A decoded line with its line end, and its number from 1."""

    text: str
    number: int


def read(location: str, config: ConfigDict) -> Iterator[Document]:
    """One document: the whole file, exactly as it is but for a byte order mark. None if it is empty."""
    del config
    with _open(location) as file:
        text = decode(_checked(file.read, location), location, 0)
    if text:
        yield Document(text, location)


def lines(location: str) -> Generator[Line, None, None]:
    """Decoded lines of a text file that may be larger than memory. Only a newline ends a line, as JSON Lines wants it."""
    offset = 0
    with _open(location) as file:
        number = 0
        while raw := _checked(file.readline, location):
            number += 1
            yield Line(decode(raw, location, offset), number)
            offset += len(raw)


def _open(location: str) -> BinaryIO:
    """The file's bytes, unpacked if its name ends in .gz."""
    try:
        packed = location.lower().endswith(".gz")
        return cast(BinaryIO, gzip.open(location, "rb")) if packed else Path(location).open("rb")
    except OSError as error:
        raise ValueError(unreadable(location, error)) from error


def unreadable(location: str, error: OSError) -> str:
    """The error text for a file that the system does not let us read."""
    return (
        f"'{location}' cannot be read: {error.strerror}.\n  Accepted: a file that you may read.\n"
        "  Change its permissions, or name another file."
    )


def _checked(read_some: Callable[[], bytes], location: str) -> bytes:
    try:
        return read_some()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"'{location}' is not a whole gzip file: {error}.\n  Accepted: a file that `gzip -t` accepts.\n"
            "  Fetch it again, or take .gz off its name if it is not packed."
        ) from error


def decode(raw: bytes, location: str, offset: int) -> str:
    """The UTF-8 text of bytes that start at `offset` of the file, without a byte order mark at its start."""
    try:
        return (raw.removeprefix(BYTE_ORDER_MARK) if offset == 0 else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start + (len(BYTE_ORDER_MARK) if offset == 0 and raw.startswith(BYTE_ORDER_MARK) else 0)
        raise ValueError(_not_utf8(raw, location, at, raw_at=at - offset)) from error


def _not_utf8(raw: bytes, location: str, at: int, raw_at: int) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        change = f"It looks like UTF-16: iconv -f UTF-16 -t UTF-8 '{location}' > converted.txt"
    elif b"\0" in raw:
        change = "It has NUL bytes, so it is probably no text at all: leave it out."
    else:
        change = f"Convert it from its encoding, for example: iconv -f WINDOWS-1252 -t UTF-8 '{location}' > converted.txt"
    return f"'{location}' is not UTF-8: byte 0x{raw[raw_at]:02x} at offset {at}.\n  Accepted: UTF-8 text.\n  {change}"
