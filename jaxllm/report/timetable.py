"""Pipeline schedules as a picture: a panel a schedule, a row a device, a box an operation with its micro-batch in it."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from jaxllm.pipeline.schedule import Op, Schedule
from jaxllm.pipeline.simulate import simulate
from jaxllm.report import canvas
from jaxllm.report.canvas import Theme

# operation -> (colour among those of the theme's lines, its name in the legend)
COLOURS = {
    Op.FORWARD: (0, "forward"),
    Op.BACKWARD_INPUT: (1, "backward, for the input"),
    Op.BACKWARD_WEIGHT: (2, "backward, for the weights"),
}
# Inches of the picture, of a row, and around the rows of a panel. In a box narrower than a number, none is written.
WIDTH, ROW, AROUND = 9.0, 0.18, 0.5
NUMBER_POINTS = 6.5


def figure(schedules: Sequence[Schedule], theme: Theme = canvas.LIGHT) -> Figure:
    """All schedules on one axis of time, whose unit is one operation on all the layers of a device.

    With V chunks a box is 1 / V wide.
    """
    times = [schedule.ticks / schedule.chunks for schedule in schedules]
    heights = [ROW * schedule.stages + AROUND for schedule in schedules]
    drawn = canvas.figure(theme, WIDTH, sum(heights) + 0.6)
    panels = drawn.subplots(len(schedules), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, schedule in zip(panels, schedules, strict=True):
        _panel(axes, schedule, max(times), theme)
    panels[-1].set_xlabel("time, in operations on all the layers of a device", fontsize=8, color=theme.faint)
    patches = [Patch(color=theme.lines[index], label=name) for index, name in COLOURS.values()]
    patches.append(Patch(color=theme.grid, label="idle"))
    if any(schedule.chunks > 1 for schedule in schedules):
        patches.append(Patch(color="none", label="paler: later chunks"))
    drawn.legend(handles=patches, loc="outside lower left", ncols=len(patches), frameon=False, fontsize=8.5, labelcolor=theme.ink)
    return drawn


def title(schedule: Schedule) -> str:
    """Its name and what it costs."""
    report = simulate(schedule)
    chunks = f", {schedule.chunks} chunks a device" if schedule.chunks > 1 else ""
    return f"{schedule.name}{chunks}: {report.ticks} ticks, {float(report.bubble):.1%} idle, {max(report.live)} stage inputs held"


def _panel(axes: Axes, schedule: Schedule, time: float, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.set_title(title(schedule), loc="left", fontsize=9.5, fontweight="bold", color=theme.ink, pad=4)
    axes.set_xlim(0, time)
    axes.set_ylim(schedule.stages, 0)
    axes.set_yticks([stage + 0.5 for stage in range(schedule.stages)], [str(stage) for stage in range(schedule.stages)])
    axes.set_ylabel("device", fontsize=8, color=theme.faint)
    axes.tick_params(colors=theme.faint, labelsize=7.5, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    box = 1 / schedule.chunks
    end = schedule.ticks * box
    axes.add_patch(Rectangle((0, 0), end, schedule.stages, facecolor=theme.grid, edgecolor="none", zorder=0))
    points = 72 * WIDTH * 0.9 / time * box
    written = points > NUMBER_POINTS * 0.62 * len(str(schedule.microbatches - 1))
    for tick in range(schedule.ticks):
        for stage in range(schedule.stages):
            op = Op(schedule.op[tick, stage])
            if op is not Op.IDLE:
                colour = _paler(theme.lines[COLOURS[op][0]], int(schedule.chunk[tick, stage]), schedule.chunks)
                axes.add_patch(Rectangle((tick * box, stage), box, 1, facecolor=colour, edgecolor=theme.background, linewidth=0.5))
                if written:
                    number = str(schedule.microbatch[tick, stage])
                    ink = "white" if _dark(colour) else "#1b1f24"
                    axes.text((tick + 0.5) * box, stage + 0.53, number, ha="center", va="center", fontsize=NUMBER_POINTS, color=ink)


def _paler(colour: str, chunk: int, chunks: int) -> tuple[float, float, float]:
    """The colour of a chunk: from full in the first to pale in the last."""
    pale = 0.6 * chunk / max(1, chunks - 1)
    red, green, blue = to_rgb(colour)
    return red + (1 - red) * pale, green + (1 - green) * pale, blue + (1 - blue) * pale


def _dark(colour: tuple[float, float, float]) -> bool:
    """Whether white can be read on it: by relative luminance, roughly."""
    red, green, blue = colour
    return 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
