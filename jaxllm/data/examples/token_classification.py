"""The class of each word of a text.

A text is [bos] words [eos]. A word's label and its weight stand at its first token (encoder), or at its last one (decoder, which
sees the word only there). Several texts share a row, each in a segment of its own. A text longer than a row is cut at a word, and counted.

Stored: tokens, segments, labels (number of the class, 0 where there is none) and weights (1 where a word has its label), all [N, T].
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import fill, pack
from jaxllm.data.documents import Document
from jaxllm.data.examples import shown
from jaxllm.data.examples.contract import Examples, MakeBatch, count_positions, decoder_arrays, row_tokens
from jaxllm.data.examples.labels import index
from jaxllm.data.examples.labels import of as labels_of
from jaxllm.data.examples.sequence_classification import ENCODERS
from jaxllm.data.shards import FLAG, Block, Column, Totals, smallest_dtype
from jaxllm.data.tokenizers.words import word_starts

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

ENCODED_AT_ONCE = 256


def make(config: ConfigDict) -> Examples:
    """Rows of texts, whose words have labels."""
    width, first = row_tokens(config), config.model.name in ENCODERS

    def columns(vocab_size: int) -> dict[str, Column]:
        return {
            "tokens": Column(width, smallest_dtype(vocab_size - 1)),
            "segments": Column(width, smallest_dtype(width)),
            "labels": Column(width, np.dtype(np.uint32)),
            "weights": Column(width, FLAG),
        }

    def rows(documents: Iterable[Document], tokenizer: "Tokenizer", labels: tuple[str, ...], totals: Totals) -> Iterator[Block]:
        texts = ((side,) for side in _texts(documents, tokenizer, labels, width, totals, first=first))
        for block in fill.fill(texts, (width,), ("segments",), 0):
            yield block | {"tokens": np.where(block["segments"] > 0, block["tokens"], tokenizer.pad_id)}

    recipe = {"rows": "token_classification", "data.target_field": config.data.target_field, "label at first token": first}
    return Examples(columns, decoder_arrays(width), rows, _batch, shown.tagged, reads="labels", recipe=recipe)


def _texts(
    documents: Iterable[Document], tokenizer: "Tokenizer", labels: tuple[str, ...], width: int, totals: Totals, *, first: bool
) -> Iterator[fill.Side]:
    numbers, starts = index(labels), word_starts(tokenizer)
    for group in pack.grouped(documents, ENCODED_AT_ONCE):
        encoded = encode([document.text for document in group], tokenizer, starts, width, first=first)
        for document, (tokens, places, words, cut) in zip(group, encoded, strict=True):
            names = labels_of(document)
            totals.documents += 1
            totals.cut += cut
            if not places:
                continue
            side = {"tokens": tokens, "labels": np.zeros(len(tokens), np.int32), "weights": np.zeros(len(tokens), np.int32)}
            side["labels"][places] = [numbers[names[order]] for order in words]
            side["weights"][places] = 1
            totals.tokens += len(tokens)
            totals.weighted_tokens += len(places)
            yield side


class Encoded(NamedTuple):
    """A text: its tokens with bos and eos; the places in them where its words have their classes; the numbers of these words; whether
    words were cut off."""

    tokens: np.ndarray
    places: list[int]
    words: list[int]
    cut: bool


def encode(texts: list[str], tokenizer: "Tokenizer", starts: np.ndarray, width: int, *, first: bool) -> Iterator[Encoded]:
    """Each text in up to `width` tokens. starts: `word_starts` of the tokenizer. first: a word's place is its first token, not its last."""
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for words in _encode([text.split(" ") for text in texts], tokenizer, starts):
        ends = np.cumsum([len(ids) for ids in words]) + len(before)
        whole = int(np.searchsorted(ends, width - len(after), "right"))
        tokens = np.array([*before, *chain.from_iterable(words[:whole]), *after], np.int32)
        pack.check_ids(tokens, tokenizer)
        # A word may have no token: a tokenizer from elsewhere drops what it does not know.
        spelt = [order for order in range(whole) if words[order]]
        places = [int(ends[order]) - (len(words[order]) if first else 1) for order in spelt]
        yield Encoded(tokens, places, spelt, whole < len(words))


def _encode(texts: list[list[str]], tokenizer: "Tokenizer", starts: np.ndarray) -> list[list[list[int]]]:
    """Ids of each word of each text, as they are in the whole text: with the space before it, where that is the tokenizer's way."""
    flat = [(word, order > 0) for words in texts for order, word in enumerate(words)]
    plain = tokenizer.encode_batch([word for word, _ in flat])
    # A tokenizer that marks the start of a word by itself needs no space.
    late = [place for place, (_, follows) in enumerate(flat) if follows and plain[place] and not starts[plain[place][0]]]
    for place, ids in zip(late, tokenizer.encode_batch([" " + flat[place][0] for place in late]), strict=True):
        plain[place] = ids
    rest = iter(plain)
    return [[next(rest) for _ in words] for words in texts]


def _batch(tokenizer: "Tokenizer") -> MakeBatch:
    del tokenizer

    def make_batch(stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
        del rows, seed, step
        return {
            "tokens": stored["tokens"],
            "targets": stored["labels"],
            "segments": stored["segments"],
            "positions": count_positions(stored["segments"]),
            "weights": stored["weights"].astype(np.float32),
        }

    return make_batch
