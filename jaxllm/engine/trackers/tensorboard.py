"""TensorBoard event files, written with the tensorboard package alone (TensorFlow is never imported).

Each session of a run adds one file. Its first event tells TensorBoard from which step on to forget what older files say
(SessionLog.START), so that an interrupted and resumed run shows one curve. https://github.com/tensorflow/tensorboard
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.engine.trackers.tracker import Row, Tracker, scalars

DIRECTORY = "tensorboard"


def make(workdir: Path, config: Mapping[str, Any], resume_step: int) -> Tracker:
    """Adds an event file to workdir/tensorboard."""
    directory = workdir / DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files in the order of their names: a counter, unlike the time of day, never goes back.
    number = 1 + max((int(path.name.split(".")[3]) for path in directory.glob("events.out.tfevents.*.jaxllm")), default=-1)
    events = EventFile(directory / f"events.out.tfevents.{number:010d}.jaxllm", resume_step + 1 if resume_step else 0)
    if resume_step == 0:
        events.text(0, "config", json.dumps(config, indent=2))
    return events


class EventFile:
    """One event file. Rows reach the operating system before `write` returns."""

    def __init__(self, path: Path, purge_step: int):
        # Imported here, as it costs a fraction of a second and most users of this package never write events.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        self._file = path.open("xb")
        self._records = RecordWriter(self._file)
        self._add(event_pb2.Event(file_version="brain.Event:2"))
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(event_pb2.Event(step=purge_step, session_log=session))

    def write(self, row: Row) -> None:
        values = [self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row).items()]
        self._add(self._event.Event(step=row["step"], summary=self._summary.Summary(value=values)))

    def text(self, step: int, name: str, text: str) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        # TensorBoard shows texts as Markdown; four spaces before each line make it leave them as they are.
        quoted = "".join(f"    {line}\n" for line in text.split("\n"))
        self._add(self._event.Event(step=step, summary=text_pb(name, quoted)))

    def close(self) -> None:
        self._records.close()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()
