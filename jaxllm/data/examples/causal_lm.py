"""Each token from those before it in its document.

Stored: tokens [N, T+1] (inputs are [:, :-1], targets are [:, 1:]), segments [N, T] (the document of each input token, counted
from 1 in each row; 0 is padding) and weights [N, T] (1 if the target counts in the loss, else 0); see pack.py.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import pack
from jaxllm.data.documents import Document
from jaxllm.data.examples import shown
from jaxllm.data.examples.contract import Examples, MakeBatch, count_positions, decoder_arrays, row_tokens
from jaxllm.data.shards import FLAG, Block, Column, Totals, smallest_dtype

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer


def make(config: ConfigDict) -> Examples:
    """Rows of whole text."""
    width = row_tokens(config)

    def columns(vocab_size: int) -> dict[str, Column]:
        ids = Column(width + 1, smallest_dtype(vocab_size - 1))
        return {"tokens": ids, "segments": Column(width, smallest_dtype(width)), "weights": Column(width, FLAG)}

    def rows(documents: Iterable[Document], tokenizer: "Tokenizer", labels: tuple[str, ...], totals: Totals) -> Iterator[Block]:
        del labels
        return pack.pack((document.text for document in documents), tokenizer, width, totals)

    return Examples(columns, decoder_arrays(width), rows, batch, shown.weighted)


def batch(tokenizer: "Tokenizer") -> MakeBatch:
    """Positions restart where a document starts, and at the row's start when it goes on from the row before."""
    del tokenizer

    def make_batch(stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
        del rows, seed, step
        return {
            "tokens": np.ascontiguousarray(stored["tokens"][:, :-1]),
            "targets": np.ascontiguousarray(stored["tokens"][:, 1:]),
            "segments": stored["segments"],
            "positions": count_positions(stored["segments"]),
            "weights": stored["weights"].astype(np.float32),
        }

    return make_batch
