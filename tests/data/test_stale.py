"""When data is prepared again, when it is left alone, and that the result is the same each time."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from corpus import Lines, contents
from ml_collections import ConfigDict

from jaxllm.data.prepare import prepare


def test_fresh_data_is_left_alone(config: ConfigDict, tmp_path: Path) -> None:
    """Also with fields changed that the shards do not depend on, and a source that was only touched."""
    first = prepare(config, tmp_path / "data", log=Lines())
    config.train.steps = 7
    config.seed = 5
    config.tokenizer.vocab_size = 17
    config.model.width = 64
    config.data.max_documents = 0
    os.utime(config.data.source, ns=(1, 1))
    lines = Lines()
    again = prepare(config, tmp_path / "data", log=lines)
    assert lines == []
    assert again.record == first.record
    np.testing.assert_array_equal(again.train.rows(np.arange(3))["tokens"], first.train.rows(np.arange(3))["tokens"])


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("data.row_tokens", 32, "data.row_tokens was 16 and is 32"),
        ("data.validation_frac", 0.3, "data.validation_frac was 0.2 and is 0.3"),
        ("data.cleaners", ("unicode",), "data.cleaners was ['unicode', 'control', 'whitespace', 'min_chars'] and is ['unicode']"),
        ("data.min_chars", 30, "data.min_chars was 1 and is 30"),
        ("data.max_documents", 30, "data.max_documents was 0 and is 30"),
        ("tokenizer.kind", "char", "tokenizer.kind was 'byte' and is 'char'"),
    ],
)
def test_a_changed_field_makes_the_data_stale(config: ConfigDict, tmp_path: Path, key: str, value: object, reason: str) -> None:
    prepare(config, tmp_path / "data", log=Lines())
    section, name = key.split(".")
    config[section][name] = value
    lines = Lines()
    prepare(config, tmp_path / "data", log=lines)
    assert reason in lines[0]
    lines.clear()
    prepare(config, tmp_path / "data", log=lines)
    assert lines == []


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "unigram"])
def test_force_prepares_again_and_gives_the_same(config: ConfigDict, tmp_path: Path, kind: str) -> None:
    config.tokenizer.update({"kind": kind, "vocab_size": 290})
    prepare(config, tmp_path / "data", log=Lines())
    before = contents(tmp_path / "data")
    lines = Lines()
    prepare(config, tmp_path / "data", force=True, log=lines)
    assert "--force" in lines[0]
    assert contents(tmp_path / "data") == before


@pytest.mark.parametrize("part", ["train", "validation", "tokenizer"])
def test_a_part_that_is_gone_is_made_again(config: ConfigDict, tmp_path: Path, part: str) -> None:
    prepare(config, tmp_path / "data", log=Lines())
    before = contents(tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / part)
    lines = Lines()
    prepare(config, tmp_path / "data", log=lines)
    assert lines[0].endswith(f"'{tmp_path / 'data' / part}' is missing")
    assert contents(tmp_path / "data") == before


def test_files_that_come_and_go_make_a_folder_stale(config: ConfigDict, tmp_path: Path) -> None:
    texts_folder = tmp_path / "texts"
    texts_folder.mkdir()
    for name in ("a", "b"):
        (texts_folder / f"{name}.txt").write_text(f"{name} text that is long enough for a row or two")
    config.data.source = str(texts_folder)
    prepare(config, tmp_path / "data", log=Lines())
    (texts_folder / "a.txt").rename(texts_folder / "c.txt")
    lines = Lines()
    prepare(config, tmp_path / "data", log=lines)
    assert f"'{texts_folder / 'a.txt'}' is gone; '{texts_folder / 'c.txt'}' is new" in lines[0]


def test_shards_outlive_their_source(config: ConfigDict, tmp_path: Path) -> None:
    """Prepared data may be copied to where the text is not; that is said, not hidden."""
    prepare(config, tmp_path / "data", log=Lines())
    Path(config.data.source).unlink()
    lines = Lines()
    prepare(config, tmp_path / "data", log=lines)
    assert "there is no" in lines.text
    assert "is used" in lines.text
    with pytest.raises(ValueError, match="there is no"):
        prepare(config, tmp_path / "data", force=True, log=Lines())
    assert len(prepare(config, tmp_path / "data", log=Lines()).train)


def test_a_tokenizer_file_that_changed_makes_the_data_stale(config: ConfigDict, tmp_path: Path) -> None:
    """And the tokenizer that was saved with the shards may not be replaced by hand."""
    for name, kind in (("a", "byte"), ("b", "char")):
        config.tokenizer.kind = kind
        prepare(config, tmp_path / name, log=Lines()).tokenizer.save(str(tmp_path / "mine"))
        config.tokenizer.kind = "file"
        config.tokenizer.path = str(tmp_path / "mine")
        lines = Lines()
        prepared = prepare(config, tmp_path / "data", log=lines)
        assert prepared.record["tokenizer"] == prepare(config, tmp_path / "data", log=Lines()).record["tokenizer"]
    assert "has changed" in lines[0]
    (tmp_path / "mine").rename(tmp_path / "away")
    lines = Lines()
    prepare(config, tmp_path / "data", log=lines)
    assert "tokenizer.path" in lines.text
    assert "is used" in lines.text
    (tmp_path / "away").rename(tmp_path / "mine")
    shutil.rmtree(tmp_path / "data" / "tokenizer")
    shutil.copytree(tmp_path / "a" / "tokenizer", tmp_path / "data" / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer in '.*' has changed since the shards were written(.|\n)*prepare --force"):
        prepare(config, tmp_path / "data", log=Lines())
