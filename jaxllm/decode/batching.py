"""Prompts of different lengths as rectangular batches, in few distinct shapes, since every new shape costs a compilation.

Letters: B batch, T prompt length.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# No shape is smaller: a shorter prompt computes no faster, and would be compiled for its own length.
SMALLEST_TOKENS = 32
MOST_SEQS = 32


class Prompts(NamedTuple):
    """Right-padded prompts. Rows that only fill up the batch have length 1 and limit 0.

    limits_B: new tokens that a row may get. streams_B2: two numbers that name the row's random stream, see `streams`.
    """

    tokens_BT: np.ndarray
    lengths_B: np.ndarray
    limits_B: np.ndarray
    streams_B2: np.ndarray


def bucket(size: int, smallest: int, largest: int) -> int:
    """`size` rounded up to smallest, 2 x smallest, 4 x smallest, ..., but never above `largest`."""
    out = smallest
    while out < size:
        out *= 2
    return min(out, largest)


def streams(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """uint32 [N, 2]: (hash of the prompt, how many equal prompts stand before it).

    Folded into the seed they give each row random numbers that do not depend on its place or its batch mates, and give
    equal prompts different ones.
    """
    before: Counter[int] = Counter()
    out = np.zeros((len(prompts), 2), np.uint32)
    for row, prompt in enumerate(prompts):
        digest = zlib.crc32(np.array(prompt, np.uint32).tobytes())
        out[row] = digest, before[digest]
        before[digest] += 1
    return out


def group(lengths: Sequence[int], most_seqs: int = MOST_SEQS) -> list[list[int]]:
    """Indices of the prompts, cut into batches of up to `most_seqs` prompts of similar length."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[start : start + most_seqs] for start in range(0, len(order), most_seqs)]


def rectangle(prompts: Sequence[Sequence[int]], context_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_BT, lengths_B), the number of rows and their length rounded up to a power of two; further rows have length 1."""
    rows = bucket(len(prompts), 1, MOST_SEQS)
    tokens_BT = np.zeros((rows, bucket(max(map(len, prompts)), SMALLEST_TOKENS, context_tokens)), np.int32)
    lengths_B = np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
        lengths_B[row] = len(prompt)
    return tokens_BT, lengths_B


def pad(prompts: Sequence[Sequence[int]], streams_N2: np.ndarray, limits: Sequence[int], context_tokens: int) -> Prompts:
    """One batch in which row i may get `limits[i]` new tokens."""
    tokens_BT, lengths_B = rectangle(prompts, context_tokens)
    limits_B, streams_B2 = np.zeros(len(lengths_B), np.int32), np.zeros((len(lengths_B), 2), np.uint32)
    limits_B[: len(prompts)] = limits
    streams_B2[: len(prompts)] = streams_N2
    return Prompts(tokens_BT, lengths_B, limits_B, streams_B2)
