"""How often an encoder-decoder's greedy output is the target itself, token by token: one wrong token is a wrong sequence."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from jaxllm.data import tokenize
from jaxllm.decode import generate
from jaxllm.ops import sampling
from jaxllm.types import Batch, Model, Params, Tokenizer


class Exact(NamedTuple):
    """`right` of `pairs` sequences."""

    right: int
    pairs: int


class Pair(NamedTuple):
    """Ids of an input and of its target, both with the eos at their end."""

    inputs: list[int]
    target: list[int]


def measure(model: Model, params: Params, tokenizer: Tokenizer, pairs: Iterable[Pair], max_seqs: int) -> Exact:
    """Over the first `max_seqs` of the pairs (0: all). A target longer than the context leaves room for counts as wrong."""
    chosen = list(islice(pairs, max_seqs or None))
    if not chosen:
        return Exact(0, 0)
    stop_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    written = generate.generate(
        model,
        params,
        [pair.inputs for pair in chosen],
        sampling.Settings(temperature=0),
        # With its eos: what goes on behind the target is wrong.
        max_new_tokens=min(max(len(pair.target) for pair in chosen), model.config.context_tokens - 1),
        stop_ids=stop_ids,
        vocab_size=tokenizer.vocab_size,
        seed=0,
        start_id=tokenize.start_id(tokenizer),
    )
    right = sum(ids == generate.strip(pair.target, stop_ids) for ids, pair in zip(written, chosen, strict=True))
    return Exact(right, len(chosen))


def unpack(batches: Iterable[Batch]) -> Iterator[Pair]:
    """The pairs of batches of seq2seq, of which several may share a row, each in a segment of its own."""
    for batch in batches:
        arrays = {name: np.asarray(batch[name]) for name in ("inputs", "input_segments", "targets", "segments")}
        for inputs, input_segments, targets, segments in zip(*arrays.values(), strict=True):
            for segment in range(1, int(segments.max()) + 1):
                yield Pair(inputs[input_segments == segment].tolist(), targets[segments == segment].tolist())
