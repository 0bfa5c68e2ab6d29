"""Pipeline schedules as data: who does what for which micro-batch at which tick.

A model is cut into V * S virtual stages of equal cost; chunk v on device s is virtual stage v * S + s. Each virtual stage
has three operations a micro-batch, which all take one tick, the simplification of Qi et al. 2023 (arXiv:2401.10241):

    FORWARD          of (stage, m) needs FORWARD of (stage - 1, m) at an earlier tick
    BACKWARD_INPUT   of (stage, m) needs its own FORWARD, and the backward of (stage + 1, m), at earlier ticks
    BACKWARD_WEIGHT  of (stage, m) needs its own BACKWARD_INPUT at an earlier tick

What travels is sent at the end of the tick that made it and is there at the start of the next one. A device does one
operation a tick. All schedules come out of one list scheduler, `_place`; they differ in the order of their micro-batches,
in the number of forwards before the first backward, and in whether the backward is split.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from itertools import pairwise

import numpy as np


class Op(IntEnum):
    """What a device does in a tick."""

    IDLE = 0
    FORWARD = 1
    BACKWARD_INPUT = 2
    BACKWARD_WEIGHT = 3


class Backward(Enum):
    """What a schedule does with gradients.

    FUSED: one backward of two ticks. BACKWARD_WEIGHT follows BACKWARD_INPUT at the next tick, and the stage before does not
    use the gradient of its output until both are done, as if it were sent only then.
    SPLIT: the stage before may go on right after BACKWARD_INPUT; BACKWARD_WEIGHT comes when there is time.
    """

    NONE = "none"
    FUSED = "fused"
    SPLIT = "split"


@dataclass(frozen=True, eq=False)
class Schedule:
    """A table a field: `op`, `microbatch` and `chunk` are int32 [ticks, stages], read-only; the last two are 0 where idle."""

    name: str
    stages: int
    microbatches: int
    chunks: int
    backward: Backward
    op: np.ndarray
    microbatch: np.ndarray
    chunk: np.ndarray

    @property
    def ticks(self) -> int:
        return len(self.op)


# (chunk, micro-batch)
Item = tuple[int, int]


def gpipe(stages: int, microbatches: int, chunks: int) -> Schedule:
    """All forwards, then all backwards in reverse order (Huang et al. 2019, arXiv:1811.06965, figure 2c).

    With several chunks, all micro-batches go around the devices once a chunk.
    """
    _check("gpipe", stages, microbatches, chunks)
    forwards = _forwards([range(microbatches)], chunks)
    warm_up = [len(forwards)] * stages
    return _place("gpipe", stages, microbatches, chunks, Backward.FUSED, forwards, forwards[::-1], warm_up)


def one_forward_one_backward(stages: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B with a flush (PipeDream-Flush, Narayanan et al. 2020, arXiv:2006.09503).

    After a warm-up of S - s - 1 forwards device s does one forward and one backward in turn: it never holds more than S - s.
    """
    _check("1f1b", stages, microbatches, chunks)
    if chunks != 1:
        raise ValueError(
            f"schedule '1f1b' with {chunks} chunks a device.\n  Accepted: 1 chunk.\n"
            "  Use 'interleaved', which is 1F1B with several chunks, or 'gpipe' or 'zb_h1', which take any number."
        )
    return _place("1f1b", stages, microbatches, 1, Backward.FUSED, *_in_groups(stages, microbatches, 1))


