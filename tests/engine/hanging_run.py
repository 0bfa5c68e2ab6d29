"""A training run that hangs in its 7th step; on the devices after a compilation, a validation and a save that take longer than a step may.

python hanging_run.py data|devices WORKDIR
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxllm import config as schema
from jaxllm import train
from jaxllm.data.loader import Loader
from jaxllm.engine import session
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.hooks import Validation
from jaxllm.engine.workdir import open_workdir

# The batch of this step is read ahead only after what happens beside step 4.
STEP_SECS, SLOW_SECS, HANGING_STEP = 3.0, 3.5, 7


def small() -> Any:
    config = schema.base()
    config.model.layers, config.model.width, config.model.heads, config.model.context_tokens = 1, 16, 2, 32
    config.tokenizer.kind, config.data.split_by = "byte", "characters"
    config.train.steps, config.train.batch_seqs, config.train.log_every_steps = 24, 8, 1
    config.schedule.warmup_steps = config.sample.tokens = 0
    config.eval.every_steps = config.checkpoint.every_steps = 4
    config.parallel.data, config.parallel.fsdp = 1, 2
    config.watchdog.step_secs = STEP_SECS
    return config


def slowed(act: Any) -> Any:
    def slow(*given: Any, **named: Any) -> Any:
        time.sleep(SLOW_SECS)
        return act(*given, **named)

    return slow


def sleep_for_ever(workdir: Path) -> None:
    (workdir / "hangs_since").touch()
    time.sleep(600)


def hang_in_data(workdir: Path) -> None:
    read = Loader._read

    def read_from_a_dead_disk(self: Loader, step: int) -> Any:
        if step == HANGING_STEP - 1:
            sleep_for_ever(workdir)
        return read(self, step)

    Loader._read = read_from_a_dead_disk


def hang_on_devices(workdir: Path) -> None:
    """The step holds a callback that does not return."""
    make = session.step.make

    def make_hanging(*parts: Any) -> Any:
        inner = make(*parts)

        def a_callback_that_waits(step: jax.Array, loss: jax.Array) -> jax.Array:
            if step == HANGING_STEP:
                sleep_for_ever(workdir)
            return loss

        def step(state: Any, batch: Any) -> Any:
            state, scalars = inner(state, batch)
            return state, scalars | {"loss": jax.pure_callback(a_callback_that_waits, scalars["loss"], state.step, scalars["loss"])}

        return step

    session.step.make = make_hanging


def main(where: str, workdir: Path) -> int:
    workdir.mkdir()
    text = workdir / "text.txt"
    text.write_text("".join(f"line {number}: the square of {number} is {number * number}.\n" for number in range(300)))
    {"data": hang_in_data, "devices": hang_on_devices}[where](workdir)
    if where == "devices":
        session.Session.compile = slowed(session.Session.compile)
        Validation.run = slowed(Validation.run)
        Checkpoints.save = slowed(Checkpoints.save)
    config = small()
    config.data.source = str(text)
    with open_workdir(workdir) as opened:
        return train.run(config, opened, Console(width=200))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
