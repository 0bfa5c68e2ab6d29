"""Each token of a document's rest from all of its prefix and the rest before it (Raffel et al. 2020, arXiv:1910.10683, section 3.2.1).

Stored are the rows of causal_lm. In every document of a row the length of the prefix is drawn uniformly from 1 to the number of
the document's predictions in the row, so that at least the last one is left; a document without any has a prefix that matters to none.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import noise
from jaxllm.data.examples import causal_lm, shown
from jaxllm.data.examples.contract import Array, Examples, MakeBatch

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer


def make(config: ConfigDict) -> Examples:
    """The rows of causal_lm, with a prefix in each document."""
    whole = causal_lm.make(config)
    prefix = Array(whole.arrays["tokens"].width, np.bool_)
    return replace(whole, arrays={**whole.arrays, "prefix": prefix}, batch=batch, show=shown.prefixed)


def batch(tokenizer: "Tokenizer") -> MakeBatch:
    """As causal_lm, with `prefix` and without the weight of predictions inside of it."""
    causal = causal_lm.batch(tokenizer)

    def make_batch(stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
        made = causal(stored, rows, seed, step)
        positions, segments = made["positions"], made["segments"]
        rows_B1, width = np.arange(len(segments))[:, None], segments.shape[1]
        # Predictions of each document; documents are numbered through the batch.
        numbers = rows_B1 * (width + 1) + segments
        predictions = np.bincount(numbers.ravel(), made["weights"].ravel(), minlength=len(segments) * (width + 1))[numbers]
        # All tokens of a document take the draw of its first one.
        draw = noise.uniforms(seed, step, rows, width)[rows_B1, np.arange(width) - positions]
        length = 1 + np.floor(draw * predictions).astype(np.int32)
        made["prefix"] = (positions < length) & (segments > 0)
        made["weights"] = made["weights"] * (positions >= length - 1)
        return made

    return make_batch
