"""From a row of a table to a prompt whose answers the model writes itself, and what rewards may compare them with.

The prompt stands where that of a pair does (preferences.py): in prompt, messages, conversations or instruction, or in the field that
data.text_field names. Everything else in the row is kept for rewards. Where messages end with an answer, that is "answer".
"""

import json
from typing import Any

from jaxllm.data.documents import Document
from jaxllm.data.sources import conversations, preferences
from jaxllm.data.sources.values import kind

ANSWER = "answer"
ACCEPTED = "an object with prompt, messages, conversations (ShareGPT) or instruction, and what rewards compare with, such as answer"
CHANGE = "Rename the fields, or set data.text_field to the one with the prompt; chat.format says which of several is it"


def read(row: Any, format_name: str, text_field: str, origin: str) -> Document:
    """The prompt of a row as `messages`, and its other fields as `fields`, values of JSON: what JSON does not know becomes text.

    Arguments as those of preferences.read_pair. ValueError that says what the row holds if it has no prompt.
    """
    try:
        if not isinstance(row, dict):
            raise conversations.Unreadable(origin, f"is {kind(row)}, not an object")
        place = preferences.prompt_field(row, format_name, text_field, origin)
        messages = preferences.read_prompt(row, place, origin)
    except conversations.Unreadable as error:
        raise ValueError(f"{error.origin} {error.what}.\n  Accepted: {ACCEPTED}.\n  {CHANGE}.") from None
    read_already = {place, "system"} | ({"input"} if place == preferences.PROMPTS["alpaca"] else set())
    others = {name: value for name, value in row.items() if name not in read_already}
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        others = {ANSWER: messages.pop()["content"]} | others
    return preferences.document(messages, (), origin)._replace(fields=json.loads(json.dumps(others, default=str)))
