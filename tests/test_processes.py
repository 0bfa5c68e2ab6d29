"""Several real processes over loopback, through the real command: they train what one process trains.

All runs have four devices, over which the parameters are split (fsdp): as four processes of one, as two of two, as one of four.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxllm.engine.workdir import open_workdir

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(f"line {number}: the square of {number} is {number * number}.\n" for number in range(300))
STEPS = 24
CONFIG = f"""
from jaxllm.config import base

def get_config():
    config = base()
    config.model.layers, config.model.width, config.model.heads, config.model.context_tokens = 2, 16, 2, 32
    config.model.vocab_size = 264
    config.tokenizer.kind = "byte"
    config.data.source = {{source!r}}
    config.data.split_by = "characters"
    config.train.steps, config.train.batch_seqs, config.train.log_every_steps = {STEPS}, 8, 1
    config.optimizer.learning_rate = 1e-2
    config.schedule.warmup_steps = 2
    config.eval.every_steps, config.checkpoint.every_steps, config.sample.every_steps = 12, 8, 12
    config.sample.tokens, config.sample.prompts = 4, ("line ",)
    config.parallel.data, config.parallel.fsdp = 1, 4
    config.train.trainable = "(?!layers/mlp/up/).*"
    return config
"""
# Of one run: starting and compiling take most of it, and other tests may run beside it.
LIMIT_SECS = 240.0


class Launched:
    """A command in several processes. Its output goes to a file, which is what a failing test shows."""

    def __init__(self, process: subprocess.Popen, log: Path):
        self.process, self.log = process, log

    def output(self) -> str:
        return "\n".join(line for line in self.log.read_text(errors="replace").splitlines() if "[Gloo]" not in line)

    def wait(self) -> int:
        try:
            return self.process.wait(LIMIT_SECS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not done in {LIMIT_SECS} s:\n{self.output()}")

    def wait_for(self, pattern: str) -> re.Match[str]:
        until = time.monotonic() + LIMIT_SECS
        while time.monotonic() < until:
            if found := re.search(pattern, self.output(), re.MULTILINE):
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        pytest.fail(f"'{pattern}' did not come:\n{self.output()}")


@contextmanager
def launch(count: int, devices: int, config: Path, workdir: Path, *more: str) -> Iterator[Launched]:
    """`count` processes of `devices` devices each. All of them are gone in the end, whatever happens."""
    command = [sys.executable, "-m", "jaxllm.train", "--config", str(config), "--workdir", str(workdir), *more]
    log = workdir.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch/local_processes.py"), str(count), *command],
            cwd=ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            yield Launched(process, log)
        finally:
            # The second one makes the launcher kill its processes.
            for _ in range(2):
                if process.poll() is None:
                    process.terminate()
                    time.sleep(0.3)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def rows(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("tokens_per_sec", "secs")} for row in lines]


def numbers(row: dict) -> dict[str, float]:
    return {key: value for key, value in row.items() if key != "kind"}


def assert_equal(one: list[dict], other: list[dict]) -> None:
    """Equal rows: losses to 1e-6 of their size, everything else to the rounding of sums in another order."""
    assert [(row["kind"], row["step"]) for row in one] == [(row["kind"], row["step"]) for row in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6), mine["step"]
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=1e-4, abs=1e-7), mine["step"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experiment")
    (directory / "text.txt").write_text(TEXT)
    (directory / "tiny.py").write_text(CONFIG.format(source=str(directory / "text.txt")))
    return directory / "tiny.py"


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, which nothing disturbed. No launcher: this is how anyone trains on one host."""
    workdir = tmp_path_factory.mktemp("alone")
    done = subprocess.run(
        [sys.executable, "-m", "jaxllm.train", "--config", str(config), "--workdir", str(workdir)],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECS,
    )
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def stopped(config: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four processes, one of which, not the first, got a SIGTERM."""
    workdir = tmp_path_factory.mktemp("four") / "run"
    with launch(4, 1, config, workdir) as run:
        pid = run.wait_for(r"^\[2\] is process (\d+) of this machine")[1]
        run.wait_for(rf"^\[0\] step +3/{STEPS} ")
        os.kill(int(pid), signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM, run.output()
        said = run.output()
    for number in range(4):
        place = rf"\[{number}\] by hand: process {number} of 4, coordinator localhost:\d+, 1 local device$"
        assert re.search(place, said, re.MULTILINE), said
    assert "[0] SIGTERM at step" in said, said
    # All but the start is said once, by the first process.
    assert not re.search(r"^\[[123]\] (?!is process|by hand|warning)", said, re.MULTILINE), said
    return workdir


def test_four_processes_train_as_one_and_stop_at_the_same_step(stopped: Path, alone: Path) -> None:
    trained = [row for row in rows(stopped) if row["kind"] == "train"]
    last = trained[-1]["step"]
    assert 3 <= last < STEPS
    assert_equal(trained, [row for row in rows(alone) if row["kind"] == "train"][:last])
    assert str(last) in {path.name for path in (stopped / "checkpoints").iterdir()}
    assert all(path.name.isdigit() or path.name == "frozen" for path in (stopped / "checkpoints").iterdir())
    assert (stopped / "checkpoints" / "frozen" / "record.json").is_file()
    told = json.loads((stopped / "run.json").read_text())
    assert told["processes"] == 4
    assert told["sessions"][-1]["end_step"] == last
    assert len(list((stopped / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (1, 4)])
def test_what_four_processes_saved_others_restore(
    stopped: Path, alone: Path, config: Path, tmp_path: Path, count: int, devices: int
) -> None:
    """To the end, with validation and samples, as if nothing had happened."""
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    # On two processes the tensor axis, too, and the layers in a scan: what is restored is cut in another way.
    more = ("--config.parallel.fsdp=2", "--config.parallel.tensor=2", "--config.model.layers_as=scan") if count == 2 else ()
    with launch(count, devices, config, workdir, *more) as run:
        assert run.wait() == 0, run.output()
        assert "[0] resuming at step" in run.output(), run.output()
        assert "[0] done." in run.output(), run.output()
    assert_equal(rows(workdir), rows(alone))
    assert (workdir / "samples.txt").read_text() == (alone / "samples.txt").read_text()


def test_two_processes_begin_with_a_run(alone: Path, config: Path, tmp_path: Path) -> None:
    """Each reads the model for itself, with quantized kernels and adapters on top. An update of nothing leaves its validation loss."""
    more = ["start=" + str(alone), "transforms=('int8','lora')", "trainable=auto", "steps=1"]
    flags = [f"--config.train.{each}" for each in more]
    # The config makes a tokenizer; the model has its own.
    flags += ["--config.tokenizer.kind=file", f"--config.tokenizer.path={alone / 'tokenizer'}", "--config.schedule.warmup_steps=0"]
    flags += ["--config.eval.every_steps=1", "--config.optimizer.learning_rate=1e-12"]
    with launch(2, 2, config, tmp_path / "run", *flags) as run:
        assert run.wait() == 0, run.output()
        assert f"[0] begins with {alone}\n" in run.output(), run.output()
    before, after = ([row["loss"] for row in rows(workdir) if row["kind"] == "eval"][-1] for workdir in (alone, tmp_path / "run"))
    # int8 moves it by 4e-4; that of random weights is 5.6.
    assert after == pytest.approx(before, abs=2e-3) and before < 4


def test_the_failure_of_one_process_ends_all(config: Path, tmp_path: Path) -> None:
    """The first process finds the run directory locked: its error is told, and nobody waits for it."""
    with open_workdir(tmp_path / "run"), launch(2, 2, config, tmp_path / "run") as run:
        assert run.wait() == 2, run.output()
        assert "[0] error: --workdir" in run.output(), run.output()
        assert "is in use by another run" in run.output()
    assert "Traceback" not in run.output()
