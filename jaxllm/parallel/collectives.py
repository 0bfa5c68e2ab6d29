"""The collectives of a compiled program, read out of its text (XLA's HLO): what travels, between which devices, how often.

A collective's bytes are those of the whole array that it is about, on one device:

    all-gather            its result          each device sends (n - 1) / n of it
    reduce-scatter        its operand         (n - 1) / n
    all-reduce            its operand       2 (n - 1) / n
    all-to-all            its operand         (n - 1) / n
    collective-permute    its operand         1

n is the number of devices in a group, and what a device sends is that of the ring algorithms (Thakur et al. 2005, section 4). A collective
between groups of one device is none. XLA's combiner passes merge collectives of several arrays into one operation; so arrays are
counted, which they do not change, and operations beside them.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d\w*)?)\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? ?\{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_TILED = re.compile(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")


@dataclass(frozen=True)
class Collective:
    """One operation of a compiled program, as each device runs it.

    kind: one of KINDS. axes: the mesh axes in which the devices of a group differ; () without a mesh and without names in the text.
    group: devices in a group. arrays: bytes of each whole array (see above). numbers: of each single number, such as a loss or a norm.
    times: how often it runs in one run of the program; None if a loop does not say how often it runs. certain: it is in no branch of a
    conditional, so that it runs on every device.
    where: the path of the program's source that it comes from, as XLA's metadata have it.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    arrays: tuple[int, ...]
    numbers: tuple[int, ...]
    times: int | None
    certain: bool
    where: str

    @property
    def phase(self) -> str:
        """forward, backward or update, as far as `where` tells."""
        if "transpose(" in self.where:
            return "backward"
        return "forward" if "jvp(" in self.where else "update"


class Line(NamedTuple):
    """The collectives of one kind over the same mesh axes in one run: arrays that travel, operations, bytes, and what a device sends."""

    kind: str
    axes: tuple[str, ...]
    arrays: int
    operations: int
    bytes: int
    sent: float


