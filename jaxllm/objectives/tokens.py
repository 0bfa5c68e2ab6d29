"""Weighted cross-entropy of tokens (or classes): the objective of every task whose `targets` and `weights` the data side made.

Pre-training, masked and span-corrupted text, translation, classification and supervised fine-tuning differ in the batch, not here.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.ops import losses
from jaxllm.transforms import leaf
from jaxllm.types import Batch, Head, Mean, Metrics, Model, Params

# What the loss reads; all else in a batch is for the model.
LOSS_ARRAYS = ("tokens", "targets", "weights")


@dataclass(frozen=True, eq=False)
class Tokens:
    """A `types.Objective`.

    Metrics: "loss" (negative log-likelihood in nats), "accuracy" (share of targets that are the likeliest token) and, with z_loss or label
    smoothing, "penalty". What is minimized is loss + penalty. The weight of each is the sum of the batch's `weights`: tokens if these are
    0 and 1.
    """

    model: Model
    train: Any

    def __call__(self, params: Params, batch: Batch, rng: jax.Array | None, /) -> tuple[Mean, Metrics]:
        read = {name: array for name, array in batch.items() if name not in LOSS_ARRAYS}
        hidden_BTD = self.model.hidden(params, batch["tokens"], **read, rng=rng)
        return self.of_hidden(hidden_BTD, self.model.head(params), batch)

    def of_hidden(self, hidden_BTD: jax.Array, head: Head, batch: Batch, /) -> tuple[Mean, Metrics]:
        train, weights_N = self.train, batch["weights"].reshape(-1)
        totals = losses.cross_entropy(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            leaf.dense(head.kernel),
            batch["targets"].reshape(-1),
            weights_N,
            bias_V=head.bias,
            chunk_tokens=train.loss_chunk_tokens,
            z_loss=train.z_loss,
            label_smoothing=train.label_smoothing,
        )
        weight = jnp.sum(weights_N)
        metrics = {"loss": Mean(totals.nll, weight), "accuracy": Mean(totals.correct, weight)}
        if train.z_loss or train.label_smoothing:
            metrics["penalty"] = Mean(totals.penalty, weight)
        return Mean(totals.nll + totals.penalty, weight), metrics


def make(model: Model, config: Any) -> Tokens:
    """The objective of the whole config."""
    return Tokens(model, config.train)
