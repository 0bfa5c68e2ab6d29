"""Documents to rows of equal length.

A document is [bos] + ids + [eos], as far as the tokenizer has them: this is the only place that adds them. Documents
follow each other in one stream x_0, x_1, ..., and row r holds x_{rT} .. x_{rT+T}: T predictions, whose first input is the
last target of the row before. So every token is predicted exactly once, a document that goes on in the next row included;
only a document's first token never is, because what stands before it is another document.
"""

from collections.abc import Generator, Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from jaxllm.data.shards import Block, Totals

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

# How much is encoded, and how much is packed, at once.
BATCH_CHARS = 1 << 20
BLOCK_TOKENS = 1 << 20

T = TypeVar("T")


def pack(texts: Iterable[str], tokenizer: "Tokenizer", row_tokens: int, totals: Totals) -> Iterator[Block]:
    """Blocks of rows: tokens [n, T+1], segments [n, T] counted from 1 in each row, weights [n, T] in 0 and 1.

    A weight is 1 where input and target belong to one document. The last row is padded with `tokenizer.pad_id`, segment 0.
    `totals` counts what went in.
    """
    for tokens, numbers in stream(texts, tokenizer, row_tokens + 1, totals, overlap=1):
        weights = (numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] > 0)
        totals.weighted_tokens += int(weights.sum())
        yield {"tokens": tokens, "segments": numbers[:, :-1], "weights": weights}


def stream(
    texts: Iterable[str], tokenizer: "Tokenizer", width: int, totals: Totals, *, overlap: int = 0, bos: bool = True
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of windows [n, width] of the documents' tokens, one after the other, and the number of the document that each is of.

    A window starts with the last `overlap` (0 or 1) tokens of the one before. Numbers count from 1 in each window; 0 is padding
    (`tokenizer.pad_id`), which only the last window has. `totals.text_bytes` counts only with an overlap. Needs memory for about
    BLOCK_TOKENS tokens, and for the longest document some 16 (byte, char) to 60 bytes a token (measured).
    """
    waiting: list[np.ndarray] = []
    for batch in batches(texts):
        waiting += _encode(batch, tokenizer, totals, bos=bos, count_bytes=overlap > 0)
        if _size(waiting) > max(BLOCK_TOKENS, width - 1):
            waiting = yield from _cut(waiting, width, overlap)
    if _size(waiting) >= width:
        waiting = yield from _cut(waiting, width, overlap)
    if _size(waiting) > overlap:
        yield _pad(waiting, width, tokenizer.pad_id)


def _size(documents: list[np.ndarray]) -> int:
    return sum(map(len, documents))


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of about BATCH_CHARS characters."""
    batch, chars = [], 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def grouped(documents: Iterable[T], most: int) -> Iterator[list[T]]:
    """Lists of up to `most`, in order."""
    rest = iter(documents)
    while group := list(islice(rest, most)):
        yield group


def _encode(texts: list[str], tokenizer: "Tokenizer", totals: Totals, *, bos: bool, count_bytes: bool) -> list[np.ndarray]:
    """[bos] + ids + [eos] of each text, without those that are empty: these would leave a gap in the numbers of the segments."""
    before = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    documents = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        document = np.fromiter(chain(before, ids, after), np.int32, len(before) + len(ids) + len(after))
        check_ids(document, tokenizer)
        totals.documents += 1
        totals.tokens += len(document)
        if count_bytes:
            totals.text_bytes += len(text.encode()) - (0 if before else first_bytes(tokenizer, text, ids))
        documents.append(document)
    return [document for document in documents if document.size]


def check_ids(ids: np.ndarray, tokenizer: "Tokenizer") -> None:
    """ValueError for an id that the tokenizer's own size excludes."""
    if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer gave ids from {ids.min()} to {ids.max()}.\n  Accepted: 0 to {tokenizer.vocab_size - 1},"
            " one less than its vocab_size.\n  Its files do not belong together: use another tokenizer."
        )


def first_bytes(tokenizer: "Tokenizer", text: str, ids: list[int]) -> int:
    """UTF-8 bytes of `text` that its first id stands for. Ids that share a character share its bytes evenly."""
    for count in range(1, min(len(ids), 8) + 1):
        start = tokenizer.decode(ids[:count])
        if start and text.startswith(start):
            return len(start.encode()) // count
    return 0


def _cut(documents: list[np.ndarray], width: int, overlap: int) -> Generator[tuple[np.ndarray, np.ndarray], None, list[np.ndarray]]:
    """All full windows, in blocks of up to BLOCK_TOKENS; returns what follows them, from the last window's last `overlap` tokens on."""
    tokens = np.concatenate(documents)
    numbers = np.repeat(np.arange(len(documents), dtype=np.int32), [len(document) for document in documents])
    stride = width - overlap
    rows, most = (len(tokens) - overlap) // stride, max(BLOCK_TOKENS // stride, 1)
    for start in range(0, rows, most):
        count, first = min(most, rows - start), start * stride
        number_rows = _windows(numbers[first:], count, width, stride)
        yield _windows(tokens[first:], count, width, stride), number_rows - number_rows[:, :1] + 1
    used = rows * stride
    # A copy, so that what is left does not keep the whole stream in memory.
    return np.split(tokens[used:].copy(), np.flatnonzero(np.diff(numbers[used:])) + 1) if used < len(tokens) else []


def _windows(stream: np.ndarray, rows: int, width: int, stride: int) -> np.ndarray:
    """[rows, width]: each row starts `stride` after the one before."""
    return np.lib.stride_tricks.sliding_window_view(stream, width)[: rows * stride : stride]


def _pad(documents: list[np.ndarray], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """One window: what is left, then padding."""
    tokens = np.concatenate(documents)
    numbers = np.repeat(np.arange(len(documents)) + 1, [len(document) for document in documents])
    padding = width - len(tokens)
    return np.pad(tokens, (0, padding), constant_values=pad_id)[None], np.pad(numbers, (0, padding))[None]
