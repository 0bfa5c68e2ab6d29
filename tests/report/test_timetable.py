"""The picture of pipeline schedules: what is in it, not how it looks."""

from matplotlib.patches import Rectangle

from jaxllm.pipeline.schedule import interleaved, one_forward_one_backward
from jaxllm.report import canvas, timetable


def test_a_box_an_operation() -> None:
    drawn = timetable.figure([one_forward_one_backward(2, 3, 1), interleaved(2, 4, 2)])
    plain, chunked = drawn.axes
    assert [axes.get_title(loc="left") for axes in drawn.axes] == [
        "1f1b: 12 ticks, 25.0% idle, 2 stage inputs held",
        "interleaved, 2 chunks a device: 27 ticks, 11.1% idle, 5 stage inputs held",
    ]
    for axes, operations, chunks in ((plain, 18, 1), (chunked, 48, 2)):
        boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)][1:]
        assert len(boxes) == len(axes.texts) == operations
        assert {box.get_width() for box in boxes} == {1 / chunks}
        assert len({box.get_facecolor() for box in boxes}) == 3 * chunks
        assert axes.get_xlim() == (0, 13.5)
    last = max((box for box in chunked.patches[1:]), key=lambda box: (box.get_x(), -box.get_y()))
    assert (last.get_x(), last.get_y()) == (13, 0)


def test_numbers_only_where_they_fit() -> None:
    assert not timetable.figure([one_forward_one_backward(2, 128, 1)]).axes[0].texts


def test_equal_schedules_give_equal_bytes() -> None:
    one, other = (canvas.png(timetable.figure([one_forward_one_backward(2, 3, 1)])) for _ in range(2))
    assert one == other and one.startswith(b"\x89PNG")
