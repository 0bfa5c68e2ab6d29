"""Rows of tables as documents: what each objective reads of them, and what is said of a row that does not hold it."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm.data import clean, documents
from jaxllm.data.documents import Document
from jaxllm.data.sources import fields

TEXTS = {"text": "one two", "target": "x y", "b": "second", "words": ["one", "two"], "blank": " "}
ROW = TEXTS | {"n": 7, "flag": True, "none": None, "f": 0.5}


def config_of(objective: str, **data: Any) -> ConfigDict:
    config = schema.base()
    config.train.objective = objective
    config.data.update(data)
    return config


def read(row: Any, objective: str, **data: Any) -> Document:
    return fields.document(row, fields.of(config_of(objective, **data)), "f:1")


@pytest.mark.parametrize(
    ("objective", "data", "expected"),
    [
        ("causal_lm", {}, Document("one two", "f:1")),
        ("masked_lm", {"target_field": "nowhere"}, Document("one two", "f:1")),
        ("seq2seq", {}, Document("one two", "f:1", "x y")),
        ("seq2seq", {"target_field": "none"}, Document("one two", "f:1", "")),
        ("sequence_classification", {"target_field": "n"}, Document("one two", "f:1", "7")),
        ("sequence_classification", {"target_field": "flag", "pair_field": "b"}, Document("one two", "f:1", "true", "second")),
        ("token_classification", {}, Document("one two", "f:1", ("x", "y"))),
        ("token_classification", {"text_field": "words", "target_field": "words"}, Document("one two", "f:1", ("one", "two"))),
        ("token_classification", {"text_field": "none", "target_field": "none"}, Document("", "f:1", ())),
    ],
)
def test_what_is_read(objective: str, data: dict[str, str], expected: Document) -> None:
    assert read(ROW, objective, **data) == expected


@pytest.mark.parametrize(
    ("row", "objective", "data", "words"),
    [
        ({"messages": []}, "causal_lm", {}, "f:1 is a conversation, and plain text is read here.*Set train.objective=sft"),
        ({"messages": "x"}, "causal_lm", {}, "f:1 has no field 'text'"),
        (ROW, "seq2seq", {"target_field": "n"}, "f:1: field 'n' holds a number, not text.*Set data.target_field"),
        (ROW, "seq2seq", {"target_field": "t"}, "f:1 has no field 't'.*Set data.target_field to the field that holds the target"),
        (ROW, "sequence_classification", {"target_field": "none"}, "holds null, not a label"),
        (ROW, "sequence_classification", {"target_field": "f"}, "holds a number, not a label.*a whole number"),
        (ROW, "sequence_classification", {"target_field": "blank"}, "holds a blank text, not a label"),
        (ROW, "sequence_classification", {"target_field": "n", "pair_field": "q"}, "no field 'q'.*Set data.pair_field"),
        (ROW, "token_classification", {"target_field": "b"}, "has 2 words in 'text' and 1 labels in 'b'.*one label a word"),
        (ROW, "token_classification", {"target_field": "n"}, "field 'n' holds a number.*a list, or a text"),
        ({"text": ["New York", "x"], "target": [1, 2]}, "token_classification", {}, "'New York' in field 'text' is no word"),
        ({"text": ["a", ""], "target": [1, 2]}, "token_classification", {}, "'' in field 'text' is no word"),
        ({"text": ["a", 3], "target": [1, 2]}, "token_classification", {}, "3 in field 'text' is no word"),
        ({"text": ["a"], "target": [None]}, "token_classification", {}, "holds null, not a label"),
        ([1], "seq2seq", {}, "f:1 is an array, not an object"),
    ],
)
def test_what_is_refused(row: Any, objective: str, data: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}") as caught:
        read(row, objective, **data)
    assert len(str(caught.value).splitlines()) == 3


def test_every_table_reads_all_fields(tmp_path: Path) -> None:
    """JSONL, a JSON array, CSV, TSV and Parquet give the same documents; tables name a missing column."""
    rows = [{"text": f"one {number}", "label": str(number % 2), "b": 'é, "q"', "rest": "no"} for number in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        with (tmp_path / f"a.{suffix}").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    config = config_of("sequence_classification", target_field="label", pair_field="b")
    for suffix in ("jsonl", "json", "csv", "tsv", "parquet"):
        found = list(documents.open(str(tmp_path / f"a.{suffix}"), config))
        assert [(document.text, document.target, document.pair) for document in found] == [
            (row["text"], row["label"], row["b"]) for row in rows
        ], suffix
    config.data.pair_field = "c"
    for suffix in ("csv", "parquet"):
        with pytest.raises(ValueError, match=r"has no column 'c'\.\n  Accepted: text, label, b, rest\.\n  Set data\.pair_field to"):
            list(documents.open(str(tmp_path / f"a.{suffix}"), config))


def test_cleaners_see_every_text_and_no_label() -> None:
    both = clean.make(config_of("seq2seq", min_chars=2))
    assert both(Document("a\x00b ", "", "c\x00d ")) == Document("ab", "", "cd")
    assert both(Document("ab", "", "c")) == clean.Dropped(Document("ab", "", "c"), "min_chars")
    pair = clean.make(config_of("sequence_classification"))
    assert pair(Document("a ", "", " x ", "b ")) == Document("a", "", " x ", "b")
    assert pair(Document("a", "", "x", "")) == clean.Dropped(Document("a", "", "x", ""), "min_chars")
    words = clean.make(config_of("token_classification"))
    assert words(Document("a\u200b b", "", ("x", "y"))) == Document("a b", "", ("x", "y"))
    lost = Document("b \u200b", "", ("x", "y"))
    assert words(lost) == clean.Dropped(lost, clean.LOST_WORDS)
