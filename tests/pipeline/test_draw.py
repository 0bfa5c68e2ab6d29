"""Drawings as text, to the letter."""

import re

from jaxllm.pipeline import draw
from jaxllm.pipeline.schedule import gpipe, interleaved, one_forward_one_backward, zb_h1

ONE_F_ONE_B = """\
tick      0         5         10
device 0  F F . . B W F B W . B W
          0 1     0 0 2 1 1   2 2
device 1  . F B W F B W F B W . .
            0 0 0 1 1 1 2 2 2

F forward, B backward for the input, W backward for the weights, . idle
below: the micro-batch"""

INTERLEAVED = """\
tick      0         5
device 0  F F F F . . B W . B
          0 1 0 1     0 0   1
          a a b b     b b   b
device 1  . F F F B W F B W B
            0 1 0 0 0 1 1 1 0
            a a b b b b b b a

tick      10
device 0  W B W B W
          1 0 0 1 1
          b a a a a
device 1  W B W . .
          0 1 1
          a a a

F forward, B backward for the input, W backward for the weights, . idle
below: the micro-batch and the chunk (a = stages 0 to 1, b = stages 2 to 3)"""


def test_one_part() -> None:
    assert draw.text(one_forward_one_backward(2, 3, 1)) == ONE_F_ONE_B


def test_parts_and_chunks() -> None:
    assert draw.text(interleaved(2, 2, 2), width=31) == INTERLEAVED


def test_width() -> None:
    """Nothing is wider than asked for, and all ticks are there, each under its number."""
    for schedule in (gpipe(4, 8, 1), zb_h1(8, 128, 1), interleaved(3, 40, 2)):
        for width in (40, 79, 100):
            drawing = draw.text(schedule, width).partition("\n\nF forward")[0]
            assert max(map(len, drawing.splitlines())) <= width
            first = [line for line in drawing.splitlines() if line.startswith("device 0")]
            assert sum(len(line.split()) - 2 for line in first) == schedule.ticks
            assert re.findall(r"\d+", " ".join(line for line in drawing.splitlines() if line.startswith("tick"))) == [
                str(tick) for tick in range(0, schedule.ticks, 5)
            ]
    assert draw.text(gpipe(4, 8, 1)).count("tick") == 1


def test_chunk_names() -> None:
    assert [draw.chunk_name(chunk) for chunk in (0, 1, 25, 26, 53)] == ["a", "b", "z", "aa", "bb"]
