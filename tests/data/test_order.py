"""The order of rows: a bijection each epoch, another one each epoch and seed, and no bias that a chi-square test could see."""

import math
from collections import Counter

import numpy as np
import pytest

from jaxllm.data import order

GOLDEN = [378, 300, 774, 107, 373, 80, 515, 904]


def epoch_rows(rows: int, seed: int, epoch: int) -> np.ndarray:
    return order.permute(rows, seed, np.full(rows, epoch, np.uint64), np.arange(rows, dtype=np.uint64))


def chi_square(counts: np.ndarray, expected: float) -> float:
    """Distance from the mean in standard deviations of a chi-square variable with len(counts) - 1 degrees of freedom."""
    degrees = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 16, 17, 31, 64, 97, 255, 256, 257, 1009, 4096, 10007])
def test_each_epoch_is_a_bijection(rows: int) -> None:
    for seed, epoch in ((0, 0), (1, 0), (0, 1), (1337, 2**40)):
        np.testing.assert_array_equal(np.sort(epoch_rows(rows, seed, epoch)), np.arange(rows))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_rows(1009, seed, epoch)) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64


def test_small_permutations_are_equally_likely() -> None:
    """Every one of the 24 orders of 4 rows comes up as often as chance has it: |z| < 4 for a fixed seed."""
    epochs = np.repeat(np.arange(24_000, dtype=np.uint64), 4)
    drawn = order.permute(4, 7, epochs, np.tile(np.arange(4, dtype=np.uint64), 24_000)).reshape(-1, 4)
    counts = Counter(map(tuple, drawn.tolist()))
    assert len(counts) == 24
    assert abs(chi_square(np.array(list(counts.values())), 1000)) < 4


def test_rows_are_spread_evenly_over_places_and_neighbours() -> None:
    """Where row r lands, and which row follows which, over 20,000 epochs of 10 rows: both uniform, |z| < 4."""
    rows, epochs = 10, 20_000
    drawn = order.permute(
        rows, 3, np.repeat(np.arange(epochs, dtype=np.uint64), rows), np.tile(np.arange(rows, dtype=np.uint64), epochs)
    ).reshape(epochs, rows)
    places = np.stack([np.bincount(drawn[:, place], minlength=rows) for place in range(rows)])
    assert abs(chi_square(places.ravel(), epochs / rows)) < 4
    steps = np.bincount(((drawn[:, 1:] - drawn[:, :-1]) % rows).ravel(), minlength=rows)[1:]
    assert abs(chi_square(steps, epochs * (rows - 1) / (rows - 1))) < 4


@pytest.mark.parametrize(("rows", "batch_seqs"), [(10, 4), (10, 10), (3, 8), (1, 5), (7, 3)])
def test_batches_run_through_epoch_after_epoch(rows: int, batch_seqs: int) -> None:
    """Batches of any size, straddling the ends of epochs or larger than one, are the concatenated epochs."""
    steps = 6 * rows
    stream = np.concatenate([order.batch_rows(rows, batch_seqs, 5, step) for step in range(steps)])
    epochs = stream[: len(stream) // rows * rows].reshape(-1, rows)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(rows), (len(epochs), 1)))
    np.testing.assert_array_equal(epochs[2], epoch_rows(rows, 5, 2))


def test_far_steps_of_large_data() -> None:
    """10^10 rows at step 10^12: no memory that grows with either, and 64-bit arithmetic all the way."""
    rows, step = 10**10 + 19, 10**12
    batch = order.batch_rows(rows, 512, 0, step)
    assert batch.dtype == np.int64
    assert 0 <= batch.min() <= batch.max() < rows
    assert len(set(batch.tolist())) == 512
    assert batch.max() > 2**32
    np.testing.assert_array_equal(order.batch_rows(rows, 256, 0, 2 * step + 1), batch[256:])


def test_the_order_never_changes() -> None:
    """A run resumed under another version must see the same rows: these values are the definition."""
    assert order.batch_rows(1000, 8, 1337, 11).tolist() == GOLDEN


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="rows = 0, batch_seqs = 4, step = 1"):
        order.batch_rows(0, 4, 0, 1)
