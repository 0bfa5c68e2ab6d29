"""Conversations in every format, from every kind of table; and what is said of rows that hold none."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from jaxllm import config as schema
from jaxllm.data import clean, documents, spool
from jaxllm.data.documents import Document
from jaxllm.data.sources import conversations, fields

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
ROWS: list[tuple[str, dict[str, Any], list[dict[str, str]]]] = [
    ("messages", {"messages": [SYSTEM, Q, A, Q, A], "id": 3}, [SYSTEM, Q, A, Q, A]),
    ("messages", {"messages": [Q | {"weight": None}, A | {"name": "x", "weight": 1}], "system": "s"}, [SYSTEM, Q, A]),
    ("messages", {"messages": [SYSTEM, Q, A], "system": "t"}, [SYSTEM, Q, A]),
    ("messages", {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, [Q, A]),
    ("sharegpt", {"conversations": SHAREGPT}, [Q, A]),
    ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, *SHAREGPT]}, [SYSTEM, Q, A]),
    ("sharegpt", {"conversations": [Q, A]}, [Q, A]),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, [Q, A]),
    ("alpaca", {"instruction": "q", "output": "a", "text": "the whole", "system": " "}, [Q, A]),
    ("alpaca", {"instruction": "q", "input": "x\ny", "output": "a"}, [Q | {"content": "q\n\nx\ny"}, A]),
    ("alpaca", {"instruction": "q", "input": None, "output": "cut \ud83d", "history": []}, [Q, A | {"content": "cut \ufffd"}]),
    ("prompt", {"prompt": "q", "completion": "a"}, [Q, A]),
    ("prompt", {"prompt": [SYSTEM, Q], "completion": [A]}, [SYSTEM, Q, A]),
    ("prompt", {"text": "q", "target": "a"}, [Q, A]),
    # What a row also has under the names of data.text_field and data.target_field is not asked.
    ("messages", {"messages": [Q, A], "text": "the whole", "target": 3}, [Q, A]),
]  # fmt: skip


def config_of(**changes: Any) -> Any:
    config = schema.base()
    config.train.objective = "sft"
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


@pytest.mark.parametrize(("name", "row", "expected"), ROWS)
def test_formats(name: str, row: dict[str, Any], expected: list[dict[str, str]]) -> None:
    for given in ("auto", name):
        found = fields.document(row, fields.of(config_of(chat__format=given)), "file:1")
        assert found == Document("\n".join(message["content"] for message in expected), "file:1", messages=tuple(expected))


@pytest.mark.parametrize(
    ("row", "changes", "words"),
    [
        ("text", {}, r"here:7 is a text, not an object.\n  Accepted: an object with messages, conversations \(ShareGPT\)"),
        ({"question": "q"}, {}, r"here:7 is no conversation: its fields are question.\n.*\n  Set chat.format, or data.text_field"),
        ({"question": "q"}, {"chat__format": "alpaca"}, "here:7 has no field 'instruction': its fields are question"),
        ({"instruction": "q", "instances": [{}]}, {}, "is no conversation: its fields are instruction, instances"),
        ({"messages": [Q, A], "prompt": "q", "completion": "a"}, {}, "could be messages or prompt"),
        ({"messages": []}, {}, "holds an empty array where its messages should be"),
        ({"messages": "[]"}, {}, "holds a text where its messages should be"),
        ({"messages": {"role": ["user", "assistant"], "content": ["q"]}}, {}, "here:7 holds columns of different lengths where"),
        ({"messages": ["hi"]}, {}, "here:7, message 1 is a text, not an object"),
        ({"messages": [Q, {"role": "robot", "content": "a"}]}, {}, r"2 has 'robot' as 'role'; .*\n  Accepted: system, user, assistant"),
        ({"messages": [{"from": "human", "value": "q"}]}, {}, "message 1 has None as 'role'; its fields are from, value"),
        ({"conversations": [{"from": "me", "value": "q"}]}, {}, r"has 'me' as 'from'; .*\n  Accepted: human, gpt"),
        ({"messages": [Q, {"role": "assistant"}]}, {}, "message 2 has no field 'content'"),
        ({"messages": [Q, A | {"content": [{"type": "text", "text": "a"}]}]}, {}, "holds an array where a text should be"),
        ({"messages": [Q, A | {"weight": 0}]}, {}, "message 2 has the weight 0, and weights of messages are not read; see chat.train_on"),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, {}, "has a history, which is not read"),
        ({"prompt": "q", "completion": [A]}, {}, "holds an array where a text should be"),
    ],
)  # fmt: skip
def test_rows_that_are_none_are_explained(row: Any, changes: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fields.document(row, fields.of(config_of(**changes)), "here:7")


EVERY = {"prompt": "p", "completion": "c", "question": "q", "answer": "a", "messages": [Q | {"content": "m"}, A], "text": "t"}


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"data__text_field": "question", "data__target_field": "answer"}, "q"),
        ({"data__target_field": "answer"}, "t"),
        ({"data__text_field": "question", "data__target_field": "answer", "chat__format": "prompt"}, "q"),
        ({"data__text_field": "question", "data__target_field": "answer", "chat__format": "messages"}, "m"),
        ({"chat__format": "prompt"}, "p"),
        # Of two names the first is the replayed text's.
        ({"data__text_field": "question", "chat__format": "prompt", "data__replay_source": "x"}, "p"),
        ({"data__text_field": "question", "data__target_field": "answer", "data__replay_source": "x"}, "q"),
    ],
)
def test_what_is_asked_for_wins(changes: dict[str, str], asked: str) -> None:
    """Fields that the config names are read, whatever else the row holds; chat.format decides above them."""
    found = fields.document(EVERY, fields.of(config_of(**changes)), "here:7").messages
    assert found[0]["content"] == asked


def test_what_is_asked_for_and_not_there_is_refused() -> None:
    for changes, words in (
        (
            {"data__text_field": "question"},
            "no field 'target', where data.text_field = 'question' and data.target_field = 'target'",
        ),
        ({"data__text_field": "x", "data__target_field": "y"}, "no field 'x' and no field 'y', where data.text_field = 'x'"),
    ):
        with pytest.raises(
            ValueError, match=f"here:7 has {words}.*\n  Accepted: both of prompt, .*\n  Correct them, or leave"
        ) as error:
            fields.document(EVERY, fields.of(config_of(**changes)), "here:7")
        assert len(str(error.value).splitlines()) == 3


def test_every_kind_of_table(tmp_path: Path) -> None:
    rows = [{"messages": [Q, A]}, {"messages": [SYSTEM, Q, A]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("instruction", "output"), ("q", "a"), ("q", "a")])
    found = list(documents.open(str(tmp_path), config_of()))
    assert [document.messages for document in found] == [(Q, A), (SYSTEM, Q, A)] * 3 + [(Q, A)] * 2
    assert [Path(document.origin).name for document in found[:4]] == ["a.jsonl:1", "a.jsonl:3", "b.json[0]", "b.json[1]"]


@pytest.mark.parametrize("source", ["python_docs", "sequences:copy", "TEXT"])
def test_text_alone_is_no_conversation(source: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(
        ValueError, match=r"holds no conversations, which train.objective = 'sft' learns from.\n  Accepted: JSON Lines"
    ):
        documents.open(source.replace("TEXT", str(tmp_path / "a.txt")), config_of())


def test_a_spool_gives_messages_back(tmp_path: Path) -> None:
    given = [conversations.document([SYSTEM, Q, A | {"content": f"é\n{number}"}], f"f:{number}") for number in range(5)]
    assert list(spool.Spool(tmp_path / "spool", given).documents()) == given


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([Q, A], ""),
        ([SYSTEM | {"content": ""}, Q, A], ""),
        ([Q, A, Q, Q, A], ""),
        ([Q], "no answer at the end"),
        ([Q, A, Q], "no answer at the end"),
        ([A, Q, A], "an answer before the first question"),
        ([SYSTEM, A], "an answer before the first question"),
        ([Q, SYSTEM, A], "a system message that is not the first"),
        ([Q, {"role": "tool", "content": ""}, A], "a message of a tool"),
        ([Q | {"content": " \n"}, A], "min_chars"),
        ([Q, A | {"content": "\ufeff"}], "min_chars"),
    ],
)
def test_what_is_left_out(messages: list[dict[str, str]], reason: str) -> None:
    found = clean.make(config_of())(conversations.document(messages, "here:1"))
    assert (found.reason if isinstance(found, clean.Dropped) else "") == reason


def test_tools_are_read_to_be_left_out_by_name() -> None:
    for turn in ({"role": "tool", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [{}]}):
        found = fields.document({"messages": [Q, turn, A]}, fields.of(config_of()), "here:1")
        assert conversations.flaw(found.messages) == "a message of a tool"
    found = fields.document({"conversations": [{"from": "observation", "value": 3}]}, fields.of(config_of()), "here:1")
    assert conversations.flaw(found.messages) == "a message of a tool"


def test_cleaners_clean_each_message_and_no_json() -> None:
    messages = [SYSTEM | {"content": " "}, Q | {"content": "e\u0301 \r\nx\x00\n\n\n\n\ny  "}, A | {"content": "  a"}]
    found = clean.make(config_of())(conversations.document(messages, "here:1"))
    assert isinstance(found, Document)
    assert found.messages == (SYSTEM | {"content": ""}, Q | {"content": "é\nx\n\n\ny"}, A | {"content": "  a"})
    assert found.text == "\né\nx\n\n\ny\n  a"
