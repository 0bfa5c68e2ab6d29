"""The simulator finds every kind of fault. Faults are put by hand into tables that are right."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.pipeline.buffers import Buffers, allocate
from jaxllm.pipeline.schedule import Backward, Op, Schedule, forward_only, interleaved, one_forward_one_backward, zb_h1
from jaxllm.pipeline.simulate import simulate

OPERATIONS, SLOTS = ("op", "microbatch", "chunk"), ("arrive_x", "arrive_dy", "x_slot", "dy_slot", "w_slot")


def with_cells(tables: Schedule | Buffers, **cells: dict[tuple[int, int], int]) -> Schedule | Buffers:
    """A copy in which `table={(tick, device): value}` is set."""
    changed = {}
    for name, values in cells.items():
        changed[name] = getattr(tables, name).copy()
        for place, value in values.items():
            changed[name][place] = value
    return replace(tables, **changed)


def swapped(schedule: Schedule, one: tuple[int, int], other: tuple[int, int]) -> Schedule:
    """A copy in which two operations have changed places."""
    cells = {name: {one: getattr(schedule, name)[other], other: getattr(schedule, name)[one]} for name in OPERATIONS}
    return with_cells(schedule, **cells)


# 1F1B on 2 devices, 3 micro-batches:   tick 0 1 2 3 4 5 6 7 8 9 10 11
#                                   device 0 F F . . B W F B W . B  W
#                                            0 1     0 0 2 1 1   2  2
#                                   device 1 . F B W F B W F B W .  .
#                                              0 0 0 1 1 1 2 2 2
PLAIN = one_forward_one_backward(2, 3, 1)
SPLIT = zb_h1(2, 3, 1)
FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "shape": (lambda: replace(PLAIN, chunk=PLAIN.chunk[:, :1]), r"table 'chunk' has the shape \(12, 1\), not \(ticks, 2\)"),
    "unknown operation": (lambda: with_cells(PLAIN, op={(0, 0): 4}), "tick 0, device 0: op 4 is not in 0 to 3"),
    "micro-batch": (lambda: with_cells(PLAIN, microbatch={(4, 1): 3}), "tick 4, device 1: microbatch 3 is not in 0 to 2"),
    "chunk": (lambda: with_cells(PLAIN, chunk={(4, 1): -1}), "tick 4, device 1: chunk -1 is not in 0 to 0"),
    "idle": (lambda: with_cells(PLAIN, microbatch={(2, 0): 1}), "tick 2, device 0: idle, but microbatch is 1, not 0"),
    "twice": (
        lambda: with_cells(PLAIN, microbatch={(1, 0): 0}),
        "tick 1, device 0: FORWARD of stage 0, micro-batch 0 is done twice",
    ),
    "never": (
        lambda: with_cells(PLAIN, op={(11, 0): 0}, microbatch={(11, 0): 0}),
        "device 0: BACKWARD_WEIGHT of stage 0, .* 2 is never",
    ),
    "wrong device": (
        lambda: swapped(PLAIN, (2, 0), (2, 1)),
        "device 1: BACKWARD_INPUT of stage 1, micro-batch 0 is never done",
    ),
    "forward too early": (
        lambda: swapped(PLAIN, (0, 1), (1, 1)),
        "tick 0, device 1: FORWARD of stage 1, micro-batch 0 is not after FORWARD of stage 0, micro-batch 0",
    ),
    "backward before its forward": (
        lambda: swapped(PLAIN, (1, 1), (2, 1)),
        "tick 1, device 1: BACKWARD_INPUT of stage 1, micro-batch 0 is not after FORWARD of stage 1, micro-batch 0",
    ),
    "weight before input": (
        lambda: swapped(PLAIN, (2, 1), (3, 1)),
        "tick 2, device 1: BACKWARD_WEIGHT of stage 1, micro-batch 0 is not after BACKWARD_INPUT of stage 1",
    ),
    "split backward too early": (
        lambda: swapped(SPLIT, (2, 0), (3, 0)),
        "tick 2, device 0: BACKWARD_INPUT of stage 0, micro-batch 0 is not after BACKWARD_INPUT of stage 1",
    ),
    "fused backward too early": (
        lambda: swapped(PLAIN, (3, 0), (4, 0)),
        "tick 3, device 0: BACKWARD_INPUT of stage 0, micro-batch 0 is not after BACKWARD_WEIGHT of stage 1",
    ),
    "fused backward torn apart": (
        lambda: swapped(PLAIN, (9, 1), (10, 1)),
        "tick 10, device 1: BACKWARD_WEIGHT of stage 1, micro-batch 2 does not directly follow",
    ),
    "backward where there is none": (
        lambda: replace(PLAIN, backward=Backward.NONE),
        "tick 2, device 1: BACKWARD_INPUT of stage 1, micro-batch 0 in a schedule without backward",
    ),
}
SLOT_FAULTS: dict[str, tuple[Callable[[Buffers], object], str]] = {
    "shape": (
        lambda buffers: replace(buffers, w_slot=buffers.w_slot[1:]),
        r"table 'w_slot' has the shape \(11, 2\), not \(12, 2\)",
    ),
    "too few slots": (lambda buffers: replace(buffers, x_slots=1), "tick 2, device 1: arrive_x 1 is not in -1 to 0"),
    "nothing was sent": (
        lambda buffers: with_cells(buffers, arrive_x={(4, 0): 0}),
        "tick 4, device 0: arrive_x is 0, but nothing was sent to this device",
    ),
    "no slot": (
        lambda buffers: with_cells(buffers, arrive_x={(1, 1): -1}),
        "tick 1, device 1: no slot for x of stage 1, micro-batch 0",
    ),
    "holds nothing": (
        lambda buffers: with_cells(buffers, arrive_x={(1, 1): 1}),
        "tick 1, device 1: FORWARD needs x of stage 1, micro-batch 0, but slot 0 holds nothing",
    ),
    "overwritten": (
        lambda buffers: with_cells(buffers, arrive_x={(2, 1): 0}),
        "tick 2, device 1: x of stage 1, micro-batch 1 overwrites x of stage 1, micro-batch 0, which is in use",
    ),
    "wrong value": (
        lambda buffers: with_cells(buffers, x_slot={(4, 1): 0}),
        "tick 4, device 1: FORWARD needs x of stage 1, micro-batch 1, but slot 0 holds x of stage 1, micro-batch 0",
    ),
    "unused": (
        lambda buffers: with_cells(buffers, dy_slot={(0, 0): 0}),
        "tick 0, device 0: dy_slot is 0, but the operation of this tick uses none",
    ),
    "idle": (lambda buffers: with_cells(buffers, w_slot={(2, 0): 0}), "tick 2, device 0: w_slot is 0, but the operation"),
}


def test_the_example_is_what_the_comment_says() -> None:
    letters = np.array([".", "F", "B", "W"])[PLAIN.op]
    assert ["".join(column) for column in letters.T] == ["FF..BWFBW.BW", ".FBWFBWFBW.."]
    assert allocate(PLAIN).arrive_x[:, 1].tolist() == [-1, 0, 1, -1, -1, -1, -1, 0, -1, -1, -1, -1]


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_schedules(fault: str) -> None:
    make, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        simulate(make())


@pytest.mark.parametrize("fault", SLOT_FAULTS)
def test_broken_slots(fault: str) -> None:
    make, message = SLOT_FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        simulate(PLAIN, make(allocate(PLAIN)))


def test_weight_slots_are_kept_until_they_are_read() -> None:
    """ZB-H1 on two devices puts one weight gradient off on the second; one slot is not enough for it."""
    buffers = allocate(SPLIT)
    assert buffers.w_slots == 2
    with pytest.raises(ValueError, match="device 1: w of stage 1, micro-batch 1 overwrites w of stage 1, micro-batch 0"):
        simulate(SPLIT, replace(buffers, w_slots=1, w_slot=np.minimum(buffers.w_slot, 0)))


def test_all_faults_are_told() -> None:
    broken = with_cells(PLAIN, op={(0, 0): 4, (1, 0): -1})
    with pytest.raises(ValueError, match=r"'1f1b' breaks 2 rules:\n  tick 0, device 0: .*\n  tick 1, device 0: "):
        simulate(broken)


CASES = (PLAIN, SPLIT, interleaved(2, 3, 2), zb_h1(3, 4, 2), forward_only(2, 3, 2))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_single_change_goes_unseen(data: st.DataObject) -> None:
    """Any entry of any table that is changed to another number breaks a rule: no entry says nothing."""
    schedule = data.draw(st.sampled_from(CASES))
    name = data.draw(st.sampled_from(OPERATIONS + SLOTS))
    tables = schedule if name in OPERATIONS else allocate(schedule)
    tick, device = data.draw(st.integers(0, schedule.ticks - 1)), data.draw(st.integers(0, schedule.stages - 1))
    value = data.draw(st.integers(-2, 6).filter(lambda value: value != getattr(tables, name)[tick, device]))
    changed = with_cells(tables, **{name: {(tick, device): value}})
    with pytest.raises(ValueError, match=f"schedule '{schedule.name}' breaks"):
        simulate(*((changed,) if name in OPERATIONS else (schedule, changed)))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_moved_operations(data: st.DataObject) -> None:
    """Two entries of a device that change places: accepted only if each is still after what it needs, which is looked up here."""
    schedule = data.draw(st.sampled_from(CASES[:4]))
    device = data.draw(st.integers(0, schedule.stages - 1))
    one, other = (data.draw(st.integers(0, schedule.ticks - 1)) for _ in range(2))
    changed = swapped(schedule, (one, device), (other, device))
    when = {
        (int(changed.op[t, s]), int(changed.chunk[t, s]) * schedule.stages + int(s), int(changed.microbatch[t, s])): int(t)
        for t, s in np.argwhere(changed.op)
    }
    fused = schedule.backward is Backward.FUSED
    sends = Op.BACKWARD_WEIGHT if fused else Op.BACKWARD_INPUT
    valid = all(
        when.get((Op.FORWARD, virtual - 1, m), -1) < when[Op.FORWARD, virtual, m] < when[Op.BACKWARD_INPUT, virtual, m]
        and when.get((sends, virtual + 1, m), -1) < when[Op.BACKWARD_INPUT, virtual, m] < when[Op.BACKWARD_WEIGHT, virtual, m]
        and (not fused or when[Op.BACKWARD_WEIGHT, virtual, m] == when[Op.BACKWARD_INPUT, virtual, m] + 1)
        for op, virtual, m in when
        if op == Op.FORWARD
    )
    if valid:
        assert simulate(changed).ticks == schedule.ticks
    else:
        with pytest.raises(ValueError, match="breaks"):
            simulate(changed)
