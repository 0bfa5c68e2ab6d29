"""Whether a reward model is as sure as it is right.

Of two answers the one with the higher reward is the better one with the probability p = s(|r - r'|), 0.5 to 1, by the model of Bradley and
Terry that the loss is made of. Pairs are put into BINS bins of p; in each, the mean p stands beside the share of the pairs in which the
chosen answer has the higher reward (equal rewards count one half). The expected calibration error is the mean distance of the two,
weighted by pairs (Guo et al. 2017, arXiv:1706.04599, eq. 3). A model that is trained with margins asks for more than p, and is less
sure than it is right.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.objectives.rewards import Compared, Rewards
from jaxllm.types import Mean, Metrics, Objective

BINS = 10
PREDICTED, RIGHT = "calibration_predicted", "calibration_right"


@dataclass(frozen=True, eq=False)
class Calibrated(Rewards):
    """The objective with two more metrics, means [BINS] of the pairs in each bin."""

    def of_pairs(self, pairs: Compared) -> tuple[Mean, Metrics]:
        loss, metrics = super().of_pairs(pairs)
        difference = pairs.chosen - pairs.rejected
        p_BS = jax.nn.sigmoid(jnp.abs(difference))
        bins_BS = jnp.minimum((2 * BINS * (p_BS - 0.5)).astype(jnp.int32), BINS - 1)
        inside_BSN = pairs.there[..., None] * jax.nn.one_hot(bins_BS, BINS)

        def means(values_BS: jax.Array) -> Mean:
            return Mean(jnp.sum(inside_BSN * values_BS[..., None], (0, 1)), jnp.sum(inside_BSN, (0, 1)))

        return loss, metrics | {PREDICTED: means(p_BS), RIGHT: means((1 + jnp.sign(difference)) / 2)}


def added(objective: Objective) -> Objective:
    """The objective, of rewards with these metrics."""
    if not isinstance(objective, Rewards):
        return objective
    return Calibrated(objective.model, objective.centering, objective.margin_factor, objective.reads)


def told(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{"calibration_error", "calibration"}, the latter [mean p, share that is right, pairs] of each bin with pairs, of sums [2, BINS]; {}
    of those without them."""
    if PREDICTED not in sums:
        return {}
    (predicted_N, pairs_N), (right_N, _) = sums[PREDICTED], sums[RIGHT]
    error = float(np.abs(predicted_N - right_N).sum() / pairs_N.sum())
    bins = [
        [float(predicted / pairs), float(right / pairs), int(pairs)]
        for predicted, right, pairs in zip(predicted_N, right_N, pairs_N, strict=True)
        if pairs
    ]
    return {"calibration_error": error, "calibration": bins}
