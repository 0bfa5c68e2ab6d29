"""How far training is: a bar on a terminal, plain lines anywhere else. Drawn when a row arrives and at no other time."""

import math
import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from jaxllm.report.units import clock, count

# Of the loss and of the speed shown by the bar, from one row to the next.
SMOOTHING = 0.7
LEAST_BAR = 4
# All control characters but tab and newline: a sample must not move the cursor or ring the bell.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Progress:
    """Shows rows of metrics.jsonl as they come.

    >>> with Progress(total_steps=1000, start_step=0) as progress:
    ...     progress.update({"kind": "train", "step": 10, "loss": 5.2, "lr": 1e-3, "tokens": 20480, "tokens_per_sec": 9000.0})
    ...     progress.message("step 10: saved")
    """

    def __init__(self, total_steps: int, start_step: int, console: Console | None = None):
        self._console = console or Console()
        self._total, self._start = total_steps, start_step
        self._loss, self._speed = _Average(), _Average()
        self._rows = 0
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar = self._make_bar() if terminal else None

    def __enter__(self) -> "Progress":
        if self._bar:
            self._task = self._bar.add_task("", total=self._total, completed=self._start, facts="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Shows a row of kind "train"; the others are told by `message`."""
        if row["kind"] != "train":
            return
        self._rows += 1
        self._loss.add(row["loss"])
        # The first row of a session holds the very first step, which starts cold and says nothing about those to come.
        if self._rows > 1:
            self._speed.add(row["tokens_per_sec"])
        if self._bar:
            self._bar.update(self._task, completed=row["step"], facts=self._fit(row))
            self._bar.refresh()
        else:
            step = f"step {row['step']:>{len(str(self._total))}}/{self._total}"
            self.message("  ".join([step, *self._facts(row, row["loss"])]))

    def message(self, text: str) -> None:
        """Prints `text` above the bar. Control characters, and letters that the terminal cannot show, are replaced."""
        shown = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
        encoding = self._console.encoding
        shown = shown.encode(encoding, errors="replace").decode(encoding)
        self._console.print(shown, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._console.file.flush()

    def _make_bar(self) -> Bar:
        return Bar(
            TextColumn("step {task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=LEAST_BAR)),
            TextColumn("{task.fields[facts]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self._console,
            auto_refresh=False,
            expand=True,
        )

    def _fit(self, row: Mapping[str, Any]) -> str:
        """As many facts as leave room for the step and a short bar, the loss at least."""
        room = self._console.width - 2 * len(str(self._total)) - len("step /") - LEAST_BAR - 2
        facts = self._facts(row, self._loss.value)
        while len(facts) > 1 and len("  ".join(facts)) > room:
            facts.pop()
        return "  ".join(facts)

    def _facts(self, row: Mapping[str, Any], loss: float | None) -> list[str]:
        """Most important first."""
        shown = [f"loss {loss:.4f}" if loss is not None and math.isfinite(loss) else "loss not finite"]
        speed = self._speed.value
        if speed:
            shown.append(f"{count(speed)} tokens/s")
            left_steps = self._total - row["step"]
            shown.append(f"left {clock(left_steps * row['tokens'] / row['step'] / speed)}")
        shown.append(f"lr {row['lr']:.2e}")
        if row.get("skipped"):
            shown.append(f"skipped {row['skipped']}")
        return shown


class _Average:
    """Exponential average of the finite values added so far, unbiased from the first one on; None before it."""

    def __init__(self) -> None:
        self._total = self._weight = 0.0

    def add(self, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            self._total = SMOOTHING * self._total + value
            self._weight = SMOOTHING * self._weight + 1.0

    @property
    def value(self) -> float | None:
        return self._total / self._weight if self._weight else None
