"""Prompts whose answers the model writes itself, and what the data knows of them."""

import datetime
from pathlib import Path
from typing import Any

import pytest

from jaxllm.config import base
from jaxllm.data import clean, spool
from jaxllm.data.documents import Document
from jaxllm.data.sources import fields, preferences, prompts

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def read(row: Any, chat_format: str = "auto", text_field: str = "text") -> Document:
    return fields.document(row, fields.Fields(text_field, "target", "", "prompts", chat_format), "here:7")


@pytest.mark.parametrize(
    ("row", "messages", "others"),
    [
        ({"prompt": "q", "answer": "4", "level": 2}, [Q], {"answer": "4", "level": 2}),
        ({"prompt": [SYSTEM, Q], "tests": ["x", {"y": None}]}, [SYSTEM, Q], {"tests": ["x", {"y": None}]}),
        ({"messages": [Q, A, Q, A], "id": 1}, [Q, A, Q], {"answer": "a", "id": 1}),
        ({"messages": [Q, A], "answer": "4"}, [Q], {"answer": "4"}),
        ({"conversations": [{"from": "human", "value": "q"}], "system": "s"}, [SYSTEM, Q], {}),
        ({"instruction": "do", "input": "it", "output": "4"}, [Q | {"content": "do\n\nit"}], {"output": "4"}),
        ({"prompt": "\n\nHuman: q\n\nAssistant:"}, [Q], {}),
        ({"prompt": "q", "when": datetime.date(2026, 1, 2)}, [Q], {"when": "2026-01-02"}),
    ],
)
def test_prompts_and_what_is_beside_them(tmp_path: Path, row: dict[str, Any], messages: list[Any], others: dict[str, Any]) -> None:
    found = read(row)
    assert found == Document("\n".join(each["content"] for each in messages), "here:7", messages=tuple(messages), fields=others)
    assert not preferences.flaw(found)
    assert list(spool.Spool(tmp_path / "spool", [found]).documents()) == [found]


def test_what_is_asked_for_is_the_prompt() -> None:
    row = {"question": "q", "prompt": "p", "messages": [Q], "answer": "4"}
    assert read(row, "named", "question").fields == {"prompt": "p", "messages": [Q], "answer": "4"}
    assert read(row, "prompt").messages[0]["content"] == "p"


@pytest.mark.parametrize(
    ("row", "chat_format", "words"),
    [
        (3, "auto", "here:7 is a number, not an object"),
        ({"question": "q"}, "auto", "here:7 has no prompt: its fields are question"),
        ({"question": "q"}, "named", "here:7 has no field 'text': its fields are question"),
        ({"question": "q"}, "sharegpt", "here:7 has no field 'conversations': its fields are question"),
        ({"prompt": "q", "messages": [Q]}, "auto", "here:7 could have its prompt in 'prompt' or 'messages'"),
        ({"prompt": 3}, "auto", "here:7 holds a number where a text should be"),
    ],
)
def test_rows_that_are_none_are_explained(row: Any, chat_format: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read(row, chat_format)
    assert prompts.ACCEPTED in str(caught.value) and len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([Q], ""),
        ([SYSTEM], "an answer before the first question"),
        ([A], "an answer before the first question"),
        ([Q, SYSTEM], "a system message that is not the first"),
        ([Q, A, A], "a prompt that ends with an answer"),
        ([Q | {"content": " "}], "min_chars"),
    ],
)
def test_what_is_left_out(messages: list[Any], reason: str) -> None:
    found = clean.make(base())(read({"messages": messages, "level": 1}))
    assert (found.reason if isinstance(found, clean.Dropped) else "") == reason
    if not reason:
        assert found == read({"messages": messages, "level": 1})
