"""Every schedule keeps the rules and costs what its paper says, by the simulator, which does not know how it was made."""

from fractions import Fraction

import numpy as np
import pytest

from jaxllm import registry
from jaxllm.pipeline.buffers import allocate
from jaxllm.pipeline.schedule import Op, Schedule, forward_only, zb_h1
from jaxllm.pipeline.simulate import simulate

NAMES = registry.names("pipeline")
CHUNKS = {"1f1b": (1,), "interleaved": (2, 3)}
SIZES = [(s, m) for s in (1, 2, 3, 4, 8) for m in sorted({1, 3, 5, s, s + 1, 2 * s - 1, 2 * s, 4 * s})]
CASES = [(name, s, m, v) for name in NAMES for s, m in SIZES for v in CHUNKS.get(name, (1, 2, 3))]


def make(name: str, stages: int, microbatches: int, chunks: int) -> Schedule:
    return registry.resolve("pipeline", name)(stages, microbatches, chunks)


def ideal_ticks(name: str, stages: int, microbatches: int, chunks: int) -> int:
    """Work of a device, and the bubble of its paper: (S - 1)(F + B + W) or, of ZB-H1, (S - 1)(F + B - W), where F = B = W = 1.

    With fewer micro-batches than stages each further chunk waits until the first micro-batch has been around.
    """
    work, missing = 3 * microbatches * chunks, max(0, stages - microbatches)
    if name == "zb_h1":
        return work + stages - 1 + missing
    return work + 3 * (stages - 1) + 3 * (chunks - 1) * missing


@pytest.mark.parametrize("name", NAMES)
def test_bubbles_are_those_of_the_papers(name: str) -> None:
    for _, stages, microbatches, chunks in (case for case in CASES if case[0] == name):
        report = simulate(make(name, stages, microbatches, chunks))
        case = (stages, microbatches, chunks)
        work = 3 * microbatches * chunks
        assert report.ops[Op.IDLE] == stages * (report.ticks - work), case
        assert report.bubble == Fraction(report.ticks - work, report.ticks), case
        if microbatches >= stages:
            unit = 3 if name == "zb_h1" else 1
            assert report.bubble == Fraction(stages - 1, unit * chunks * microbatches + stages - 1), case
        if name != "zb_h1" or microbatches >= stages or chunks == 1:
            assert report.ticks == ideal_ticks(name, *case), case


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_peaks(stages: int, microbatches: int) -> None:
    """1F1B holds S - s micro-batches on device s, however many there are; GPipe holds all of them."""
    one = tuple(min(microbatches, stages - stage) for stage in range(stages))
    assert simulate(make("gpipe", stages, microbatches, 1)).live == (microbatches,) * stages
    assert simulate(make("gpipe", stages, microbatches, 3)).live == (3 * microbatches,) * stages
    assert simulate(make("1f1b", stages, microbatches, 1)).live == one
    split = simulate(make("zb_h1", stages, microbatches, 1))
    assert split.live == one
    assert max(split.unfinished) == min(stages, microbatches)
    put_off = tuple(stage + 1 for stage in range(stages))
    assert split.pending == put_off if microbatches >= stages else max(split.pending) <= microbatches
    if microbatches % stages == 0 and microbatches > stages:
        for chunks in (2, 3):
            # Narayanan et al. 2021: 2 (S - s - 1) + (V - 1) S forwards of warm-up, and one.
            wanted = tuple(2 * (stages - stage - 1) + (chunks - 1) * stages + 1 for stage in range(stages))
            assert simulate(make("interleaved", stages, microbatches, chunks)).live == wanted


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_forward_only(chunks: int) -> None:
    for stages, microbatches in SIZES:
        schedule = forward_only(stages, microbatches, chunks)
        report = simulate(schedule)
        assert report.ticks == microbatches * chunks + stages - 1 + (chunks - 1) * max(0, stages - microbatches)
        assert set(np.unique(schedule.op)) <= {Op.IDLE, Op.FORWARD}
        assert allocate(schedule).dy_slots == allocate(schedule).w_slots == 0


@pytest.mark.parametrize("name", NAMES)
def test_slots_are_as_few_as_they_can_be(name: str) -> None:
    """A device needs as many slots as it has values that wait at the same tick: counted here tick by tick."""
    for _, stages, microbatches, chunks in (case for case in CASES if case[0] == name and case[1] < 8):
        schedule = make(name, stages, microbatches, chunks)
        buffers = allocate(schedule)
        waiting = {"x": np.zeros(schedule.op.shape, int), "dy": np.zeros(schedule.op.shape, int)}
        waiting["w"] = waiting["x"].copy()
        when = {
            (schedule.op[t, s], schedule.chunk[t, s] * stages + s, schedule.microbatch[t, s]): t
            for t, s in np.argwhere(schedule.op)
        }
        for (op, virtual, microbatch), tick in when.items():
            if op == Op.FORWARD and virtual + 1 < stages * chunks:
                read = when[Op.BACKWARD_INPUT, virtual + 1, microbatch]
                waiting["x"][tick + 1 : read + 1, (virtual + 1) % stages] += 1
            if op == Op.BACKWARD_INPUT and virtual > 0:
                read = when[Op.BACKWARD_INPUT, virtual - 1, microbatch]
                waiting["dy"][tick + 1 : read + 1, (virtual - 1) % stages] += 1
            if op == Op.BACKWARD_INPUT:
                waiting["w"][tick : when[Op.BACKWARD_WEIGHT, virtual, microbatch] + 1, virtual % stages] += 1
        case = (stages, microbatches, chunks)
        assert (buffers.x_slots, buffers.dy_slots, buffers.w_slots) == tuple(count.max() for count in waiting.values()), case


def test_memory_of_1f1b_does_not_grow_with_the_microbatches() -> None:
    for name, chunks in (("1f1b", 1), ("interleaved", 2), ("zb_h1", 1), ("zb_h1", 2)):
        few, many = (allocate(make(name, 4, microbatches, chunks)) for microbatches in (8, 64))
        assert (few.x_slots, few.dy_slots, few.w_slots) == (many.x_slots, many.dy_slots, many.w_slots)
    assert allocate(make("gpipe", 4, 64, 1)).x_slots == 64


def test_tables_cannot_be_changed() -> None:
    schedule = zb_h1(2, 2, 1)
    for table in (schedule.op, schedule.microbatch, schedule.chunk, allocate(schedule).x_slot):
        with pytest.raises(ValueError, match="read-only"):
            table[0, 0] = 1


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("gpipe", (0, 1, 1), "schedule 'gpipe' with 0 stages.\n  Accepted: 1 or more.\n  Raise"),
        ("zb_h1", (1, -2, 1), "schedule 'zb_h1' with -2 micro-batches.\n  Accepted: 1 or more.\n  Raise"),
        ("interleaved", (1, 1, 0), "schedule 'interleaved' with 0 chunks.\n  Accepted: 1 or more.\n  Raise"),
        (
            "interleaved",
            (2, 2, 1),
            "with 1 chunk a device.\n  Accepted: 2 chunks or more.\n  Raise the number of chunks, or use '1f1b'",
        ),
        ("1f1b", (2, 2, 2), "with 2 chunks a device.\n  Accepted: 1 chunk.\n  Use 'interleaved'"),
    ],
)
def test_refusals(name: str, sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make(name, *sizes)
    assert message in str(caught.value)
