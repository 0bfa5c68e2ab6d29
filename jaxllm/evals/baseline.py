"""What a guess that has read nothing gets: every target by how often it is one in the training data (a unigram model).

    p(v) = (count of v + 1) / (count of all + number of outcomes)      (add-one smoothing; Jurafsky & Martin, section 3.6)
    loss = mean of -log p(target), in nats; accuracy = share of targets that are the most frequent one

A model that does not beat both has learned nothing from the tokens around a target.
"""

from typing import NamedTuple

import numpy as np

from jaxllm.data import loader
from jaxllm.data.examples.contract import MakeBatch
from jaxllm.data.shards import Shards

# Of the training data, evenly spaced: a million targets or more, so that frequencies no longer move.
MOST_ROWS = 16_384
BLOCK_ROWS = 256


class Baseline(NamedTuple):
    """loss: nats a target, as `perplexity` gives it. accuracy: of the one guess that is right most often."""

    loss: float
    accuracy: float


def measure(train: Shards, rows: Shards, make_batch: MakeBatch, outcomes: int, max_seqs: int = 0) -> Baseline:
    """The baseline of the targets in `rows`, whose noise is that of `loader.sweep`; frequencies are those of `train`.

    `outcomes`: of which a target is one, tokens of the vocabulary or classes. `max_seqs`: as `loader.sweep` takes so many rows.
    """
    return score(count(train, make_batch, outcomes, MOST_ROWS), count(rows, make_batch, outcomes, max_seqs))


def count(shards: Shards, make_batch: MakeBatch, outcomes: int, max_rows: int = 0) -> np.ndarray:
    """float64 [V]: sum of the weights of each target, in all rows or in `max_rows` evenly spaced ones if there are more."""
    counts_V = np.zeros(outcomes)
    number = min(max_rows or len(shards), len(shards))
    chosen = np.arange(number) * len(shards) // max(number, 1)
    for start in range(0, number, BLOCK_ROWS):
        block = chosen[start : start + BLOCK_ROWS]
        batch = make_batch(shards.rows(block), block, loader.SWEEP_SEED, loader.SWEEP_STEP)
        counts_V += np.bincount(batch["targets"].ravel(), batch["weights"].ravel(), minlength=outcomes)
    return counts_V


def score(seen_V: np.ndarray, targets_V: np.ndarray) -> Baseline:
    """How well the frequencies `seen_V` predict the targets counted in `targets_V`; ValueError if there are none."""
    if not targets_V.sum():
        raise ValueError(
            "nothing to evaluate: no target has a weight above 0.\n  Accepted: rows in which a document has two tokens or more.\n"
            "  Give more text."
        )
    log_p_V = np.log(seen_V + 1) - np.log(seen_V.sum() + len(seen_V))
    share_V = targets_V / targets_V.sum()
    return Baseline(loss=-float(share_V @ log_p_V), accuracy=float(share_V[seen_V.argmax()]))
