"""Where the tokens of a row lie when several devices share it, each a part of consecutive indices.

In causal attention the queries late in a row see most keys. If each device had consecutive tokens, the last would see 2N - 1 times
as many pairs as the first, and all would wait for it. So the row is cut into 2N chunks, and the device i gets the chunks i and
2N - 1 - i (zigzag, as in Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2): then all see equally many, in whole and of
the keys of each device.

Pure NumPy, so that the host lays out what it reads and no device has to move anything.
"""

import numpy as np


def plain(tokens: int) -> np.ndarray:
    """int32 [tokens]: each token in its place."""
    return np.arange(tokens, dtype=np.int32)


def zigzag(tokens: int, parts: int) -> np.ndarray:
    """int32 [tokens]: the place in the row of what lies at each index, so that row[..., places] is the row as laid out.

    Places ascend in each of the `parts`. ValueError unless all 2 x parts chunks are of one size.
    """
    if tokens % (2 * parts):
        raise ValueError(
            f"rows of {tokens} tokens cannot be laid out for balance over parallel.seq = {parts} devices.\n"
            f"  Accepted: multiples of 2 x parallel.seq = {2 * parts} tokens.\n"
            f"  Set data.row_tokens to such a multiple, as {-(-tokens // (2 * parts)) * 2 * parts}."
        )
    chunks = plain(tokens).reshape(2 * parts, -1)
    return np.stack([chunks[:parts], chunks[: parts - 1 : -1]], axis=1).reshape(-1)
