"""The text about a hang: where every thread is, and the collectives that the devices may be waiting in.

It is made from memory alone: the disk may be what hangs, so not even the lines of the source are read.
"""

import math
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from jaxllm.report.units import size

# Lines of the listing of collectives.
LISTED = 40
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\(")
_COLLECTIVE = re.compile(rf"({KINDS})(-start)?")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=(mesh\[.*?\] ?\{.*?\}|\{\{.*?\}\}|\[[^ ]*\](?:T\([\d,]*\))?|\{\})")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c64|c128)\[([\d,]*)\]")


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


def collectives(program: str) -> list[str]:
    """One line for each collective of a compiled program (HLO text), in program order, loops and branches in place and once.

    A line has the kind, the result's bytes on one device, the groups of devices (or the pairs), and the operation it comes from.
    """
    computations: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in program.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[2]
            entry = name if found[1] else entry
        computations.setdefault(name, []).append(line)
    return list(_walk(computations, entry, ""))


def _walk(computations: dict[str, list[str]], name: str, inside: str) -> Iterator[str]:
    for line in computations.get(name, ()):
        found = _INSTRUCTION.match(line)
        if not found or found[2] in ("async-update", "async-done"):
            continue
        if (kind := _COLLECTIVE.fullmatch(found[2])) is not None:
            yield _describe(kind[1], kind[2] is not None, found[1], line) + inside
            continue
        within = ", in a loop" if found[2] == "while" else ", in a branch" if found[2] == "conditional" else inside
        for called in _CALLED.findall(line):
            for each in re.findall(r"[\w.\-]+", called):
                yield from _walk(computations, each, within)


def _describe(kind: str, starts: bool, result: str, line: str) -> str:
    groups, source = _GROUPS.search(line), _OP_NAME.search(line)
    sizes = [_bytes(*array) for array in _ARRAY.findall(result)]
    # What starts a collective holds its operands besides, except an all-reduce.
    result_bytes = max(sizes, default=0) if starts and kind != "all-reduce" else sum(sizes)
    among = f" among {groups[1][:60]}{'...' if len(groups[1]) > 60 else ''}" if groups else ""
    return f"{kind} of {size(result_bytes)}{among}{f' ({source[1][-80:]})' if source else ''}"


def _bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" or dtype.startswith("f8") else int(re.sub(r"\D", "", dtype))
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8


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
