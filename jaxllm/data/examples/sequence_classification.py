"""The class of a text, or of a pair of texts.

A row is one text: [bos] text [eos], or [bos] text [eos] pair [eos]. The class stands at one place: at the first token of an encoder, at the
last one of a decoder, which has seen the others; no other place has weight. What is longer than a row is cut, of a pair the
longer text first, and counted.

Stored: tokens [N, T], ends [N, 2] (length of the first text with its bos and eos; length of all) and labels [N, 1].
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import pack
from jaxllm.data.documents import Document
from jaxllm.data.examples import shown
from jaxllm.data.examples.contract import Array, Examples, MakeBatch, count_positions, decoder_arrays, row_tokens
from jaxllm.data.examples.labels import index
from jaxllm.data.shards import Block, Column, Totals, smallest_dtype
from jaxllm.data.tokenizers.added import Added

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

BLOCK_ROWS = 1024
# bos, a token of each of two texts, an eos behind each.
LEAST_TOKENS = 5
# The models whose tokens see those behind them.
ENCODERS = ("bert",)


def make(config: ConfigDict) -> Examples:
    """Rows of one text each."""
    width, paired, first = row_tokens(config), bool(config.data.pair_field), config.model.name in ENCODERS
    if width < LEAST_TOKENS:
        raise ValueError(
            f"rows of {width} tokens do not hold a text to classify with its bos and eos.\n  Accepted: {LEAST_TOKENS} or more.\n"
            "  Raise data.row_tokens."
        )

    def columns(vocab_size: int) -> dict[str, Column]:
        labels = Column(1, np.dtype(np.uint32))
        return {"tokens": Column(width, smallest_dtype(vocab_size - 1)), "ends": Column(2, smallest_dtype(width)), "labels": labels}

    def rows(documents: Iterable[Document], tokenizer: "Tokenizer", labels: tuple[str, ...], totals: Totals) -> Iterator[Block]:
        return _rows(documents, tokenizer, labels, width, totals)

    def batch(tokenizer: "Tokenizer") -> MakeBatch:
        del tokenizer
        return _batch(first=first, token_types=paired and first)

    arrays = decoder_arrays(width) | ({"token_types": Array(width, np.int32)} if paired and first else {})
    recipe = {"rows": "sequence_classification"} | {f"data.{name}": config.data[name] for name in ("target_field", "pair_field")}
    return Examples(columns, arrays, rows, batch, shown.classified, reads="label", added=Added(borders=paired), recipe=recipe)


def _rows(
    documents: Iterable[Document], tokenizer: "Tokenizer", labels: tuple[str, ...], width: int, totals: Totals
) -> Iterator[Block]:
    numbers = index(labels)
    for group in pack.grouped(documents, BLOCK_ROWS):
        texts = tokenizer.encode_batch([document.text for document in group])
        pairs = tokenizer.encode_batch([document.pair or "" for document in group])
        block = {
            "tokens": np.full((len(group), width), tokenizer.pad_id),
            "ends": np.zeros((len(group), 2), int),
            "labels": np.array([[numbers[str(document.target)]] for document in group]),
        }
        for row, (document, ids, pair) in enumerate(zip(group, texts, pairs, strict=True)):
            tokens, border, cut = join(ids, None if document.pair is None else pair, tokenizer, width)
            pack.check_ids(tokens, tokenizer)
            block["tokens"][row, : len(tokens)] = tokens
            block["ends"][row] = border, len(tokens)
            totals.documents += 1
            totals.tokens += len(tokens)
            totals.weighted_tokens += 1
            totals.padding += width - len(tokens)  # which no segments tell of: they are not stored
            totals.cut += cut
        yield block


def join(ids: list[int], pair: list[int] | None, tokenizer: "Tokenizer", width: int) -> tuple[np.ndarray, int, bool]:
    """(tokens, length of the first text in them, whether something was cut)."""
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    room = width - len(before) - len(after) * (1 if pair is None else 2)
    second = pair or []
    cut = max(len(ids) + len(second) - room, 0)
    # The longer one first, then both in turn.
    keep_first = max(min(len(ids), room - min(len(second), room // 2)), 0)
    first = [*before, *ids[:keep_first], *after]
    rest = [] if pair is None else [*second[: room - keep_first], *after]
    return np.array([*first, *rest], np.int32), len(first), cut > 0


def _batch(*, first: bool, token_types: bool) -> MakeBatch:
    def make_batch(stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
        del rows, seed, step
        tokens, border, length = stored["tokens"], stored["ends"][:, :1], stored["ends"][:, 1:]
        place = np.arange(tokens.shape[1], dtype=np.int32)
        segments = (place < length).astype(np.int32)
        here = (place == (0 if first else length - 1)) & (segments > 0)
        made = {
            "tokens": tokens,
            "targets": np.where(here, stored["labels"], 0).astype(np.int32),
            "segments": segments,
            "positions": count_positions(segments),
            "weights": here.astype(np.float32),
        }
        if token_types:
            made["token_types"] = ((place >= border) & (place < length)).astype(np.int32)
        return made

    return make_batch