def interleaved(stages: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B with several chunks a device (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.2).

    Micro-batches go through a chunk in groups of S, then the same group through the next chunk. Where M is not a multiple of S,
    which the paper does not allow, groups of S to 2 S - 1 are made, as equal as can be, so that no device waits for a short one.
    """
    _check("interleaved", stages, microbatches, chunks)
    if chunks < 2:
        raise ValueError(
            f"schedule 'interleaved' with {chunks} chunk a device.\n  Accepted: 2 chunks or more.\n"
            "  Raise the number of chunks, or use '1f1b', which is the schedule of one chunk."
        )
    return _place("interleaved", stages, microbatches, chunks, Backward.FUSED, *_in_groups(stages, microbatches, chunks))


def zb_h1(stages: int, microbatches: int, chunks: int) -> Schedule:
    """Zero-bubble H1 (Qi et al. 2023, arXiv:2401.10241, section 2.1): 1F1B whose weight gradients fill what was idle.

    Device s puts off s weight gradients, just enough for the first device to be never idle after its first backward. So no
    device holds more micro-batches, from their forward to their weight gradient, than the first one does in 1F1B, which are S.
    With several chunks, which the paper does not have, it is the interleaved schedule that is split.
    """
    _check("zb_h1", stages, microbatches, chunks)
    return _place("zb_h1", stages, microbatches, chunks, Backward.SPLIT, *_in_groups(stages, microbatches, chunks))


def forward_only(stages: int, microbatches: int, chunks: int) -> Schedule:
    """The forwards of the interleaved order without any backward, for evaluation."""
    _check("forward_only", stages, microbatches, chunks)
    forwards = _forwards(_groups(stages, microbatches), chunks)
    warm_up = [len(forwards)] * stages
    return _place("forward_only", stages, microbatches, chunks, Backward.NONE, forwards, [], warm_up)


def _check(name: str, stages: int, microbatches: int, chunks: int) -> None:
    for what, number in (("stages", stages), ("micro-batches", microbatches), ("chunks", chunks)):
        if number < 1:
            raise ValueError(f"schedule '{name}' with {number} {what}.\n  Accepted: 1 or more.\n  Raise the number of {what}.")


def _groups(stages: int, microbatches: int) -> list[range]:
    """Runs of at least `stages` micro-batches, if there are as many, as equal as can be, longer ones first."""
    number = max(1, microbatches // stages)
    short, longer = divmod(microbatches, number)
    starts = [index * short + min(index, longer) for index in range(number + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


def _forwards(groups: list[range], chunks: int) -> list[Item]:
    return [(chunk, microbatch) for group in groups for chunk in range(chunks) for microbatch in group]


def _in_groups(stages: int, microbatches: int, chunks: int) -> tuple[list[Item], list[Item], list[int]]:
    """(forwards, backwards, warm-up): a group goes through all chunks, and back through them, before the next.

    The warm-up, a device, are the forwards before the first pair of one forward and one backward. With one chunk it is one for
    each later stage; with several all chunks but the last of the first group, and two for each later stage.
    """
    groups = _groups(stages, microbatches)
    backwards = [(chunk, microbatch) for group in groups for chunk in reversed(range(chunks)) for microbatch in group]
    each = 1 if chunks == 1 else 2
    warm_up = [each * (stages - stage - 1) + (chunks - 1) * len(groups[0]) for stage in range(stages)]
    return _forwards(groups, chunks), backwards, warm_up


class _Device:
    """What one device has still to do, and what it may do next.

    Forwards and backwards come in a fixed order: the warm-up, then one of each in turn, then the rest of the backwards.
    A weight gradient comes as soon as more than `put_off` of them wait, or else when the next in order has to wait.
    """

    def __init__(self, stage: int, forwards: list[Item], backwards: list[Item], warm_up: int, put_off: int) -> None:
        self.stage, self.put_off = stage, put_off
        first = [(Op.FORWARD, item) for item in forwards]
        second = [(Op.BACKWARD_INPUT, item) for item in backwards]
        turns = [entry for pair in zip(first[warm_up:], second, strict=False) for entry in pair]
        self.queue = deque([*first[:warm_up], *turns, *second[max(0, len(first) - warm_up) :]])
        self.weights = deque[Item]()

    def choose(self, ready: Callable[[Op, Item, int], bool]) -> Op:
        """The operation of this tick."""
        if len(self.weights) <= self.put_off and self.queue and ready(*self.queue[0], self.stage):
            return self.queue[0][0]
        return Op.BACKWARD_WEIGHT if self.weights else Op.IDLE

    def take(self, op: Op) -> Item:
        """Does what was chosen; its (chunk, micro-batch)."""
        if op is Op.IDLE:
            return 0, 0
        if op is Op.BACKWARD_WEIGHT:
            return self.weights.popleft()
        _, item = self.queue.popleft()
        if op is Op.BACKWARD_INPUT:
            self.weights.append(item)
        return item


def _place(
    name: str,
    stages: int,
    microbatches: int,
    chunks: int,
    backward: Backward,
    forwards: list[Item],
    backwards: list[Item],
    warm_up: list[int],
) -> Schedule:
    """The earliest ticks at which the devices can do what they have to do, in their order."""
    put_off = range(stages) if backward is Backward.SPLIT else [0] * stages
    devices = [_Device(stage, forwards, backwards, warm_up[stage], put_off[stage]) for stage in range(stages)]
    done: set[tuple[Op, int, int]] = set()
    last = chunks * stages - 1
    # What the backward of the stage before waits for.
    sent = Op.BACKWARD_INPUT if backward is Backward.SPLIT else Op.BACKWARD_WEIGHT

    def ready(op: Op, item: Item, stage: int) -> bool:
        chunk, microbatch = item
        virtual = chunk * stages + stage
        if op is Op.FORWARD:
            return virtual == 0 or (Op.FORWARD, virtual - 1, microbatch) in done
        return (Op.FORWARD, virtual, microbatch) in done and (virtual == last or (sent, virtual + 1, microbatch) in done)

    rows = []
    while any(device.queue or device.weights for device in devices):
        ops = [device.choose(ready) for device in devices]
        if not any(ops):
            raise RuntimeError(f"schedule '{name}': {stages} stages, {microbatches} micro-batches, {chunks} chunks come to a halt")
        items = [device.take(op) for device, op in zip(devices, ops, strict=True)]
        done |= {(op, chunk * stages + s, m) for s, (op, (chunk, m)) in enumerate(zip(ops, items, strict=True)) if op}
        rows.append([(op, microbatch, chunk) for op, (chunk, microbatch) in zip(ops, items, strict=True)])
    tables = np.array(rows, np.int32).transpose(2, 0, 1).copy()
    tables.setflags(write=False)
    return Schedule(name, stages, microbatches, chunks, backward, *tables)
