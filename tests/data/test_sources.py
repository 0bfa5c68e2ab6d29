"""Each reader against what Python's own libraries wrote, and against broken files."""

import ast
import csv
import gzip
import inspect
import json
import pydoc_data.topics
import sys
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jaxllm import config as schema
from jaxllm.data import documents
from jaxllm.data.sources import python_docs

AWKWARD = ["plain", 'a\nb,"c"\td', "", "  indented\r\n", "naïve 日本 😀", "x" * 300_000]


def read(source, field="text"):
    config = schema.base()
    config.data.text_field = field
    return list(documents.open(str(source), config))


def texts(source, field="text"):
    return [document.text for document in read(source, field)]


def test_text_is_the_file_exactly(tmp_path):
    raw = "\r\n\ttab \0 naïve 😀\n\n".encode()
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.md").write_bytes(b"\xef\xbb\xbf" + raw)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(raw))
    assert [text.encode() for text in texts(tmp_path)] == [raw, raw, raw]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_jsonl_and_json_arrays(tmp_path, mark):
    rows = [{"n": index, "body": text} for index, text in enumerate(AWKWARD)]
    (tmp_path / "rows.jsonl").write_bytes(mark + "\n".join(json.dumps(row) for row in rows).encode())
    (tmp_path / "array.json").write_bytes(mark + json.dumps(rows, indent=1, ensure_ascii=False).encode())
    assert texts(tmp_path / "rows.jsonl", "body") == AWKWARD
    assert texts(tmp_path / "array.json", "body") == AWKWARD
    assert read(tmp_path / "array.json", "body")[1].origin.endswith("array.json[1]")


def test_json_null_is_empty_and_half_a_surrogate_pair_becomes_valid_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "cut \\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
    assert texts(tmp_path / "a.jsonl") == ["", "cut \ufffd", "😀"]


@pytest.mark.parametrize(("suffix", "dialect"), [(".csv", "excel"), (".tsv", "excel-tab")])
def test_csv(tmp_path, suffix, dialect):
    path = tmp_path / f"table{suffix}"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, dialect).writerows([["text", "n"], *([text, "1"] for text in AWKWARD)])
    assert texts(path) == AWKWARD


def test_parquet(tmp_path):
    rows = [*AWKWARD, None] * 100
    for name, kind in (
        ("a", pyarrow.string()),
        ("b", pyarrow.large_string()),
        ("c", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
    ):
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"n": range(len(rows)), "text": pyarrow.array(rows).cast(kind)}), path)
        found = read(path)
        assert [document.text for document in found] == [text or "" for text in rows]
        assert found[-1].origin == f"{path}[{len(rows) - 1}]"


def test_hf_streams_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "train.jsonl").write_text('{"text": "a", "other": "A"}\n{"text": null, "other": "B"}\n')
    (hub / "validation.jsonl").write_text('{"text": "a", "other": "A"}\n' * 9 + '{"text": broken\n')
    (hub / "test.jsonl").write_text('{"text": "t", "other": "T"}\n')
    assert [document[:2] for document in read(f"hf:{hub}")] == [("a", f"hf:{hub}[0]"), ("", f"hf:{hub}[1]")]
    assert texts(f"hf:{hub}?config=default&split=test", "other") == ["T"]
    for source, message in (
        (f"hf:{hub}?split=validation", "(?s)cannot be .*JSON parse error.*Accepted"),
        (f"hf:{hub}?split=dev", "(?s)cannot be opened: Bad split: dev.*Accepted"),
        (f"hf:{hub}?splt=dev", "(?s)unknown option 'splt'.*Accepted: hf:OWNER/NAME"),
        ("hf:", "no name"),
    ):
        with pytest.raises(ValueError, match=message):
            read(source)


