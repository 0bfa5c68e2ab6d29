"""JSON Lines, one document a line, and JSON files that hold one array of objects."""

import json
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from jaxllm.data.documents import Document
from jaxllm.data.sources import text

# Shown on each side of the place where a line is broken.
EXCERPT_CHARS = 40


def read(location: str, config: ConfigDict) -> Iterator[Document]:
    """The field `data.text_field` of each line; blank lines are left out. The origin is `file:line`.

    A file that starts with `[` is one array: it is read whole and its origins are `file[index]`.
    """
    lines = text.lines(location)
    filled = (line for line in lines if line.text.strip())
    for index, line in enumerate(filled):
        if index == 0 and line.text.lstrip().startswith("["):
            whole = line.text + "".join(rest.text for rest in lines)
            yield from _array(_parse(whole, location, line.number), location, config.data.text_field)
            return
        origin = f"{location}:{line.number}"
        yield Document(field_text(_parse(line.text, location, line.number), config.data.text_field, origin), origin)


def _array(rows: list[Any], location: str, field: str) -> Iterator[Document]:
    for index, row in enumerate(rows):
        origin = f"{location}[{index}]"
        yield Document(field_text(row, field, origin), origin)


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


def field_text(row: Any, field: str, origin: str) -> str:
    """The text in a field of a row ("" for null); ValueError that lists the row's fields if it has no such text."""
    if not isinstance(row, dict):
        raise ValueError(
            f"{origin} is {_kind(row)}, not an object.\n  Accepted: objects with the text in a field.\n"
            f'  Write the row as {{"{field}": "..."}}.'
        )
    if field not in row:
        raise ValueError(
            f"{origin} has no field '{field}'.\n  Accepted: {', '.join(row)}.\n"
            "  Set data.text_field to the field that holds the text."
        )
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        texts = ", ".join(name for name, other in row.items() if isinstance(other, str)) or "none of its fields"
        raise ValueError(
            f"{origin}: field '{field}' holds {_kind(value)}, not text.\n  Accepted: a field with text; here {texts}.\n"
            "  Set data.text_field to one of these."
        )
    # A JSON string may hold half a surrogate pair ("\ud83d"), which is no Unicode text and has no UTF-8 form.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _kind(value: Any) -> str:
    kinds = {"dict": "an object", "list": "an array", "int": "a number", "float": "a number", "bool": "true or false"}
    return kinds.get(type(value).__name__, f"a value of type {type(value).__name__}")
