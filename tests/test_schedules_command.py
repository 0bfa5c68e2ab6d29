"""The command: drawings, the table, the picture, and mistakes."""

import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from jaxllm import registry, schedules
from jaxllm.pipeline.simulate import simulate


def call(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "COLUMNS": "100", "PATH": ""}
    command = [sys.executable, "-W", "error", "-m", "jaxllm.schedules", *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_command(tmp_path: Path) -> None:
    ran = call(tmp_path, "--stages", "4", "--microbatches", "8", "--png", "all.png")
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert ["gpipe", "1", "33", "33", "27.3%", "27.3%", "(S-1)/(M+S-1)", "8", "1", "8,", "1,", "1"] in lines
    assert ["1f1b", "1", "33", "33", "27.3%", "27.3%", "(S-1)/(M+S-1)", "4", "1", "4,", "1,", "1"] in lines
    assert ["interleaved", "2", "57", "28.5", "15.8%", "15.8%", "(S-1)/(VM+S-1)", "11", "1", "11,", "2,", "1"] in lines
    assert ["zb_h1", "1", "27", "27", "11.1%", "11.1%", "(S-1)/(3M+S-1)", "4", "4", "4,", "1,", "4"] in lines
    assert ran.stdout.count("device 3") == 5 and max(map(len, ran.stdout.splitlines())) <= 100
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_one_schedule(tmp_path: Path) -> None:
    ran = call(tmp_path, "--name", "zb_h1", "--chunks", "3", "--stages", "2", "--microbatches", "3")
    assert ran.returncode == 0 and "zb_h1, 3 chunks" in ran.stdout and "gpipe" not in ran.stdout
    assert "(S-1)/(3VM+S-1)" in ran.stdout


def test_what_does_not_take_the_chunks_is_left_out() -> None:
    for chunks, names, reason in (
        (1, ["gpipe", "1f1b", "zb_h1"], "'interleaved' with 1 chunk"),
        (2, ["gpipe", "interleaved", "zb_h1"], "'1f1b' with 2"),
    ):
        chosen, left_out = schedules.choose("", 2, 4, chunks)
        assert [schedule.name for schedule in chosen] == names
        assert len(left_out) == 1 and reason in left_out[0]


def test_every_schedule_is_compared() -> None:
    chosen, left_out = schedules.choose("", 4, 8, None)
    assert sorted(schedule.name for schedule in chosen) == list(registry.names("pipeline")) and not left_out


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_textbook_formulas(chunks: int) -> None:
    for schedule in schedules.choose("", 4, 12, chunks)[0]:
        formula, bubble = schedules.textbook(schedule)
        assert bubble == simulate(schedule).bubble
        idle, _, whole = formula.partition("/")
        numbers = {"S": 4, "M": 12, "V": chunks}
        # "3VM" -> "3*V*M"
        read = [eval(re.sub(r"(?<=[3V])(?=[VM])", "*", part), numbers) for part in (idle, whole)]
        assert Fraction(*read) == bubble


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--stages", "0"), "schedule 'gpipe' with 0 stages.\n  Accepted: 1 or more."),
        (("--name", "1f1"), "unknown pipeline '1f1'. Did you mean '1f1b'?\n  Accepted: 1f1b, gpipe, interleaved, zb_h1."),
        (("--name", "1f1b", "--chunks", "2"), "with 2 chunks a device.\n  Accepted: 1 chunk."),
        (("--png", "none/all.png"), "'none/all.png': No such file or directory"),
        (("1f1b",), "unexpected argument '1f1b'"),
    ],
)
def test_mistakes_are_told_without_a_traceback(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    ran = call(tmp_path, *arguments)
    assert ran.returncode == 2 and words in ran.stderr and "Traceback" not in ran.stderr
