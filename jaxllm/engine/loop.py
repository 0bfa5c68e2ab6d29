"""The loop around the one train step. It knows no objective, no architecture and no file format.

The next step is dispatched before the metrics of this one are read, so that the device never waits for the host.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxllm.engine.errors import NonFiniteError, TrainingError
from jaxllm.engine.watchdog import Doing
from jaxllm.types import Source

# Reads the flag of `Interrupts`: anything but None stops the loop after the step in flight.
Stop = Callable[[], Any]


@dataclass(frozen=True)
class Hook:
    """Something that happens beside training: `run(step, state)` every so many updates (0: never) and after the last one."""

    run: Callable[[int, Any], None]
    every_steps: int

    def due(self, step: int, last: int) -> bool:
        return step == last or (self.every_steps > 0 and step % self.every_steps == 0)


@dataclass(frozen=True)
class Monitor:
    """Reads the metrics of finished steps: writes rows, counts skipped steps, and stops what cannot get better.

    parameter_names: one name for each entry of the metric `moved`. first_moves: name -> the update, 1 or 2, that must change it, where it
    is not the first one; 0 for none. tell: hears what is about to happen to which update, as
    `watchdog.Watchdog.step` does.
    """

    source: Source
    write: Callable[[Mapping[str, Any]], None]
    message: Callable[[str], None]
    log_every_steps: int
    max_nonfinite_steps: int
    positions_a_step: int
    parameter_names: Sequence[str]
    first_moves: Mapping[str, int]
    tell: Callable[[Doing, int], None]

    def read(self, step: int, metrics: Mapping[str, Any], clock: "Clock") -> None:
        """`metrics` of update number `step` (from 1), still on the device. Raises TrainingError if training must stop."""
        self.tell(Doing.READ, step)
        values = jax.device_get(dict(metrics))
        self.tell(Doing.WRITE, step)
        moved = values.pop("moved")
        scalars = {name: value.item() for name, value in values.items()}
        finite, in_a_row = scalars.pop("finite"), scalars.pop("skipped_in_a_row")
        if scalars.pop("weight") == 0:
            raise TrainingError(
                f"step {step}: every target of the batch has weight 0, so there is nothing to learn (rows {self._rows(step)}).\n"
                "  Accepted: batches with at least one weighted target.\n"
                "  In another --workdir, raise train.batch_seqs or leave out the documents behind these rows."
            )
        if not finite:
            self.message(self._skipped(step, in_a_row, scalars.get("loss_scale")))
        elif (update := step - scalars["skipped"]) <= 2:
            self._check_moved(moved, update)
        if in_a_row >= self.max_nonfinite_steps:
            raise NonFiniteError(step, in_a_row, self._rows(step))
        if step % self.log_every_steps == 0 or step == 1:
            self.write({"kind": "train", "step": step, **scalars, "tokens": step * self.positions_a_step, **clock.lap(step)})

    def _skipped(self, step: int, in_a_row: int, loss_scale: float | None) -> str:
        if loss_scale is not None and not in_a_row:
            return f"step {step} skipped: the gradient overflows float16; the loss scale is {loss_scale:g} from now on"
        return f"step {step} skipped: loss or gradient is not finite (rows {self._rows(step)})"

    def _rows(self, step: int) -> str:
        return ", ".join(str(int(row)) for row in self.source.rows(step - 1))

    def _check_moved(self, moved: Any, update: int) -> None:
        due = [
            (name, flag) for name, flag in zip(self.parameter_names, moved, strict=True) if self.first_moves.get(name, 1) == update
        ]
        still = [name for name, flag in due if not flag]
        if still:
            raise TrainingError(
                f"step {update} of those that count did not change {len(still)} trainable parameters: {', '.join(dict.fromkeys(still))}.\n"
                "  Accepted: every trainable parameter gets a gradient and a learning rate.\n"
                "  Exclude them with train.trainable, or look at optimizer.groups and the mask of the loss"
                + (
                    ", and at the learning rate: what is left of a model after too large an update has no gradient."
                    if update > 1
                    else "."
                )
            )


class Clock:
    """Speed between two logged rows."""

    def __init__(self, step: int, tokens_a_step: int):
        self.tokens_a_step = tokens_a_step
        self.start = self.last_time = time.perf_counter()
        self.last_step = step

    def lap(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        tokens = (step - self.last_step) * self.tokens_a_step
        row = {"tokens_per_sec": round(tokens / max(now - self.last_time, 1e-9), 1), "secs": round(now - self.start, 3)}
        self.last_time, self.last_step = now, step
        return row

    def pause(self, since: float) -> None:
        """Takes the time from `since` until now (a hook) out of the next lap."""
        self.last_time += time.perf_counter() - since


def train(
    update: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    state: Any,
    source: Source,
    monitor: Monitor,
    hooks: Sequence[Hook],
    *,
    start: int,
    total: int,
    stop: Stop,
) -> tuple[int, Any]:
    """(number of updates done, state) after update number `total`, or earlier if `stop()` says so.

    Batches are asked for by the index of the step, from `start`. Hooks run in order, after the metrics of their step were read.
    """
    clock = Clock(start, monitor.positions_a_step)
    waiting: tuple[int, Mapping[str, Any]] | None = None
    step = start
    while step < total:
        monitor.tell(Doing.AGREE, step + 1)
        if stop() is not None:
            break
        monitor.tell(Doing.DATA, step + 1)
        batch = source.batch(step)
        monitor.tell(Doing.DISPATCH, step + 1)
        state, metrics = update(state, batch)
        step += 1
        if waiting is not None:
            monitor.read(*waiting, clock)
        waiting = step, metrics
        due = [hook for hook in hooks if hook.due(step, total)]
        if due:
            monitor.read(*waiting, clock)
            waiting = None
            began = time.perf_counter()
            for hook in due:
                hook.run(step, state)
            clock.pause(began)
    if waiting is not None:
        monitor.read(*waiting, clock)
    return step, state
