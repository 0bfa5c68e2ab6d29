"""What compression cost and saved: a table, a picture and a JSON file.

The error of a kernel is that of its products, relative to them: ||x (W - Q)|| / ||x W|| over the calibration data. Beside each stands that
of rounding the same kernel to the nearest code, on the same data.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from jaxllm.report.units import size

JSON, PNG = "compression.json", "compression.png"
# Inches: of the errors, and of each line below them. ROOM: for what is written behind the longest bar.
WIDE, CHANGE_HEIGHT, ROOM = (7.5, 4.2), 0.28, 1.6
# Of the lines, where there are more kernels than colours.
MARKERS = ("o", "s", "^")


class KernelError(NamedTuple):
    """Of one kernel. layer: counted over the stacks. nearest: of rounding to the nearest code."""

    layer: int
    name: str
    error: float
    nearest: float


@dataclasses.dataclass(frozen=True)
class Report:
    """model: its path. what: the method and the grid, in words. calibration: the data, in words; "" for none.

    before, after: rows of `evaluate` on the same text, and "tokens_per_sec" of decoding, if they were measured.
    bytes_before, bytes_after: of the parameters as they are on a device.
    """

    model: str
    what: str
    calibration: str
    kernels: Sequence[KernelError]
    bytes_before: int
    bytes_after: int
    before: dict[str, Any]
    after: dict[str, Any]
    versions: dict[str, str]

    def better(self) -> int:
        """How many kernels have a smaller error than by rounding to the nearest code."""
        return sum(each.error < each.nearest for each in self.kernels)

    def blank(self) -> int:
        """How many kernels read nothing but 0, and were rounded to the nearest code for want of anything better."""
        return sum(each.error == each.nearest == 0 for each in self.kernels)

    def save(self, directory: Path) -> None:
        """Writes JSON and PNG."""
        fields = dataclasses.asdict(self) | {"kernels": [each._asdict() for each in self.kernels]}
        (directory / JSON).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        (directory / PNG).write_bytes(picture(self))


def show(report: Report, console: Console) -> None:
    """Prints kernels by name, over the layers, and what changed."""
    console.print(f"{report.model}: {report.what}", markup=False, highlight=False)
    if report.kernels:
        numbers = [Column(name, justify="right") for name in ("median error", "largest", "to the nearest", "better in")]
        table = Table(
            "kernel", *numbers, caption=f"of its products, relative to them, on {report.calibration}", caption_justify="left"
        )
        names = list(dict.fromkeys(each.name for each in report.kernels))
        for name in names:
            found = [each for each in report.kernels if each.name == name]
            median, largest, nearest = (
                statistics.median(each.error for each in found),
                max(each.error for each in found),
                statistics.median(each.nearest for each in found),
            )
            better = sum(each.error < each.nearest for each in found)
            table.add_row(short(name, names), f"{median:.2%}", f"{largest:.2%}", f"{nearest:.2%}", f"{better} of {len(found)}")
        console.print(table)
        if blank := report.blank():
            console.print(
                f"{blank} kernels read nothing but 0 on these data, and were rounded to the nearest code", highlight=False
            )
    changes = Table("", *(Column(name, justify="right") for name in ("before", "after", "ratio")))
    for name, before, after, ratio in _changes(report):
        changes.add_row(name, before, after, ratio)
    if report.before:
        console.print(f"{report.before['metric']}, on {report.before['data']}", markup=False, highlight=False)
    console.print(changes)


def _changes(report: Report) -> list[tuple[str, str, str, str]]:
    one, other = report.bytes_before, report.bytes_after
    rows = [("parameters on a device", size(one), size(other), f"{other / one:.3f}")]
    for key, name, form in (
        ("perplexity", "perplexity", "{:.3f}"),
        ("loss", "loss (nats a token)", "{:.4f}"),
        ("accuracy", "likeliest token is right", "{:.2%}"),
        ("tokens_per_sec", "tokens written a second, one row", "{:.1f}"),
    ):
        if key in report.before:
            before, after = report.before[key], report.after[key]
            rows.append((name, form.format(before), form.format(after), f"{after / before:.3f}"))
    return rows


def picture(report: Report) -> bytes:
    """PNG: the errors of the kernels over the layers, a colour a kernel, and dashed those of rounding to the nearest.

    Below, what changed.
    """
    from jaxllm.report import canvas  # noqa: PLC0415

    theme, changes = canvas.LIGHT, _changes(report)
    below = 1.0 + CHANGE_HEIGHT * len(changes)
    drawn = canvas.figure(theme, WIDE[0], (WIDE[1] if report.kernels else 0) + below)
    if report.kernels:
        parts: Any = drawn.subfigures(2, 1, height_ratios=(WIDE[1], below))
        _draw_errors(parts[0], theme, report)
        axes = parts[1].add_subplot()
    else:
        axes = drawn.add_subplot()
    canvas.dress(axes, theme, "After, as a share of before", "", "")
    axes.grid(visible=False)
    axes.barh([name for name, *_ in changes], [float(ratio) for *_, ratio in changes], color=theme.lines[0], height=0.6)
    axes.axvline(1, color=theme.faint, linestyle=(0, (4, 2)), linewidth=1.0)
    for place, (_, before, after, ratio) in enumerate(changes):
        label = axes.text(float(ratio), place, f" {ratio}: {before} to {after}", va="center", fontsize=8, color=theme.ink)
        label.set_bbox({"facecolor": theme.background, "edgecolor": "none", "pad": 0.6})
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(canvas.MaxNLocator(5))
    axes.set_xlim(0, ROOM * max(1.0, *(float(ratio) for *_, ratio in changes)))
    return canvas.png(drawn)


def _draw_errors(part: Any, theme: Any, report: Report) -> None:
    """The upper part of the picture."""
    from matplotlib.lines import Line2D  # noqa: PLC0415

    from jaxllm.report import canvas  # noqa: PLC0415

    axes = part.add_subplot()
    canvas.dress(axes, theme, "Error of each kernel's products", "layer", "relative error")
    names = list(dict.fromkeys(each.name for each in report.kernels))
    lines, colors = [], (*theme.lines, theme.ink)
    for index, name in enumerate(names):
        found = [each for each in report.kernels if each.name == name]
        round_, place = divmod(index, len(colors))
        color, marker, layers = colors[place], MARKERS[round_ % len(MARKERS)], [each.layer for each in found]
        axes.plot(layers, [each.error for each in found], color=color, linewidth=1.6, marker=marker, markersize=4)
        axes.plot(layers, [each.nearest for each in found], color=color, linewidth=1.0, linestyle=(0, (4, 2)), alpha=0.7)
        lines.append(Line2D([], [], color=color, marker=marker, markersize=4, label=short(name, names)))
    lines.append(Line2D([], [], color=theme.faint, linestyle=(0, (4, 2)), linewidth=1.0, label="to the nearest"))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value >= 0.1 or not value else f"{value:.1%}")
    part.legend(handles=lines, loc="outside right center", frameon=False, fontsize=8.5, labelcolor=theme.ink)
    axes.set_title(report.what, loc="right", fontsize=8.5, color=theme.faint, pad=10)


def short(name: str, names: Sequence[str]) -> str:
    """The end of a path name that tells it from the others: attention/q."""
    parts = name.removesuffix("/kernel").split("/")
    for count in range(1, len(parts) + 1):
        ending = "/" + "/".join(parts[-count:])
        if sum(f"/{other.removesuffix('/kernel')}".endswith(ending) for other in names) == 1:
            return ending[1:]
    return name
