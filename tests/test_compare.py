"""The command: what it prints and where it writes."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_runs import write_run

from jaxllm import compare
from jaxllm.report import comparison


def call(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = str(Path(__file__).resolve().parent.parent)
    environment = {"PYTHONPATH": path, "COLUMNS": "100", "PATH": ""}
    command = [sys.executable, "-W", "error", "-m", "jaxllm.compare", *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_command(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "small", floor=3.0)
    write_run(tmp_path / "runs" / "large", floor=2.8, model__width=512)
    ran = call(tmp_path, "runs/small", "runs/large/")
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert ["small", "large"] in lines and ["model.width", "256", "512"] in lines
    assert "wrote runs/compare.html and runs/compare.png" in ran.stdout
    assert (tmp_path / "runs" / "compare.html").is_file() and (tmp_path / "runs" / "compare.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no directory was given"),
        (("runs", "runs"), "given twice"),
        (("a", "b"), "'a' does not exist"),
        (("--ouch=x",), "Unknown"),
    ],
)
def test_mistakes_are_told_without_a_traceback(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    ran = call(tmp_path, *arguments)
    assert ran.returncode == 2 and words in ran.stderr and "Traceback" not in ran.stderr


def test_tables_fit_the_terminal(tmp_path: Path) -> None:
    """Six runs on 80 columns come in parts, each with all lines. A long name is folded, and makes no other column wider."""
    names = [*(f"experiment-{index}" for index in range(5)), "experiment-5-" + "x" * 40]
    found = comparison.compare([write_run(tmp_path / name, steps=50, seed=seed) for seed, name in enumerate(names)])
    console = Console(width=80, record=True, force_terminal=False)
    with console.capture() as capture:
        compare.show(found, console)
    shown = capture.get()
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count("validation loss, best") == 3
    assert all(shown.count(f"experiment-{index}") == 1 for index in range(6))


@pytest.mark.parametrize(
    ("widths", "found"),
    [
        ([], [slice(0, 0)]),
        ([5, 5, 5], [slice(0, 2), slice(2, 3)]),
        ([99, 1], [slice(0, 1), slice(1, 2)]),
        ([3, 3, 4], [slice(0, 3)]),
    ],
)
def test_columns_are_cut_into_parts(widths: list[int], found: list[slice]) -> None:
    assert compare.parts(widths, 10) == found


def test_pages_go_beside_the_runs_or_here(tmp_path: Path) -> None:
    together = comparison.compare([write_run(tmp_path / "x" / "a"), write_run(tmp_path / "x" / "b")])
    apart = comparison.compare([tmp_path / "x" / "a", write_run(tmp_path / "y" / "c")])
    assert compare.beside(together) == tmp_path / "x" and compare.beside(apart) == Path()
