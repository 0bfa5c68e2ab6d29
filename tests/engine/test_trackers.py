"""Every tracker gets the same rows; files are read back with the readers that users have, services are stood in for."""

import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm import config as schema
from jaxllm import registry
from jaxllm.engine import trackers
from jaxllm.engine.trackers.tracker import Row

NAMES = registry.names("tracker")


def train_row(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 5 - step / 10, "grad_norm": 1.0, "tokens": step * 64, "skipped": 0}


def feed(tracker: trackers.Tracker, first: int, last: int) -> None:
    """Training rows, an evaluation and a text every 5 steps."""
    for step in range(first, last + 1):
        tracker.write(train_row(step))
        if step % 5 == 0:
            tracker.write({"kind": "eval", "step": step, "loss": 4.0, "perplexity": float("inf")})
            tracker.text(step, "samples", f"text <of> step {step}\x1d\u2028 \r and\n\nmore")


def open_one(name: str, workdir: Path, resume_step: int = 0) -> trackers.Tracker:
    return registry.resolve("tracker", name)(workdir, json.loads(schema.to_json(schema.base())), resume_step)


class FakeService(types.ModuleType):
    """Stands for `wandb` and for `mlflow` with `mlflow.entities`: keeps every call as (name, arguments)."""

    def __init__(self) -> None:
        super().__init__("service")
        self.calls: list[tuple[str, Any]] = []
        self.id, self.info, self.experiment_id = "id7", types.SimpleNamespace(run_id="id7"), "3"
        self.Error = self.MlflowException = type("ServiceError", (Exception,), {})
        self.failing = ""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append((name, {**named, "": arguments} if arguments else named))
            if name == self.failing:
                raise self.Error("no answer")
            return tuple(arguments) if name in ("Metric", "Param", "Html") else self

        return call

    def of(self, name: str) -> list[Any]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    fake = FakeService()
    for name in ("wandb", "mlflow", "mlflow.entities"):
        monkeypatch.setitem(sys.modules, name, fake)
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return fake


def read_events(workdir: Path, tag: str) -> list[tuple[int, Any]]:
    """(step, value) of every point that TensorBoard would show."""
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.util import tensor_util

    shown = EventMultiplexer().AddRun(str(workdir / "tensorboard"), "run").Reload()
    return [(event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in shown.Tensors("run", tag)]


def test_jsonl_rows_are_on_disk_at_once_and_strict_json(tmp_path: Path) -> None:
    tracker = open_one("jsonl", tmp_path)
    row = {"kind": "train", "step": 1, "loss": np.float32(2.5), "lr": float("nan"), "grad_norm": float("-inf"), "accuracy": None}
    tracker.write(row)
    written = (tmp_path / "metrics.jsonl").read_text()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(written, parse_constant=refuse) == {**row, "loss": 2.5, "lr": None, "grad_norm": None}
    tracker.text(1, "samples", "a\udcffb")
    assert "a\\udcffb" in (tmp_path / "samples.txt").read_text()
    tracker.close()


@pytest.mark.parametrize("killed_at", [0, 3, 7, 12, 19])
@pytest.mark.parametrize("torn", ["", '{"kind": "train", "st', "\xff"])
def test_resumed_files_equal_those_of_an_unbroken_run(tmp_path: Path, killed_at: int, torn: str) -> None:
    """Killed at any step after the checkpoint of step 6, with or without a row cut short."""
    whole, broken = open_one("jsonl", tmp_path / "whole"), open_one("jsonl", tmp_path / "broken")
    feed(whole, 1, 20)
    whole.close()
    feed(broken, 1, killed_at)
    broken.close()
    for name in ("metrics.jsonl", "samples.txt"):
        with (tmp_path / "broken" / name).open("a", encoding="latin-1") as file:
            file.write(torn)
    resume_step = 6 if killed_at >= 6 else 0
    again = open_one("jsonl", tmp_path / "broken", resume_step)
    feed(again, resume_step + 1, 20)
    again.close()
    for name in ("metrics.jsonl", "samples.txt"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "broken").glob("*.tmp"))


def test_tensorboard_shows_one_curve_over_sessions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    for first, last in ((1, 9), (7, 12), (11, 15)):
        tracker = open_one("tensorboard", tmp_path, first - 1)
        feed(tracker, first, last)
        tracker.close()
    points = read_events(tmp_path, "train/loss")
    assert [step for step, _ in points] == list(range(1, 16))
    np.testing.assert_allclose([value for _, value in points], [5 - step / 10 for step in range(1, 16)], rtol=1e-6)
    assert [step for step, _ in read_events(tmp_path, "eval/loss")] == [5, 10, 15]
    # An infinite perplexity is left out, not drawn.
    with pytest.raises(KeyError):
        read_events(tmp_path, "eval/perplexity")
    texts = read_events(tmp_path, "samples")
    assert [step for step, _ in texts] == [5, 10, 15]
    assert b"    text <of> step 5" in texts[0][1]
    assert b'"layers": 6' in read_events(tmp_path, "config")[0][1]


