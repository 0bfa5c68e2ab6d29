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


def group(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the prompts, cut into batches of up to MOST_SEQS prompts of similar length."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[start : start + MOST_SEQS] for start in range(0, len(order), MOST_SEQS)]


def pad(prompts: Sequence[Sequence[int]], streams_N2: np.ndarray, max_new_tokens: int, context_tokens: int) -> Prompts:
    """One batch, with the number of rows and their length rounded up to a power of two. A row gets `max_new_tokens`, or as many as
    still fit into the context."""
    rows = bucket(len(prompts), 1, MOST_SEQS)
    width = bucket(max(map(len, prompts)), SMALLEST_TOKENS, context_tokens)
    tokens_BT = np.zeros((rows, width), np.int32)
    lengths_B, limits_B, streams_B2 = np.ones(rows, np.int32), np.zeros(rows, np.int32), np.zeros((rows, 2), np.uint32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
        lengths_B[row] = len(prompt)
        limits_B[row] = min(max_new_tokens, context_tokens - len(prompt))
    streams_B2[: len(prompts)] = streams_N2
    return Prompts(tokens_BT, lengths_B, limits_B, streams_B2)
