"""Which reader gets which file, in which order, and what is said when there is nothing to read."""

import gzip

import pytest

from jaxllm import config as schema
from jaxllm.data import documents


def config(**fields):
    made = schema.base()
    made.data.update(fields)
    return made


def read(source, **fields):
    return list(documents.open(str(source), config(**fields)))


def write(folder, **files):
    """Keyword `a__b_txt` becomes the file a/b.txt."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_folder_gives_every_kind_in_a_fixed_order(tmp_path, caplog):
    write(
        tmp_path,
        b_jsonl='{"text": "one"}\n\n{"text": "two"}\n',
        a_txt="first",
        sub__c_csv='text,n\n"three,\nfour",1\n',
        sub__d_tsv="n\ttext\n1\tfive\n",
        sub__e_jsonl_gz=gzip.compress(b'{"text": "six"}\n'),
        _hidden_txt="no",
        _git__x_txt="no",
        picture_png=b"\x89PNG",
    )
    found = read(tmp_path)
    assert [document.text for document in found] == ["first", "one", "two", "three,\nfour", "five", "six"]
    assert [document.origin.removeprefix(f"{tmp_path}/") for document in found] == [
        "a.txt",
        "b.jsonl:1",
        "b.jsonl:3",
        "sub/c.csv:3",
        "sub/d.tsv:2",
        "sub/e.jsonl.gz:1",
    ]
    assert "1 x .png" in caplog.text


def test_order_does_not_depend_on_the_file_system(tmp_path):
    names = [f"{letter}{number}" for letter in "mzaqc" for number in (9, 1, 5)]
    for name in names:
        write(tmp_path, **{f"{name}__{name}_txt": name})
    assert [document.text for document in read(tmp_path)] == sorted(names)


def test_glob_reads_every_match_and_unknown_kinds_as_text(tmp_path):
    write(tmp_path, z_log="z", a_log="a", sub__b_log="b", c_txt="c")
    assert [document.text for document in read(f"{tmp_path}/*.log")] == ["a", "z"]
    assert [document.text for document in read(f"{tmp_path}/**/*.log")] == ["a", "b", "z"]
    assert [document.text for document in read(tmp_path / "z.log")] == ["z"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    (tmp_path / "part[1].txt").write_text("here")
    assert [document.text for document in read(tmp_path / "part[1].txt")] == ["here"]


def test_max_documents_stops_before_the_rest_is_read(tmp_path):
    write(tmp_path, a_jsonl='{"text": "one"}\n{"text": "two"}\nbroken\n')
    assert [document.text for document in read(tmp_path, max_documents=2)] == ["one", "two"]
    with pytest.raises(ValueError, match="a.jsonl:3 is not JSON"):
        read(tmp_path, max_documents=3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("python_doc", "there is no 'python_doc'. Did you mean 'python_docs'?"),
        ("{folder}/storys.txt", "there is no '.*storys.txt'. Did you mean '.*/stories.txt'?"),
        ("{folder}/storeis/1.txt", "there is no '.*storeis/1.txt'. Did you mean '.*/stories.txt'?"),
        ("{folder}/*.zip", r"no file matches '.*/\*.zip'"),
        ("{folder}/empty.txt", "holds no document: there is nothing in it"),
        ("{folder}/header.csv", "holds no document: there is nothing in it"),
        ("{folder}/pictures", "holds no file to read, only 2 x .png"),
        ("", "the source is empty"),
    ],
)
def test_nothing_to_read(tmp_path, monkeypatch, source, message):
    write(tmp_path, stories_txt="x", empty_txt="", header_csv="text,n\n", pictures__a_png=b"", pictures__b_png=b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read(source.format(folder=tmp_path))
    assert "\n  Accepted: " in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("name", ["nowhere", "~nobody-of-this-name/a.txt", "long" * 100])
def test_a_missing_path_is_an_error_before_anything_is_read(tmp_path, monkeypatch, name):
    """And says which setting to change: evaluate has no data.source."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no(.|\n)*Change --data\.$"):
        documents.open(name, config(), setting="--data")
    with pytest.raises(ValueError, match=r"Change the source\.$"):
        documents.open(name, config())
