"""A schedule as text: a column a tick, a block of lines a device."""

from jaxllm.pipeline.schedule import Op, Schedule

LETTERS = {Op.IDLE: ".", Op.FORWARD: "F", Op.BACKWARD_INPUT: "B", Op.BACKWARD_WEIGHT: "W"}
# Ticks between two numbers above the columns; parts are multiples of it.
EVERY = 5


def text(schedule: Schedule, width: int = 100) -> str:
    """The drawing with its legend, cut into parts of at most `width` characters, but five ticks at least, one below the other.

    Under the letter of an operation stands its micro-batch, and under that its chunk (a, b, ...) if there are several.
    """
    label_chars = len(f"device {schedule.stages - 1}") + 2
    cell_chars = len(str(schedule.microbatches - 1)) + 1
    room = EVERY * max(1, (width - label_chars) // (cell_chars * EVERY))
    starts = range(0, schedule.ticks, room)
    parts = [_part(schedule, start, min(start + room, schedule.ticks), label_chars, cell_chars) for start in starts]
    return "\n\n".join([*parts, legend(schedule)])


def legend(schedule: Schedule) -> str:
    """What the letters mean."""
    below = "below: the micro-batch"
    if schedule.chunks > 1:
        ends = [(v * schedule.stages, (v + 1) * schedule.stages - 1) for v in range(schedule.chunks)]
        named = [f"{chunk_name(v)} = stages {first} to {last}" for v, (first, last) in enumerate(ends)]
        below += f" and the chunk ({', '.join(named)})"
    return f"F forward, B backward for the input, W backward for the weights, . idle\n{below}"


def chunk_name(chunk: int) -> str:
    """a to z, then aa, ab, ..."""
    return (chunk_name(chunk // 26 - 1) if chunk >= 26 else "") + chr(ord("a") + chunk % 26)


def _part(schedule: Schedule, start: int, end: int, label_chars: int, cell_chars: int) -> str:
    ticks = range(start, end)
    numbers = "".join(str(tick).ljust(EVERY * cell_chars) for tick in ticks if tick % EVERY == 0)
    lines = ["tick".ljust(label_chars) + numbers]
    for device in range(schedule.stages):
        cells = [
            (LETTERS[Op(op)], str(microbatch), chunk_name(chunk)) if op else (LETTERS[Op.IDLE], "", "")
            for op, microbatch, chunk in zip(
                schedule.op[start:end, device],
                schedule.microbatch[start:end, device],
                schedule.chunk[start:end, device],
                strict=True,
            )
        ]
        shown = 3 if schedule.chunks > 1 else 2
        for index, label in zip(range(shown), (f"device {device}", "", ""), strict=False):
            lines.append(label.ljust(label_chars) + "".join(cell[index].ljust(cell_chars) for cell in cells))
    return "\n".join(line.rstrip() for line in lines)
