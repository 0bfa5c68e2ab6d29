"""Prepare from text to shards: what comes out, when it is made again, and that nothing is lost when something goes wrong."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxllm.config import base, to_json
from jaxllm.data import folder, spool
from jaxllm.data.prepare import Prepared, prepare

ROOT = Path(__file__).parents[2]
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"


@pytest.fixture
def config(tmp_path: Path) -> ConfigDict:
    """40 documents of different lengths as bytes, rows of 16."""
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": document(number)}) + "\n" for number in range(40)))
    config = base()
    config.data.source = str(source)
    config.data.validation_frac = 0.2
    config.data.row_tokens = 16
    config.tokenizer.kind = "byte"
    return config


def document(number: int) -> str:
    return f"Document number {number} says: " + "é and so on, " * (number % 7) + "end."


class Lines(list[str]):
    """A log that can be read."""

    def __call__(self, line: str) -> None:
        self.append(line)

    @property
    def text(self) -> str:
        return "\n".join(self)


def texts(prepared: Prepared, split: str) -> list[str]:
    """The documents of a split, put together again from the targets of its rows."""
    shards = getattr(prepared, split)
    rows = shards.rows(np.arange(len(shards)))
    ids = rows["targets"][rows["weights"] > 0].tolist()
    ends = [index for index, token in enumerate(ids) if token == prepared.tokenizer.eos_id]
    return [prepared.tokenizer.decode(ids[start:stop]) for start, stop in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


def contents(directory: Path) -> dict[str, bytes]:
    """Everything but the record, which holds times."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != folder.RECORD
    }


def test_every_document_is_in_one_split(config: ConfigDict, tmp_path: Path) -> None:
    lines = Lines()
    prepared = prepare(config, tmp_path / "data", log=lines)
    train, validation = texts(prepared, "train"), texts(prepared, "validation")
    assert sorted(train + validation) == sorted(document(number) for number in range(40))
    assert len(train) == prepared.train.documents
    assert 3 <= len(validation) <= 14
    for split, parts in (("train", train), ("validation", validation)):
        shards = getattr(prepared, split)
        assert shards.text_bytes == len("".join(parts).encode())
        # The byte tokenizer has bos and eos: every byte and every eos is predicted.
        assert shards.weighted_tokens == shards.text_bytes + len(parts)
        assert shards.bytes_per_token == shards.text_bytes / shards.weighted_tokens
        shards.verify()
    assert re.search(r"train: \d+ rows of 16 tokens from \d+ documents", lines.text)
    assert prepared.record["documents"]["data.source"] == {
        "read": 40,
        "dropped": {},
        "kept": 40,
        "chars": len("".join(train + validation)),
    }
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["data.json", "lock", "tokenizer", "train", "validation"]


def test_new_documents_leave_the_old_ones_where_they_were(config: ConfigDict, tmp_path: Path) -> None:
    before = prepare(config, tmp_path / "data", log=Lines())
    held_out = set(texts(before, "validation"))
    with open(config.data.source, "a") as file:
        file.writelines(json.dumps({"text": document(number)}) + "\n" for number in range(40, 80))
    lines = Lines()
    after = prepare(config, tmp_path / "data", log=lines)
    assert f"'{config.data.source}' has changed" in lines.text
    assert held_out < set(texts(after, "validation"))
    assert len(texts(after, "train") + texts(after, "validation")) == 80


@pytest.mark.parametrize("frac", [1e-9, 0.5])
def test_each_side_gets_a_document(tmp_path: Path, frac: float) -> None:
    for number in range(20):
        pair = spool.Spool(tmp_path / "spool", [f"a {number}", f"b {number}"])
        parts = spool.split(pair, "documents", frac)
        assert sorted([*parts["train"](), *parts["validation"]()]) == [f"a {number}", f"b {number}"]
        assert len(list(parts["train"]())) == 1


@pytest.mark.parametrize("frac", [0.1, 0.25, 0.5])
def test_characters_are_cut_where_the_share_says(tmp_path: Path, frac: float) -> None:
    """As nanoGPT cuts: text[: int(n * (1 - frac))] for training, whatever documents the text consists of."""
    documents = ["abcd", "éfghij", "k", "lmnopqrstu"]
    whole = "".join(documents)
    parts = spool.split(spool.Spool(tmp_path / "spool", documents), "characters", frac)
    train, validation = list(parts["train"]()), list(parts["validation"]())
    border = int(len(whole) * (1 - frac))
    assert "".join(train) == whole[:border]
    assert "".join(validation) == whole[border:]
    assert len(train) + len(validation) in (4, 5)


