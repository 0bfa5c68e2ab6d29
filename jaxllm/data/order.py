"""Which rows make up a batch, as a pure function of (seed, step): no iterator, no state, no memory that grows with the data.

Every epoch visits each row once, in an order of its own. The order is a keyed permutation of 0 .. rows-1: a place is written
as a point of a rectangle a x b just large enough, and the generalized Feistel network of Black and Rogaway 2002 (section 5,
doi:10.1007/3-540-45760-7_9) turns its two coordinates by pseudo-random amounts, one by the other in turn. A point that ends
outside 0 .. rows-1 is sent through again until it does not (their section 4, cycle walking); that is rare above 64 rows.
"""

import math

import numpy as np

from jaxllm.data.noise import mix

TURNS = 8
# Smaller rectangles have too few permutations within reach: some orders of 4 rows came up several per cent too often.
LEAST_SIDE = 8


def batch_rows(rows: int, batch_seqs: int, seed: int, step: int) -> np.ndarray:
    """Row indices int64 [batch_seqs] of the global batch of this step (steps count from 0).

    Batches follow each other without a gap: one that meets the end of an epoch goes on with the next one. A batch larger
    than the data repeats rows.
    """
    if rows < 1 or batch_seqs < 1 or step < 0:
        raise ValueError(
            f"rows = {rows}, batch_seqs = {batch_seqs}, step = {step}.\n  Accepted: 1 or more, 1 or more, 0 or more."
            "\n  Change the one that is too small."
        )
    # Python integers: a step times a batch size may be large, and the epoch is all that has to fit in 64 bits.
    epoch, offset = divmod(step * batch_seqs, rows)
    place = offset + np.arange(batch_seqs, dtype=np.uint64)
    return permute(rows, seed, np.uint64(epoch) + place // np.uint64(rows), place % np.uint64(rows))


def permute(rows: int, seed: int, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Row int64 [N] found at each place of each epoch (uint64 [N] both): for a fixed epoch a bijection of 0 .. rows-1."""
    a = max(LEAST_SIDE, math.isqrt(rows - 1) + 1)
    sides = np.uint64(a), np.uint64(max(LEAST_SIDE, -(-rows // a)))
    keys_NX = mix(mix(mix(np.array(seed, np.uint64)) ^ epochs)[:, None] + np.arange(TURNS, dtype=np.uint64))
    out = _turn(places, keys_NX, sides)
    while (outside := np.flatnonzero(out >= rows)).size:
        out[outside] = _turn(out[outside], keys_NX[outside], sides)
    return out.astype(np.int64)


def _turn(value: np.ndarray, keys_NX: np.ndarray, sides: tuple[np.uint64, np.uint64]) -> np.ndarray:
    a, b = sides
    left: np.ndarray = value // b
    right: np.ndarray = value % b
    for key_N in keys_NX.T:
        # The sides change places with the coordinates, so each turn is undone by subtracting the same amount.
        left, right, a, b = right, (left + mix(key_N ^ right) % a) % a, b, a
    return left * b + right
