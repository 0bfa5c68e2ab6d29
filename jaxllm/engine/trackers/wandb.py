"""Weights & Biases (https://docs.wandb.ai). Works without a network under WANDB_MODE=offline.

W&B does not let a run go back, so the rows that a resumed run repeats are there twice; they are equal, as resuming is exact.
"""

import html
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.engine.trackers.tracker import Row, Tracker, optional, scalars, stored_run

STORED = "wandb_run.txt"


def make(workdir: Path, config: Mapping[str, Any], resume_step: int) -> Tracker:
    """A new run, or the one that this directory began if it resumes. WANDB_PROJECT and W&B's other variables are obeyed."""
    wandb = optional("wandb", "wandb")
    workdir.mkdir(parents=True, exist_ok=True)
    run_id = stored_run(workdir / STORED, resume_step)
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jaxllm"),
            name=workdir.resolve().name,
            dir=str(workdir),
            config=dict(config),
            id=run_id,
            resume="allow" if run_id else None,
            # Its capture of the terminal would break the progress bar.
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        raise ValueError(
            f"train.trackers names 'wandb', but a run could not be started: {error}\n"
            "  Accepted: a login, or no network at all. Run `wandb login`, or set WANDB_MODE=offline."
        ) from error
    (workdir / STORED).write_text(run.id + "\n", encoding="utf-8")
    # The horizontal axis is our step, not the number of calls.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return WandbRun(run, wandb.Html)


class WandbRun:
    def __init__(self, run: Any, page: Any):
        self._run, self._page = run, page

    def write(self, row: Row) -> None:
        self._run.log({"step": row["step"], **scalars(row)})

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({"step": step, name: self._page(f"<pre>{html.escape(text)}</pre>", inject=False)})

    def close(self) -> None:
        self._run.finish()
