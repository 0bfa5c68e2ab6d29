"""The text that a person sees, on a terminal and in a log file."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from jaxllm.engine.progress import Progress


def row(step: int, **changes: Any) -> dict[str, Any]:
    fields = {"loss": 3.0, "lr": 3e-4, "tokens": step * 100, "tokens_per_sec": 1000.0, "secs": 1.0, "skipped": 0}
    return {"kind": "train", "step": step, **fields, **changes}


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=60)


def terminal(width: int = 110) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)


def printed(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_plain_lines_are_exact_and_never_wrap() -> None:
    console = plain_console()
    with Progress(1000, 0, console) as progress:
        progress.update(row(1, loss=7.62, tokens_per_sec=3.0))
        progress.update(row(100, loss=3.21049))
        progress.update({"kind": "eval", "step": 100, "loss": 3.3})
        progress.message("step 100: " + "x" * 100)
        progress.update(row(200, skipped=2, tokens_per_sec=2000.0))
    # 900 steps of 100 tokens at 1000 tokens/s are 90 s; then 800 steps at (0.7 * 1000 + 2000) / 1.7 tokens/s are 50.4 s.
    assert printed(console).splitlines() == [
        "step    1/1000  loss 7.6200  lr 3.00e-04",
        "step  100/1000  loss 3.2105  1.00k tokens/s  left 1:30  lr 3.00e-04",
        "step 100: " + "x" * 100,
        "step  200/1000  loss 3.0000  1.59k tokens/s  left 0:50  lr 3.00e-04  skipped 2",
    ]


@pytest.mark.parametrize("start", [0, 400])
def test_first_row_of_a_session_says_nothing_about_speed(start: int) -> None:
    """It includes compilation, also after a resume."""
    console = plain_console()
    with Progress(1000, start, console) as progress:
        progress.update(row(start + 10, tokens_per_sec=0.5))
        progress.update(row(start + 20))
    first, second = printed(console).splitlines()
    assert "tokens/s" not in first and "left" not in first
    left_secs = (1000 - start - 20) // 10
    assert f"left {left_secs // 60}:{left_secs % 60:02d}" in second


@pytest.mark.parametrize("loss", [float("nan"), None])
def test_loss_that_is_not_finite(loss: float | None) -> None:
    console = plain_console()
    with Progress(10, 0, console) as progress:
        progress.update(row(1))
        progress.update(row(2, loss=loss))
        progress.update(row(3, loss=2.0))
    assert [re.findall(r"loss (not finite|\S+)", line)[0] for line in printed(console).splitlines()] == [
        "3.0000",
        "not finite",
        "2.0000",
    ]


def test_bar_is_drawn_at_rows_only_and_stays_below_messages() -> None:
    console = terminal()
    with Progress(1000, 0, console) as progress:
        progress.update(row(10))
        drawn = len(printed(console))
        progress.update({"kind": "eval", "step": 10, "loss": 3.3})
        assert len(printed(console)) == drawn
        progress.message("[bold]a message[/bold] :smile:")
        progress.update(row(1000, loss=2.0))
    shown = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed(console)).strip())
    # Smoothed: (0.7 * 3 + 2) / 1.7.
    assert shown[-1].startswith("step 1000/1000 ━━") and shown[-1].endswith("loss 2.4118  1.00k tokens/s  left 0:00  lr 3.00e-04")
    assert any(line == "[bold]a message[/bold] :smile:" for line in shown)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_bar_fits_any_width(width: int) -> None:
    console = terminal(width)
    with Progress(100_000, 0, console) as progress:
        progress.update(row(10))
        progress.update(row(99_990, skipped=123))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed(console))
    last = re.split(r"[\r\n]+", shown.strip())[-1]
    assert len(last) <= width and "step 99990/100000" in last and "loss 3.0000" in last


def test_messages_cannot_steer_the_terminal() -> None:
    """A young model writes anything."""
    console = plain_console()
    Progress(10, 0, console).message("a\x1b[2Jb\x07c\x9b\x7f\rd\ne é")
    assert printed(console) == "a\ufffd[2Jb\ufffdc\ufffd\ufffd\ufffdd\ne é\n"


def test_terminal_that_knows_no_unicode() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Progress(10, 0, Console(file=file)).message("caf\u00e9 \udcff")
    file.seek(0)
    assert file.read() == "caf? ?\n"


def test_an_error_leaves_the_terminal_usable() -> None:
    console = terminal()
    with pytest.raises(RuntimeError), Progress(10, 0, console) as progress:
        progress.update(row(1))
        raise RuntimeError
    # The cursor is shown again.
    assert printed(console).rstrip("\n").endswith("\x1b[?25h")