def sent(kind: str, group: int, size: float) -> float:
    """Bytes that a device of a group of so many sends where the whole array has `size` bytes."""
    if kind in ("collective-permute", "collective-broadcast"):
        return size
    return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def read(text: str, mesh: Mesh | AbstractMesh | None = None) -> list[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`), in the order in which they stand in its computations.

    Loops count as often as they run, conditionals with each of their branches. ValueError for a text that is no HLO module.
    """
    entry, computations = _split(text)
    return list(_visit(entry, computations, _Devices(mesh), 1, True))


def summary(collectives: Iterable[Collective], numbers: bool = False) -> list[Line]:
    """One line a kind and axes, in the order of KINDS, of the arrays that they move, or of the single numbers.

    A loop that does not say how often it runs counts once.
    """
    found: dict[tuple[str, tuple[str, ...], int], list[tuple[int, tuple[int, ...]]]] = {}
    for each in collectives:
        moved = each.numbers if numbers else each.arrays
        if moved:
            found.setdefault((each.kind, each.axes, each.group), []).append((each.times or 1, moved))
    lines = []
    for (kind, axes, group), several in found.items():
        count, size = (sum(times * what(moved) for times, moved in several) for what in (len, sum))
        lines.append(Line(kind, axes, count, sum(times for times, _ in several), size, sent(kind, group, size)))
    return sorted(lines, key=lambda line: (KINDS.index(line.kind), line.axes))


def _split(text: str) -> tuple[str, dict[str, list[str]]]:
    """(name of the entry, name -> lines of each computation)."""
    entry, computations, lines = "", dict[str, list[str]](), list[str]()
    for line in text.splitlines():
        start = None if line.startswith(" ") else _COMPUTATION.match(line)
        if start:
            lines = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif " = " in line:
            lines.append(line)
    if not entry:
        raise ValueError(
            "the text has no ENTRY computation.\n  Accepted: compiled.as_text() of a jax program.\n  Compile the program before it is read."
        )
    return entry, computations


def _visit(
    name: str, computations: dict[str, list[str]], devices: "_Devices", times: int | None, certain: bool
) -> Iterator[Collective]:
    for line in computations.get(name, ()):
        found = _collective(line, devices, times, certain)
        if found is not None:
            yield found
        loop = _WHILE.search(line)
        if loop:
            trips = _TRIPS.search(line)
            more = None if trips is None or times is None else times * int(trips[1])
            for part in loop.groups():
                yield from _visit(part, computations, devices, more, certain)
            continue
        for several, one in _BRANCHES.findall(line):
            for part in (several or one).split(","):
                yield from _visit(part.strip().lstrip("%"), computations, devices, times, False)
        for part in _CALLED.findall(line):
            yield from _visit(part, computations, devices, times, certain)


def _collective(line: str, devices: "_Devices", times: int | None, certain: bool) -> Collective | None:
    match = _COLLECTIVE.search(line)
    if match is None:
        return None
    result, kind, start = match.groups()
    axes, group = devices.of(line)
    if group == 1:
        return None
    parts = _ARRAY.findall(_result(result, kind) if start else result)
    each = [(_size(*part) * (group if kind == "reduce-scatter" else 1), bool(part[1])) for part in parts]
    arrays = tuple(size for size, is_array in each if is_array)
    if kind == "all-to-all" and len(parts) == group:  # one operand a device: together they are the array
        arrays = (sum(arrays),)
    numbers = tuple(size for size, is_array in each if not is_array)
    where = _OP_NAME.search(line)
    return Collective(kind, axes, group, arrays, numbers, times, certain, where[1] if where else "")


def _result(started: str, kind: str) -> str:
    """Of what a start operation gives, (operands, results, ...), the results. An all-reduce has results only."""
    if kind == "all-reduce":
        return started
    parts = _parts(started.strip()[1:-1])
    return parts[1]


def _parts(listed: str) -> list[str]:
    """The top level of a list with commas and parentheses."""
    parts, depth = [""], 0
    for letter in listed:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _size(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"^[a-z]+(\d+).*", r"\1", dtype))
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8


@dataclass(frozen=True)
class _Devices:
    """Which axes of the mesh devices differ in. A program calls a device by its place in the mesh."""

    mesh: Mesh | AbstractMesh | None

    def of(self, line: str) -> tuple[tuple[str, ...], int]:
        """(axes, devices of a group) of a collective's line."""
        groups = self._groups(line)
        if "source_target_pairs" not in line:
            return self._axes(groups), len(groups[0])
        # A permutation has no groups: it lies along the axes in which sources and targets differ.
        moved = [pair for pair in groups if pair[0] != pair[1]]
        axes = self._axes(moved)
        return axes, math.prod(self.mesh.shape[axis] for axis in axes) if self.mesh else min(len(moved), 1) + 1

    def _groups(self, line: str) -> list[list[int]]:
        named, tiled = _NAMED.search(line), _TILED.search(line)
        if named:
            return _named_groups(*named.groups())
        if tiled:
            return _iota(tiled[2]).reshape(_numbers(tiled[1])).tolist()
        listed = _LISTED.search(line)
        groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])] if listed else []
        # No groups are one group of all devices.
        return groups or [list(range(self.mesh.size if self.mesh else 2))]

    def _axes(self, groups: Sequence[Sequence[int]]) -> tuple[str, ...]:
        if self.mesh is None:
            return ()
        shape = tuple(self.mesh.shape.values())
        places = [np.stack(np.unravel_index(np.asarray(group), shape)) for group in groups]
        differ = np.any([(place != place[:, :1]).any(1) for place in places] or [[False] * len(shape)], axis=0)
        return tuple(name for name, yes in zip(self.mesh.shape, differ, strict=True) if yes)


def _numbers(listed: str) -> list[int]:
    return [int(n) for n in listed.split(",") if n]


def _iota(written: str) -> np.ndarray:
    """The devices of `[2,4]T(1,0)`, counted along these sizes, then with the dimensions in that order; or of a list, "0,2,1,3"."""
    match = _IOTA.match(written)
    if match is None:
        return np.asarray(_numbers(written))
    sizes = _numbers(match[1])
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(match[2]) if match[2] else None)


def _named_groups(sizes: str, devices: str | None, names: str) -> list[list[int]]:
    """The groups of `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`; 'a':(2)2 is a part of a, 2 devices with 2 before it."""
    mesh = {name: int(size) for name, size, _, _ in _AXIS.findall(sizes)}
    places = _iota(devices) if devices else np.arange(math.prod(mesh.values()))
    shape, own = list[int](), list[int]()
    parts = {name: (int(before or 1), int(size or mesh[name])) for name, _, before, size in _AXIS.findall(names)}
    for name, whole in mesh.items():
        before, size = parts.get(name, (whole, 1))
        own += [len(shape) + 1] if name in parts else []
        shape += [before, size, whole // (before * size)]
    rest = [d for d in range(len(shape)) if d not in own]
    found: list[list[int]] = places.reshape(shape).transpose(*rest, *own).reshape(-1, math.prod(shape[d] for d in own)).tolist()
    return found
