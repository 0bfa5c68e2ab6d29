"""JSON Lines, one document a line, and JSON files that hold one array of objects."""

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from ml_collections import ConfigDict

from jaxllm.data.documents import Document
from jaxllm.data.sources import fields, text

# Shown on each side of the place where a line is broken.
EXCERPT_CHARS = 40


def read(location: str, config: ConfigDict) -> Iterator[Document]:
    """A document a line, from the fields that the objective reads; blank lines are left out. The origin is `file:line`.

    A file that starts with `[` is one array: it is read whole and its origins are `file[index]`.
    """
    wanted = fields.of(config)
    for row, origin in objects(location):
        yield fields.document(row, wanted, origin)


def objects(location: str) -> Iterator[tuple[Any, str]]:
    """(what a line, or an element of the array, holds; its origin) of the file; ValueError where it is not JSON."""
    # Closed here and not by the garbage collector, which an error would leave it to.
    with closing(text.lines(location)) as lines:
        filled = (line for line in lines if line.text.strip())
        for index, line in enumerate(filled):
            if index == 0 and line.text.lstrip().startswith("["):
                whole = line.text + "".join(rest.text for rest in lines)
                rows = _parse(whole, location, line.number)
                yield from ((row, f"{location}[{index}]") for index, row in enumerate(rows))
                return
            yield _parse(line.text.rstrip("\n"), location, line.number), f"{location}:{line.number}"


def _parse(text: str, location: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        # Besides broken JSON: a number of more digits, or brackets deeper, than Python's reader takes.
        line, what = first_line, str(error)
        if isinstance(error, json.JSONDecodeError):
            line += error.lineno - 1
            what = f"{error.msg} at column {error.colno}: {_excerpt(text, error.pos)}"
        raise ValueError(
            f"{location}:{line} is not JSON: {what}\n  Accepted: one JSON object a line, or one array of objects.\n"
            "  Correct the line; if the file is not JSON Lines, change its suffix (.txt is read as one text)."
        ) from error


def _excerpt(text: str, place: int) -> str:
    """What stands around the place in its line."""
    before = text[:place].rpartition("\n")[2]
    after = text[place:].partition("\n")[0]
    start = before if len(before) <= EXCERPT_CHARS else "..." + before[-EXCERPT_CHARS:]
    end = after if len(after) <= EXCERPT_CHARS else after[:EXCERPT_CHARS] + "..."
    return (start + end).strip() or "nothing follows"
