"""What the processes of a run do together. With one process each function is its trivial case and costs nothing.

Every function here that waits must be called by all processes, in the same order.
"""

import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# For the slowest thing that one process does while the others wait: to prepare the data.
WAIT_SECS = 24 * 3600
# Until a file that one host has written is seen by all: network file systems keep names in memory for some seconds.
SHARED_SECS = 30.0
_waits: Counter[str] = Counter()


def is_first() -> bool:
    """True on the one process that writes the files of a run, prints and reports."""
    return jax.process_index() == 0


def wait(name: str, timeout_secs: float = WAIT_SECS) -> None:
    """Returns when all processes have come to this point. `name` tells points apart; may be called from any thread.

    It uses no device, so that nothing is held up on them, and a process that dies meanwhile ends the wait with an error.
    """
    if jax.process_count() == 1:
        return
    # Imported here: it is JAX's own barrier, which has no public name but this one.
    from orbax.checkpoint import multihost

    _waits[name] += 1
    multihost.get_barrier_sync_fn()(key=f"jaxllm {name} {_waits[name]}", timeout_ms=int(timeout_secs * 1000))


def from_first(number: int) -> int:
    """The number that the first process gives, on all: what it alone has read from a file or the clock."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def fetch(tree: Any) -> Any:
    """The arrays of a tree as NumPy arrays on every process, also those of which each holds only a part."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(whole, tree)


def check_reach(devices: np.ndarray) -> None:
    """ValueError unless every process holds some of these devices of a mesh: one without any could neither compute nor save."""
    holding = {device.process_index for device in devices.flat}
    if idle := sorted(set(range(jax.process_count())) - holding):
        raise ValueError(
            f"the mesh has {devices.size} of {jax.device_count()} devices, so that {len(idle)} of {jax.process_count()} processes have"
            f" nothing to do (process {idle[0]}, ...).\n"
            f"  Accepted: a mesh that reaches every process, such as one of all {jax.device_count()} devices.\n"
            "  Raise parallel.data or parallel.fsdp (-1: what is left over), or start fewer processes."
        )


def of_all(numbers: Sequence[int]) -> np.ndarray:
    """int32 [processes, numbers]: what each process gives."""
    return np.asarray(multihost_utils.process_allgather(np.array(numbers, np.int32))).reshape(jax.process_count(), -1)


def check_same(texts: Mapping[str, str], what: str, change: str) -> None:
    """ValueError, on all processes, unless each has the same texts by the same names; it names those that differ."""
    if jax.process_count() == 1:
        return
    numbers = of_all([_hash(text) for text in texts.values()])
    others = (numbers != numbers[0]).any(0)
    if others.any():
        differing = [name for name, differs in zip(texts, others, strict=True) if differs]
        who = ", ".join(str(process) for process in np.flatnonzero((numbers != numbers[0]).any(1)))
        mine = ", ".join(f"{name} = {texts[name]}" for name in differing[:4] if len(texts[name]) < 80)
        raise ValueError(
            f"{what} on process {who} is not that of process 0: {', '.join(differing[:8])}"
            f" ({f'{mine} ' if mine else ''}on process {jax.process_index()}).\n"
            f"  Accepted: the same on every process.\n  {change}"
        )


def _hash(text: str) -> int:
    return zlib.crc32(text.encode()) % 2**31


def check_shared(file: Path, what: str) -> None:
    """ValueError, on all processes, if one does not see `file` as the first process has just written it."""
    if jax.process_count() == 1:
        return

    def content() -> int:
        try:
            return zlib.crc32(file.read_bytes()) % 2**31
        except OSError:
            return -1

    wanted, until = from_first(content()), time.monotonic() + SHARED_SECS
    while content() != wanted and time.monotonic() < until:
        time.sleep(0.2)
    sees = of_all([content() == wanted])[:, 0]
    if not sees.all():
        who = ", ".join(map(str, np.flatnonzero(sees == 0)))
        raise ValueError(
            f"{what} {file.parent} is not the same directory on all hosts: process {who} does not see the file '{file.name}' that"
            " process 0 has written there.\n"
            "  Accepted: a directory on a file system that all hosts share.\n  Give another one."
        )


class Vote:
    """What any process wishes, known to all at the same call: `vote(number)` is called equally often by each.

    Each call starts a maximum over all devices and returns the result of the call before, which has long been there: so nobody
    waits for it, and it costs one launch of a program that moves four bytes.
    """

    def __init__(self) -> None:
        self._alone = jax.process_count() == 1
        if self._alone:
            return
        devices = np.array(jax.devices())
        mesh = Mesh(devices, ("devices",), axis_types=(AxisType.Auto,))
        self._split, self._count = NamedSharding(mesh, PartitionSpec("devices")), len(devices)
        self._highest: Callable[[jax.Array], jax.Array] = jax.jit(jax.numpy.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if self._alone:
            return number
        mine = np.full(1, number, np.int32)
        numbers = jax.make_array_from_callback((self._count,), self._split, lambda _: mine)
        self._before, result = self._highest(numbers), self._before
        return 0 if result is None else int(result)
