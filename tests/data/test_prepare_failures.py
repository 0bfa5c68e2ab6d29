"""Nothing is lost when prepare goes wrong: bad input, damaged shards, a full disk, kill -9, two at once, a directory of others."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from corpus import Lines, contents
from ml_collections import ConfigDict

from jaxllm.config import to_json
from jaxllm.data import folder
from jaxllm.data.prepare import prepare
from jaxllm.data.tokenizers.byte import ByteTokenizer

ROOT = Path(__file__).parents[2]


BAD_INPUT = {
    "missing": (lambda path: None, "there is no"),
    "empty": (lambda path: path.write_text(""), "holds no document"),
    "blank": (lambda path: path.write_text(" \n \n"), "every document was dropped (1 by min_chars)"),
    "latin": (lambda path: path.write_bytes(b"caf\xe9 " * 50), "is not UTF-8: byte 0xe9 at offset 3"),
    "short": (lambda path: path.write_text("too short"), "has 6 tokens, which is shorter than one row of 16 tokens"),
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


def test_what_fails_at_first_leaves_nothing(config: ConfigDict, tmp_path: Path) -> None:
    config.data.source = str(tmp_path / "missing.txt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="there is no"):
        prepare(config, tmp_path / "runs" / "new" / "data", log=Lines())
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "runs" / "new").mkdir(parents=True)
    (tmp_path / "runs" / "note").write_text("")
    with pytest.raises(ValueError, match="there is no"):
        prepare(config, tmp_path / "runs" / "new" / "data", log=Lines())
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.name != "note"] == ["new"]
    assert not any((tmp_path / "runs" / "new").iterdir())


def test_who_waits_for_one_that_fails_makes_the_directory_anew(config: ConfigDict, tmp_path: Path) -> None:
    waits, made = threading.Event(), []

    def second() -> None:
        made.append(prepare(config, tmp_path / "new" / "data", log=lambda line: waits.set() if "waiting" in line else None))

    thread = threading.Thread(target=second)
    with pytest.raises(ValueError, match="at first"), folder.locked(tmp_path / "new" / "data", lambda line: None):
        thread.start()
        assert waits.wait(20)
        raise ValueError("at first")
    thread.join(60)
    assert len(made[0].train) > 0 and (tmp_path / "new" / "data" / folder.LOCK).exists()


@pytest.mark.parametrize("owner", ["start", "path"])
def test_a_chat_template_that_is_missing_is_told_before_the_text_is_read(config: ConfigDict, tmp_path: Path, owner: str) -> None:
    """By the name of the field that the user set."""
    run, other = tmp_path / "run", tmp_path / "other"
    for path in (run / "tokenizer", other):
        ByteTokenizer().save(str(path))
    config.train.objective, config.train.start, config.chat.template = "sft", str(run), "tokenizer"
    config.tokenizer.update({"kind": "file", "path": str(run / "tokenizer" if owner == "start" else other)})
    words = f"the tokenizer of train.start = '{run}'" if owner == "start" else f"tokenizer.path = '{other}'"
    lines = Lines()
    with pytest.raises(
        ValueError, match=re.escape(f"chat.template = 'tokenizer', but {words} has no chat template.\n  Accepted: ")
    ):
        prepare(config, tmp_path / "data", log=lines)
    assert lines == [f"preparing {tmp_path / 'data'}: nothing is there yet"]


def test_equal_documents_cannot_be_split(config: ConfigDict, tmp_path: Path) -> None:
    Path(config.data.source).write_text('{"text": "twins"}\n' * 3)
    with pytest.raises(ValueError, match=r"3 documents with one and the same text(.|\n)*Accepted(.|\n)*data.split_by=characters"):
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


@pytest.mark.parametrize("call", [0, 3, 7, 8, 9])
def test_a_full_disk_keeps_what_was_there(config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The disk is full at the first array, ... the index of the other split (7), data.json, and the note that files are moved."""
    before = prepare(config, tmp_path / "data", log=Lines())
    held = contents(tmp_path / "data")
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
    assert contents(tmp_path / "data") == held
    config.data.row_tokens = 16
    assert prepare(config, tmp_path / "data", log=Lines()).record == before.record


LIMITED = """
    import resource, sys
    from pathlib import Path
    from jaxllm.config import from_json
    from jaxllm.data.prepare import prepare

    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        prepare(from_json(Path(sys.argv[1]).read_text()), sys.argv[2])
    except ValueError as error:
        sys.exit(str(error))
"""


def test_a_file_that_may_not_grow(config: ConfigDict, tmp_path: Path) -> None:
    """By the system itself: a quota of 2000 bytes a file."""
    prepare(config, tmp_path / "data", log=Lines())
    held = contents(tmp_path / "data")
    config.data.row_tokens = 32
    (tmp_path / "config.json").write_text(to_json(config))
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(tmp_path / "config.json"), str(tmp_path / "data")]
    ended = subprocess.run(command, cwd=ROOT, timeout=120, check=False, capture_output=True, text=True)
    assert "is full (File too large).\n  Accepted: room for" in ended.stderr
    assert contents(tmp_path / "data") == held


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_a_directory_that_may_not_be_written(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match=r"cannot be written to \((.|\n)*Accepted: (.|\n)*set data\.dir"):
        prepare(config, tmp_path / "data", log=Lines())


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


@pytest.mark.parametrize("field", ["source", "validation_source"])
def test_errors_name_the_setting(config: ConfigDict, tmp_path: Path, field: str) -> None:
    config.data[field] = str(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=rf"there is no .*nowhere\.txt(.|\n)*Change data\.{field}\.$"):
        prepare(config, tmp_path / "data", log=Lines())


def test_the_command_compares_rows_with_their_hashes(config: ConfigDict, tmp_path: Path) -> None:
    """A flipped bit leaves sizes as they were; only reading all of it tells."""
    prepare(config, tmp_path / "data", log=Lines())
    (tmp_path / "config.json").write_text(to_json(config))
    command = [sys.executable, "-m", "jaxllm.prepare", f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path}"]
    assert subprocess.run(command, cwd=ROOT, timeout=120, check=False, capture_output=True).returncode == 0
    path = tmp_path / "data" / "validation" / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 4
    path.write_bytes(data)
    ended = subprocess.run(command, cwd=ROOT, timeout=120, check=False, capture_output=True, text=True)
    assert ended.returncode == 2
    assert f"'{path}' was damaged after it was written" in ended.stderr


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
