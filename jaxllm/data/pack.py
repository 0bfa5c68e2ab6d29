"""Documents to rows of equal length.

A document is [bos] + ids + [eos], as far as the tokenizer has them: this is the only place that adds them. Documents
follow each other in one stream x_0, x_1, ..., and row r holds x_{rT} .. x_{rT+T}: T predictions, whose first input is the
last target of the row before. So every token is predicted exactly once, a document that goes on in the next row included;
only a document's first token never is, because what stands before it is another document.
"""

from collections.abc import Generator, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.data.shards import Block, Totals

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

# How much is encoded, and how much is packed, at once.
BATCH_CHARS = 1 << 20
BLOCK_TOKENS = 1 << 20


def pack(texts: Iterable[str], tokenizer: "Tokenizer", row_tokens: int, totals: Totals) -> Iterator[Block]:
    """Blocks of rows: tokens [n, T+1], segments [n, T] counted from 1 in each row, weights [n, T] in 0 and 1.

    A weight is 1 where input and target belong to one document. The last row is padded with `tokenizer.pad_id`, segment 0.
    Needs memory for about BLOCK_TOKENS tokens, and for the longest document some 16 (byte, char) to 60 bytes a token (measured).
    `totals` counts what went in.
    """
    waiting: list[np.ndarray] = []
    for batch in _batches(texts):
        waiting += _encode(batch, tokenizer, totals)
        if _size(waiting) > max(BLOCK_TOKENS, row_tokens):
            waiting = yield from _cut(waiting, row_tokens)
    if _size(waiting) > row_tokens:
        waiting = yield from _cut(waiting, row_tokens)
    if _size(waiting) > 1:
        yield _pad(waiting, row_tokens, tokenizer.pad_id)


def _size(documents: list[np.ndarray]) -> int:
    return sum(map(len, documents))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, chars = [], 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encode(texts: list[str], tokenizer: "Tokenizer", totals: Totals) -> list[np.ndarray]:
    """[bos] + ids + [eos] of each text, without those that are empty: these would leave a gap in the numbers of the segments."""
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    documents = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        document = np.fromiter(chain(before, ids, after), np.int32, len(before) + len(ids) + len(after))
        if document.size and not 0 <= document.min() <= document.max() < tokenizer.vocab_size:
            raise ValueError(
                f"the tokenizer gave ids from {document.min()} to {document.max()}.\n  Accepted: 0 to {tokenizer.vocab_size - 1},"
                " one less than its vocab_size.\n  Its files do not belong together: use another tokenizer."
            )
        totals.documents += 1
        totals.tokens += len(document)
        totals.text_bytes += len(text.encode()) - (0 if before else first_bytes(tokenizer, text, ids))
        documents.append(document)
    return [document for document in documents if document.size]


def first_bytes(tokenizer: "Tokenizer", text: str, ids: list[int]) -> int:
    """UTF-8 bytes of `text` that its first id stands for. Ids that share a character share its bytes evenly."""
    for count in range(1, min(len(ids), 8) + 1):
        start = tokenizer.decode(ids[:count])
        if start and text.startswith(start):
            return len(start.encode()) // count
    return 0


def _cut(documents: list[np.ndarray], row_tokens: int) -> Generator[Block, None, list[np.ndarray]]:
    """All full rows, in blocks of up to BLOCK_TOKENS; returns what follows them: the last row's last token on."""
    stream = np.concatenate(documents)
    numbers = np.repeat(np.arange(len(documents), dtype=np.int32), [len(document) for document in documents])
    rows, most = (len(stream) - 1) // row_tokens, max(BLOCK_TOKENS // row_tokens, 1)
    for start in range(0, rows, most):
        count, first = min(most, rows - start), start * row_tokens
        number_rows = _windows(numbers[first:], count, row_tokens)
        segments = number_rows[:, :-1] - number_rows[:, :1] + 1
        yield Block(_windows(stream[first:], count, row_tokens), segments, number_rows[:, 1:] == number_rows[:, :-1])
    used = rows * row_tokens
    # A copy, so that what is left does not keep the whole stream in memory.
    return np.split(stream[used:].copy(), np.flatnonzero(np.diff(numbers[used:])) + 1)


def _windows(stream: np.ndarray, rows: int, row_tokens: int) -> np.ndarray:
    """[rows, row_tokens + 1]: each row starts with the last entry of the one before."""
    return np.lib.stride_tricks.sliding_window_view(stream, row_tokens + 1)[: rows * row_tokens : row_tokens]


def _pad(documents: list[np.ndarray], row_tokens: int, pad_id: int) -> Block:
    """One row: what is left, up to row_tokens tokens, then padding."""
    stream = np.concatenate(documents)
    segments = np.repeat(np.arange(len(documents)) + 1, [len(document) for document in documents])
    padding = row_tokens + 1 - len(stream)
    segments = np.pad(segments, (0, padding))
    weights = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
    return Block(np.pad(stream, (0, padding), constant_values=pad_id)[None], segments[None, :-1], weights[None])
