"""Writes the parts of docs/matrix.md: each of the tests that have just run, if all of its tests ran and passed."""

import datetime
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from parallel import columns

PAGE = Path(__file__).resolve().parents[2] / "docs" / "matrix.md"
# Part -> what its tests recorded, [key, ..., figure, ...] each.
RECORDED: dict[str, list[list[Any]]] = {"cell": [], "adapter": [], "pipeline": [], "held": []}


@pytest.fixture(autouse=True, scope="module")
def _anew(compiled_anew: None) -> None:
    """No program of a mesh comes out of the compilation cache."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Runs where the reports arrive: with several workers, in the process that started them."""
    for name, value in report.user_properties:
        if name in RECORDED and report.when == "call" and report.passed:
            RECORDED[name].append(list(value))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    complete: dict[str, tuple[int, Callable[[list[list[Any]]], list[str]]]] = {
        "cell": (len(columns.FAMILIES) * len(columns.COLUMNS), _cells),
        "adapter": (len(columns.ADAPTED) * len(columns.COLUMNS), _table),
        "pipeline": (36, _pipelines),
        "held": (4, _held),
    }
    for name, (number, write) in complete.items():
        if len(RECORDED[name]) == number:
            _put(name, write(RECORDED[name]))


def _put(name: str, lines: list[str]) -> None:
    """The lines in the place of the page's part of this name, between its two marks."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(f"<!-- {name}: written by `make matrix` -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    assert begin and end, f"docs/matrix.md has no part '{name}'"
    made = f"jax {jax.__version__}, Python {platform.python_version()}, {datetime.date.today()}."
    PAGE.write_text(before + begin + "\n".join(["", made, "", *lines, "", ""]) + end + after, encoding="utf-8")


def _table(recorded: list[list[Any]]) -> list[str]:
    """The largest deviations, and a row for each mesh with a column for each model."""
    found = {(title, model): figures for model, title, *figures in recorded}
    models = sorted({model for _, model in found}, key=columns.MODELS.index)
    (title, model), (_, worst, array) = max(found.items(), key=lambda cell: cell[1][1])
    lines = [
        f"Largest: {max(loss for loss, *_ in found.values()):.1e} of a loss; {worst:.1e} of a gradient, `{array}` of {model}, {title}.",
        "",
        "| mesh | " + " | ".join(models) + " |",
        "| --- |" + " --- |" * len(models),
    ]
    for title in columns.COLUMNS:
        cells = [found[title, model] for model in models]
        lines.append(f"| {title} | " + " | ".join(f"{loss:.0e}, {gradient:.1e}" for loss, gradient, _ in cells) + " |")
    return lines


def _cells(recorded: list[list[Any]]) -> list[str]:
    lines = [*_table(recorded), "", "What differs from one device:", ""]
    for title, given in columns.COLUMNS.items():
        said = ", ".join(f"{key.replace('__', '.')}={value}" for key, value in given.items())
        lines.append(f"- {title}: `{said}`")
    return [
        *lines,
        "",
        "Of T5 and the Transformer, whose stages have layers of both stacks, 1F1B is `parallel.schedule=interleaved`.",
    ]


def _pipelines(recorded: list[list[Any]]) -> list[str]:
    found = {(schedule, stages, times): worst for schedule, stages, times, _, worst in recorded}
    columns_ = [(stages, times) for stages in (2, 4, 8) for times in (1, 2, 4)]
    lines = [
        f"Largest: {max(loss for *_, loss, _ in recorded):.1e} of a loss, {max(found.values()):.1e} of a gradient.",
        "",
        "| schedule | " + " | ".join(f"S {stages}, M {stages * times}" for stages, times in columns_) + " |",
        "| --- |" + " --- |" * len(columns_),
    ]
    for schedule in dict.fromkeys(row[0] for row in recorded):
        lines.append(f"| `{schedule}` | " + " | ".join(f"{found[schedule, *column]:.1e}" for column in columns_) + " |")
    return lines


def _held(recorded: list[list[Any]]) -> list[str]:
    lines = [
        f"A stage's input is {recorded[0][1]:,} bytes.",
        "",
        "| schedule | M 2 | M 4 | M 8 | M 16 | stage inputs more a micro-batch, from M 4 on |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for schedule, _, *temps, slope in recorded:
        lines.append(f"| `{schedule}` | " + " | ".join(f"{temp:,}" for temp in temps) + f" | {slope:.2f} |")
    return lines
