"""The run directory: its lock, its config, its atomic writes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm.engine import workdir
from jaxllm.engine.workdir import CHANGEABLE, CHANGEABLE_SECTIONS, check_space, open_workdir, write_json, write_text

HOLD = """
import sys, time
from jaxllm.engine.workdir import open_workdir
run = open_workdir(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def changed(key: str, value: object) -> ConfigDict:
    config = schema.base()
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
    return config


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        with pytest.raises(
            ValueError, match=f"in use by another run: process {owner.pid} on {os.uname().nodename}.*\n.*give another"
        ):
            open_workdir(tmp_path / "run")
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with open_workdir(tmp_path / "run") as run:
        assert run.lock.read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(ValueError, match=f"process {os.getpid()} on "):
            open_workdir(tmp_path / "run")
    open_workdir(tmp_path / "run").close()


def test_a_file_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="(?s)cannot be written.*Accepted: a directory.*Give another --workdir"):
        open_workdir(tmp_path / "run")


def test_changeable_fields_exist() -> None:
    assert set(CHANGEABLE) <= set(schema.SCHEMA)
    assert set(CHANGEABLE_SECTIONS) <= {key.partition(".")[0] for key in schema.SCHEMA}


@pytest.mark.parametrize(
    ("key", "value"), [("train.steps", 5), ("checkpoint.keep_last", 3), ("parallel.tensor", 2), ("model.layers_as", "scan")]
)
def test_resuming_with_what_may_change(tmp_path: Path, key: str, value: object) -> None:
    run = open_workdir(tmp_path)
    run.adopt_config(schema.base(), newest=1)
    run.adopt_config(changed(key, value), newest=1)
    assert schema.flatten(schema.load(run.config))[key] == value
    run.close()


def test_a_config_that_trains_nothing_is_not_that_of_the_run(tmp_path: Path) -> None:
    with open_workdir(tmp_path) as run:
        run.adopt_config(changed("train.steps", 20), newest=None)
        before = run.config.read_bytes()
        for steps in (13, 14):
            run.adopt_config(changed("train.steps", steps), newest=14)
            assert run.config.read_bytes() == before
        with pytest.raises(ValueError, match="seed was 0 and is now 1"):
            run.adopt_config(changed("seed", 1), newest=2000)
        run.adopt_config(changed("train.steps", 15), newest=14)
        assert schema.load(run.config).train.steps == 15


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.width", 512),
        ("tokenizer.kind", "byte"),
        ("data.source", "other.txt"),
        ("optimizer.b2", 0.9),
        ("schedule.name", "wsd"),
        ("train.batch_seqs", 8),
        ("precision.compute", "bfloat16"),
        ("seed", 1),
    ],
)
def test_resuming_with_what_may_not(tmp_path: Path, key: str, value: object) -> None:
    with open_workdir(tmp_path) as run:
        run.adopt_config(schema.base(), newest=None)
        before = run.config.read_bytes()
        old = schema.SCHEMA[key].default
        with pytest.raises(ValueError) as caught:
            run.adopt_config(changed(key, value), newest=1)
        assert f"{key} was {old!r} and is now {value!r}" in str(caught.value)
        assert "Use another --workdir" in str(caught.value) and f"--config.{key}={old}" in str(caught.value)
        assert run.config.read_bytes() == before
        # Nothing was trained yet: nothing to protect.
        run.adopt_config(changed(key, value), newest=None)
        assert schema.flatten(schema.load(run.config))[key] == value


def test_a_tuple_to_set_back_is_readable_in_a_shell(tmp_path: Path) -> None:
    with open_workdir(tmp_path) as run:
        run.adopt_config(changed("train.transforms", ("nf4", "lora")), newest=None)
        with pytest.raises(ValueError, match="set it back: --config.train.transforms=\"\\('nf4', 'lora'\\)\"$"):
            run.adopt_config(schema.base(), newest=1)


def test_a_vocabulary_size_filled_in_is_no_change(tmp_path: Path) -> None:
    with open_workdir(tmp_path) as run:
        run.adopt_config(changed("model.vocab_size", 4096), newest=None)
        run.adopt_config(schema.base(), newest=1)
        with pytest.raises(ValueError, match=r"model.vocab_size was 4096 and is now 100"):
            run.adopt_config(changed("model.vocab_size", 4096), newest=1)
            run.adopt_config(changed("model.vocab_size", 100), newest=1)


def test_a_write_cut_short_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": [1, 2.5, None]})
    assert path.read_text() == '{\n  "a": [\n    1,\n    2.5,\n    null\n  ]\n}\n'

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workdir.os, "fsync", fail)
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_bytes() == before


def test_too_little_space_is_told_before_training(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "there", 1)
    with pytest.raises(ValueError, match=r"(?s)free, and the checkpoints of this run need 1048576.00 GiB.*Make room"):
        check_space(tmp_path / "not" / "there", 2**50)


def fail_in(path: Path, *files: str) -> None:
    """An error in a run that has its config, a heartbeat, the lock of its data, and these files."""
    with pytest.raises(ValueError, match="no such data"), open_workdir(path) as run:
        run.adopt_config(schema.base(), newest=None)
        for name in ("hosts/0.json", "data/lock", *files):
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text("x")
        raise ValueError("no such data")


def test_a_run_that_fails_before_it_has_anything_leaves_nothing(tmp_path: Path) -> None:
    fail_in(tmp_path / "series" / "run")
    assert not any(tmp_path.iterdir())
    # What another one made stays, and what has taken time.
    (tmp_path / "series").mkdir()
    fail_in(tmp_path / "series" / "run")
    assert (tmp_path / "series").is_dir() and not any((tmp_path / "series").iterdir())
    for kept in ("data/data.json", "metrics.jsonl"):
        fail_in(tmp_path / kept.replace("/", "_"), kept)
        assert (tmp_path / kept.replace("/", "_") / kept).exists()
    (tmp_path / "there").mkdir()
    fail_in(tmp_path / "there")
    assert (tmp_path / "there" / "config.json").exists()
    with open_workdir(tmp_path / "again"):
        pass
    assert (tmp_path / "again").is_dir()