def test_tensorboard_rows_of_a_shorter_second_session_replace_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was logged beyond the restored step is gone even where the new session logs nothing."""
    caplog.set_level(logging.CRITICAL)
    for first, last in ((1, 9), (4, 5)):
        tracker = open_one("tensorboard", tmp_path, first - 1)
        feed(tracker, first, last)
        tracker.close()
    assert [step for step, _ in read_events(tmp_path, "train/loss")] == [1, 2, 3, 4, 5]


def test_tensorflow_is_never_imported(tmp_path: Path) -> None:
    """Even where it is installed: it takes seconds, and grabs GPU memory."""
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] != "tensorflow", "imports tensorflow"
sys.meta_path.insert(0, Refuse())
from pathlib import Path
from jaxllm.engine.trackers import tensorboard
tracker = tensorboard.make(Path({str(tmp_path)!r}), {{}}, 0)
tracker.write({{"kind": "train", "step": 1, "loss": 1.0}})
tracker.text(1, "samples", "text")
tracker.close()
print("jax" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, "False"), ran.stderr


def test_wandb(tmp_path: Path, service: FakeService) -> None:
    tracker = open_one("wandb", tmp_path / "my run")
    feed(tracker, 1, 5)
    tracker.close()
    (begun,) = service.of("init")
    assert begun["name"] == "my run" and begun["id"] is None and begun["resume"] is None
    assert begun["config"]["model"]["layers"] == 6
    assert {"step_metric": "step", "": ("*",)} in service.of("define_metric")
    logged = [arguments[""][0] for arguments in service.of("log")]
    assert logged[0] == {"step": 1, "train/loss": 4.9, "train/grad_norm": 1.0, "train/tokens": 64.0, "train/skipped": 0.0}
    assert logged[5] == {"step": 5, "eval/loss": 4.0}
    assert logged[6]["samples"][0].startswith("<pre>text &lt;of&gt; step 5")
    assert len(service.of("finish")) == 1
    open_one("wandb", tmp_path / "my run", 3)
    assert (service.of("init")[1]["id"], service.of("init")[1]["resume"]) == ("id7", "allow")
    # A fresh start in the same directory is another run.
    open_one("wandb", tmp_path / "my run", 0)
    assert service.of("init")[2]["id"] is None


def test_mlflow(tmp_path: Path, service: FakeService) -> None:
    tracker = open_one("mlflow", tmp_path / "my run")
    feed(tracker, 1, 5)
    tracker.close()
    assert service.of("MlflowClient") == [{"tracking_uri": (tmp_path / "my run" / "mlruns").as_uri()}]
    assert service.of("create_run") == [{"": ("3",), "run_name": "my run"}]
    batches = service.of("log_batch")
    params = [param for batch in batches for param in batch.get("params", ())]
    assert ("model.layers", "6") in params and len(params) == len(schema.SCHEMA)
    metrics = [batch["metrics"] for batch in batches if "metrics" in batch]
    name, value, _, step = metrics[0][0]
    assert (name, value, step) == ("train/loss", 4.9, 1)
    assert [metric[0] for metric in metrics[5]] == ["eval/loss"]
    assert service.of("log_text")[0][""][2] == "samples/00000005.txt"
    assert len(service.of("set_terminated")) == 1
    open_one("mlflow", tmp_path / "my run", 3)
    assert service.of("update_run") == [{"status": "RUNNING", "": ("id7",)}] and len(service.of("create_run")) == 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """And nothing is written before that."""
    monkeypatch.setitem(sys.modules, name, None)
    config = schema.base()
    config.train.trackers = (name,)
    with pytest.raises(ValueError, match=rf"package {name} is not installed(.|\n)*pip install 'jaxllm\[{name}\]'"):
        trackers.open_all(config, tmp_path / "run", 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "call"), [("wandb", "init"), ("mlflow", "create_run")])
def test_service_that_does_not_start_is_an_error(tmp_path: Path, service: FakeService, name: str, call: str) -> None:
    service.failing = call
    with pytest.raises(ValueError, match=f"train.trackers names '{name}'.*no answer(.|\n)*Accepted: "):
        open_one(name, tmp_path)


@pytest.mark.parametrize(("name", "call"), [("wandb", "log"), ("mlflow", "log_batch"), ("mlflow", "log_text")])
def test_service_that_fails_later_is_left_behind_with_a_warning(tmp_path: Path, service: FakeService, name: str, call: str) -> None:
    config, told = schema.base(), list[str]()
    config.train.trackers = (name,)
    tracker = trackers.open_all(config, tmp_path, 0, told.append)
    service.failing = call
    feed(tracker, 1, 6)
    tracker.close()
    assert len(told) == 1 and f"tracker {name} stopped: ServiceError: no answer" in told[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7
    assert len(read_events(tmp_path, "train/loss")) == 6


def test_full_disk_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, row: Row) -> None:
        raise OSError(28, "No space left on device")

    tracker = trackers.open_all(schema.base(), tmp_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr("jaxllm.engine.trackers.jsonl.JsonLines.write", fail)
        with pytest.raises(OSError, match="No space left"):
            tracker.write(train_row(1))
    tracker.close()


def test_open_all_writes_everywhere(tmp_path: Path, service: FakeService) -> None:
    config = schema.base()
    config.train.trackers = ("mlflow", "wandb")
    tracker = trackers.open_all(config, tmp_path, 0)
    feed(tracker, 1, 5)
    tracker.close()
    assert set(NAMES) == {"jsonl", "tensorboard", "wandb", "mlflow"}
    assert "text <of> step 5" in (tmp_path / "samples.txt").read_text()
    assert len(read_events(tmp_path, "train/loss")) == len(service.of("finish")) * 5 == 5
    assert service.of("set_terminated")
