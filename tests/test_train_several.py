"""Several adapters of one base, one after the other: each as if it were alone, the base in memory once."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict
from rich.console import Console
from test_train import ROOT, numbers, wait_for_step
from test_train import run as run_alone

from jaxllm import beginning, command, series, start
from jaxllm import config as schema
from jaxllm.engine import folder, hooks
from jaxllm.engine.session import Session
from jaxllm.engine.workdir import open_workdir

TEXTS = {
    "squares": "".join(f"the square of {n} is {n * n}.\n" for n in range(300)),
    "winds": "".join(f"On day {n} the wind came from the {('north', 'east', 'south')[n % 3]}.\n" for n in range(300)),
}
CONFIG = """
from jaxllm.config import base

def get_config():
    config = base()
    config.train.start = {start!r}
    config.train.transforms, config.lora.rank, config.lora.dropout_frac = ("nf4", "lora"), 2, 0.1
    config.model.dropout_frac = 0.1
    config.data.source, config.data.split_by, config.data.row_tokens = "elsewhere.txt", "characters", 32
    config.train.steps, config.train.batch_seqs, config.train.log_every_steps = 12, 8, 1
    config.parallel.data = 1
    config.train.ema_decay = 0.5
    config.optimizer.learning_rate, config.schedule.warmup_steps = 1e-2, 2
    config.eval.every_steps, config.checkpoint.every_steps = 6, 4
    config.sample.tokens, config.sample.prompts = 4, ("the ",)
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base, texts, and the config of adapters."""
    place = tmp_path_factory.mktemp("series")
    for name, text in TEXTS.items():
        (place / f"{name}.txt").write_text(text)
    config = schema.base()
    config.model.update({"layers": 1, "width": 64, "heads": 2, "context_tokens": 32})
    config.tokenizer.kind = "byte"
    config.data.update({"source": str(place / "squares.txt"), "split_by": "characters"})
    config.train.update({"steps": 2, "batch_seqs": 8})
    config.parallel.data = 1
    config.sample.tokens, config.schedule.warmup_steps = 0, 0
    assert run_alone(config, place / "base")[0] == 0
    (place / "adapter.py").write_text(CONFIG.format(start=str(place / "base")))
    return place


def config_of(place: Path, name: str, workdir: Path, **train: Any) -> ConfigDict:
    config = schema.load(place / "adapter.py")
    config.data.source = str(place / f"{name}.txt")
    config.train.update(train)
    return command.resolved(config, workdir, ())


def run(place: Path, workdir: Path, *names: str, **train: Any) -> tuple[int, str]:
    """(exit code, what was printed) of a series in this process."""
    output = io.StringIO()
    with ExitStack() as stack:
        configs = {name: config_of(place, name, workdir / name, **train) for name in names}
        opened = {name: stack.enter_context(open_workdir(workdir / name)) for name in names}
        code = series.run(configs, opened, Console(file=output, width=200))
    return code, output.getvalue()


def told(output: str, *beginnings: str) -> list[str]:
    """The lines that begin in one of these ways."""
    return [line for line in output.splitlines() if line.startswith(beginnings)]


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """The same runs, each by itself."""
    for name in TEXTS:
        assert run_alone(config_of(place, name, place / "alone" / name), place / "alone" / name)[0] == 0
    return place / "alone"


def assert_same(alone: Path, together: Path) -> None:
    """Metrics, samples, config and every bit of the checkpoints."""
    assert numbers(together) == numbers(alone)
    for file in ("samples.txt", "config.json"):
        assert (together / file).read_text() == (alone / file).read_text()
    steps = {path.name for path in (alone / "checkpoints").iterdir()}
    assert steps == {path.name for path in (together / "checkpoints").iterdir()} and "frozen" in steps
    for step in steps:
        one, other = (folder.read_record(workdir / "checkpoints" / step) for workdir in (alone, together))
        assert (one.fingerprint(), one.frozen, one.meta) == (other.fingerprint(), other.frozen, other.meta)


class Counted:
    """How often the base was read and the step compiled, and where the frozen arrays of each run lay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read, self.compiled, self.restored = 0, 0, 0
        self.places: list[list[int]] = []
        load, compile, read = start.load, Session.compile, folder.read
        create, restore = beginning.SharedBeginning.create, beginning.SharedBeginning.restore

        def note(make: Callable[..., Any]) -> Callable[..., Any]:
            def made(*given: Any) -> Any:
                state = make(*given)
                shards = [shard for leaf in jax.tree.leaves(state.frozen) for shard in leaf.addressable_shards]
                self.places.append([shard.data.unsafe_buffer_pointer() for shard in shards])
                return state

            return made

        def counting(name: str, call: Callable[..., Any], counts: Callable[..., bool] = lambda *given: True) -> Callable[..., Any]:
            def counted(*given: Any) -> Any:
                setattr(self, name, getattr(self, name) + counts(*given))
                return call(*given)

            return counted

        monkeypatch.setattr(start, "load", counting("read", load))
        monkeypatch.setattr(Session, "compile", counting("compiled", compile))
        monkeypatch.setattr(folder, "read", counting("restored", read, lambda path, *_: path.name == "frozen"))
        monkeypatch.setattr(beginning.SharedBeginning, "create", note(create))
        monkeypatch.setattr(beginning.SharedBeginning, "restore", note(restore))


