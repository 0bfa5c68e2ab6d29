"""Compares finished or unfinished runs: a table here, and compare.html and compare.png with the curves.

python -m jaxllm.compare DIR DIR ... [--out DIR]
"""

from collections.abc import Iterator
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jaxllm import command
from jaxllm.report import comparison
from jaxllm.report.comparison import Comparison, Line
from jaxllm.report.units import plain

# Characters of a run's column on the terminal, and between two columns.
WIDEST, GAP = 32, 2


def main(directories: list[str]) -> None:
    found = comparison.compare(directories)
    console = Console()
    show(found, console)
    page, picture = comparison.write(found, flags.FLAGS.out or beside(found))
    console.print(f"wrote {page} and {picture}", markup=False, highlight=False, soft_wrap=True)


def show(found: Comparison, console: Console) -> None:
    """Prints the tables, in parts if there are too many runs for the width of the terminal, and the warnings."""
    differences = [Line(key, [plain(value) for value in values], frozenset()) for key, values in found.differences]
    label_chars = max(len(line.name) for line in [*found.lines, *differences])
    wanted = [max(map(len, [name, *column])) for name, *column in _columns(found.names, [*found.lines, *differences])]
    for part in parts([min(WIDEST, chars) + GAP for chars in wanted], console.width - label_chars - GAP):
        console.print(_table(found.lines, found.names, part))
        if differences:
            console.print()
            console.print(_table(differences, found.names, part, "config"))
        console.print()
    for warning in found.warnings:
        console.print(Text("! ", "bold yellow") + Text(warning))


def parts(widths: list[int], room: int) -> list[slice]:
    """Neighbouring columns cut into groups that fit into `room` characters, a column that does not fit alone."""
    starts, used = [0], 0
    for index, width in enumerate(widths):
        if used and used + width > room:
            starts.append(index)
            used = 0
        used += width
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(widths)], strict=True)]


def _columns(names: list[str], lines: list[Line]) -> Iterator[tuple[str, ...]]:
    """(name, cell, cell, ...) of each run."""
    return zip(names, *(line.cells for line in lines), strict=True)


def _table(lines: list[Line], names: list[str], part: slice, title: str = "") -> Table:
    table = Table(Column(title, no_wrap=True), box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for name in names[part]:
        table.add_column(Text(name), overflow="fold", max_width=WIDEST)
    for line in lines:
        cells = [Text(cell, "bold green" if index in line.best else "") for index, cell in enumerate(line.cells)]
        table.add_row(Text(line.name, "dim"), *cells[part])
    return table


def beside(found: Comparison) -> Path:
    """The directory that holds all runs, or else the current one."""
    parents = {run.directory.resolve().parent: run.directory.parent for run in found.runs}
    return next(iter(parents.values())) if len(parents) == 1 else Path()


if __name__ == "__main__":
    flags.DEFINE_string(
        "out", "", "directory for compare.html and compare.png; default: the one that holds the runs, or the current one"
    )
    command.run(main, positional=True)