BROKEN = {
    "latin1.txt": ("äé".encode("latin-1"), "byte 0xe4 at offset 0.*Accepted: UTF-8.*iconv -f WINDOWS-1252 -t UTF-8 '"),
    "mark.txt": (b"\xef\xbb\xbfabc\xff", "byte 0xff at offset 6"),
    "utf16.txt": ("abc".encode("utf-16"), "iconv -f UTF-16 -t UTF-8 '"),
    "program.txt": (b"\x7fELF\0\0\xff", "probably no text at all"),
    "late.jsonl": (b'{"text": "one"}\n{"text": "tw\xff"}\n', "byte 0xff at offset 28"),
    "cut.txt.gz": (gzip.compress(b"some text" * 99)[:-9], "is not a whole gzip file"),
    "plain.txt.gz": (b"plain", "is not a whole gzip file.*take .gz off"),
    "syntax.jsonl": (b'{"text": "a"}\n\n{"text": }\n', r'syntax.jsonl:3 is not JSON: Expecting value at column 10: {"text": }'),
    "cut.jsonl": (b'{"text": "a"}\n{"text":\n', r'cut.jsonl:2 is not JSON: Expecting value at column 9: {"text":'),
    "cut.json": (b'[{"text": "a"},\n', "cut.json:2 is not JSON: .*nothing follows"),
    "object.json": (b'{\n "text": "a"\n}\n', r"object.json:1 is not JSON: Expecting property name .* at column 2: {"),
    "separator.jsonl": ('{"text": "a\u2028b", }'.encode(), r'at column 17: {"text": "a.b", }'),
    "long.jsonl": (b'{"text": "' + b"x" * 500 + b'" y}', r'at column 513: \.\.\.x{38}" y}\n'),
    "digits.jsonl": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "digits.jsonl:1 is not JSON: .*limit"),
    "deep.jsonl": (b"[" * 200_000, "deep.jsonl:1 is not JSON: .*recursion"),
    "later.jsonl": (b'{"text": "a"}\n[{"text": "b"}]\n', "later.jsonl:2 is an array, not an object"),
    "syntax.json": (b'[{"text": "a"},\n{"text": }]\n', r'syntax.json:2 is not JSON: Expecting value at column 10: {"text": }'),
    "field.jsonl": (b'{"txt": "a", "id": 1}\n', "field.jsonl:1 has no field 'text'.*Accepted: txt, id.*Set data.text_field"),
    "number.jsonl": (b'{"text": 3, "body": "b"}\n', "number.jsonl:1: field 'text' holds a number, not text.*here body"),
    "list.json": (b'[["a"]]', r"list.json\[0\] is an array, not an object"),
    "column.csv": (b"a,b\n1,2\n", "has no column 'text'.*Accepted: a, b.*Set data.text_field"),
    "cells.csv": (b"text\na,b\n", "cells.csv:2 has 2 cells, but the header has 1"),
    "blank.csv": (b"\n\na\nb\n", "has no column 'text'.*Accepted: a\\."),
    "quote.csv": (b'text\n"a\n', "quote.csv:2 is not CSV"),
    "table.parquet": (b"no", "is not a whole Parquet file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_what_to_change(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert "\n  Accepted: " in str(caught.value)


def test_parquet_without_the_column_lists_the_others(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="(?s)no column 'text'.*Accepted: body, n"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="field 'n' holds a number"):
        read(tmp_path / "a.parquet", "n")


def test_parquet_that_breaks_off_while_it_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"{n} " * 50 for n in range(5000)]}), path, use_dictionary=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:3000] + b"\xff" * 400 + whole[3400:])
    with pytest.raises(ValueError, match="(?s)a.parquet' is not a whole Parquet file.*Accepted"):
        read(path)
    latin = pyarrow.array([b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), path)
    with pytest.raises(ValueError, match="(?s)can't decode byte 0xe9.*Accepted: Parquet, with text in UTF-8"):
        read(path)


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "{folder}/a.parquet"), ("datasets", "hf:OWNER/NAME")])
def test_a_missing_optional_package_is_named(tmp_path, monkeypatch, package, source):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"(?s){package}, which is not installed.*Accepted.*pip install 'jaxllm\[data\]'"):
        read(source.format(folder=tmp_path))


def test_python_docs_are_prose_of_this_python():
    found = {document.origin.removeprefix("python_docs:"): document.text for document in read("python_docs")}
    assert sum(map(len, found.values())) > 2_000_000
    assert found["topics/if"].strip() == pydoc_data.topics.topics["if"].strip()
    # Against the docstrings that the imported module itself has.
    for name, thing in (("", json.decoder), (".JSONDecoder", json.JSONDecoder), (".JSONDecoder.decode", json.JSONDecoder.decode)):
        assert f"json.decoder{name}\n\n{inspect.getdoc(thing)}" in found["json/decoder.py"]
    assert not any(part in ("test", "tests", "site-packages") for origin in found for part in origin.split("/"))
    # None is forgotten: the blunt way to tell whether a module has a docstring.
    for path in Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py"):
        assert (path.name in found) or ast.get_docstring(ast.parse(path.read_bytes())) is None


def test_python_docs_import_nothing_and_go_on_without_topics(tmp_path, monkeypatch, caplog):
    method = 'def f(x):\n            """Prose.\n\n            More.\n            """\n'
    (tmp_path / "good.py").write_text(f"raise SystemExit\n\nclass A:\n    if True:\n        {method}")
    (tmp_path / "broken.py").write_text('"""Prose."""\ndef (')
    (tmp_path / "bare.py").write_text("x = 1\n")
    for folder in ("zip", "test", "bag"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(f'"""The {folder}."""')
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert [document[:2] for document in python_docs.read("", schema.base())] == [
        ("good.A.f\n\nProse.\n\nMore.", "python_docs:good.py"),
        ("bag\n\nThe bag.", "python_docs:bag/__init__.py"),
        ("zip\n\nThe zip.", "python_docs:zip/__init__.py"),
    ]
    assert "no pydoc_data" in caplog.text
    assert "broken.py is left out" in caplog.text
