"""From a row of a table to a conversation, in whichever of the common formats it is written.

messages   {"messages": [{"role": "user", "content": "..."}, ...]}
sharegpt   {"conversations": [{"from": "human", "value": "..."}, ...]}
alpaca     {"instruction": "...", "input": "...", "output": "..."}; input may be absent or empty, and is written below the instruction
prompt     {"prompt": "...", "completion": "..."}, both texts or both lists of messages; or the fields that data.text_field and
           data.target_field name, and these alone where one of the two is set

A "system" field beside any of these is the system's message.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.data.documents import Document, Message
from jaxllm.data.sources.values import kind, valid

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"} | ROLES
# Their messages are read, so that the conversation can be left out by a name.
TOOLS = ("tool", "tools", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")
TOOL_FIELDS = ("tool_calls", "function_call")
# The format of rows that show nothing by themselves: data.text_field and data.target_field say it.
NAMED = "named"
FORMATS = "messages, conversations (ShareGPT), instruction and output (Alpaca), prompt and completion"


class Unreadable(ValueError):
    """A row that holds something else than what is read. origin: where it is. what: a few words that follow it."""

    def __init__(self, origin: str, what: str):
        self.origin, self.what = origin, what
        super().__init__(
            f"{origin} {what}.\n  Accepted: an object with {FORMATS}; or with the fields that data.text_field and data.target_field name."
            "\n  Set chat.format, or data.text_field and data.target_field to the question and its answer."
        )


def document(messages: Sequence[Message], origin: str) -> Document:
    """The conversation as a document, whose text is that of all messages."""
    return Document("\n".join(message["content"] for message in messages), origin, messages=tuple(messages))


def read(row: Any, format_name: str, fields: tuple[str, str], origin: str) -> Document:
    """The conversation in a row.

    format_name: chat.format, or NAMED for a prompt in `fields` and nowhere else. fields: data.text_field and data.target_field.
    ValueError that says what the row holds if it is none.
    """
    if not isinstance(row, dict):
        raise Unreadable(origin, f"is {kind(row)}, not an object")
    if format_name == "auto":
        format_name = _recognize(row, fields, origin)
    return document(with_system(_READERS[format_name](row, fields, origin), row, origin), origin)


def with_system(messages: list[Message], row: Mapping[str, Any], origin: str) -> list[Message]:
    """The messages behind the one in the row's field "system", if that says something and they have none."""
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[:1] and messages[0]["role"] != "system":
        return [message("system", system, origin), *messages]
    return messages


def flaw(messages: Sequence[Message]) -> str:
    """Why nothing can be learnt from the conversation, in a few words; empty if something can."""
    roles = [message["role"] for message in messages]
    if any(role in TOOLS for role in roles):
        return "a message of a tool"
    if "system" in roles[1:]:
        return "a system message that is not the first"
    if roles[-1:] != ["assistant"]:
        return "no answer at the end"
    if "user" not in roles[: roles.index("assistant")]:
        return "an answer before the first question"
    return ""


def _recognize(row: Mapping[str, Any], fields: tuple[str, str], origin: str) -> str:
    asked = {
        "messages": ("messages",),
        "sharegpt": ("conversations",),
        "alpaca": ("instruction", "output"),
        "prompt": ("prompt", "completion"),
    }
    found = [name for name, needed in asked.items() if all(field in row for field in needed)]
    if not found and all(field in row for field in fields):
        return "prompt"
    if len(found) != 1:
        what = f"could be {' or '.join(found)}" if found else "is no conversation"
        raise Unreadable(origin, f"{what}: its fields are {', '.join(row) or 'none'}")
    return found[0]


def _messages(row: Mapping[str, Any], fields: tuple[str, str], origin: str) -> list[Message]:
    del fields
    return turns(field(row, "messages", origin), "role", "content", ROLES, origin)


def _sharegpt(row: Mapping[str, Any], fields: tuple[str, str], origin: str) -> list[Message]:
    del fields
    return turns(field(row, "conversations", origin), "from", "value", SHAREGPT_ROLES, origin)


