"""Runs a schedule with labels in the place of arrays, and finds every rule that it breaks.

It knows the rules of `schedule.py` and `buffers.py`, and nothing of how the tables were made.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from jaxllm.pipeline.buffers import Buffers, allocate
from jaxllm.pipeline.schedule import Backward, Op, Schedule

# (what, virtual stage, micro-batch): what a slot holds, or what was done.
Label = tuple[str, int, int]
F, B, W = Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT


@dataclass(frozen=True)
class Report:
    """What a schedule costs.

    bubble      idle device-ticks / all device-ticks
    live        the most stage inputs that each device holds at a tick: from FORWARD until BACKWARD_INPUT is done
    pending     the most weight gradients that each device has put off: from the tick after BACKWARD_INPUT to BACKWARD_WEIGHT
    unfinished  the most of both together: from FORWARD until BACKWARD_WEIGHT is done
    """

    ticks: int
    ops: dict[Op, int]
    bubble: Fraction
    live: tuple[int, ...]
    pending: tuple[int, ...]
    unfinished: tuple[int, ...]


def simulate(schedule: Schedule, buffers: Buffers | None = None) -> Report:
    """What the schedule costs; `buffers` are those of `allocate` if none are given.

    ValueError naming tick, device and rule, a line for every rule that is broken.
    """
    broken = _check_tables(schedule)
    if not broken:
        broken = _check_operations(schedule)
    if not broken:
        buffers = buffers or allocate(schedule)
        broken = _check_shapes(schedule, buffers) or _Replay(schedule, buffers).broken()
    if broken:
        raise ValueError("\n  ".join([f"schedule '{schedule.name}' breaks {len(broken)} rules:", *broken]))
    return _measure(schedule)


def _at(tick: int, device: int) -> str:
    return f"tick {tick}, device {device}"


def _said(op: Op, virtual: int, microbatch: int) -> str:
    return f"{op.name} of stage {virtual}, micro-batch {microbatch}"


def _check_tables(schedule: Schedule) -> list[str]:
    """Shapes, and values in range."""
    tables = {"op": (schedule.op, len(Op)), "microbatch": (schedule.microbatch, schedule.microbatches)}
    tables["chunk"] = (schedule.chunk, schedule.chunks)
    broken = []
    for name, (table, size) in tables.items():
        if table.ndim != 2 or table.shape != (schedule.ticks, schedule.stages):
            return [f"table '{name}' has the shape {table.shape}, not (ticks, {schedule.stages})"]
        for tick, device in np.argwhere((table < 0) | (table >= size)):
            broken.append(f"{_at(tick, device)}: {name} {table[tick, device]} is not in 0 to {size - 1}")
        if name != "op":
            for tick, device in np.argwhere((schedule.op == Op.IDLE) & (table != 0)):
                broken.append(f"{_at(tick, device)}: idle, but {name} is {table[tick, device]}, not 0")
    return broken


def _events(schedule: Schedule) -> list[tuple[int, int, Op, int, int]]:
    """(tick, device, operation, virtual stage, micro-batch) of all that is not idle, in order."""
    return [
        (
            int(tick),
            int(device),
            Op(schedule.op[tick, device]),
            int(schedule.chunk[tick, device]) * schedule.stages + int(device),
            int(schedule.microbatch[tick, device]),
        )
        for tick, device in np.argwhere(schedule.op != Op.IDLE)
    ]


def _check_operations(schedule: Schedule) -> list[str]:
    """Everything once, and after what it needs."""
    broken = []
    when: dict[tuple[Op, int, int], int] = {}
    for tick, device, op, virtual, microbatch in _events(schedule):
        if schedule.backward is Backward.NONE and op is not F:
            broken.append(f"{_at(tick, device)}: {_said(op, virtual, microbatch)} in a schedule without backward")
        elif (op, virtual, microbatch) in when:
            broken.append(f"{_at(tick, device)}: {_said(op, virtual, microbatch)} is done twice")
        else:
            when[op, virtual, microbatch] = tick
    last = schedule.stages * schedule.chunks - 1
    for op in (F,) if schedule.backward is Backward.NONE else (F, B, W):
        for virtual in range(last + 1):
            for microbatch in range(schedule.microbatches):
                if (op, virtual, microbatch) not in when:
                    broken.append(f"device {virtual % schedule.stages}: {_said(op, virtual, microbatch)} is never done")
    for (op, virtual, microbatch), tick in when.items():
        for need in _needs(op, virtual, last, schedule.backward):
            if when.get((*need, microbatch), -1) >= tick:
                place = _at(tick, virtual % schedule.stages)
                broken.append(f"{place}: {_said(op, virtual, microbatch)} is not after {_said(*need, microbatch)}")
        if op is W and schedule.backward is Backward.FUSED and when.get((B, virtual, microbatch), tick) < tick - 1:
            place = _at(tick, virtual % schedule.stages)
            broken.append(f"{place}: {_said(op, virtual, microbatch)} does not directly follow BACKWARD_INPUT, as fused ones do")
    return broken


def _needs(op: Op, virtual: int, last: int, backward: Backward) -> list[tuple[Op, int]]:
    """(operation, virtual stage) that must be done at an earlier tick."""
    if op is F:
        return [(F, virtual - 1)] if virtual > 0 else []
    if op is W:
        return [(B, virtual)]
    after = [(W if backward is Backward.FUSED else B, virtual + 1)] if virtual < last else []
    return [(F, virtual), *after]


def _check_shapes(schedule: Schedule, buffers: Buffers) -> list[str]:
    broken = []
    for name, size in (
        ("arrive_x", buffers.x_slots),
        ("x_slot", buffers.x_slots),
        ("arrive_dy", buffers.dy_slots),
        ("dy_slot", buffers.dy_slots),
        ("w_slot", buffers.w_slots),
    ):
        table = getattr(buffers, name)
        if table.shape != schedule.op.shape:
            return [f"table '{name}' has the shape {table.shape}, not {schedule.op.shape}"]
        for tick, device in np.argwhere((table < -1) | (table >= size)):
            broken.append(f"{_at(tick, device)}: {name} {table[tick, device]} is not in -1 to {size - 1}")
    return broken


@dataclass
class _Replay:
    """The devices' memories, by what is stored in them."""

    schedule: Schedule
    buffers: Buffers
    # (kind of slot, device, number) -> what it holds and who may still read it
    memory: dict[tuple[str, int, int], tuple[Label, set[Op]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def broken(self) -> list[str]:
        """All rules that are broken, in the order of ticks."""
        last = self.schedule.stages * self.schedule.chunks - 1
        sent: dict[tuple[str, int], Label] = {}
        events = defaultdict(list)
        for event in _events(self.schedule):
            events[event[0]].append(event)
        for tick in range(self.schedule.ticks):
            for kind, table in (("x", self.buffers.arrive_x), ("dy", self.buffers.arrive_dy)):
                for device in range(self.schedule.stages):
                    self.arrive(tick, device, kind, int(table[tick, device]), sent.get((kind, device)))
            sent = {}
            busy = set()
            for _, device, op, virtual, microbatch in events[tick]:
                busy.add(device)
                self.operate(tick, device, op, virtual, microbatch)
                if op is F and virtual < last:
                    sent["x", (virtual + 1) % self.schedule.stages] = ("x", virtual + 1, microbatch)
                if op is B and virtual > 0:
                    sent["dy", (virtual - 1) % self.schedule.stages] = ("dy", virtual - 1, microbatch)
            for device in set(range(self.schedule.stages)) - busy:
                for kind in ("x", "dy", "w"):
                    self.unused(tick, device, kind)
        return self.faults

    def operate(self, tick: int, device: int, op: Op, virtual: int, microbatch: int) -> None:
        last = self.schedule.stages * self.schedule.chunks - 1
        uses = {"x": op in (F, B) and virtual > 0, "dy": op is B and virtual < last, "w": op is W}
        for kind, used in uses.items():
            if used:
                self.read(tick, device, op, (kind, virtual, microbatch))
            elif kind != "w" or op is not B:
                self.unused(tick, device, kind)
        if op is B:
            self.store(tick, device, "w", int(self.buffers.w_slot[tick, device]), ("w", virtual, microbatch))

    def arrive(self, tick: int, device: int, kind: str, slot: int, label: Label | None) -> None:
        if label is None and slot >= 0:
            self.faults.append(f"{_at(tick, device)}: arrive_{kind} is {slot}, but nothing was sent to this device")
        elif label is not None:
            self.store(tick, device, kind, slot, label)

    def store(self, tick: int, device: int, kind: str, slot: int, label: Label) -> None:
        if slot < 0:
            self.faults.append(f"{_at(tick, device)}: no slot for {_named(label)}")
            return
        held = self.memory.get((kind, device, slot))
        if held and held[1]:
            self.faults.append(f"{_at(tick, device)}: {_named(label)} overwrites {_named(held[0])}, which is in use")
        self.memory[kind, device, slot] = label, self.readers(kind)

    def readers(self, kind: str) -> set[Op]:
        if kind == "x":
            return {F} if self.schedule.backward is Backward.NONE else {F, B}
        return {B} if kind == "dy" else {W}

    def read(self, tick: int, device: int, op: Op, label: Label) -> None:
        kind, *_ = label
        slot = int(getattr(self.buffers, f"{kind}_slot")[tick, device])
        held = self.memory.get((kind, device, slot))
        if held is None or held[0] != label:
            found = f"holds {_named(held[0])}" if held else "holds nothing"
            self.faults.append(f"{_at(tick, device)}: {op.name} needs {_named(label)}, but slot {slot} {found}")
        else:
            held[1].discard(op)

    def unused(self, tick: int, device: int, kind: str) -> None:
        slot = int(getattr(self.buffers, f"{kind}_slot")[tick, device])
        if slot >= 0:
            self.faults.append(f"{_at(tick, device)}: {kind}_slot is {slot}, but the operation of this tick uses none")


def _named(label: Label) -> str:
    kind, virtual, microbatch = label
    return f"{kind} of stage {virtual}, micro-batch {microbatch}"


def _measure(schedule: Schedule) -> Report:
    when = {(op, virtual, microbatch): tick for tick, _, op, virtual, microbatch in _events(schedule)}
    backward = schedule.backward is not Backward.NONE
    live, pending, unfinished = (np.zeros((schedule.ticks, schedule.stages), int) for _ in range(3))
    for (op, virtual, microbatch), tick in when.items():
        if op is F:
            device = virtual % schedule.stages
            read = when[B, virtual, microbatch] if backward else tick
            done = when[W, virtual, microbatch] if backward else tick
            live[tick : read + 1, device] += 1
            pending[read + 1 : done + 1, device] += 1
            unfinished[tick : done + 1, device] += 1
    ops = {op: int((schedule.op == op).sum()) for op in Op}
    bubble = Fraction(ops[Op.IDLE], schedule.op.size)
    peaks = (tuple(int(peak) for peak in counted.max(axis=0)) for counted in (live, pending, unfinished))
    return Report(schedule.ticks, ops, bubble, *peaks)
