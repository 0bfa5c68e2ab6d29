"""Knowledge distillation: a student learns the distributions of a teacher (Hinton et al. 2015, arXiv:1503.02531).

    loss = (1 - h) t^2 KL + h nll

KL is the forward or reverse divergence of the teacher and the student at each target, both at the temperature t, as distributions of the
teacher's K likeliest tokens and the rest (ops/coarse.py); nll the student's cross-entropy at temperature 1, h its share
(distill.hard_frac). What the teacher says stands in the batch, so that this is a function of the current parameters and the batch, as any
other objective.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.objectives.scores import READ
from jaxllm.ops import coarse
from jaxllm.transforms import leaf
from jaxllm.types import Batch, Head, Mean, Metrics, Model, Params


@dataclass(frozen=True, eq=False)
class Distill:
    """A `types.Objective`.

    Metrics: "loss" and "accuracy" of the student alone, as those of tokens.py; "kl", the divergence in nats a token, not multiplied by
    anything; "covered", the share of the teacher's probability that its K tokens have. The weight of each is the sum of the batch's
    `weights`.
    """

    model: Model
    how: Any
    chunk_tokens: int

    def __call__(self, params: Params, batch: Batch, rng: jax.Array | None, /) -> tuple[Mean, Metrics]:
        read = {name: batch[name] for name in READ if name in batch}
        hidden_BTD = self.model.hidden(params, batch["tokens"], **read, rng=rng)
        return self.of_hidden(hidden_BTD, self.model.head(params), batch)

    def of_hidden(self, hidden_BTD: jax.Array, head: Head, batch: Batch, /) -> tuple[Mean, Metrics]:
        how, weights_N = self.how, batch["weights"].reshape(-1)
        log_p_NO = batch["teacher"].reshape(-1, how.top_k + 1)
        found = coarse.scores(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            leaf.dense(head.kernel),
            batch["teacher_ids"].reshape(-1, how.top_k),
            batch["targets"].reshape(-1),
            bias_V=head.bias,
            temperature=how.temperature,
            chunk_tokens=self.chunk_tokens,
        )
        weight = jnp.sum(weights_N)

        def mean(values_N: jax.Array) -> Mean:
            # Not a product: what does not count need not be a number.
            return Mean(jnp.sum(jnp.where(weights_N > 0, weights_N * values_N, 0.0)), weight)

        kl, nll = mean(coarse.DIVERGENCES[how.kl](log_p_NO, found.log_q_NO)), mean(-found.log_q_N)
        total = (1 - how.hard_frac) * how.temperature**2 * kl.total + how.hard_frac * nll.total
        metrics = {
            "loss": nll,
            "accuracy": mean(found.correct_N),
            "kl": kl,
            "covered": mean(1 - jnp.exp(log_p_NO[:, -1])),
        }
        return Mean(total, weight), metrics


def make(model: Model, config: Any) -> Distill:
    """The objective of the whole config."""
    return Distill(model, config.distill, config.train.loss_chunk_tokens)