def _alpaca(row: Mapping[str, Any], fields: tuple[str, str], origin: str) -> list[Message]:
    del fields
    question, answer = instruction(row, origin), field(row, "output", origin)
    return [message("user", question, origin), message("assistant", answer, origin)]


def instruction(row: Mapping[str, Any], origin: str) -> str:
    """What is asked in a row of the format alpaca."""
    if row.get("history"):
        raise Unreadable(origin, "has a history, which is not read")
    asked = [text(field(row, "instruction", origin), origin), text(row.get("input"), origin)]
    return "\n\n".join(filter(None, asked))


def _prompt(row: Mapping[str, Any], fields: tuple[str, str], origin: str) -> list[Message]:
    names = ("prompt", "completion") if {"prompt", "completion"} <= row.keys() else fields
    prompt, completion = (field(row, name, origin) for name in names)
    return _exchange(prompt, completion, origin)


def _exchange(prompt: Any, completion: Any, origin: str) -> list[Message]:
    if isinstance(prompt, list) and isinstance(completion, list):
        return turns([*prompt, *completion], "role", "content", ROLES, origin)
    return [message("user", prompt, origin), message("assistant", completion, origin)]


def _named(row: Mapping[str, Any], fields: tuple[str, str], origin: str) -> list[Message]:
    if lacking := [name for name in fields if name not in row]:
        raise ValueError(
            f"{origin} has no field {' and no field '.join(map(repr, lacking))}, where data.text_field = {fields[0]!r} and"
            f" data.target_field = {fields[1]!r}.\n  Accepted: both of {', '.join(row) or 'no field'}.\n"
            "  Correct them, or leave out both, and what the row holds is recognized by its fields."
        )
    return _exchange(row[fields[0]], row[fields[1]], origin)


_READERS = {"messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca, "prompt": _prompt, NAMED: _named}


def turns(given: Any, role_field: str, text_field: str, roles: Mapping[str, str], origin: str) -> list[Message]:
    if isinstance(given, dict) and all(isinstance(column, list) for column in given.values()):
        # How the package datasets gives a list of objects, if its features say `Sequence`.
        if len({len(column) for column in given.values()}) > 1:
            raise Unreadable(origin, "holds columns of different lengths where its messages should be")
        given = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
    if not isinstance(given, list) or not given:
        raise Unreadable(origin, f"holds {kind(given)} where its messages should be")
    if role_field == "from" and isinstance(given[0], dict) and "role" in given[0]:
        role_field, text_field = "role", "content"
    return [_turn(turn, role_field, text_field, roles, f"{origin}, message {number}") for number, turn in enumerate(given, 1)]


def _turn(turn: Any, role_field: str, text_field: str, roles: Mapping[str, str], origin: str) -> Message:
    if not isinstance(turn, dict):
        raise Unreadable(origin, f"is {kind(turn)}, not an object")
    role = turn.get(role_field)
    if role in TOOLS or any(turn.get(field) for field in TOOL_FIELDS):
        return {"role": TOOLS[0], "content": ""}
    if not isinstance(role, str) or role not in roles:
        raise ValueError(
            f"{origin} has {role!r} as '{role_field}'; its fields are {', '.join(turn) or 'none'}.\n"
            f"  Accepted: {', '.join(roles)}.\n  Correct the row, or leave it out."
        )
    # A table has null where a message says nothing of it.
    if turn.get("weight") not in (None, 1):
        raise Unreadable(origin, f"has the weight {turn['weight']!r}, and weights of messages are not read; see chat.train_on")
    return message(roles[role], field(turn, text_field, origin), origin)


def message(role: str, content: Any, origin: str) -> Message:
    return {"role": role, "content": text(content, origin)}


def field(row: Mapping[str, Any], name: str, origin: str) -> Any:
    if name not in row:
        raise Unreadable(origin, f"has no field '{name}': its fields are {', '.join(row) or 'none'}")
    return row[name]


def text(value: Any, origin: str) -> str:
    """A text; null is empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unreadable(origin, f"holds {kind(value)} where a text should be")
    return valid(value)
