"""How pictures look: two themes, one set of axes, labels at the ends of lines, PNG bytes that depend on nothing but the content."""

import io
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from jaxllm.report.units import clock, count


@dataclass(frozen=True)
class Theme:
    """Colours of a page. `lines` are Okabe and Ito's, which the colour-blind can tell apart (https://jfly.uni-koeln.de/color/)."""

    name: str
    background: str
    ink: str
    faint: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Theme(
    "light", "#ffffff", "#1b1f24", "#6a737d", "#e4e7eb", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b27d00", "#3a9bd0")
)
DARK = Theme("dark", "#171b21", "#e6e9ed", "#9aa4b0", "#2b313a", ("#56b4e9", "#f0803c", "#2fc79a", "#e39cc4", "#f0c04c", "#9fb8ff"))
STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))

DPI = 150
ROUND_SECS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200)


def figure(theme: Theme, width: float, height: float) -> Figure:
    """An empty figure of that many inches."""
    return Figure(figsize=(width, height), dpi=DPI, facecolor=theme.background, layout="constrained")


def dress(axes: Axes, theme: Theme, title: str, x_label: str, y_label: str) -> None:
    """Title above the left corner, horizontal grid, no box."""
    axes.set_facecolor(theme.background)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=theme.ink, pad=10)
    axes.set_xlabel(x_label, fontsize=9, color=theme.faint)
    axes.set_ylabel(y_label, fontsize=9, color=theme.faint)
    axes.tick_params(colors=theme.faint, labelsize=8.5, length=0)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.grid)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def count_ticks(axis: Axis) -> None:
    """12.3k instead of 12300, on the x or y axis given."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def clock_ticks(axis: Axis) -> None:
    """0:30, 1:00, ... at round times. The limits of the axis must be final."""
    length = axis.get_view_interval()[1]
    step = next((step for step in ROUND_SECS if length / step <= 7), 86400 * math.ceil(length / 7 / 86400))
    axis.set_major_locator(MultipleLocator(step))
    axis.set_major_formatter(FuncFormatter(lambda value, _: clock(max(value, 0))))


def _tick(value: float) -> str:
    """`count` without zeros behind the point."""
    return (
        re.sub(r"\.(\d*?)0+(?=\D|$)", lambda found: f".{found[1]}" if found[1] else "", count(value)) if value >= 0 else str(value)
    )


def line(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, style: Any = "-") -> None:
    """A curve; a dot if there is just one point, which would draw no line."""
    finite = np.isfinite(x) & np.isfinite(y)
    if finite.sum() == 1:
        axes.plot(x[finite], y[finite], "o", color=color, markersize=6)
    else:
        axes.plot(x, y, color=color, linestyle=style, linewidth=1.8, solid_capstyle="round")


def fit(axes: Axes, values: list[np.ndarray], start_frac: float = 0.03) -> float | None:
    """Sets the vertical range to what happens after the first few percent of the curves, if their start would flatten the rest.

    Returns the highest value that is cut off, None if nothing is.
    """
    finite = [array[np.isfinite(array)] for array in values]
    finite = [array for array in finite if array.size]
    if not finite:
        return None
    low, high = min(float(array.min()) for array in finite), max(float(array.max()) for array in finite)
    late = max(float(array[min(math.ceil(start_frac * array.size), array.size - 1) :].max()) for array in finite)
    margin = 0.07 * (late - low) or 0.05 * (abs(low) or 1.0)
    cut = high - low > 1.5 * (late - low) > 0
    axes.set_ylim(low - margin, (late if cut else high) + margin)
    return high if cut else None


def label_ends(axes: Axes, ends: list[tuple[str, float, float, str]]) -> None:
    """Names curves at their right ends. `ends`: (name, x, y, colour). Labels that would overlap are moved apart.

    Call it last: the limits of the axes must be final.
    """
    low, high = axes.get_ylim()
    axes.set_xlim(right=1.01 * max((x for _, x, _, _ in ends), default=1.0))
    shown = sorted((min(max((y - low) / (high - low), 0.0), 1.0), name, color) for name, x, y, color in ends)
    gap = 12.0 / (axes.bbox.height * 72 / DPI)
    heights = spread([place for place, _, _ in shown], gap)
    for height, (_, name, color) in zip(heights, shown, strict=True):
        axes.annotate(
            name,
            (1.0, height),
            xycoords="axes fraction",
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=color,
            fontweight="bold",
            annotation_clip=False,
            parse_math=False,
        )


def spread(places: list[float], gap: float) -> list[float]:
    """Sorted `places`, moved as little as needed to lie `gap` apart: groups that touch are centred on their mean."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_bottom(group, gap) + gap * index for group in groups for index in range(len(group))]


def _bottom(group: list[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: list[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)


def png(drawn: Figure) -> bytes:
    """The picture. Equal content gives equal bytes: no date, no version."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The name of a run may have letters that the font does not; they become boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # Draws once, where Figure.savefig draws twice.
        FigureCanvasAgg(drawn).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
