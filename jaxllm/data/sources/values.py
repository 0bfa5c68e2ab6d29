"""The values of a row: what they are called in errors, and texts as Unicode."""

from typing import Any


def kind(value: Any) -> str:
    """What a value is, for a reader: "an object", "null", ..."""
    kinds = {
        "dict": "an object",
        "list": "an array",
        "tuple": "an array",
        "int": "a number",
        "float": "a number",
        "bool": "true or false",
        "NoneType": "null",
    }
    if isinstance(value, str):
        return "a text" if value.strip() else "a blank text"
    if isinstance(value, list) and not value:
        return "an empty array"
    return kinds.get(type(value).__name__, f"a value of type {type(value).__name__}")


def valid(text: str) -> str:
    """The text as Unicode: a JSON string may hold half a surrogate pair ("\\ud83d"), which has no UTF-8 form."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
