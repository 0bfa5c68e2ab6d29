"""From a row of a table to a document: the fields that the objective reads, and what is said if they do not hold it."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxllm import registry
from jaxllm.data.documents import CONVERSED, Document
from jaxllm.data.sources import conversations, preferences, prompts
from jaxllm.data.sources.values import kind, valid
from jaxllm.schema import SCHEMA

# Fields with the messages of a conversation.
CONVERSATIONS = ("messages", "conversations")


class Fields(NamedTuple):
    """The names of the fields; target is empty if none is read, and so is pair. `reads` is that of `examples.contract.Examples`.

    format: how a conversation is written (chat.format, or conversations.NAMED where text and target name what is read).
    """

    text: str
    target: str
    pair: str
    reads: str
    format: str

    @property
    def settings(self) -> dict[str, str]:
        """Field that is read -> the setting with its name; empty for conversations, whose fields each row shows by itself."""
        if self.reads in CONVERSED:
            return {}
        named = {self.text: "data.text_field", self.target: "data.target_field", self.pair: "data.pair_field"}
        return {name: setting for name, setting in named.items() if name}


def of(config: ConfigDict) -> Fields:
    """What the objective reads."""
    reads = registry.resolve("examples", config.train.objective)(config).reads
    target = "" if reads == "text" else config.data.target_field
    pair = config.data.pair_field if reads == "label" else ""
    named = _is_set(config, "text_field") if reads in ("pairs", "prompts") else _names_both(config)
    chat_format = conversations.NAMED if config.chat.format in ("auto", "prompt") and named else config.chat.format
    return Fields(config.data.text_field, target, pair, reads, chat_format)


def _names_both(config: ConfigDict) -> bool:
    """Whether the config says where a question and its answer are. Beside replayed text, data.text_field alone says where that is."""
    return _is_set(config, "target_field") or (_is_set(config, "text_field") and not config.data.replay_source)


def _is_set(config: ConfigDict, name: str) -> bool:
    return bool(config.data[name] != SCHEMA[f"data.{name}"].default)


def document(row: Any, fields: Fields, origin: str) -> Document:
    """The document in a row; ValueError that lists the row's fields if it lacks one of them or holds something else there."""
    if fields.reads == "messages":
        return conversations.read(row, fields.format, (fields.text, fields.target), origin)
    if fields.reads == "pairs":
        return preferences.read_pair(row, fields.format, fields.text, origin)
    if fields.reads == "prompts":
        return prompts.read(row, fields.format, fields.text, origin)
    if fields.reads == "labelled":
        return preferences.read_labelled(row, fields.format, (fields.text, fields.target), origin)
    if fields.reads == "labels":
        return _words(row, fields, origin)
    text = field_text(row, fields.text, origin)
    pair = field_text(row, fields.pair, origin, "data.pair_field") if fields.pair else None
    target = None
    if fields.reads == "target":
        target = field_text(row, fields.target, origin, "data.target_field")
    elif fields.reads == "label":
        target = _label(_value(row, fields.target, origin, "data.target_field"), fields.target, origin)
    return Document(text, origin, target, pair)


def check_columns(location: str, columns: Collection[str], fields: Fields) -> None:
    """ValueError if a table lacks a field."""
    for name, setting in fields.settings.items():
        if name not in columns:
            raise ValueError(
                f"'{location}' has no column '{name}'.\n  Accepted: {', '.join(columns)}.\n"
                f"  Set {setting} to the column that holds the {_held(setting)}."
            )


def field_text(row: Any, field: str, origin: str, setting: str = "data.text_field") -> str:
    """The text in a field of a row ("" for null); ValueError that lists the row's fields if it has no such text."""
    value = _value(row, field, origin, setting)
    if value is None:
        return ""
    if not isinstance(value, str):
        texts = ", ".join(name for name, other in row.items() if isinstance(other, str)) or "none of its fields"
        raise ValueError(
            f"{origin}: field '{field}' holds {kind(value)}, not text.\n  Accepted: a field with text; here {texts}.\n"
            f"  Set {setting} to one of these."
        )
    return valid(value)


def _held(setting: str) -> str:
    return "text" if setting == "data.text_field" else "target" if setting == "data.target_field" else "second text"


def _value(row: Any, field: str, origin: str, setting: str) -> Any:
    if not isinstance(row, dict):
        raise ValueError(
            f"{origin} is {kind(row)}, not an object.\n  Accepted: objects with the text in a field.\n"
            f'  Write the row as {{"{field}": "..."}}.'
        )
    if field not in row and any(isinstance(row.get(name), list) for name in CONVERSATIONS):
        raise ValueError(
            f"{origin} is a conversation, and plain text is read here, from the field '{field}'.\n"
            "  Accepted: text (also as data.replay_source); conversations as data.source of train.objective = 'sft'.\n"
            f"  Set train.objective=sft to train on conversations, or {setting}, or give another source."
        )
    if field not in row:
        raise ValueError(
            f"{origin} has no field '{field}'.\n  Accepted: {', '.join(row)}.\n"
            f"  Set {setting} to the field that holds the {_held(setting)}."
        )
    return row[field]


def _label(value: Any, field: str, origin: str) -> str:
    """The name of a class: a text, a whole number, true or false."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value).strip()
    raise ValueError(
        f"{origin}: field '{field}' holds {kind(value)}, not a label.\n  Accepted: a text that is not blank, or a whole number.\n"
        "  Set data.target_field to another field, or leave the row out."
    )


def _words(row: Any, fields: Fields, origin: str) -> Document:
    words = _list(row, fields.text, origin, "data.text_field", lambda value: value)
    labels = _list(row, fields.target, origin, "data.target_field", lambda value: _label(value, fields.target, origin))
    wrong = next((word for word in words if not isinstance(word, str) or word.split() != [word]), None)
    if wrong is not None:
        raise ValueError(
            f"{origin}: {wrong!r} in field '{fields.text}' is no word.\n  Accepted: words without white space in them.\n"
            "  Correct the row, or set data.text_field to another field."
        )
    if len(words) != len(labels):
        raise ValueError(
            f"{origin} has {len(words)} words in '{fields.text}' and {len(labels)} labels in '{fields.target}'.\n"
            "  Accepted: one label a word.\n  Correct the row, or set data.text_field and data.target_field."
        )
    return Document(" ".join(words), origin, tuple(labels))


def _list(row: Any, field: str, origin: str, setting: str, read: Callable[[Any], str]) -> list[str]:
    """A list in a field, or the parts of a text between white space; null is empty."""
    value = _value(row, field, origin, setting)
    if value is None:
        return []
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list):
        raise ValueError(
            f"{origin}: field '{field}' holds {kind(value)}.\n  Accepted: a list, or a text with spaces between its parts.\n"
            f"  Set {setting} to a field with one of these."
        )
    return [read(each) for each in value]
