"""What a run directory says, read so that a missing or half-written file costs only itself.

Nothing but the files is looked at: config.json, run.json, data.json, metrics.jsonl, samples.txt (the Run fields say what
each holds). What is missing or cannot be read is said in `Run.notes`.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import flatten
from jaxllm.consistency import DISTILL, PREFERENCES

Row = Mapping[str, Any]

KINDS = ("train", "eval", "rollouts")
CONFIG, ENVIRONMENT, DATA, METRICS, SAMPLES = "config.json", "run.json", "data.json", "metrics.jsonl", "samples.txt"


@dataclass(frozen=True)
class Run:
    """A run directory as it was when it was read.

    config: {"model.layers": 6, ...} from config.json.   environment: run.json (parameters, memory, versions, sessions).
    data: data.json, the provenance of the shards.       train, evals: rows of metrics.jsonl by step, one a step.
    rollouts: those of the answers that were drawn for training.
    samples: (heading, text) of each section of samples.txt.
    notes: what is missing or damaged, in words.
    """

    directory: Path
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    train: list[Row]
    evals: list[Row]
    rollouts: list[Row]
    samples: list[tuple[str, str]]
    notes: list[str]


def read(directory: str | Path) -> Run:
    """The run in `directory`; ValueError if there is none."""
    directory = Path(directory)
    if not (directory / CONFIG).is_file() and not (directory / METRICS).is_file():
        raise ValueError(_not_a_run(directory))
    notes: list[str] = []
    config, environment, data = (_object(directory / name, notes) for name in (CONFIG, ENVIRONMENT, DATA))
    rows = _rows(directory / METRICS, notes)
    text = _text(directory / SAMPLES, notes)
    return Run(
        directory=directory,
        name=directory.resolve().name,
        config=flatten(config),
        environment=environment,
        data=data,
        train=_by_step(row for row in rows if row["kind"] == "train"),
        evals=_by_step(row for row in rows if row["kind"] == "eval"),
        rollouts=_by_step(row for row in rows if row["kind"] == "rollouts"),
        samples=_sections(text),
        notes=notes,
    )


def prefers(run: Run) -> bool:
    """Whether the run was trained on preferences, whose metrics are those of report/healthy.py."""
    return run.config.get("train.objective") in PREFERENCES


def learns_from(run: Run) -> str | None:
    """The objective whose rows the run was trained on."""
    objective: str | None = run.config.get("train.objective")
    return run.config.get("distill.rows") if objective == DISTILL else objective


def loss_unit(shown: Sequence[Run]) -> str:
    """What the loss of these runs is a number of."""
    kinds = {prefers(run) for run in shown}
    return "mean loss of a pair or answer" if kinds == {True} else "nats per token" if kinds == {False} else "loss"


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def column(rows: Iterable[Row], name: str) -> np.ndarray:
    """float64 [rows]; NaN where a row does not have a finite number."""
    found = [number(row.get(name)) for row in rows]
    return np.array([math.nan if value is None else value for value in found], dtype=np.float64)


def elapsed(rows: Iterable[Row]) -> np.ndarray:
    """Seconds of training at each row. `secs` restarts in every session; here the sessions follow each other without a gap."""
    secs = column(rows, "secs")
    before, last, total = 0.0, 0.0, []
    for value in secs:
        if value < last:
            before += last
        if not math.isnan(value):
            last = value
        total.append(before + value)
    return np.array(total, dtype=np.float64)


def _not_a_run(directory: Path) -> str:
    state = "is not a run directory: it has neither config.json nor metrics.jsonl" if directory.is_dir() else "does not exist"
    inside = sorted(path.parent for path in directory.glob(f"*/{CONFIG}")) if directory.is_dir() else []
    hint = f" It holds runs: {' '.join(map(str, inside[:8]))}." if inside else ""
    return f"'{directory}' {state}.\n  Accepted: the --workdir of a jaxllm.train command.{hint}\n  Give the directory of one run."


def _text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing.")
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
    return ""


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _text(path, notes)
    if not text and notes and notes[-1].startswith(path.name):
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        notes.append(f"{path.name} is damaged or half written: it is not JSON.")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} is damaged: it holds no JSON object.")
        return {}
    return value


def _rows(path: Path, notes: list[str]) -> list[Row]:
    rows: list[Row] = []
    unreadable = 0
    # Not splitlines(), which also splits at characters that JSON allows inside a string.
    for line in _text(path, notes).split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and row.get("kind") in KINDS and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            unreadable += 1
    if unreadable:
        notes.append(f"{path.name}: {unreadable} line{'s are' if unreadable > 1 else ' is'} damaged or half written and left out.")
    return rows


def _by_step(rows: Iterable[Row]) -> list[Row]:
    """In order; of several rows of one step the last one."""
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def _sections(text: str) -> list[tuple[str, str]]:
    """(heading, body) of each part that starts with a line `=== heading ===`."""
    sections: list[tuple[str, list[str]]] = []
    for line in text.split("\n"):
        if line.startswith("=== ") and line.endswith(" ==="):
            sections.append((line[4:-4], []))
        elif sections:
            sections[-1][1].append(line)
        elif line.strip():
            sections.append(("samples", [line]))
    return [(heading, "\n".join(body).strip("\n")) for heading, body in sections]
