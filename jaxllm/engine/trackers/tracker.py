"""What every tracker does, and what they share.

A tracker receives the rows of metrics.jsonl, `{"kind": "train", "step": 100, "loss": 3.2, ...}`, and texts. Each module here has
`make(workdir, config, resume_step) -> Tracker`: `config` is the whole configuration as a nested dict, and `resume_step` is the
number of updates in the restored checkpoint (0 for a fresh run). Rows of later steps, which an interrupted run wrote after that
checkpoint, are dropped where the format allows it, so that there is one curve.
"""

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

Row = Mapping[str, Any]


class Tracker(Protocol):
    """Somewhere to write metrics."""

    def write(self, row: Row) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None:
        """Writes out what is buffered; no other method may be called after it."""
        ...


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NumPy and JAX scalars as Python numbers, NaN and infinities as None."""
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


def scalars(row: Row) -> dict[str, float]:
    """{"train/loss": 3.2, ...}: the finite numbers of a row under the names used by TensorBoard, W&B and MLflow."""
    values = {name: plain(value) for name, value in row.items() if name not in ("kind", "step")}
    return {f"{row['kind']}/{name}": float(value) for name, value in values.items() if isinstance(value, int | float)}


def optional(module: str, extra: str) -> ModuleType:
    """The imported module; ValueError that says what to install if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Another missing module means that the package is there but broken: that message is the better one.
        if error.name != module.partition(".")[0]:
            raise
        raise ValueError(
            f"train.trackers names '{extra}', but the package {module} is not installed.\n"
            f"  Accepted: trackers whose package is there. Run pip install 'jaxllm[{extra}]', or take it out of train.trackers."
        ) from error


def stored_run(path: Path, resume_step: int) -> str | None:
    """The id, kept in `path`, of the run that a service began for this directory; None for a fresh run."""
    return path.read_text(encoding="utf-8").strip() or None if resume_step > 0 and path.is_file() else None
