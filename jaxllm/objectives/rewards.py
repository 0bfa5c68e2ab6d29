"""The objective of reward models: of two answers to a prompt the chosen one is to get the higher number.

The model's head has one class, and its logit at one token of an answer is the reward: at the last token of a decoder, the one that ends
the answer, and at the first token of an encoder. With r(w) and r(l) of the chosen and the rejected answer, s the logistic function, m
the margin of the pair and c the coefficient reward.centering, the loss of a pair is

    -log s(r(w) - r(l) - m) + c (r(w) + r(l))^2

Ouyang et al. 2022, arXiv:2203.02155, eq. 1 (Bradley and Terry's model of preferences, one pair a prompt); the margin is that of Touvron
et al. 2023, arXiv:2307.09288, eq. 2, and the second term that of Eisenstein et al. 2023, arXiv:2312.09244. m is reward.margin_factor
times what the data says, 0 where it says nothing. Both are those of TRL 1.16, which takes the factor for 1.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.models import heads
from jaxllm.objectives.scores import READ
from jaxllm.ops import branches
from jaxllm.types import Batch, Head, Mean, Metrics, Model, Params


class Compared(NamedTuple):
    """Of each pair of a batch, [B, S]: the rewards and the margin, 0 where there is no pair, and whether there is one: 0 or 1."""

    chosen: jax.Array
    rejected: jax.Array
    margin: jax.Array
    there: jax.Array

    def mean(self, values: jax.Array) -> Mean:
        """Over the pairs."""
        return Mean(jnp.sum(self.there * values), jnp.sum(self.there))


@dataclass(frozen=True, eq=False)
class Rewards:
    """A `types.Objective`. The weight of each metric is the number of pairs.

    Metrics: "loss", the first term; "penalty", the second one, if there is one (what is minimized is their sum); "accuracy", how many
    pairs have the higher reward at the chosen answer; "margin", the difference of the rewards; "chosen_reward" and "rejected_reward".
    reads: the arrays of a batch that the model sees besides its tokens.
    """

    model: Model
    centering: float
    margin_factor: float
    reads: tuple[str, ...]

    def __call__(self, params: Params, batch: Batch, rng: jax.Array | None, /) -> tuple[Mean, Metrics]:
        hidden_BTD = self.model.hidden(params, batch["tokens"], **{name: batch[name] for name in self.reads}, rng=rng)
        return self.of_hidden(hidden_BTD, self.model.head(params), batch)

    def of_hidden(self, hidden_BTD: jax.Array, head: Head, batch: Batch, /) -> tuple[Mean, Metrics]:
        return self.of_pairs(self.compare(hidden_BTD, head, batch))

    def compare(self, hidden_BTD: jax.Array, head: Head, batch: Batch) -> Compared:
        """The rewards of the pairs."""
        weights_BT, pairs_BT = batch["weights"], batch.get("pairs", batch["segments"])

        def total(values_BT: jax.Array) -> jax.Array:
            return branches.totals(weights_BT * values_BT, pairs_BT, batch["branches"], 2)

        rewards, margins, number = (
            total(values_BT) for values_BT in (heads.logits(hidden_BTD, head)[..., 0], batch["margins"], jnp.ones_like(weights_BT))
        )
        there = (number[..., 1] > 0) & (number[..., 2] > 0)
        chosen, rejected, margin = (jnp.where(there, each, 0.0) for each in (rewards[..., 1], rewards[..., 2], margins[..., 1]))
        return Compared(chosen, rejected, self.margin_factor * margin, there.astype(jnp.float32))

    def of_pairs(self, pairs: Compared) -> tuple[Mean, Metrics]:
        """The loss and what else is measured of pairs."""
        difference = pairs.chosen - pairs.rejected
        loss = pairs.mean(-jax.nn.log_sigmoid(difference - pairs.margin))
        metrics = {
            "loss": loss,
            "accuracy": pairs.mean((pairs.chosen > pairs.rejected).astype(jnp.float32)),
            "margin": pairs.mean(difference),
            "chosen_reward": pairs.mean(pairs.chosen),
            "rejected_reward": pairs.mean(pairs.rejected),
        }
        if not self.centering:
            return loss, metrics
        penalty = pairs.mean(self.centering * (pairs.chosen + pairs.rejected) ** 2)
        return Mean(loss.total + penalty.total, loss.weight), metrics | {"penalty": penalty}


def make(model: Model, config: Any) -> Rewards:
    """The objective of the whole config."""
    # An encoder is told of branches by the segments.
    reads = READ if model.decode is not None else tuple(name for name in READ if name != "branches")
    return Rewards(model, config.reward.centering, config.reward.margin_factor, reads)
