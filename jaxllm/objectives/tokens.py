"""Weighted cross-entropy of the next token: the objective of every task whose `targets` and `weights` the data side made.

Pre-training, masked and span-corrupted text and supervised fine-tuning differ in the batch, not here.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.ops import losses
from jaxllm.types import Batch, Mean, Metrics, Model, Objective, Params


def make(model: Model, config: Any, shards: int = 1) -> Objective:
    """objective(params, batch, rng) -> (Mean to minimize, metrics), for the whole config.

    Metrics: "loss" (negative log-likelihood in nats), "accuracy" (share of targets that are the likeliest token) and, where it is on,
    "z_loss". What is minimized is loss + z_loss. The weight of each is the sum of the batch's `weights`: tokens if these are 0 and 1.
    `rng` switches the model's dropout on; None leaves it off. `shards` is the number of parts into which the mesh cuts a batch:
    each sums its own gradient of the head, so that these meet once a step and not once a chunk.
    """
    chunk_tokens, z_loss = config.train.loss_chunk_tokens, config.train.z_loss

    def objective(params: Params, batch: Batch, rng: jax.Array | None) -> tuple[Mean, Metrics]:
        hidden_BTD = model.hidden(params, batch["tokens"], segments=batch["segments"], positions=batch["positions"], rng=rng)
        weights_N = batch["weights"].reshape(-1)
        nll, z, correct = losses.cross_entropy(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            model.head(params),
            batch["targets"].reshape(-1),
            weights_N,
            chunk_tokens=chunk_tokens,
            z_loss=z_loss,
            shards=shards,
        )
        weight = jnp.sum(weights_N)
        metrics = {"loss": Mean(nll, weight), "accuracy": Mean(correct, weight)}
        if z_loss:
            metrics["z_loss"] = Mean(z, weight)
        return Mean(nll + z, weight), metrics

    return objective