def test_char_split_covers_both_alphabets(config: ConfigDict, tmp_path: Path) -> None:
    """A character that only the held-out end has is still in the vocabulary; there is no bos and no eos to predict."""
    source = tmp_path / "text.txt"
    source.write_text("ab" * 45 + "xyzé" + "a" * 6)
    config.data.update({"source": str(source), "split_by": "characters", "validation_frac": 0.1, "cleaners": ()})
    config.tokenizer.kind = "char"
    prepared = prepare(config, tmp_path / "data", log=Lines())
    assert prepared.tokenizer.vocab_size == 6
    assert (prepared.train.tokens, prepared.validation.tokens) == (90, 10)
    assert (prepared.train.weighted_tokens, prepared.validation.weighted_tokens) == (89, 9)
    # Of "xyzéaaaaaa" all but the x, and the é has two bytes.
    assert prepared.validation.text_bytes == 10


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="tinyshakespeare is not part of the repository")
def test_shakespeare_is_split_as_nanogpt_splits_it(config: ConfigDict, tmp_path: Path) -> None:
    config.data.update(
        {"source": str(SHAKESPEARE), "split_by": "characters", "validation_frac": 0.1, "cleaners": (), "row_tokens": 64}
    )
    config.tokenizer.kind = "char"
    prepared = prepare(config, tmp_path / "data", log=Lines())
    assert (prepared.train.tokens, prepared.validation.tokens, prepared.tokenizer.vocab_size) == (1_003_854, 111_540, 65)


