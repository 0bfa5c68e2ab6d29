"""run.json: what ran where, what it took, and one entry a session."""

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxllm.engine.session import Session, bytes_by_category, count
from jaxllm.engine.step import Compiled
from jaxllm.engine.workdir import write_json
from jaxllm.parallel import processes

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece")


class Record:
    """Writes `path`, on the first process, when a session starts and, completed, when it ends; earlier sessions stay listed."""

    def __init__(self, path: Path, session: Session, compiled: Compiled, start_step: int):
        self._path, self._began, self._before = path, datetime.now(UTC), _sessions(path)
        self._current: dict[str, Any] = {"started": self._began.isoformat(timespec="seconds"), "start_step": start_step}
        self._facts = _facts(session, compiled)
        self._write()

    def end(self, step: int, reason: str) -> None:
        """The session ended after update number `step`. `reason`: "done", the signal's name, or "hang"."""
        ended = datetime.now(UTC)
        secs = round((ended - self._began).total_seconds(), 1)
        self._current |= {"ended": ended.isoformat(timespec="seconds"), "end_step": step, "secs": secs, "reason": reason}
        self._write()

    def _write(self) -> None:
        sessions = [*self._before, self._current]
        if processes.is_first():
            write_json(self._path, {**self._facts, "started": sessions[0]["started"], "sessions": sessions})


def _facts(session: Session, compiled: Compiled) -> Mapping[str, Any]:
    abstract = session.abstract
    return {
        "parameters": count(abstract.params) + count(abstract.frozen),
        "trainable": count(abstract.params),
        "bytes": dict(bytes_by_category(session)),
        "compile_secs": round(compiled.compile_secs, 2),
        "memory_bytes": {
            "arguments": compiled.argument_bytes,
            "temporaries": compiled.temp_bytes,
            "outputs": compiled.output_bytes,
            "peak": compiled.peak_bytes,
        },
        "flops_per_step": compiled.flops,
        "devices": [device.device_kind for device in session.plan.mesh.devices.flat],
        "mesh": dict(session.plan.mesh.shape),
        "processes": jax.process_count(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _sessions(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError):
        return []
