"""The training command from end to end: what it writes, how it resumes, what it refuses."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from jaxllm import config as schema
from jaxllm import runs, train
from jaxllm.engine.errors import NonFiniteError
from jaxllm.engine.state import TrainState
from jaxllm.engine.workdir import open_workdir

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(f"line {number}: the square of {number} is {number * number}.\n" for number in range(600))
CONFIG = """
from jaxllm.config import base

def get_config():
    config = base()
    config.model.layers, config.model.width, config.model.heads, config.model.context_tokens = 2, 16, 2, 32
    config.model.dropout_frac = 0.1
    config.tokenizer.kind = "byte"
    config.data.source = {source!r}
    config.data.split_by = "characters"
    config.train.steps, config.train.batch_seqs, config.train.log_every_steps = 24, 8, 1
    config.optimizer.learning_rate = 1e-2
    config.train.ema_decay = 0.5
    config.schedule.warmup_steps = 2
    config.eval.every_steps, config.checkpoint.every_steps, config.sample.every_steps = 6, 4, 8
    config.sample.tokens, config.sample.prompts = 4, ("line ",)
    return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose whole run takes seconds."""
    directory = tmp_path_factory.mktemp("experiment")
    (directory / "text.txt").write_text(TEXT)
    (directory / "tiny.py").write_text(CONFIG.format(source=str(directory / "text.txt")))
    return directory / "tiny.py"


def run(config: ConfigDict, workdir: Path) -> tuple[int, str]:
    """(exit code, what was printed) of a run in this process."""
    output = io.StringIO()
    with open_workdir(workdir) as opened:
        code = train.run(config, opened, Console(file=output, width=200))
    return code, output.getvalue()


def command(config_file: Path, workdir: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "jaxllm.train", "--config", str(config_file), "--workdir", str(workdir), *more]


def numbers(workdir: Path) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("tokens_per_sec", "secs")} for row in rows]


@pytest.fixture(scope="module")
def finished(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing disturbed, in a process of its own."""
    workdir = tmp_path_factory.mktemp("finished")
    done = subprocess.run(command(config_file, workdir), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    return workdir


def test_a_run_writes_all_its_files_and_learns(finished: Path) -> None:
    rows = numbers(finished)
    train_rows = [row for row in rows if row["kind"] == "train"]
    evals = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in train_rows] == list(range(1, 25))
    assert [row["step"] for row in evals] == [6, 12, 18, 24]
    assert {"loss", "accuracy", "grad_norm", "lr", "tokens", "skipped"} <= set(train_rows[0])
    assert train_rows[-1]["tokens"] == 24 * 8 * 32
    # An untrained model knows nothing: ln 258, and half the variance of its logits, which is 1.
    assert abs(train_rows[0]["loss"] - 6.05) < 0.3
    assert evals[-1]["loss"] < evals[0]["loss"] < 5.5
    assert evals[-1]["bits_per_byte"] == pytest.approx(evals[-1]["loss"] / 0.6931472, rel=1e-3)  # bytes are tokens here
    for name in ("config.json", "run.json", "data.json", "samples.txt", "report.html", "tokenizer", "pictures/loss.png"):
        assert (finished / name).exists(), name
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(int(path.name) for path in (finished / "checkpoints").iterdir()) == [20, 24]
    assert (finished / "samples.txt").read_text().count("=== step") == 3
    assert (
        schema.load(finished / "config.json").model.vocab_size
        == json.loads((finished / "data.json").read_text())["tokenizer"]["vocab_size"]
    )


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            if numbers(workdir)[-1]["step"] >= step:
                return
        except (OSError, IndexError, ValueError):
            pass
        time.sleep(0.01)
    pytest.fail(f"no step {step} in time: {process.poll()}")


