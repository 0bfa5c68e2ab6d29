"""Objectives of preferences: pairs of a chosen and a rejected answer (dpo, orpo, simpo), and answers that are good or bad (kto).

The losses are in preference_losses.py. A batch has forked rows: segments of a prompt with two answers each, branches 1 and 2; several
share a row, and a segment counts once, whatever its length. What an answer is by the reference stands in the batch (`reference`), so that
an objective is a function of the current parameters and the batch, as any other.
"""

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.consistency import REFERRED
from jaxllm.objectives import preference_losses
from jaxllm.objectives.preference_losses import Answers, How, PairLoss
from jaxllm.objectives.scores import READ, target_log_probs
from jaxllm.ops import branches
from jaxllm.parallel import constrain as devices
from jaxllm.types import Batch, Head, Mean, Metrics, Model, Params


class Compared(NamedTuple):
    """Of each segment of a batch [B, S] its answers 1 and 2, and whether it has them: float32, 0 or 1. What is not there has log p -1."""

    answers: tuple[Answers, Answers]
    there: tuple[jax.Array, jax.Array]


@dataclass(frozen=True, eq=False)
class Preferences(abc.ABC):
    """What the objectives of this file have in common; a `types.Objective`.

    reads_reference: whether the batch has the array `reference`.
    """

    model: Model
    how: How
    chunk_tokens: int
    reads_reference: bool

    def __call__(self, params: Params, batch: Batch, rng: jax.Array | None, /) -> tuple[Mean, Metrics]:
        hidden_BTD = self.model.hidden(params, batch["tokens"], **{name: batch[name] for name in READ}, rng=rng)
        return self.of_hidden(hidden_BTD, self.model.head(params), batch)

    @abc.abstractmethod
    def of_hidden(self, hidden_BTD: jax.Array, head: Head, batch: Batch, /) -> tuple[Mean, Metrics]:
        """See `types.Objective`."""

    def score(self, hidden_BTD: jax.Array, head: Head, batch: Batch) -> Compared:
        """The log-probabilities of the answers."""
        weights_BT = batch["weights"]
        log_p_BT = target_log_probs(hidden_BTD, head, batch, self.chunk_tokens)

        def total(values_BT: jax.Array) -> jax.Array:
            return branches.totals(values_BT, batch["segments"], batch["branches"], 2)

        log_p, tokens = total(weights_BT * log_p_BT), total(weights_BT)
        reference = total(weights_BT * batch["reference"]) if self.reads_reference else jnp.zeros_like(log_p)
        there = (tokens > 0).astype(jnp.float32)
        log_p, tokens = jnp.where(tokens > 0, log_p, -1.0), jnp.maximum(tokens, 1.0)
        first, second = (Answers(log_p[..., i], reference[..., i], tokens[..., i]) for i in (1, 2))
        return Compared((first, second), (there[..., 1], there[..., 2]))


@dataclass(frozen=True, eq=False)
class Pairs(Preferences):
    """dpo, orpo and simpo. The weight of each metric is the number of pairs.

    Metrics: "loss"; "chosen_logp" and "rejected_logp", log p of the whole answers in nats, of orpo and simpo a token of them;
    "chosen_reward" and "rejected_reward", beta times that, less the reference's (dpo); "margin", the difference of the rewards; "accuracy",
    how many pairs have one above 0.
    """

    loss: PairLoss
    of_means: bool

    def of_hidden(self, hidden_BTD: jax.Array, head: Head, batch: Batch, /) -> tuple[Mean, Metrics]:
        (chosen, rejected), (has_chosen, has_rejected) = self.score(hidden_BTD, head, batch)
        is_pair = has_chosen * has_rejected
        number = jnp.sum(is_pair)

        def mean(values: jax.Array) -> Mean:
            return Mean(jnp.sum(jnp.where(is_pair > 0, values, 0.0)), number)

        loss = mean(self.loss(chosen, rejected, self.how))
        logps = [answers.mean if self.of_means else answers.log_p for answers in (chosen, rejected)]
        rewards = [self.how.beta * (answers.mean if self.of_means else answers.ratio) for answers in (chosen, rejected)]
        metrics = {
            "loss": loss,
            "accuracy": mean((rewards[0] > rewards[1]).astype(jnp.float32)),
            "margin": mean(rewards[0] - rewards[1]),
            "chosen_reward": mean(rewards[0]),
            "rejected_reward": mean(rewards[1]),
            "chosen_logp": mean(logps[0]),
            "rejected_logp": mean(logps[1]),
        }
        return loss, metrics


@dataclass(frozen=True, eq=False)
class Labelled(Preferences):
    """kto: branch 1 is an answer, good where `desirable` is 1 at all tokens of its segment; branch 2 the answer of another prompt.

    The divergence from the reference is the mean over the mismatched answers of a micro-batch on all devices, as in TRL. It is all that a
    loss here knows of other rows: it differs with the size of a micro-batch, and with nothing else. Metrics: "loss" and "kl" of all
    answers; "chosen_reward", "chosen_logp" of the good ones and "rejected_reward", "rejected_logp" of the bad ones.
    """

    def of_hidden(self, hidden_BTD: jax.Array, head: Head, batch: Batch, /) -> tuple[Mean, Metrics]:
        (answers, mismatched), (there, has_mismatched) = self.score(hidden_BTD, head, batch)
        desirable = batch["desirable"].astype(jnp.float32) * batch["weights"]
        is_good = branches.totals(desirable, batch["segments"], batch["branches"], 2)[..., 1] > 0
        # The gradient ends before it travels: nothing goes back over the devices.
        apart = jax.lax.stop_gradient(jnp.sum(has_mismatched * mismatched.ratio))
        kl = preference_losses.divergence(*devices.total((apart, jnp.sum(has_mismatched))))

        def mean(values: jax.Array, counted: jax.Array) -> Mean:
            return Mean(jnp.sum(jnp.where(counted > 0, values, 0.0)), jnp.sum(counted))

        loss = mean(preference_losses.kto(answers, is_good, kl, self.how), there)
        rewards, good, bad = self.how.beta * answers.ratio, there * is_good, there * ~is_good
        metrics = {
            "loss": loss,
            "kl": mean(jnp.broadcast_to(kl, there.shape), there),
            "chosen_reward": mean(rewards, good),
            "rejected_reward": mean(rewards, bad),
            "chosen_logp": mean(answers.log_p, good),
            "rejected_logp": mean(answers.log_p, bad),
        }
        return loss, metrics


def make_pairs(model: Model, config: Any) -> Pairs:
    """dpo, orpo or simpo, of the whole config."""
    objective = config.train.objective
    named: dict[str, PairLoss] = {"orpo": preference_losses.orpo, "simpo": preference_losses.simpo}
    loss = preference_losses.LOSSES[config.preference.loss] if objective == "dpo" else named[objective]
    return Pairs(model, _how(config), config.train.loss_chunk_tokens, objective in REFERRED, loss, of_means=objective != "dpo")


def make_labelled(model: Model, config: Any) -> Labelled:
    """kto, of the whole config."""
    return Labelled(model, _how(config), config.train.loss_chunk_tokens, "kto" in REFERRED)


def _how(config: Any) -> How:
    given = config.preference
    beta = given.beta or (2.0 if config.train.objective == "simpo" else 0.1)
    return How(beta, given.label_smoothing, given.margin, given.desirable_weight, given.undesirable_weight)
