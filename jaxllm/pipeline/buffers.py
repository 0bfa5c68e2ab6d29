"""The memory that a schedule needs: which slot each value that waits is kept in, by colouring intervals.

A device keeps three kinds of values in arrays whose sizes are fixed before the first tick:

    x   the input of a virtual stage: arrives at the start of the tick after FORWARD of the stage before, and is held until
        this stage's BACKWARD_INPUT (in a schedule without backward: its FORWARD) has read it. The first virtual stage
        needs none: its input is the embedding of the micro-batch, which can be computed again.
    dy  the gradient of the output: arrives at the start of the tick after BACKWARD_INPUT of the next stage, in fused schedules
        too, and is held until BACKWARD_INPUT has read it. The last virtual stage needs none: it makes the loss itself.
    w   what BACKWARD_WEIGHT needs: written at the end of BACKWARD_INPUT, held until BACKWARD_WEIGHT has read it.

In a tick arrivals are stored first, then the operation reads, then it writes. So a slot whose last reader is at tick t is free
for an arrival at tick t + 1. Chunks share the slots of their device, and what crosses from the last device to the first is
stored as any other arrival.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from jaxllm.pipeline.schedule import Backward, Op, Schedule


@dataclass(frozen=True, eq=False)
class Buffers:
    """Slots as int32 tables [ticks, stages], read-only, -1 where there is none, and their numbers, the largest over devices.

    arrive_x   slot for the activation that was sent to this device at the end of the tick before; stored first
    arrive_dy  slot for the gradient that was sent to this device at the end of the tick before; stored first
    x_slot     slot that FORWARD and BACKWARD_INPUT read
    dy_slot    slot that BACKWARD_INPUT reads
    w_slot     slot that BACKWARD_INPUT writes and BACKWARD_WEIGHT reads
    """

    arrive_x: np.ndarray
    arrive_dy: np.ndarray
    x_slot: np.ndarray
    dy_slot: np.ndarray
    w_slot: np.ndarray
    x_slots: int
    dy_slots: int
    w_slots: int


def allocate(schedule: Schedule) -> Buffers:
    """The fewest slots with which `schedule` can run on each device."""
    ticks = {
        (
            Op(schedule.op[tick, stage]),
            schedule.chunk[tick, stage] * schedule.stages + stage,
            schedule.microbatch[tick, stage],
        ): tick
        for tick, stage in np.argwhere(schedule.op != Op.IDLE)
    }
    tables = {name: np.full(schedule.op.shape, -1, np.int32) for name in ("arrive_x", "arrive_dy", "x_slot", "dy_slot", "w_slot")}
    last = schedule.chunks * schedule.stages - 1
    end = Op.FORWARD if schedule.backward is Backward.NONE else Op.BACKWARD_INPUT
    counts = {"x": 0, "dy": 0, "w": 0}
    for stage in range(schedule.stages):
        mine = [key for key in ticks if key[1] % schedule.stages == stage]
        forwards = [(v, m) for op, v, m in mine if op is Op.FORWARD and v > 0]
        backwards = [(v, m) for op, v, m in mine if op is Op.BACKWARD_INPUT]
        # Of each value the tick at which it is written, and those at which it is read.
        x = [(ticks[Op.FORWARD, v - 1, m] + 1, ticks[Op.FORWARD, v, m], ticks[end, v, m]) for v, m in forwards]
        dy = [(ticks[Op.BACKWARD_INPUT, v + 1, m] + 1, ticks[Op.BACKWARD_INPUT, v, m]) for v, m in backwards if v < last]
        w = [(ticks[Op.BACKWARD_INPUT, v, m], ticks[Op.BACKWARD_WEIGHT, v, m]) for v, m in backwards]
        for kind, arrival, values in (("x", "arrive_x", x), ("dy", "arrive_dy", dy), ("w", "w_slot", w)):
            slots = _colour([(value[0], value[-1]) for value in values])
            for slot, (written, *read) in zip(slots, values, strict=True):
                tables[arrival][written, stage] = slot
                tables[f"{kind}_slot"][read, stage] = slot
            counts[kind] = max(counts[kind], *(slot + 1 for slot in slots), 0)
    for table in tables.values():
        table.setflags(write=False)
    return Buffers(**tables, x_slots=counts["x"], dy_slots=counts["dy"], w_slots=counts["w"])


def _colour(intervals: list[tuple[int, int]]) -> list[int]:
    """A slot for each (first, last) tick, such that no two that share a tick share a slot: as few as overlap at most."""
    slots = [0] * len(intervals)
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    for index in sorted(range(len(intervals)), key=intervals.__getitem__):
        first, last = intervals[index]
        while busy and busy[0][0] < first:
            heapq.heappush(free, heapq.heappop(busy)[1])
        slots[index] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (last, slots[index]))
    return slots
