"""Pseudo-random numbers as a pure function of (seed, step, row): no generator, no state.

A batch's noise does not depend on the batch's size, on its other rows or on the host that reads them, so that a run resumed on
other devices sees what it would have seen. Words are those of SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195).
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_HIGH, _LOW = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(value: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words that spreads every bit: one step of SplitMix64 from the state `value`."""
    with np.errstate(over="ignore"):
        value = value + _GOLDEN
        value = (value ^ (value >> np.uint64(30))) * _HIGH
        value = (value ^ (value >> np.uint64(27))) * _LOW
    return value ^ (value >> np.uint64(31))


def uniforms(seed: int, step: int, rows_B: np.ndarray, count: int) -> np.ndarray:
    """float64 [B, count] in [0, 1): row b's numbers depend on (seed, step, rows_B[b]) alone."""
    key_B = mix(mix(mix(np.array(seed, np.uint64)) ^ np.uint64(step)) ^ rows_B.astype(np.uint64))
    with np.errstate(over="ignore"):
        states = key_B[:, None] + np.arange(count, dtype=np.uint64) * _GOLDEN
    return (mix(states) >> np.uint64(11)) * 2.0**-53
