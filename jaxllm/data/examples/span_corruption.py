"""Hidden spans of a text from the rest of it (T5; Raffel et al. 2020, arXiv:1910.10683, sections 3.1.4 and 3.3.4).

A row of L tokens is cut into spans that stay and spans that are hidden, in turn, beginning with one that stays:
  inputs   a b <0> e f g <1> eos       targets   <0> c d <1> h eos
Hidden are round(L x data.noise_frac) tokens in round(hidden / data.mean_span_tokens) spans, whose borders are drawn so that each
way of cutting is as likely as the others. So all rows have equal lengths, and L is the largest whose inputs fill an encoder row
of data.row_tokens. Span k is replaced by `sentinel_ids[k]`, counted from the top of the vocabulary down.

Stored: tokens [N, L], a stretch of the stream of documents, each closed by eos. As in T5 a row is one example whatever number of documents
it touches, so that attention crosses their borders. The last row ends with the stream and so may repeat some of the row before.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import noise, pack, tokenize
from jaxllm.data.documents import Document
from jaxllm.data.examples import shown
from jaxllm.data.examples.contract import Examples, MakeBatch, decoder_arrays, encoder_arrays, row_tokens, shift_right
from jaxllm.data.shards import Block, Column, Totals, smallest_dtype
from jaxllm.data.tokenizers.added import Added

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer


class Sizes(NamedTuple):
    """Tokens of a row before it is corrupted, how many are hidden, in how many spans, and what comes out."""

    raw: int
    hidden: int
    spans: int

    @property
    def inputs(self) -> int:
        return self.raw - self.hidden + self.spans + 1

    @property
    def targets(self) -> int:
        return self.hidden + self.spans + 1


def corrupted(raw: int, noise_frac: float, mean_span_tokens: float) -> Sizes:
    """What a row of `raw` tokens (2 or more) becomes. At least one token is hidden and at least one stays."""
    hidden = min(max(round(raw * noise_frac), 1), raw - 1)
    return Sizes(raw, hidden, max(round(hidden / mean_span_tokens), 1))


def solve(input_tokens: int, noise_frac: float, mean_span_tokens: float) -> Sizes:
    """The sizes with the longest row whose inputs are exactly `input_tokens` long.

    There is one for 3 tokens or more, since a token more makes inputs longer by one or leaves their length as it is.
    """
    raw = max(input_tokens - 1, 2)  # inputs are at most one token, the eos, longer than the row
    while corrupted(raw + 1, noise_frac, mean_span_tokens).inputs <= input_tokens:
        raw += 1
    return corrupted(raw, noise_frac, mean_span_tokens)


def make(config: ConfigDict) -> Examples:
    """Rows of text, with other spans hidden each time."""
    sizes = _sizes(config)

    def columns(vocab_size: int) -> dict[str, Column]:
        return {"tokens": Column(sizes.raw, smallest_dtype(vocab_size - 1))}

    def rows(documents: Iterable[Document], tokenizer: "Tokenizer", labels: tuple[str, ...], totals: Totals) -> Iterator[Block]:
        del labels
        texts = (document.text for document in documents)
        for tokens in _full(pack.stream(texts, tokenizer, sizes.raw, totals, bos=False)):
            totals.weighted_tokens += sizes.targets * len(tokens)
            yield {"tokens": tokens}

    def batch(tokenizer: "Tokenizer") -> MakeBatch:
        return _batch(tokenizer, sizes)

    recipe = {"rows": "span_corruption"} | {f"data.{name}": config.data[name] for name in ("noise_frac", "mean_span_tokens")}
    arrays = encoder_arrays(sizes.inputs) | decoder_arrays(sizes.targets)
    return Examples(columns, arrays, rows, batch, shown.paired, added=Added(sentinels=sizes.spans, borders=True), recipe=recipe)


def _sizes(config: ConfigDict) -> Sizes:
    data, width = config.data, row_tokens(config)
    given = f"data.noise_frac = {data.noise_frac} with data.mean_span_tokens = {data.mean_span_tokens} and rows of {width} tokens"
    if width < 3:
        raise ValueError(f"{given}: nothing can be hidden.\n  Accepted: rows of 3 tokens or more.\n  Raise data.row_tokens.")
    # Checked before the search: spans that grow as fast as the row would let it run on.
    sizes = (
        solve(width, data.noise_frac, data.mean_span_tokens)
        if data.noise_frac / data.mean_span_tokens < 1 - data.noise_frac
        else None
    )
    if sizes is None or sizes.spans > sizes.raw - sizes.hidden:
        raise ValueError(
            f"{given}: there are more hidden spans than tokens that could stand between them.\n"
            f"  Accepted: spans of more than {data.noise_frac / (1 - data.noise_frac):.3g} tokens with this share.\n"
            "  Raise data.mean_span_tokens, or lower data.noise_frac."
        )
    if sizes.targets > config.model.context_tokens:
        raise ValueError(
            f"{given} make targets of {sizes.targets} tokens.\n  Accepted: up to model.context_tokens = {config.model.context_tokens}.\n"
            "  Lower data.noise_frac or data.row_tokens, or raise model.context_tokens."
        )
    return sizes


def _full(windows: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
    """Windows [n, L] without padding: the last one is moved to the left until it is full. None if there is less text than one."""
    last: np.ndarray | None = None
    for tokens, numbers in windows:
        filled = int((numbers[-1] > 0).sum())
        if filled == tokens.shape[1]:
            yield tokens
        elif last is not None:
            yield np.concatenate([last[filled:], tokens[-1, :filled]])[None]
        last = tokens[-1]


def _batch(tokenizer: "Tokenizer", sizes: Sizes) -> MakeBatch:
    sentinels = np.array(tokenizer.sentinel_ids[: sizes.spans], np.int32)
    start_id = tokenize.start_id(tokenizer)
    eos_id = np.array(tokenizer.eos_id, np.int32)  # there is one: `tokenize.make` has seen to it

    def make_batch(stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
        number = _cut(sizes, seed, step, rows)
        inputs, targets = (_closed(part, eos_id) for part in _sides(stored["tokens"], number, sentinels))
        positions = np.broadcast_to(np.arange(sizes.targets, dtype=np.int32), targets.shape)
        return {
            "inputs": inputs,
            "input_segments": np.ones_like(inputs),
            "input_positions": np.broadcast_to(np.arange(sizes.inputs, dtype=np.int32), inputs.shape).copy(),
            "tokens": shift_right(targets, positions, start_id),
            "targets": targets,
            "segments": np.ones_like(targets),
            "positions": positions.copy(),
            "weights": np.ones_like(targets, np.float32),
        }

    return make_batch


def _cut(sizes: Sizes, seed: int, step: int, rows: np.ndarray) -> np.ndarray:
    """int32 [B, L]: number of each token's span: 0, 2, ... stay, 1, 3, ... are hidden."""
    stay = sizes.raw - sizes.hidden
    draws = noise.uniforms(seed, step, rows, stay - 1 + sizes.hidden - 1)
    lengths = np.stack([_parts(draws[:, : stay - 1], sizes.spans), _parts(draws[:, stay - 1 :], sizes.spans)], axis=2)
    ends = np.cumsum(lengths.reshape(len(rows), 2 * sizes.spans), axis=1)
    starts = np.zeros((len(rows), sizes.raw), np.int32)
    np.put_along_axis(starts, ends[:, :-1], 1, axis=1)
    return np.cumsum(starts, axis=1, dtype=np.int32)


