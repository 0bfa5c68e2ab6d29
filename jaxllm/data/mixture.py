"""Replay: a share of each batch is rows of a second source, such as what a model read before, so that it does not forget it.

A few per cent go far (Ibrahim et al. 2024, arXiv:2403.08763, section 6: 1 to 50 % are compared, 5 % is their default). As in order.py, the
batch is a function of (seed, step): either source has a permutation and epochs of its own.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import order
from jaxllm.data.examples.contract import MakeBatch
from jaxllm.data.noise import mix
from jaxllm.data.shards import Shards

# Sets the permutation of the replay rows apart from that of the others.
REPLAY = np.uint64(0x7265706C6179)


class Replay(NamedTuple):
    """`seqs` of each batch are these rows. Their arrays have the names and widths of the others."""

    shards: Shards
    make_batch: MakeBatch
    seqs: int
    microbatches: int


class Batches(NamedTuple):
    """The training batches on the host, each a function of the step: rows of `shards`, and among them those of `replay`."""

    shards: Shards
    make_batch: MakeBatch
    batch_seqs: int
    seed: int
    replay: Replay | None = None

    def rows(self, step: int) -> np.ndarray:
        """int64 [B]: the rows of the shards that make up the global batch of this step; those of replay count from the last one on."""
        if self.replay is not None:
            return batch_rows(len(self.shards), self.replay, self.batch_seqs, self.seed, step)
        return order.batch_rows(len(self.shards), self.batch_seqs, self.seed, step)

    def arrays(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays [R, T] of these R rows, all of the batch of this step or some."""
        first = len(self.shards)
        is_replayed = rows >= first
        own, other = rows[~is_replayed], rows[is_replayed]
        made = self.make_batch(self.shards.rows(own), own, self.seed, step) if own.size else None
        if self.replay is None or not other.size:
            return made or {}
        replayed = self.replay.make_batch(self.replay.shards.rows(other - first), other, self.seed, step)
        return replayed if made is None else _joined(made, replayed, is_replayed)


def replay_seqs(config: ConfigDict) -> int:
    """Rows of a batch that are replayed: the nearest number to data.replay_frac, but some and not all if that is above 0."""
    frac, batch = config.data.replay_frac, config.train.batch_seqs
    return min(max(1, round(frac * batch)), batch - 1) if frac else 0


def describe(config: ConfigDict, train: Shards, replay: Shards) -> str:
    """The share of replay in rows and, as rows are not equally full, in the tokens that count in the loss."""
    batch, seqs = config.train.batch_seqs, replay_seqs(config)
    if not seqs:
        return "replay: no row of a batch (data.replay_frac = 0); only the loss on it is measured"
    weights = [count * shards.weighted_tokens / len(shards) for count, shards in ((seqs, replay), (batch - seqs, train))]
    return f"replay: {seqs} of the {batch} rows of a batch, {weights[0] / sum(weights):.1%} of the tokens that it trains on"


def places(batch_seqs: int, seqs: int, microbatches: int) -> np.ndarray:
    """bool [B]: which rows of a batch are replayed, evenly spaced. Row i belongs to micro-batch i mod M, and each has its share, up to a
    row."""
    micro_R, row_R = np.divmod((2 * np.arange(seqs) + 1) * batch_seqs // (2 * seqs), batch_seqs // microbatches)
    found = np.zeros(batch_seqs, bool)
    found[row_R * microbatches + micro_R] = True
    return found


def batch_rows(rows: int, replay: Replay, batch_seqs: int, seed: int, step: int) -> np.ndarray:
    """int64 [B] as order.batch_rows: below `rows` one of the first source, from there on one of replay."""
    replayed_B = places(batch_seqs, replay.seqs, replay.microbatches)
    found = np.empty(batch_seqs, np.int64)
    found[~replayed_B] = order.batch_rows(rows, batch_seqs - replay.seqs, seed, step)
    other_seed = int(mix(np.array(seed, np.uint64) ^ REPLAY))
    found[replayed_B] = rows + order.batch_rows(len(replay.shards), replay.seqs, other_seed, step)
    return found


def _joined(own: Mapping[str, np.ndarray], replayed: Mapping[str, np.ndarray], is_replayed_B: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays [B, T] of a batch, given those of its rows of either kind, in their order."""
    found = {name: np.empty((len(is_replayed_B), array.shape[1]), array.dtype) for name, array in own.items()}
    for name, array in found.items():
        array[~is_replayed_B], array[is_replayed_B] = own[name], replayed[name]
    return found
