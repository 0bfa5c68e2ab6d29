"""Hidden tokens from all others of their document (Devlin et al. 2019, arXiv:1810.04805, section 3.1).

Of the tokens that are text, each is chosen with probability `data.noise_frac`. A chosen one is predicted at its own place; what
stands there is the mask (80 %), a random token (10 %) or the token itself (10 %). With `data.whole_words` words are chosen so, with
all of their tokens. Unlike there, the number of chosen tokens is not fixed, and noise is drawn anew each time a row is seen.

Stored: tokens [N, T] and segments [N, T] (document of each token, counted from 1 in each row; 0 is padding). No token is in two rows.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import noise, pack, tokenize
from jaxllm.data.documents import Document
from jaxllm.data.examples import shown
from jaxllm.data.examples.contract import Examples, MakeBatch, count_positions, decoder_arrays, row_tokens
from jaxllm.data.shards import Block, Column, Totals, smallest_dtype
from jaxllm.data.tokenizers.added import Added
from jaxllm.data.tokenizers.words import word_starts

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

MASK_FRAC, RANDOM_FRAC = 0.8, 0.1


def make(config: ConfigDict) -> Examples:
    """Rows of whole text, with other tokens hidden each time."""
    width = row_tokens(config)

    def columns(vocab_size: int) -> dict[str, Column]:
        return {"tokens": Column(width, smallest_dtype(vocab_size - 1)), "segments": Column(width, smallest_dtype(width))}

    def rows(documents: Iterable[Document], tokenizer: "Tokenizer", labels: tuple[str, ...], totals: Totals) -> Iterator[Block]:
        del labels
        special = _table(tokenizer, tokenize.special_ids(tokenizer))
        for tokens, numbers in pack.stream((document.text for document in documents), tokenizer, width, totals):
            totals.weighted_tokens += int(((numbers > 0) & ~special[tokens]).sum())
            yield {"tokens": tokens, "segments": numbers}

    def batch(tokenizer: "Tokenizer") -> MakeBatch:
        return _batch(tokenizer, config.data.noise_frac, config.data.whole_words)

    recipe = {"rows": "masked_lm"}
    return Examples(columns, decoder_arrays(width), rows, batch, shown.masked, added=Added(mask=True), recipe=recipe)


def _table(tokenizer: "Tokenizer", ids: set[int]) -> np.ndarray:
    """bool [V]: which ids are among these."""
    return np.isin(np.arange(tokenizer.vocab_size), list(ids))


def _batch(tokenizer: "Tokenizer", noise_frac: float, whole_words: bool) -> MakeBatch:
    special = _table(tokenizer, tokenize.special_ids(tokenizer))
    ordinary = np.flatnonzero(~special).astype(np.int32)
    starts = word_starts(tokenizer) if whole_words else None
    mask_id = np.array(tokenizer.mask_id, np.int32)  # there is one: `tokenize.make` has seen to it

    def make_batch(stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
        targets, segments = stored["tokens"], stored["segments"]
        shape = targets.shape
        choose, kind, other = np.split(noise.uniforms(seed, step, rows, 3 * shape[1]), 3, axis=1)
        if starts is not None:
            choose = np.take_along_axis(choose, _word_places(targets, segments, starts, special), axis=1)
        chosen = (choose < noise_frac) & (segments > 0) & ~special[targets]
        random = ordinary[(other * len(ordinary)).astype(np.int32)]
        shown = np.where(kind < MASK_FRAC, mask_id, np.where(kind < MASK_FRAC + RANDOM_FRAC, random, targets))
        return {
            "tokens": np.where(chosen, shown, targets).astype(np.int32),
            "targets": targets,
            "segments": segments,
            "positions": count_positions(segments),
            "weights": chosen.astype(np.float32),
        }

    return make_batch


def _word_places(tokens: np.ndarray, segments: np.ndarray, starts: np.ndarray, special: np.ndarray) -> np.ndarray:
    """int [B, T]: place of the first token of each token's word. A row, a document and a special token end a word."""
    after = np.pad(special[tokens][:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = starts[tokens] | special[tokens] | after | (np.diff(segments, axis=1, prepend=0) != 0)
    return np.maximum.accumulate(np.where(first, np.arange(tokens.shape[1]), 0), axis=1)