def _parts(draws: np.ndarray, parts: int) -> np.ndarray:
    """int [B, parts]: lengths of 1 or more that sum to draws.shape[1] + 1, each way as likely: borders at the smallest draws."""
    count, gaps = draws.shape
    borders = (
        np.sort(np.argpartition(draws, parts - 2, axis=1)[:, : parts - 1], axis=1) + 1 if parts > 1 else np.zeros((count, 0), int)
    )
    edges = np.pad(borders, ((0, 0), (1, 1)), constant_values=((0, 0), (0, gaps + 1)))
    return np.diff(edges, axis=1)


def _sides(tokens: np.ndarray, number: np.ndarray, sentinels: np.ndarray) -> Iterator[np.ndarray]:
    """Inputs and targets without eos: the spans of the other side are one sentinel each."""
    rows = len(tokens)
    first = np.diff(number, axis=1, prepend=-1) != 0
    marked = sentinels[number // 2]
    for mine in (number % 2 == 0, number % 2 == 1):
        kept = mine | first
        yield np.where(mine, tokens, marked)[kept].reshape(rows, -1)


def _closed(ids: np.ndarray, eos_id: np.ndarray) -> np.ndarray:
    return np.pad(ids, ((0, 0), (0, 1)), constant_values=eos_id).astype(np.int32)
