"""A tokenizer on disk: the files that decide how it encodes, and `tokenizer_kind.json`, which says how to read them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

RECORD = "tokenizer_kind.json"


class NotATokenizer(ValueError):
    """Bytes that a tokenizer library cannot read."""


class Saved(NamedTuple):
    """What a tokenizer is restored from: its record (kind, bos_id, eos_id, pad_id, ...) and its files by name."""

    record: dict[str, Any]
    files: Mapping[str, bytes]


def contents(record: dict[str, Any], parts: Mapping[str, bytes]) -> dict[str, bytes]:
    """File name -> bytes of everything that decides the ids of a text; the record comes last."""
    record = {**record, "files": sorted(parts)}
    return {**parts, RECORD: (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()}


def write(directory: str, parts: Mapping[str, bytes]) -> None:
    """Writes the files in their order, so that a folder with a record is whole."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, data in parts.items():
        Path(directory, name).write_bytes(data)


def read(directory: str | Path) -> Saved:
    """The inverse of `write`; ValueError if there is no tokenizer or a part of it is missing."""
    record = Path(directory, RECORD)
    if not record.is_file():
        raise ValueError(
            f"no tokenizer in '{directory}': it has no {RECORD}.\n  Accepted: a folder that a tokenizer was saved to, such as"
            " RUN/tokenizer.\n  Check the path, or prepare the data again."
        )
    try:
        values = json.loads(record.read_bytes())
        return Saved(values, {name: Path(directory, name).read_bytes() for name in values["files"]})
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError) as error:
        raise ValueError(damaged(directory, error)) from error


def damaged(directory: str | Path, error: Exception) -> str:
    """The error text for a saved tokenizer that cannot be restored."""
    return (
        f"the tokenizer in '{directory}' is damaged: {error}.\n  Accepted: the files as they were saved.\n"
        "  Copy the folder again, or prepare the data again."
    )


EMPTY = (
    "no text to train a tokenizer on.\n  Accepted: documents with at least one character after cleaning.\n"
    "  Check data.source, data.cleaners and data.min_chars."
)


def valid(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as Python integers; ValueError if one is outside the vocabulary."""
    found = [int(index) for index in ids]
    wrong = next((index for index in found if not 0 <= index < vocab_size), None)
    if wrong is not None:
        raise ValueError(
            f"token id {wrong} is outside the tokenizer's vocabulary.\n  Accepted: 0 to {vocab_size - 1}.\n"
            "  Use the tokenizer that the ids were made with; a model with more rows than that must not emit the others."
        )
    return found


def utf8(text: str) -> bytes:
    """The text's bytes; ValueError for half a surrogate pair, which is no Unicode text."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}.\n"
            "  Accepted: Unicode text.\n  Give the text as UTF-8, or remove that character."
        ) from error