def test_a_run_that_was_killed_and_stopped_ends_as_if_nothing_had_happened(
    config_file: Path, finished: Path, tmp_path: Path
) -> None:
    """kill -9 before the first checkpoint and after one, SIGTERM, Ctrl-C: the metrics are equal to the last bit."""
    for step, number, code in (
        (2, signal.SIGKILL, -9),
        (6, signal.SIGKILL, -9),
        (9, signal.SIGTERM, 143),
        (13, signal.SIGINT, 130),
    ):
        process = subprocess.Popen(
            command(config_file, tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for_step(process, tmp_path, step)
        os.kill(process.pid, number)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        if number != signal.SIGKILL:
            assert "everything is saved. To go on, run the same command again" in output
            assert "python" in output
            assert f"--workdir {tmp_path}" in output
    done = subprocess.run(command(config_file, tmp_path), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    assert numbers(tmp_path) == numbers(finished)
    assert (tmp_path / "samples.txt").read_text() == (finished / "samples.txt").read_text()
    assert len(json.loads((tmp_path / "run.json").read_text())["sessions"]) >= 4


def test_a_run_with_frozen_parameters_resumes_to_the_bit_and_keeps_them_once(config_file: Path, tmp_path: Path) -> None:
    """kill -9 after a checkpoint and Ctrl-C: the metrics of a run that nothing disturbed, and one frozen tree that nobody wrote again."""
    frozen = "--config.train.trainable=layers/(?!attention/[qk]/).*"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = subprocess.run(command(config_file, whole, frozen), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = None
    for step, number, code in ((9, signal.SIGKILL, -9), (14, signal.SIGINT, 130), (24, None, 0)):
        process = subprocess.Popen(
            command(config_file, broken, frozen), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if number is not None:
            wait_for_step(process, broken, step)
            os.kill(process.pid, number)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        assert ("resuming at step" in output) == (number != signal.SIGKILL)
        record = broken / "checkpoints" / "frozen" / "record.json"
        assert written in (None, record.stat().st_mtime_ns)
        written = record.stat().st_mtime_ns
    assert numbers(broken) == numbers(whole)
    assert {path.name for path in (broken / "checkpoints").iterdir()} == {"frozen", "20", "24"}
    assert (broken / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    names = set(json.loads(record.read_text())["leaves"])
    assert {"frozen/embed/tokens", "frozen/layers/attention/q/kernel"} < names and "frozen/layers/attention/v/kernel" not in names
    one, other = (runs.load(workdir).params for workdir in (whole, broken))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(("steps", "words"), [(24, " of 24 already"), (23, ", beyond train.steps = 23")])
def test_a_finished_run_says_so(config_file: Path, finished: Path, steps: int, words: str) -> None:
    """And its files stay as they are."""
    before, said = numbers(finished), (finished / "config.json").read_bytes()
    config = schema.load(config_file)
    config.train.steps = steps
    code, output = run(config, finished)
    assert code == 0
    assert f"this run is at step 24{words}: nothing is left to train. Raise train.steps to go on." in output
    assert (numbers(finished), (finished / "config.json").read_bytes()) == (before, said)


def test_the_config_of_a_run_resumes_it(config_file: Path, tmp_path: Path) -> None:
    """As the report says: with the config.json that the run wrote, its vocabulary filled in, and one field changed."""
    config = schema.load(config_file)
    config.train.steps, config.sample.prompts = 3, ()
    run(config, tmp_path)
    done = subprocess.run(
        command(tmp_path / "config.json", tmp_path, "--config.train.steps=5"), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "resuming at step 3" in done.stdout
    assert "preparing" not in done.stdout
    assert [row["step"] for row in numbers(tmp_path) if row["kind"] == "train"] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("parallel.data", 99, "but there are 8 devices"),
        ("schedule.warmup_steps", 24, "is not less than train.steps = 24"),
        ("train.trainable", "mlp", "selects no parameter"),
        ("optimizer.groups", (("mlp", 1.0, 1.0),), "selects no parameter"),
        ("model.head_dim", 3, "head width 3 is odd"),
    ],
)
def test_what_cannot_run_is_refused_before_data_is_prepared(
    config_file: Path, tmp_path: Path, key: str, value: object, words: str
) -> None:
    config = schema.load(config_file)
    section, _, name = key.rpartition(".")
    config[section][name] = value
    config.data.source = "there is no such file"
    with pytest.raises(ValueError, match=words):
        run(config, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.width", 32, "model.width was 16 and is now 32"),
        ("optimizer.learning_rate", 0.5, "optimizer.learning_rate was 0.01 and is now 0.5"),
        ("data.cleaners", (), "data.cleaners was"),
    ],
)
def test_a_run_is_not_continued_as_another(config_file: Path, finished: Path, key: str, value: object, words: str) -> None:
    config = schema.load(config_file)
    section, _, name = key.rpartition(".")
    config[section][name] = value
    stored = (finished / "config.json").read_text()
    with pytest.raises(ValueError, match=words):
        run(config, finished)
    assert (finished / "config.json").read_text() == stored


@pytest.mark.parametrize(
    ("there", "frozen_there", "to_come"),
    [([], False, 4 * 12 + 20), ([], True, 4 * 12), ([4, 8], True, 2 * 12), ([4, 8, 12], True, 12), ([2, 4, 6, 8, 10], True, 12)],
)
def test_checkpoints_that_are_there_need_no_more_room(there: list[int], frozen_there: bool, to_come: int) -> None:
    """keep_last 2 and keep_best 1, and one while it is written; a state of 3 float32 numbers, and 5 that are frozen."""
    params, frozen = {"w": jax.ShapeDtypeStruct((3,), "float32")}, {"w": jax.ShapeDtypeStruct((5,), "float32")}
    none: Any = None
    state = TrainState(none, params, frozen, none, none, none, none, none)
    session: Any = SimpleNamespace(config=schema.base(), abstract=state)
    checkpoints: Any = SimpleNamespace(steps=lambda: there, has_frozen=lambda: frozen_there)
    assert train._bytes_to_come(session, checkpoints) == to_come


def test_two_runs_in_one_directory(config_file: Path, finished: Path) -> None:
    with open_workdir(finished):
        second = subprocess.run(command(config_file, finished), cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "is in use by another run" in second.stderr
    assert "Traceback" not in second.stderr


def test_text_that_changed_since_is_refused(config_file: Path, finished: Path, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text(TEXT)
    config = schema.load(config_file)
    config.data.source = str(source)
    config.train.steps = 4
    config.eval.every_steps = config.sample.every_steps = 0
    run(config, tmp_path / "run")
    prepared = (tmp_path / "run/data/data.json").read_text()
    source.write_text(TEXT.replace("square", "cube"))
    config.train.steps = 8
    with pytest.raises(ValueError, match="are not those that this run began with"):
        run(config, tmp_path / "run")
    # What the run was trained on is still there: it can go on once the other text is gone.
    assert (tmp_path / "run/data/data.json").read_text() == prepared
    source.unlink()
    assert "resuming at step 4" in run(config, tmp_path / "run")[1]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("line " * 20, "a prompt of 100 tokens, for a model with a context of 32"),
        ("Quoi ?", "character 'Q' .* is not in the vocabulary"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_before_the_first_step(
    config_file: Path, tmp_path: Path, prompt: str, words: str
) -> None:
    config = schema.load(config_file)
    config.tokenizer.kind = "char"
    config.sample.prompts = ("line ", prompt)
    with pytest.raises(ValueError, match=words):
        run(config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_that_diverges_stops_and_says_where(config_file: Path, tmp_path: Path) -> None:
    config = schema.load(config_file)
    config.optimizer.learning_rate = 1e30
    config.optimizer.clip_norm = 0.0
    config.train.max_nonfinite_steps = 3
    with pytest.raises(NonFiniteError, match=r"3 steps in a row, up to step \d+, .*batch rows"):
        run(config, tmp_path)


def test_dry_run_writes_nothing(config_file: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "dry"
    done = subprocess.run(command(config_file, workdir, "--dry_run"), cwd=ROOT, capture_output=True, text=True, check=True)
    for words in ('"layers": 2', "parameters", "optimizer", "tokens in all", "6,144"):
        assert words in done.stdout
    assert not workdir.exists()
