"""The text about a hang: where every thread is, and the collectives that the devices may be waiting in.

It is made from memory alone: the disk may be what hangs, so not even the lines of the source are read.
"""

import sys
import threading
from collections.abc import Sequence
from types import FrameType

from jax.sharding import AbstractMesh, Mesh

from jaxllm.parallel import collectives
from jaxllm.parallel.collectives import Collective
from jaxllm.report.units import size

# Lines of the listing of collectives.
LISTED = 40


def stacks() -> str:
    """The Python stack of every thread, innermost call first; the main thread first, threads in the same place together."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    places: dict[str, list[str]] = {}
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        if ident != threading.get_ident():
            places.setdefault(_calls(frame), []).append(names.get(ident) or f"{ident} (not started by Python, such as a callback)")
    return "\n".join(f"thread {', '.join(threads)}:\n{calls}" for calls, threads in places.items())


def _calls(frame: FrameType | None) -> str:
    lines = []
    while frame is not None:
        code = frame.f_code
        lines.append(f"  {code.co_filename}:{frame.f_lineno} in {code.co_qualname}\n")
        frame = frame.f_back
    return "".join(lines)


def list_collectives(program: str, mesh: Mesh | AbstractMesh) -> list[str]:
    """One line for each collective of a compiled program (HLO text), in program order, loops and branches in place and once."""
    return [_describe(each) for each in collectives.read(program, mesh)]


def _describe(each: Collective) -> str:
    over = f" over {' x '.join(each.axes)}" if each.axes else ""
    times = "" if each.times == 1 else f", {each.times or 'several'} times"
    source = f" ({each.where[-80:]})" if each.where else ""
    return (
        f"{each.kind}{over} of {size(sum(each.arrays) + sum(each.numbers))}{source}{times}{'' if each.certain else ', in a branch'}"
    )


def about(lines: Sequence[str] | None) -> str:
    """What can be said about the last collective, given those of the compiled step (None: it is not known yet); ends with a newline."""
    if not lines:
        reason = "none is known, as the step is not compiled yet" if lines is None else "the step has none"
        return f"last collective: {reason}\n"
    numbered = [f"  {number}. {line}" for number, line in enumerate(lines, 1)]
    if len(numbered) > LISTED:
        half = LISTED // 2
        numbered = [*numbered[:half], f"  ... {len(numbered) - 2 * half} more ...", *numbered[-half:]]
    return "\n".join(
        [
            "last collective. known: a step runs these, in this order. not known: in which of them the devices are, as XLA does not tell;",
            "what XLA, NCCL or gloo have said themselves stands above, in stderr",
            *numbered,
            "",
        ]
    )
