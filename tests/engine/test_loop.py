"""The loop alone, with an update that only counts."""

import os
import signal
from collections import UserDict
from typing import Any

import numpy as np
import pytest

from jaxllm.engine.errors import NonFiniteError, TrainingError
from jaxllm.engine.loop import Hook, Monitor, train
from jaxllm.engine.signals import Interrupts
from jaxllm.engine.watchdog import Doing


class Numbers:
    """A source whose batch is its step."""

    def batch(self, step: int) -> int:
        return step

    def rows(self, step: int) -> np.ndarray:
        return np.array([10 * step, 10 * step + 1])


def metrics(step: int, **changes: object) -> dict:
    given = {
        "loss": 1.0 / step,
        "weight": 2.0,
        "finite": True,
        "skipped": 0,
        "skipped_in_a_row": 0,
        "moved": [True, True],
    } | changes
    return {name: np.asarray(value) for name, value in given.items()}


def run(update, hooks=(), total=6, start=0, stop=lambda: None, source=None, told=None, **options):  # noqa: ANN001, ANN003, ANN201
    rows, messages, told, source = [], [], [] if told is None else told, source or Numbers()
    settings = {"log_every_steps": 2, "max_nonfinite_steps": 2, "positions_a_step": 8} | options
    monitor = Monitor(
        source,
        rows.append,
        messages.append,
        parameter_names=("a", "b"),
        first_moves={},
        tell=lambda doing, step: told.append((doing, step)),
        **settings,
    )
    step, state = train(update, [], source, monitor, hooks, start=start, total=total, stop=stop)
    return step, state, rows, messages


def count(state: list, batch: int) -> tuple[list, dict]:
    return [*state, batch], metrics(batch + 1)


def test_every_batch_once_in_order_and_rows_as_asked() -> None:
    step, state, rows, _ = run(count, total=7, log_every_steps=3)
    assert (step, state) == (7, [0, 1, 2, 3, 4, 5, 6])
    assert [row["step"] for row in rows] == [1, 3, 6]
    assert [row["loss"] for row in rows] == pytest.approx([1, 1 / 3, 1 / 6])
    assert [row["tokens"] for row in rows] == [8, 24, 48]


def test_a_resumed_loop_goes_on_with_the_next_batch() -> None:
    step, state, rows, _ = run(count, start=3, total=6)
    assert (step, state) == (6, [3, 4, 5])
    assert [row["step"] for row in rows] == [4, 6]


def test_the_next_step_is_dispatched_before_metrics_are_read() -> None:
    events = []

    class Spy(UserDict):
        def __init__(self, step: int):
            super().__init__(metrics(step))
            self.step = step

        def keys(self):  # noqa: ANN202
            events.append(("read", self.step))
            return super().keys()

    def update(state: list, batch: int) -> tuple[list, dict]:
        events.append(("dispatch", batch + 1))
        return state, Spy(batch + 1)

    run(update, total=3)
    assert events == [("dispatch", 1), ("dispatch", 2), ("read", 1), ("dispatch", 3), ("read", 2), ("read", 3)]


def test_what_comes_is_told_before_it_is_done() -> None:
    told: list = []

    class Telling(Numbers):
        def batch(self, step: int) -> int:
            told.append("batch")
            return step

    def update(state: list, batch: int) -> tuple[list, dict]:
        told.append("update")
        return count(state, batch)

    def stop() -> None:
        told.append("stop")

    run(update, [Hook(lambda step, state: told.append("hook"), 2)], total=2, stop=stop, source=Telling(), told=told)
    first = [(Doing.AGREE, 1), "stop", (Doing.DATA, 1), "batch", (Doing.DISPATCH, 1), "update"]
    second = [(Doing.AGREE, 2), "stop", (Doing.DATA, 2), "batch", (Doing.DISPATCH, 2), "update"]
    assert told == [*first, *second, (Doing.READ, 1), (Doing.WRITE, 1), (Doing.READ, 2), (Doing.WRITE, 2), "hook"]


def test_hooks_run_in_order_after_the_metrics_of_their_step() -> None:
    calls: list = []
    hooks = [
        Hook(lambda step, state: calls.append(("evaluate", step, len(state))), every_steps=2),
        Hook(lambda step, state: calls.append(("save", step, len(state))), every_steps=4),
        Hook(lambda step, state: calls.append(("at the end", step, len(state))), every_steps=0),
    ]
    run(count, hooks, total=5)
    last = [("evaluate", 5, 5), ("save", 5, 5), ("at the end", 5, 5)]
    assert calls == [("evaluate", 2, 2), ("evaluate", 4, 4), ("save", 4, 4), *last]


def test_stop_ends_between_two_steps() -> None:
    seen: list = []

    def update(state: list, batch: int) -> tuple[list, dict]:
        seen.append(batch)
        return count(state, batch)

    step, state, _, _ = run(update, total=100, stop=lambda: "wish" if len(seen) == 3 else None)
    assert (step, state) == (3, [0, 1, 2])


def test_skipped_steps_are_named_and_too_many_stop_the_run() -> None:
    in_a_row = {2: 1, 4: 1, 5: 2}

    def update(state: list, batch: int) -> tuple[list, dict]:
        bad = in_a_row.get(batch + 1, 0)
        return state, metrics(batch + 1, finite=not bad, skipped_in_a_row=bad)

    with pytest.raises(NonFiniteError, match=r"2 steps in a row, up to step 5, .*\(batch rows 40, 41\)") as caught:
        run(update, total=9)
    assert "optimizer.learning_rate" in str(caught.value)
    _, _, _, messages = run(update, total=4)
    assert messages == [
        "step 2 skipped: loss or gradient is not finite (rows 10, 11)",
        "step 4 skipped: loss or gradient is not finite (rows 30, 31)",
    ]


def test_an_overflow_of_float16_is_no_alarm() -> None:
    def update(state: list, batch: int) -> tuple[list, dict]:
        return state, metrics(batch + 1, finite=batch > 1, skipped=min(batch + 1, 2), loss_scale=2.0 ** max(14 - batch, 13))

    _, _, _, messages = run(update, total=4)
    assert messages == [
        "step 1 skipped: the gradient overflows float16; the loss scale is 16384 from now on",
        "step 2 skipped: the gradient overflows float16; the loss scale is 8192 from now on",
    ]


@pytest.mark.parametrize("skipped", [0, 2])
def test_a_parameter_that_does_not_move_is_an_error(skipped: int) -> None:
    """In the first step that is not skipped, whichever that is: later on a gradient may be 0."""

    def update(first: int) -> Any:
        def step(state: list, batch: int) -> tuple[list, dict]:
            finite = batch >= skipped
            moved = [finite, finite and batch >= skipped + first]
            return state, metrics(batch + 1, finite=finite, skipped=min(batch + 1, skipped), moved=moved)

        return step

    with pytest.raises(TrainingError, match="did not change 1 trainable parameters: b"):
        run(update(1))
    run(update(0))


def test_a_batch_without_weight_is_an_error() -> None:
    with pytest.raises(TrainingError, match="step 1: every target of the batch has weight 0"):
        run(lambda state, batch: (state, metrics(batch + 1, weight=0.0)))


@pytest.mark.parametrize("number", Interrupts.SIGNALS)
def test_the_first_signal_is_a_wish_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        assert interrupts.received is None
        os.kill(os.getpid(), number)
        assert interrupts.received is number
        assert signal.getsignal(number) == before  # a second one stops at once
    assert signal.getsignal(number) == before