def test_validation_source_is_used_whole(config: ConfigDict, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("held out by hand, all of it")
    config.data.validation_source = str(other)
    config.data.validation_frac = 0.0
    prepared = prepare(config, tmp_path / "data", log=Lines())
    assert texts(prepared, "validation") == ["held out by hand, all of it"]
    assert len(texts(prepared, "train")) == 40


def test_trained_tokenizer_sees_only_the_train_split(config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxllm.data import tokenize

    seen: list[str] = []
    make = tokenize.make
    monkeypatch.setattr(tokenize, "make", lambda config, texts: (seen.extend(texts()), make(config, texts))[1])
    prepared = prepare(config, tmp_path / "data", log=Lines())
    assert seen == texts(prepared, "train")


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


def test_force_prepares_again_and_gives_the_same(config: ConfigDict, tmp_path: Path) -> None:
    prepare(config, tmp_path / "data", log=Lines())
    before = contents(tmp_path / "data")
    lines = Lines()
    prepare(config, tmp_path / "data", force=True, log=lines)
    assert "--force" in lines[0]
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


BAD_INPUT = {
    "missing": (lambda path: None, "there is no"),
    "empty": (lambda path: path.write_text(""), "holds no document"),
    "blank": (lambda path: path.write_text(" \n \n"), "every document was dropped (1 by min_chars)"),
    "latin": (lambda path: path.write_bytes(b"caf\xe9 " * 50), "is not UTF-8: byte 0xe9 at offset 3"),
    "short": (lambda path: path.write_text("too short"), "has 6 tokens, which is shorter than one row of 16 predictions"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named_and_loses_nothing(config: ConfigDict, tmp_path: Path, name: str) -> None:
    before = prepare(config, tmp_path / "data", log=Lines())
    make, words = BAD_INPUT[name]
    make(tmp_path / "bad.txt")
    good = config.data.source
    config.data.source = str(tmp_path / "bad.txt")
    config.data.split_by = "characters"
    config.data.validation_frac = 0.5
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        prepare(config, tmp_path / "data", log=Lines())
    assert "\n  Accepted: " in str(error.value)
    config.data.update({"source": good, "split_by": "documents", "validation_frac": 0.2})
    lines = Lines()
    assert prepare(config, tmp_path / "data", log=lines).record == before.record
    assert lines == []
    assert not (tmp_path / "data" / folder.PARTIAL).exists()


def test_one_document_cannot_be_split_by_documents(config: ConfigDict, tmp_path: Path) -> None:
    config.data.max_documents = 1
    with pytest.raises(ValueError, match=r"holds one document(.|\n)*Set data.split_by=characters"):
        prepare(config, tmp_path / "data", log=Lines())
    Path(config.data.source).write_text('{"text": "twins"}\n' * 3)
    config.data.max_documents = 0
    with pytest.raises(ValueError, match="3 documents with one and the same text"):
        prepare(config, tmp_path / "data", log=Lines())


def test_a_vocabulary_larger_than_the_models(config: ConfigDict, tmp_path: Path) -> None:
    """Before anything is packed, and also when the data is there already."""
    config.model.vocab_size = 258
    with pytest.raises(ValueError, match=r"tokenizer has 259 tokens, but model\.vocab_size = 258\.\n  Accepted: 259 or more"):
        prepare(config, tmp_path / "data", log=Lines())
    config.model.vocab_size = 259
    prepare(config, tmp_path / "data", log=Lines())
    config.model.vocab_size = 200
    with pytest.raises(ValueError, match="tokenizer has 259 tokens"):
        prepare(config, tmp_path / "data", log=Lines())


def test_shards_cut_short_stop_and_force_repairs(config: ConfigDict, tmp_path: Path) -> None:
    prepare(config, tmp_path / "data", log=Lines())
    before = contents(tmp_path / "data")
    os.truncate(tmp_path / "data" / "train" / "tokens.bin", 50)
    with pytest.raises(ValueError, match=r"tokens\.bin' has 50 bytes(.|\n)*prepare --force"):
        prepare(config, tmp_path / "data", log=Lines())
    prepare(config, tmp_path / "data", force=True, log=Lines())
    assert contents(tmp_path / "data") == before


def test_shards_of_other_data_are_noticed(config: ConfigDict, tmp_path: Path) -> None:
    prepare(config, tmp_path / "data", log=Lines())
    shutil.rmtree(tmp_path / "data" / "train")
    shutil.copytree(tmp_path / "data" / "validation", tmp_path / "data" / "train")
    with pytest.raises(ValueError, match=r"the shards in '.*train' are not those that data\.json"):
        prepare(config, tmp_path / "data", log=Lines())


@pytest.mark.parametrize("call", range(4))
def test_a_full_disk_keeps_what_was_there(config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The disk is full at the first, second, ... file that is brought to disk."""
    before = prepare(config, tmp_path / "data", log=Lines())
    config.data.row_tokens = 32
    calls = iter(range(1000))
    sync = os.fsync

    def fsync(file: int) -> None:
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(ValueError, match=r"is full \(No space left on device\)\.\n  Accepted: (.|\n)*unchanged"):
            prepare(config, tmp_path / "data", log=Lines())
    assert not (tmp_path / "data" / folder.PARTIAL).exists()
    config.data.row_tokens = 16
    assert prepare(config, tmp_path / "data", log=Lines()).record == before.record


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from jaxllm.config import from_json
    from jaxllm.data.prepare import prepare

    moment = sys.argv[3]
    def die():
        os.kill(os.getpid(), signal.SIGKILL)
    rename = Path.rename
    def renamed(self, target):
        rename(self, target)
        if moment == Path(target).name:
            die()
    Path.rename = renamed
    def log(line):
        if moment.endswith(":") and line.startswith(moment):
            die()
    prepare(from_json(Path(sys.argv[1]).read_text()), sys.argv[2], log=log)
"""


@pytest.mark.parametrize("moment", ["tokenizer:", "validation:", "old-train", "validation"])
def test_killed_at_any_moment(config: ConfigDict, tmp_path: Path, moment: str) -> None:
    """kill -9 while it packs leaves the old data in use; kill -9 while files are moved makes the next prepare start over."""
    clean = prepare(config, tmp_path / "clean", log=Lines())
    config.data.row_tokens = 32
    before = prepare(config, tmp_path / "data", log=Lines())
    config.data.row_tokens = 16
    (tmp_path / "config.json").write_text(to_json(config))
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "config.json"), str(tmp_path / "data"), moment]
    assert subprocess.run(command, cwd=ROOT, timeout=120, check=False).returncode == -signal.SIGKILL
    lines = Lines()
    if moment.endswith(":"):
        assert folder.read_record(tmp_path / "data") == before.record
    else:
        assert folder.read_record(tmp_path / "data") == folder.UNFINISHED
    again = prepare(config, tmp_path / "data", log=lines)
    assert lines[0].endswith("data.row_tokens was 32 and is 16" if moment.endswith(":") else "the last prepare did not finish")
    assert contents(tmp_path / "data") == contents(tmp_path / "clean")
    assert again.record["splits"] == clean.record["splits"]


def test_two_processes_wait_for_each_other(config: ConfigDict, tmp_path: Path) -> None:
    """The second one waits, finds the data fresh, and makes nothing. (Locks belong to open files, so threads will do.)"""
    packing, go_on = threading.Event(), threading.Event()
    first, second = Lines(), Lines()

    def slow(line: str) -> None:
        first.append(line)
        if line.startswith("train:"):
            packing.set()
            assert go_on.wait(30)

    def waiting(line: str) -> None:
        second.append(line)
        go_on.set()

    one = threading.Thread(target=prepare, args=(config, tmp_path / "data"), kwargs={"log": slow})
    one.start()
    assert packing.wait(30)
    prepared = prepare(config, tmp_path / "data", log=waiting)
    one.join()
    assert second == [f"waiting for another process that prepares {tmp_path / 'data'}"]
    prepared.train.verify()


def test_foreign_files_are_never_touched(config: ConfigDict, tmp_path: Path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds 'train', which prepare has not written"):
        prepare(config, tmp_path / "data", log=Lines())
    assert contents(tmp_path / "data") == {"train/mine.txt": b"precious"}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made: '.*file' is a file"):
        prepare(config, tmp_path / "file", log=Lines())
    config.data.source = str(tmp_path)
    with pytest.raises(ValueError, match="lies inside data.source"):
        prepare(config, tmp_path / "runs" / "data", log=Lines())
