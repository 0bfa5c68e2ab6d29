"""Examples of several sides (a source and its translation; words and their labels) to rows of equal length.

Examples follow each other in a row as long as each side still has room (greedily, in their order), and an example's number in
the row, its segment, is the same on all sides.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

BLOCK_ROWS = 1024

# One side of an example: the names of parallel arrays [length].
Side = Mapping[str, np.ndarray]


def fill(
    examples: Iterable[Sequence[Side]], widths: Sequence[int], segments: Sequence[str], padding: int
) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of rows [n, widths[i]] of all arrays of side i, and of its segments (from 1; 0 is padding) under `segments[i]`.

    No side of an example may be longer than its width or empty. Ends of rows are filled with `padding`.
    """
    rows: list[list[Sequence[Side]]] = [[]]
    room = list(widths)
    for example in examples:
        sizes = [len(next(iter(side.values()))) for side in example]
        if any(size > left for size, left in zip(sizes, room, strict=True)):
            if len(rows) == BLOCK_ROWS:
                yield _block(rows, widths, segments, padding)
                rows = []
            rows.append([])
            room = list(widths)
        rows[-1].append(example)
        room = [left - size for size, left in zip(sizes, room, strict=True)]
    if rows[-1]:
        yield _block(rows, widths, segments, padding)


def _block(rows: list[list[Sequence[Side]]], widths: Sequence[int], segments: Sequence[str], padding: int) -> dict[str, np.ndarray]:
    block: dict[str, np.ndarray] = {}
    for index, (width, name) in enumerate(zip(widths, segments, strict=True)):
        names = rows[0][0][index].keys()
        block |= {each: np.full((len(rows), width), padding, np.int32) for each in names}
        block[name] = np.zeros((len(rows), width), np.int32)
        for number, row in enumerate(rows):
            start = 0
            for order, example in enumerate(row):
                for each, values in example[index].items():
                    stop = start + len(values)
                    block[each][number, start:stop] = values
                block[name][number, start:stop] = order + 1
                start = stop
    return block
