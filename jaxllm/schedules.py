"""Draws pipeline schedules and compares what they cost; nothing is run and no device is needed.

python -m jaxllm.schedules --stages 4 --microbatches 8 [--name 1f1b] [--chunks 2] [--png FILE]
"""

from fractions import Fraction
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxllm import command, registry
from jaxllm.pipeline import draw
from jaxllm.pipeline.buffers import allocate
from jaxllm.pipeline.schedule import Backward, Schedule
from jaxllm.pipeline.simulate import simulate

# Chunks a device where none are asked for: the fewest that a schedule takes.
CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb_h1": 1}
STYLES = {"F": "blue", "B": "red", "W": "green", ".": "dim"}
COLUMNS = ("schedule", "V", "ticks", "time", "idle", "textbook", "", "held", "put off", "slots")
# Characters that the table needs, whatever the terminal has.
TABLE_CHARS = 100
NOTES = """
V: chunks of layers a device. time: in operations on all the layers of a device, which are ticks / V. idle: share of all
device-ticks; textbook: the papers' formula, for M >= S, of interleaved for M a multiple of S. held: stage inputs between
forward and backward on the busiest device. put off: weight gradients that wait there. slots: what a device keeps room for,
of stage inputs, arriving gradients and weight gradients.
"""


def define_flags() -> None:
    flags.DEFINE_integer("stages", 4, "devices in the pipeline")
    flags.DEFINE_integer("microbatches", 8, "micro-batches of a step")
    flags.DEFINE_string("name", "", f"{', '.join(registry.names('pipeline'))}; default: all that take the number of chunks")
    flags.DEFINE_integer("chunks", None, "chunks of layers a device; default: 1, and 2 of interleaved")
    flags.DEFINE_string("png", "", "file for the picture")


def main(arguments: list[str]) -> None:
    del arguments
    given = flags.FLAGS
    console = Console(soft_wrap=True, highlight=False)
    schedules, left_out = choose(given.name, given.stages, given.microbatches, given.chunks)
    for schedule in schedules:
        console.print(Text(f"{schedule.name}, {schedule.chunks} chunks" if schedule.chunks > 1 else schedule.name, "bold"))
        console.print(coloured(draw.text(schedule, console.width)), end="\n\n")
    Console(width=max(console.width, TABLE_CHARS), soft_wrap=True).print(table(schedules))
    console.print(Text(f"\n{' '.join(NOTES.split())}\n", "dim"), soft_wrap=False)
    for reason in left_out:
        console.print(Text("! ", "bold yellow") + Text(f"left out: {reason}"))
    if given.png:
        # Matplotlib takes a second to load.
        from jaxllm.report import canvas, timetable

        path = Path(given.png).expanduser()
        path.write_bytes(canvas.png(timetable.figure(schedules)))
        console.print(Text(f"wrote {path}"))


def choose(name: str, stages: int, microbatches: int, chunks: int | None) -> tuple[list[Schedule], list[str]]:
    """(schedules, why others are left out); the named one, or all. ValueError if the named one, or none, takes these numbers."""
    wanted = [name] if name else list(CHUNKS)
    schedules, refused = [], []
    for each in wanted:
        make = registry.resolve("pipeline", each)
        try:
            schedules.append(make(stages, microbatches, CHUNKS[each] if chunks is None else chunks))
        except ValueError as error:
            refused.append(error)
    if not schedules:
        raise refused[0]
    return schedules, [str(error).partition("\n")[0] for error in refused]


def textbook(schedule: Schedule) -> tuple[str, Fraction]:
    """The bubble of the papers as a formula and as a number: (S-1)(F+B+W), of ZB-H1 (S-1)(F+B-W), over itself and the work."""
    units = 3 if schedule.backward is Backward.SPLIT else 1
    factor = "".join([str(units)] * (units > 1) + ["V"] * (schedule.chunks > 1))
    idle, work = schedule.stages - 1, units * schedule.chunks * schedule.microbatches
    return f"(S-1)/({factor}M+S-1)", Fraction(idle, work + idle)


def table(schedules: list[Schedule]) -> Table:
    """A line a schedule."""
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column in ("schedule", "") else "right", no_wrap=True)
    for schedule in schedules:
        report, buffers = simulate(schedule), allocate(schedule)
        formula, bubble = textbook(schedule)
        shown.add_row(
            schedule.name,
            str(schedule.chunks),
            str(report.ticks),
            f"{report.ticks / schedule.chunks:g}",
            f"{float(report.bubble):.1%}",
            f"{float(bubble):.1%}",
            formula,
            str(max(report.live)),
            str(max(report.pending)),
            f"{buffers.x_slots}, {buffers.dy_slots}, {buffers.w_slots}",
        )
    return shown


def coloured(drawing: str) -> Text:
    """A drawing with the letters of its operations in colours."""
    shown = Text(drawing)
    start = 0
    for line in drawing.splitlines(keepends=True):
        if line.startswith("device "):
            label = len(line) - len(line.removeprefix("device ").lstrip("0123456789"))
            for index, letter in enumerate(line[label:], start + label):
                if letter in STYLES:
                    shown.stylize(STYLES[letter], index, index + 1)
        start += len(line)
    return shown


if __name__ == "__main__":
    define_flags()
    command.run(main)
