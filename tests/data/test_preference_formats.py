"""The formats of preference data, each to a prompt and its answers; rows that are none are explained, useless ones are named."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from jaxllm import config as schema
from jaxllm.data import clean, documents, spool
from jaxllm.data.documents import Document
from jaxllm.data.sources import fields, preferences

Q, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
SYSTEM = {"role": "system", "content": "s"}
MORE = {"role": "user", "content": "more"}
FROM_Q, FROM_A, FROM_B = ({"from": role, "value": text} for role, text in (("human", "q"), ("gpt", "a"), ("gpt", "b")))
BOTH = {"chosen": "a", "rejected": "b"}
HH = "\n\nHuman: q\n\nAssistant: x\n\nHuman: more\n\nAssistant:"

# (a row, its prompt); the answers are a and b.
PAIRS: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
    ({"prompt": "q", **BOTH}, [Q]),
    ({"prompt": "q", "system": "s", **BOTH, "id": 3}, [SYSTEM, Q]),
    ({"prompt": [SYSTEM, Q], "chosen": [A], "rejected": [B]}, [SYSTEM, Q]),
    ({"prompt": [Q], "chosen": A, "rejected": B}, [Q]),
    ({"messages": [Q, A, MORE], **BOTH}, [Q, A, MORE]),
    ({"conversations": [FROM_Q], "chosen": FROM_A, "rejected": FROM_B}, [Q]),
    ({"conversations": [FROM_Q, FROM_A, FROM_Q], **BOTH}, [Q, A, Q]),
    ({"instruction": "do", "input": "this", "output": "x", **BOTH}, [Q | {"content": "do\n\nthis"}]),
    ({"instruction": "do", "input": "", **BOTH}, [Q | {"content": "do"}]),
    # Whole conversations, whatever else the row holds, as in UltraFeedback.
    ({"chosen": [Q, A], "rejected": [Q, B]}, [Q]),
    ({"prompt": "?", "messages": [Q, A], "chosen": [SYSTEM, Q, A, Q, A], "rejected": [SYSTEM, Q, A, Q, B]}, [SYSTEM, Q, A, Q]),
    ({"chosen": {"role": ["user", "assistant"], "content": ["q", "a"]}, "rejected": [FROM_Q, FROM_B]}, [Q]),
    # HH-RLHF.
    ({"chosen": HH + " a", "rejected": HH + " b"}, [Q, A | {"content": "x"}, MORE]),
    ({"prompt": HH, "chosen": " a", "rejected": " b"}, [Q, A | {"content": "x"}, MORE]),
    ({"chosen": "Human: q\n\nHuman: r\n\nAssistant: a", "rejected": "Human: q\n\nHuman: r\n\nAssistant:b"}, [Q | {"content": "q\n\nr"}]),
]  # fmt: skip


def config_of(objective: str = "dpo", **changes: Any) -> Any:
    config = schema.base()
    config.train.objective = objective
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


def read(row: Any, objective: str = "dpo", **changes: Any) -> Document:
    return fields.document(row, fields.of(config_of(objective, **changes)), "here:7")


@pytest.mark.parametrize(("row", "prompt"), PAIRS)
def test_pairs(row: dict[str, Any], prompt: list[dict[str, str]]) -> None:
    found = read(row)
    expected = Document("\n".join(each["content"] for each in prompt), "here:7", None, None, tuple(prompt), ((A,), (B,)))
    stripped = tuple(tuple({**each, "content": each["content"].strip()} for each in answer) for answer in found.answers)
    assert found._replace(answers=stripped) == expected
    assert not preferences.flaw(found)


def test_what_is_asked_for_is_the_prompt() -> None:
    row = {"prompt": "p", "question": "x", "messages": [Q], "instruction": "i", **BOTH}
    for changes, asked in (
        ({"data__text_field": "question"}, "x"),
        # That of answers is none of a prompt.
        ({"data__target_field": "question", "chat__format": "prompt"}, "p"),
        ({"chat__format": "prompt"}, "p"),
        ({"chat__format": "messages"}, "q"),
        ({"chat__format": "alpaca"}, "i"),
        ({"chat__format": "prompt", "data__text_field": "question"}, "x"),
        ({"chat__format": "messages", "data__text_field": "question"}, "q"),
    ):
        assert read(row, **changes).messages[0]["content"] == asked


@pytest.mark.parametrize(
    ("more", "score"),
    [
        ({}, None),
        ({"margin": 0.5}, 0.5),
        ({"margin": "-2"}, -2),
        ({"margin": None, "score_chosen": 7.5, "score_rejected": 4}, 3.5),
        ({"margin": 1, "score_chosen": 7, "score_rejected": 4}, 1),
        ({"score_chosen": 7, "score_rejected": None}, None),
    ],
)
def test_margins(more: dict[str, Any], score: float | None) -> None:
    assert read({"prompt": "q", **BOTH, **more}).score == score


@pytest.mark.parametrize("label", [True, False, 1, 0, "True", " false"])
def test_labelled_answers(label: Any) -> None:
    good = str(label).strip().lower() in ("true", "1")
    for row, prompt in (
        ({"prompt": "q", "completion": "a"}, (Q,)),
        ({"prompt": [SYSTEM, Q], "completion": [A]}, (SYSTEM, Q)),
        ({"messages": [Q, B, Q, A]}, (Q, B, Q)),
        ({"conversations": [FROM_Q, FROM_A], "system": "s"}, (SYSTEM, Q)),
        ({"instruction": "q", "output": "a"}, (Q,)),
    ):
        found = read({**row, "label": label}, "kto")
        assert (found.messages, found.answers, found.score) == (prompt, ((A,),), float(good))
        assert found.text == "\n".join(message["content"] for message in prompt)
    assert read(
        {"question": "q", "said": "a", "label": label}, "kto", data__text_field="question", data__target_field="said"
    ).messages == (Q,)


@pytest.mark.parametrize(
    ("objective", "row", "words"),
    [
        ("dpo", "text", r"here:7 is a text, not an object"),
        ("dpo", {"prompt": "q", "good": "a"}, "here:7 has no field 'chosen' and no field 'rejected': its fields are prompt, good"),
        ("dpo", {"prompt": "q", "chosen": "a"}, "here:7 has no field 'rejected': its fields are prompt, chosen"),
        ("dpo", {"question": "q", **BOTH}, "here:7 has no prompt: its fields are question, chosen, rejected"),
        ("dpo", BOTH, "here:7 has no prompt: its fields are chosen, rejected"),
        ("dpo", {"prompt": "q", "messages": [Q], **BOTH}, "here:7 could have its prompt in 'prompt' or 'messages'"),
        ("dpo", {"chosen": [Q, A], "rejected": "b"}, "here:7 has a whole conversation as chosen or rejected, and an answer as the other"),
        ("dpo", {"prompt": "q", "chosen": 3, "rejected": "b"}, "here:7, chosen holds a number where a text should be"),
        ("dpo", {"prompt": "q", "chosen": "a", "rejected": []}, "here:7, rejected holds an empty array where its messages should be"),
        ("dpo", {"prompt": "q", "chosen": "a", "rejected": [{"text": "b"}]}, "here:7, rejected, message 1 has None as 'from'"),
        ("dpo", {"prompt": 3, **BOTH}, "here:7 holds a number where a text should be"),
        ("dpo", {"instruction": "q", "history": [["x", "y"]], **BOTH}, "has a history, which is not read"),
        ("reward", {"prompt": "q", **BOTH, "margin": "big"}, "here:7 has 'big' as 'margin'"),
        ("reward", {"prompt": "q", **BOTH, "margin": True}, "here:7 has True as 'margin'"),
        ("reward", {"prompt": "q", **BOTH, "score_chosen": float("nan"), "score_rejected": 1}, "here:7 has nan as 'score_chosen'"),
        ("kto", {"prompt": "q", "completion": "a"}, "here:7 has no field 'label': its fields are prompt, completion"),
        ("kto", {"prompt": "q", **BOTH}, "here:7 is no conversation: its fields are prompt, chosen, rejected"),
        ("kto", {"prompt": "q", "completion": "a", "label": "good"}, "here:7 has 'good' as 'label'"),
        ("kto", {"prompt": "q", "completion": "a", "label": 0.5}, "here:7 has 0.5 as 'label'"),
    ],
)  # fmt: skip
def test_rows_that_are_none_are_explained(objective: str, row: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read(row, objective)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and lines[1].startswith("  Accepted: ")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": [Q, A, MORE, A], "rejected": [Q, B]}, "chosen and rejected differ before their last answer"),
        ({"chosen": [Q, A], "rejected": [MORE, B]}, "chosen and rejected differ before their last answer"),
        ({"prompt": [Q, A], **BOTH}, "a prompt that ends with an answer"),
        ({"chosen": [Q, A], "rejected": [Q, MORE]}, "no answer at the end"),
        ({"prompt": [SYSTEM], **BOTH}, "an answer before the first question"),
        ({"prompt": [Q, SYSTEM, Q], **BOTH}, "a system message that is not the first"),
        ({"prompt": [Q, {"role": "tool", "content": "x"}], **BOTH}, "a message of a tool"),
        ({"prompt": " ", **BOTH}, "min_chars"),
        # Said where it is left out, so that it counts there (examples/preferences.py).
        ({"prompt": "q", "chosen": " ", "rejected": None}, ""),
        ({"prompt": "q", "chosen": "\ufeff", "rejected": "b"}, ""),
        ({"chosen": [Q, A], "rejected": [Q, A]}, ""),
    ],
)
def test_what_is_left_out(row: dict[str, Any], reason: str) -> None:
    found = clean.make(config_of())(read(row))
    assert (found.reason if isinstance(found, clean.Dropped) else "") == reason


def test_cleaners_clean_prompts_and_answers() -> None:
    found = clean.make(config_of())(
        read({"system": " s ", "prompt": "q\r\n", "chosen": "e\u0301  ", "rejected": "b\x00", "margin": 2})
    )
    assert isinstance(found, Document)
    assert found.messages == (SYSTEM | {"content": " s"}, Q) and found.answers == ((A | {"content": "é"},), (B,))
    assert (found.text, found.score) == (" s\nq", 2)


def test_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"chosen": HH + " a", "rejected": HH + " b"}, {"chosen": HH + " b", "rejected": HH + " a"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    with (tmp_path / "e.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("chosen", "rejected"), *(row.values() for row in rows)])
    found = list(documents.open(str(tmp_path), config_of()))
    assert [document.answers for document in found] == [((A,), (B,)), ((B,), (A,))] * 5
    assert list(spool.Spool(tmp_path / "spool", found).documents()) == found


@pytest.mark.parametrize(("objective", "words"), [("dpo", "prompt, chosen and rejected"), ("kto", "messages and label")])
@pytest.mark.parametrize("source", ["python_docs", "python_questions", "sequences:copy"])
def test_other_sources_are_refused(source: str, objective: str, words: str) -> None:
    with pytest.raises(
        ValueError, match=f"which train.objective = '{objective}' (learns|does not learn) from.\n  Accepted: .*{words}"
    ):
        documents.open(source, config_of(objective))
