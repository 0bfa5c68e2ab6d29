"""The curves of several runs in one picture."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxllm.report import canvas
from jaxllm.report.canvas import STYLES, Theme
from jaxllm.report.runs import Run, column, elapsed, loss_unit
from jaxllm.report.summary import smoothed

# What is drawn upwards: field of the rows -> (title, unit); "" is that of the runs' loss.
SCORES = {
    "loss": ("Validation loss", ""),
    "bits_per_byte": ("Validation bits per byte", "bits per byte of text"),
    "train_loss": ("Training loss (smoothed)", ""),
}
# What is drawn to the right.
AGAINST = {"tokens": "tokens seen", "time": "training time"}

PANEL = (5.2, 3.2)
# Of a name beside a curve: a longer one would leave no room for the curves.
LABEL_CHARS = 23


def panel(runs: Sequence[Run], names: Sequence[str], score: str, against: str, theme: Theme) -> Figure:
    """One picture."""
    drawn = canvas.figure(theme, *PANEL)
    _draw(drawn.add_subplot(), runs, names, score, against, theme)
    return drawn


def grid(runs: Sequence[Run], names: Sequence[str], scores: Sequence[str], theme: Theme) -> Figure:
    """All pictures in one: a row a score, a column for tokens and one for time."""
    drawn = canvas.figure(theme, PANEL[0] * len(AGAINST), PANEL[1] * len(scores))
    axes = drawn.subplots(len(scores), len(AGAINST), squeeze=False)
    for row, score in zip(axes, scores, strict=True):
        for place, against in zip(row, AGAINST, strict=True):
            _draw(place, runs, names, score, against, theme)
    return drawn


def labels(names: Sequence[str]) -> list[str]:
    """The names, long ones without their middle; where that makes two equal they carry their number, counted from 1."""
    half = (LABEL_CHARS - 1) // 2
    cut = [name if len(name) <= LABEL_CHARS else f"{name[:half]}…{name[-half:]}" for name in names]
    return [label if cut.count(label) == 1 else f"{label} ({number})" for number, label in enumerate(cut, 1)]


def _draw(axes: Axes, runs: Sequence[Run], names: Sequence[str], score: str, against: str, theme: Theme) -> None:
    title, unit = SCORES[score]
    canvas.dress(axes, theme, title, AGAINST[against], unit or loss_unit(runs))
    ends, drawn = [], []
    for index, (run, name) in enumerate(zip(runs, labels(names), strict=True)):
        x, y = _curve(run, score, against)
        seen = np.isfinite(x) & np.isfinite(y)
        if not seen.any():
            continue
        color = theme.lines[index % len(theme.lines)]
        canvas.line(axes, x, y, color, STYLES[index // len(theme.lines) % len(STYLES)])
        if score != "train_loss":
            axes.plot(x, y, "o", color=color, markersize=4)
        ends.append((name, float(x[seen][-1]), float(y[seen][-1]), color))
        drawn.append(y)
    if not ends:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=theme.faint)
        return
    canvas.fit(axes, drawn)
    axes.set_xlim(left=0)
    canvas.label_ends(axes, ends)
    (canvas.count_ticks if against == "tokens" else canvas.clock_ticks)(axes.xaxis)


def _curve(run: Run, score: str, against: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, y). Rows of kind "eval" do not say when they were made, but the training rows around them do."""
    places = column(run.train, "tokens") if against == "tokens" else elapsed(run.train)
    if score == "train_loss":
        return places, smoothed(column(run.train, "loss"))
    known = np.isfinite(places)
    steps = column(run.evals, "step")
    if not known.any():
        return np.full(len(steps), np.nan), column(run.evals, score)
    return np.interp(steps, column(run.train, "step")[known], places[known]), column(run.evals, score)
