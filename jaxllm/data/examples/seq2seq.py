"""One text from another: `data.target_field` from `data.text_field`.

Both end with eos, and the decoder starts with bos (pad, if there is none). Several pairs share a row, each in a segment of its own on
both sides, so that attention and cross-attention stay in a pair. A side longer than a row is cut before its eos, and counted.

Stored: inputs and input_segments [N, S], targets and segments [N, T]; segments count from 1 in each row, 0 is padding.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import fill, pack, tokenize
from jaxllm.data.documents import Document
from jaxllm.data.examples import shown
from jaxllm.data.examples.contract import (
    Examples,
    MakeBatch,
    count_positions,
    decoder_arrays,
    encoder_arrays,
    row_tokens,
    shift_right,
)
from jaxllm.data.shards import Block, Column, Totals, smallest_dtype
from jaxllm.data.tokenizers.added import Added

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

ENCODED_AT_ONCE = 1024


def make(config: ConfigDict) -> Examples:
    """Rows of pairs."""
    width = row_tokens(config)
    input_width = config.data.input_tokens or width

    def columns(vocab_size: int) -> dict[str, Column]:
        ids = smallest_dtype(vocab_size - 1)
        return {
            "inputs": Column(input_width, ids),
            "input_segments": Column(input_width, smallest_dtype(width)),
            "targets": Column(width, ids),
            "segments": Column(width, smallest_dtype(width)),
        }

    def rows(documents: Iterable[Document], tokenizer: "Tokenizer", labels: tuple[str, ...], totals: Totals) -> Iterator[Block]:
        del labels
        pairs = _pairs(documents, tokenizer, (input_width, width), totals)
        return fill.fill(pairs, (input_width, width), ("input_segments", "segments"), tokenizer.pad_id)

    recipe = {"rows": "seq2seq", "data.target_field": config.data.target_field, "data.input_tokens": input_width}
    arrays = encoder_arrays(input_width) | decoder_arrays(width)
    return Examples(columns, arrays, rows, _batch, shown.paired, reads="target", added=Added(borders=True), recipe=recipe)


def _pairs(
    documents: Iterable[Document], tokenizer: "Tokenizer", widths: tuple[int, int], totals: Totals
) -> Iterator[tuple[fill.Side, fill.Side]]:
    for group in pack.grouped(documents, ENCODED_AT_ONCE):
        encoded = (tokenizer.encode_batch([side(document) for document in group]) for side in (_source, _target))
        for pair in zip(*encoded, strict=True):
            inputs, targets = (np.array([*ids[: width - 1], tokenizer.eos_id]) for ids, width in zip(pair, widths, strict=True))
            pack.check_ids(inputs, tokenizer)
            pack.check_ids(targets, tokenizer)
            totals.documents += 1
            totals.tokens += len(inputs) + len(targets)
            totals.weighted_tokens += len(targets)
            totals.cut += any(len(ids) > width - 1 for ids, width in zip(pair, widths, strict=True))
            yield {"inputs": inputs}, {"targets": targets}


def _source(document: Document) -> str:
    return document.text


def _target(document: Document) -> str:
    return str(document.target)


def _batch(tokenizer: "Tokenizer") -> MakeBatch:
    start_id = tokenize.start_id(tokenizer)

    def make_batch(stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
        del rows, seed, step
        positions = count_positions(stored["segments"])
        tokens = shift_right(stored["targets"], positions, start_id)
        return {
            "inputs": stored["inputs"],
            "input_segments": stored["input_segments"],
            "input_positions": count_positions(stored["input_segments"]),
            "tokens": np.where(stored["segments"] > 0, tokens, stored["targets"]),
            "targets": stored["targets"],
            "segments": stored["segments"],
            "positions": positions,
            "weights": (stored["segments"] > 0).astype(np.float32),
        }

    return make_batch
