"""Where metrics go: metrics.jsonl and TensorBoard always, Weights & Biases and MLflow when `train.trackers` names them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from jaxllm import registry
from jaxllm.config import to_json
from jaxllm.engine.trackers.tracker import Row, Tracker

ALWAYS = ("jsonl", "tensorboard")


def open_all(
    config: ConfigDict, workdir: str | Path, resume_step: int, warn: Callable[[str], None] = logging.warning
) -> "Trackers":
    """One tracker that writes to all. Only one process of a run may have it open: `Trackers()` of the others does nothing.

    Services are opened first: if one is not installed or not logged in, the run stops before it has changed a file.
    `warn` receives a line when a service fails later; then training goes on without it.
    """
    directory = Path(workdir)
    fields = json.loads(to_json(config))
    opened: list[tuple[str, Tracker]] = []
    try:
        for name in dict.fromkeys([*config.train.trackers, *ALWAYS]):
            opened.append((name, registry.resolve("tracker", name)(directory, fields, resume_step)))
    except BaseException:
        for _, tracker in opened:
            tracker.close()
        raise
    return Trackers(opened, warn)


class Trackers:
    """Writes to several trackers; see `open_all`."""

    def __init__(self, opened: Sequence[tuple[str, Tracker]] = (), warn: Callable[[str], None] = logging.warning):
        self._opened, self._warn = dict(opened), warn

    def write(self, row: Row) -> None:
        self._each(lambda tracker: tracker.write(row))

    def text(self, step: int, name: str, text: str) -> None:
        self._each(lambda tracker: tracker.text(step, name, text))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._opened.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        # Local files come first: what a service does must not cost a row of metrics.jsonl.
        for name in sorted(self._opened, key=lambda name: name not in ALWAYS):
            try:
                act(self._opened[name])
            except Exception as error:
                # A full disk must stop the run, a service that cannot be reached must not.
                if name in ALWAYS:
                    raise
                del self._opened[name]
                self._warn(f"tracker {name} stopped: {type(error).__name__}: {error}. Training goes on without it.")
