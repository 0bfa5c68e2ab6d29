"""Examples of one or several sides (a source and its translation; words and their labels) to rows of equal length.

Best fit, the largest first (Ding et al. 2024, arXiv:2404.10830): no example is cut, and each goes where the least room is
left of the rows that have enough. There the rows are the leaves of a segment tree; here the rooms that some row has are the bits of
one integer, and its lowest bit above an example's length is found in one pass over some words of memory. Several sides are our addition:
an example is as large as its share of all sides together, and rooms are looked up side by side, the side with the most tokens first.

Examples are packed WINDOW by WINDOW, and rows are not opened again: of thousands of rows, one or two have room left.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

# What is packed at once, and held in memory: so many tokens or examples. But a window fills WINDOW_ROWS rows or more.
WINDOW_TOKENS, WINDOW_EXAMPLES, WINDOW_ROWS = 1 << 22, 100_000, 256

# One side of an example: the names of parallel arrays [length].
Side = Mapping[str, np.ndarray]


def fill(
    examples: Iterable[Sequence[Side]], widths: Sequence[int], segments: Sequence[str], padding: int
) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of rows [n, widths[i]] of all arrays of side i, and of its segments (from 1; 0 is padding) under `segments[i]`.

    Every example is in one row, with the same segment on all sides. Examples of a row keep their order, and rows stand in that of
    their largest examples, so that the first rows are no other sort than the last. No side of an example may be longer than its
    width or empty. Ends of rows are filled with `padding`.
    """
    for window in _windows(examples, widths):
        sizes_NS = np.array([[len(next(iter(side.values()))) for side in example] for example in window])
        yield _block(window, sizes_NS, best_fit(sizes_NS, widths), widths, segments, padding)


def _windows(examples: Iterable[Sequence[Side]], widths: Sequence[int]) -> Iterator[list[Sequence[Side]]]:
    """The examples in lists that are packed together."""
    least, window, tokens = WINDOW_ROWS * sum(widths), [], 0
    for example in examples:
        window.append(example)
        tokens += sum(len(next(iter(side.values()))) for side in example)
        if tokens >= least and (tokens >= WINDOW_TOKENS or len(window) >= WINDOW_EXAMPLES):
            yield window
            window, tokens = [], 0
    if window:
        yield window


def best_fit(sizes_NS: np.ndarray, widths: Sequence[int]) -> list[list[int]]:
    """The numbers of the examples in each row, for examples with these sizes (one a side)."""
    shares_NS = sizes_NS / np.array(widths)
    # The side that fills up first decides most often whether there is room: asked first, the others are rarely asked in vain.
    sides = np.argsort(-shares_NS.sum(0), kind="stable")
    order = np.argsort(-shares_NS.sum(1), kind="stable").tolist()
    sizes = list(map(tuple, sizes_NS[:, sides].tolist()))
    rooms = _Rooms()
    rows: list[list[int]] = []
    left: list[tuple[int, ...]] = []
    for number in order:
        row = rooms.take(sizes[number])
        if row is None:
            row = len(rows)
            rows.append([])
            left.append(tuple(widths[side] for side in sides))
        rows[row].append(number)
        left[row] = tuple(room - size for room, size in zip(left[row], sizes[number], strict=True))
        rooms.put(left[row], row)
    # A row's first example is its largest.
    return [sorted(row) for row in sorted(rows)]


class _Rooms:
    """Rows by the room that they have. Bit r of `bits` is set if some row has room r on the first side; `below[r]` are these rows: a list,
    or, of more sides, again by their room."""

    def __init__(self) -> None:
        self.bits = 0
        self.below: dict[int, _Rooms | list[int]] = {}

    def __bool__(self) -> bool:
        return self.bits > 0

    def put(self, rooms: Sequence[int], row: int) -> None:
        first, rest = rooms[0], rooms[1:]
        below = self.below.setdefault(first, _Rooms() if rest else [])
        if isinstance(below, _Rooms):
            below.put(rest, row)
        else:
            below.append(row)
        self.bits |= 1 << first

    def take(self, sizes: Sequence[int]) -> int | None:
        """A row with at least so much room, and of these the least on the first side, then on the second, ...; it is taken out."""
        first, rest = sizes[0], sizes[1:]
        bits = self.bits >> first
        while bits:
            room = first + (bits & -bits).bit_length() - 1
            below = self.below[room]
            row = below.take(rest) if isinstance(below, _Rooms) else below.pop()
            if row is not None:
                if not below:
                    del self.below[room]
                    self.bits ^= 1 << room
                return row
            bits &= bits - 1
        return None


def _block(
    examples: Sequence[Sequence[Side]],
    sizes_NS: np.ndarray,
    rows: Sequence[Sequence[int]],
    widths: Sequence[int],
    segments: Sequence[str],
    padding: int,
) -> dict[str, np.ndarray]:
    """The arrays of all sides, and their segments, of the rows with these examples."""
    block: dict[str, np.ndarray] = {}
    counts = np.array([len(row) for row in rows])
    order = np.concatenate(rows)
    placed = [examples[number] for number in order.tolist()]
    first = np.repeat(np.cumsum(counts) - counts, counts)  # of each example's row, the first example
    for index, (width, name) in enumerate(zip(widths, segments, strict=True)):
        sizes_N = sizes_NS[order, index]
        before_N = np.cumsum(sizes_N) - sizes_N
        starts_N = np.repeat(np.arange(len(rows)) * width, counts) + before_N - before_N[first]
        places = np.repeat(starts_N - before_N, sizes_N) + np.arange(sizes_N.sum())
        arrays = {each: np.concatenate([example[index][each] for example in placed]) for each in placed[0][index]}
        arrays[name] = np.repeat(np.arange(len(order)) - first + 1, sizes_N)
        for each, values in arrays.items():
            block[each] = np.full((len(rows), width), 0 if each == name else padding, np.int32)
            block[each].reshape(-1)[places] = values
    return block
