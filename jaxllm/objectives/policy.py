"""Policy gradients of answers that the model wrote itself (grpo, ppo): what is not a function of the parameters stands in the batch.

old: log-probabilities of the targets when they were drawn; reference: by the model before step 0; advantages: how much better than
expected. Of ppo, old_values: what was expected behind each token; returns: what came. weights are the shares of the whole batch's loss
(policy_losses.token_weights), so that the loss is their weighted sum and is divided by nothing: its weight is 1 for the whole batch, and
that of a micro-batch or of a device its part of the tokens.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.models import heads
from jaxllm.objectives import policy_losses
from jaxllm.ops import losses
from jaxllm.transforms import leaf
from jaxllm.types import Batch, Head, Mean, Metrics, Model, Params

# What the model reads of a batch, besides its tokens.
READ = ("segments", "positions")


@dataclass(frozen=True, eq=False)
class Grpo:
    """A `types.Objective`.

    Metrics: "loss"; over the tokens that count "clipped_low" and "clipped_high" (shares of them whose ratio is clipped at that end),
    "drift" (estimate of KL(p | old): how far the model has gone since the answers were drawn) and, with rl.kl, "kl" (of the reference).
    """

    model: Model
    rl: Any
    batch_tokens: int
    chunk_tokens: int

    def __call__(self, params: Params, batch: Batch, rng: jax.Array | None, /) -> tuple[Mean, Metrics]:
        hidden_BTD = self.model.hidden(params, batch["tokens"], **{name: batch[name] for name in READ}, rng=rng)
        return self.of_hidden(hidden_BTD, self.model.head(params), batch)

    def of_hidden(self, hidden_BTD: jax.Array, head: Head, batch: Batch, /) -> tuple[Mean, Metrics]:
        rl, weights_BT = self.rl, batch["weights"]
        log_p_BT = log_probs(hidden_BTD, head, batch["targets"], rl.temperature, self.chunk_tokens)
        found = policy_losses.clipped(log_p_BT, batch["old"], batch["advantages"], rl.clip, rl.clip_high or rl.clip)
        losses_BT, beside = found.loss, {"clipped_low": found.low, "clipped_high": found.high}
        beside["drift"] = policy_losses.kl(log_p_BT, batch["old"])
        if rl.kl:
            beside["kl"] = policy_losses.kl(log_p_BT, batch["reference"])
            losses_BT += rl.kl * beside["kl"]
        loss = Mean(weighted_sum(losses_BT, weights_BT), jnp.float32(weights_BT.size / self.batch_tokens))
        return loss, {"loss": loss} | token_means(beside, weights_BT)


@dataclass(frozen=True, eq=False)
class Ppo(Grpo):
    """The clipped loss of the policy and rl.value_coef times that of values, of a model with a value head (Schulman et al. 2017, eq. 9).

    Metrics: "loss", of which "value_loss" is the part of the values, not yet times rl.value_coef; over the tokens that count "clipped_low",
    "clipped_high", "drift" as above, "value_clipped" and "value_error" (squared). What leads away from the reference is in the rewards.
    """

    def of_hidden(self, hidden_BTD: jax.Array, head: Head, batch: Batch, /) -> tuple[Mean, Metrics]:
        rl, weights_BT = self.rl, batch["weights"]
        log_p_BT = log_probs(hidden_BTD, head, batch["targets"], rl.temperature, self.chunk_tokens)
        found = policy_losses.clipped(log_p_BT, batch["old"], batch["advantages"], rl.clip, rl.clip_high or rl.clip)
        values_BT = heads.values(hidden_BTD, head)
        value_losses_BT, value_clipped_BT = policy_losses.value_loss(
            values_BT, batch["old_values"], batch["returns"], rl.value_clip
        )
        beside = {"clipped_low": found.low, "clipped_high": found.high, "drift": policy_losses.kl(log_p_BT, batch["old"])}
        beside |= {"value_clipped": value_clipped_BT, "value_error": jnp.square(values_BT - batch["returns"])}
        share = jnp.float32(weights_BT.size / self.batch_tokens)
        loss = Mean(weighted_sum(found.loss + rl.value_coef * value_losses_BT, weights_BT), share)
        value_loss = Mean(weighted_sum(value_losses_BT, weights_BT), share)
        return loss, {"loss": loss, "value_loss": value_loss} | token_means(beside, weights_BT)


def weighted_sum(values_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """The sum of weight x value where the weight is not 0: what stands elsewhere counts for nothing, whatever it is."""
    return jnp.sum(jnp.where(weights_BT > 0, weights_BT * values_BT, 0))


def token_means(values: dict[str, jax.Array], weights_BT: jax.Array) -> Metrics:
    """Their means over the tokens that count."""
    counts_BT = (weights_BT > 0).astype(jnp.float32)
    return {name: Mean(weighted_sum(values_BT, counts_BT), jnp.sum(counts_BT)) for name, values_BT in values.items()}


def log_probs(hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array, temperature: float, chunk_tokens: int) -> jax.Array:
    """float32 [B, T]: log-probabilities of the targets, the logits divided by the temperature; chunk_tokens as of losses.log_probs."""
    log_p_N = losses.log_probs(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]) / temperature,
        leaf.dense(head.kernel),
        targets_BT.reshape(-1),
        bias_V=None if head.bias is None else head.bias / temperature,
        chunk_tokens=chunk_tokens,
    )
    return log_p_N.reshape(targets_BT.shape)


def make(model: Model, config: Any, kind: type[Grpo] = Grpo) -> Grpo:
    """The objective of the whole config."""
    width = config.data.row_tokens or config.model.context_tokens
    return kind(model, config.rl, config.train.batch_seqs * width, config.train.loss_chunk_tokens)


def make_ppo(model: Model, config: Any) -> Grpo:
    """The same with a loss of values."""
    return make(model, config, Ppo)