def test_each_run_is_the_one_that_it_is_alone(place: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    code, output = run(place, tmp_path, *TEXTS)
    assert code == 0 and told(output, "begins ") == [
        f"begins with {place / 'base'}",
        f"begins with {place / 'base'} (in memory already)",
    ]
    assert told(output, "256 tokens a step") == [
        f"256 tokens a step, 12 steps; {how}" for how in ("compiling ...", "as compiled before")
    ]
    for name in TEXTS:
        assert_same(alone / name, tmp_path / name)
    assert (counted.read, counted.compiled, counted.restored) == (1, 1, 0)
    assert len(counted.places) == 2 and counted.places[0] == counted.places[1]
    # With more steps all go on: from checkpoints, of which the first one gives the frozen tree.
    code, output = run(place, tmp_path, *TEXTS, steps=14)
    assert code == 0 and output.count("resuming at step 12") == 2 and "begins with " not in output
    assert told(output, "256 tokens a step") == [
        f"256 tokens a step, 2 of 14 steps; {how}" for how in ("compiling ...", "as compiled before")
    ]
    assert (counted.read, counted.compiled, counted.restored) == (1, 2, 1)
    assert len(counted.places) == 4 and counted.places[2] == counted.places[3]
    longer = tmp_path / "longer"
    shutil.copytree(alone / "winds", longer)
    assert run_alone(config_of(place, "winds", longer, steps=14), longer)[0] == 0
    assert_same(longer, tmp_path / "winds")
    # Where one goes on and another begins, what is read for that one serves both.
    shutil.copytree(alone / "squares", tmp_path / "mixed" / "squares")
    restored = counted.restored
    assert run(place, tmp_path / "mixed", *TEXTS, steps=14)[0] == 0
    assert (counted.read, counted.restored) == (2, restored) and counted.places[4] == counted.places[5]
    assert_same(tmp_path / "squares", tmp_path / "mixed" / "squares")
    code, output = run(place, tmp_path, "squares", steps=13)
    assert (
        code == 0
        and "this run is at step 14, beyond train.steps = 13: nothing is left to train. Raise train.steps to go on." in output
    )


def test_ctrl_c_ends_the_series_and_the_same_command_goes_on(place: Path, alone: Path, tmp_path: Path) -> None:
    data = [f"--data={name}={place / name}.txt" for name in TEXTS]
    flags = ["--config", str(place / "adapter.py"), *data, "--workdir", str(tmp_path)]
    series = [sys.executable, "-m", "jaxllm.adapters", "train", *flags]
    process = subprocess.Popen(series, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(process, tmp_path / "squares", 5)
    os.kill(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "SIGINT at step" in output and "-m jaxllm.adapters train --config" in output
    assert numbers(tmp_path / "squares")[-1]["step"] < 12 and not (tmp_path / "winds" / "metrics.jsonl").exists()
    # All data is there before the first step.
    assert (tmp_path / "winds" / "data" / "train").is_dir()
    frozen = tmp_path / "squares" / "checkpoints" / "frozen" / "record.json"
    written = frozen.stat().st_mtime_ns
    process = subprocess.run(series, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    # One goes on and one begins, and the base is read once for both.
    reads = f"reads {place / 'base'}, with which a later run begins; this one goes on beside its frozen parameters"
    assert told(process.stdout, "reads ", "begins ") == [reads, f"begins with {place / 'base'} (in memory already)"]
    assert len(told(process.stdout, "resuming at step")) == 1
    assert frozen.stat().st_mtime_ns == written
    for name in TEXTS:
        assert_same(alone / name, tmp_path / name)


def test_a_signal_in_the_last_step_of_a_run_ends_the_series(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(validation: hooks.Validation, step: int, state: Any) -> None:
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(hooks.Validation, "run", interrupt)
    code, output = run(place, tmp_path, "squares", "winds", steps=4)
    assert code == 128 + signal.SIGTERM
    assert "SIGTERM after 1 of 2 adapters: all of them are saved." in output
    assert not (tmp_path / "winds" / "metrics.jsonl").exists()
    # One is complete, and nothing comes behind the other.
    code, output = run(place, tmp_path, "squares", "winds", steps=4)
    assert code == 0 and "this run is at step 4 of 4 already" in output


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "no data is given"),
        (["law.jsonl"], "--data law.jsonl does not name an adapter and its data"),
        (["law="], "--data law= does not name"),
        (["../law=law.jsonl"], "--data ../law=law.jsonl does not name"),
        (["law=a.jsonl", "law=b.jsonl"], "--data law=b.jsonl has a name that came before"),
    ],
)
def test_data_without_names_is_refused(data: list[str], words: str) -> None:
    with pytest.raises(ValueError, match="(?s)^" + re.escape(words) + ".*\n  Accepted: .*--data.*\n  "):
        series.parse(data)
    assert series.parse(["law=a=b.jsonl", "a.b-1=hf:x"]) == {"law": "a=b.jsonl", "a.b-1": "hf:x"}


@pytest.mark.parametrize(
    ("flag", "workdir", "words"),
    [
        ("--config.train.transforms=('nf4',)", "new", "train.transforms = ('nf4',): no adapter beside a model"),
        ("--config.train.start=", "new", "train.start = '': no adapter beside a model"),
        ("--config.data.dir=there", "new", "data.dir = 'there' is one directory for the data of several adapters"),
        ("--config.seed=1", "base", "is a run"),
    ],
)
def test_a_config_that_shares_no_base_is_refused(place: Path, flag: str, workdir: str, words: str) -> None:
    flags = ["--config", str(place / "adapter.py"), flag, "--workdir", str(place / workdir), "--data", f"winds={place}/winds.txt"]
    code = f"import sys; from jaxllm import adapters, command; adapters.define_flags(); sys.argv = {['x', 'train', *flags]!r}; "
    code += "command.run(adapters.main, positional=True)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().split("\n")) == 3
    assert not (place / "new").exists()


def test_data_that_needs_another_head_is_refused_before_the_first_step(place: Path, tmp_path: Path) -> None:
    configs = {}
    for name, labels in (("two", "ab"), ("three", "abc")):
        rows = [json.dumps({"text": f"number {n}", "label": labels[n % len(labels)]}) for n in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        config = schema.load(place / "adapter.py")
        config.train.objective, config.model.head = "sequence_classification", "classify"
        config.data.update({"source": str(tmp_path / f"{name}.jsonl"), "split_by": "documents", "target_field": "label"})
        configs[name] = command.resolved(config, tmp_path / name, ())
    with ExitStack() as stack, pytest.raises(ValueError, match="(?s)'two' and 'three' do not fit.*model.classes = 2, and 3 with"):
        opened = {name: stack.enter_context(open_workdir(tmp_path / name)) for name in configs}
        series.run(configs, opened, Console(file=io.StringIO()))
    assert not (tmp_path / "two" / "metrics.jsonl").exists()
