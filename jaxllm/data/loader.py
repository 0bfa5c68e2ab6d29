"""Batches as global arrays on the mesh: batch = f(seed, step), read ahead by one background thread.

Each host reads only the rows that its own devices hold. Letters: B batch, T width of an array.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import jax
import numpy as np

from jaxllm.data.examples.contract import MakeBatch
from jaxllm.data.mixture import Batches
from jaxllm.data.shards import Shards

AHEAD_STEPS = 2
# Stands for a row that fills up the last batch of a sweep.
NO_ROW = -1
# What a sweep's noise is drawn from, so that every evaluation of every run sees the same one.
SWEEP_SEED, SWEEP_STEP = 0, 0

Arrays = dict[str, np.ndarray]


class Loader:
    """A `types.Source`. Ask for any step in any order; steps that follow one another come from the read-ahead."""

    def __init__(self, batches: Batches, sharding: jax.sharding.Sharding):
        self._batches, self._sharding = batches, sharding
        self._pool = ThreadPoolExecutor(1, "loader")
        self._coming: dict[int, Future[dict[str, jax.Array]]] = {}

    def rows(self, step: int) -> np.ndarray:
        """int64 [B], as `Batches.rows`."""
        return self._batches.rows(step)

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The arrays [B, T] of this step (see `types.Batch`), laid out by the sharding.

        What goes wrong while reading ahead is raised here, by the step that it belongs to.
        """
        wanted = range(step, step + 1 + AHEAD_STEPS)
        for old in self._coming.keys() - set(wanted):
            self._coming.pop(old).cancel()
        for each in wanted:
            if each not in self._coming:
                self._coming[each] = self._pool.submit(self._read, each)
        return self._coming.pop(step).result()

    def close(self) -> None:
        """Ends the background thread. The loader cannot be used afterwards."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, step: int) -> dict[str, jax.Array]:
        return _place(partial(self._batches.arrays, step), self.rows(step), self._sharding)


def make(batches: Batches, sharding: jax.sharding.Sharding) -> Loader:
    """These training batches on the mesh. Close it, or use it in a `with`."""
    _check_divides("train.batch_seqs", batches.batch_seqs, sharding)
    return Loader(batches, sharding)


def sweep(
    shards: Shards, make_batch: MakeBatch, batch_seqs: int, sharding: jax.sharding.Sharding, max_seqs: int = 0
) -> Iterator[dict[str, jax.Array]]:
    """Batches that hold each row once, in order: all of them, or `max_seqs` evenly spaced ones if there are more.

    Noise is the same each time. The last batch is filled up with rows of segment 0 and weight 0.
    """
    _check_divides("batch_seqs", batch_seqs, sharding)
    count = min(max_seqs or len(shards), len(shards))
    chosen = np.arange(count) * len(shards) // max(count, 1)

    def read(rows: np.ndarray) -> Arrays:
        return make_batch(shards.rows(rows), rows, SWEEP_SEED, SWEEP_STEP)

    for start in range(0, count, batch_seqs):
        rows = chosen[start : start + batch_seqs]
        yield _place(read, np.pad(rows, (0, batch_seqs - len(rows)), constant_values=NO_ROW), sharding)


def _check_divides(name: str, batch_seqs: int, sharding: jax.sharding.Sharding) -> None:
    """ValueError if a batch does not split evenly over the devices that share it."""
    devices = sharding.num_devices
    parts = devices // sharding.shard_shape((devices, devices))[0]
    if batch_seqs % parts:
        raise ValueError(
            f"{name} = {batch_seqs} does not split over {parts} devices.\n  Accepted: {parts}, {2 * parts}, {3 * parts}, ...\n"
            f"  Set {name} to one of these, or lower parallel.data or parallel.fsdp."
        )


def _place(read: Callable[[np.ndarray], Arrays], rows: np.ndarray, sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """The batch of these rows as global arrays [B, T]. Of them this host makes, by `read`, those that its own devices hold."""
    # The second axis may be split, too: any number of entries that divides tells the rows.
    shape = (len(rows), sharding.num_devices)
    indices = sharding.addressable_devices_indices_map(shape).values()
    spans = sorted({index[0].indices(len(rows))[:2] for index in indices if index is not None})
    mine = np.concatenate([np.arange(*span) for span in spans])
    real = np.maximum(rows[mine], 0)
    local = read(real)
    if (missing := rows[mine] == NO_ROW).any():
        local = {name: np.where(missing[:, None], array.dtype.type(0), array) for name, array in local.items()}

    def part(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(len(rows))
        first = np.searchsorted(mine, start)
        return array[first : first + stop - start, index[1]]

    return {
        name: jax.make_array_from_callback((len(rows), array.shape[1]), sharding, partial(part, array))
        for name, array in local.items()
    }
