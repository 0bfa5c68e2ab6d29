"""What a model says of the targets of a batch, as what a pass over it measures: nothing is minimized."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxllm.ops import coarse, losses
from jaxllm.transforms import leaf
from jaxllm.types import Batch, Head, Mean, Metrics, Model, Params

# What a decoder reads of a batch with answers besides its tokens.
READ = ("segments", "positions", "branches")
# Array int32 [B, T] of a batch that is scored: which of the tokens of the whole batch a token is, row by row, however devices cut it.
PLACE = "place"


@dataclass(frozen=True, eq=False)
class Scores(abc.ABC):
    """A `types.Objective` whose metrics have, in the place of a sum, totals [tokens, ...] by the names of `measure`: 0 where a target does
    not count.

    Micro-batches, devices and the stages of a pipeline add them up as any other metric; each has zeros where the tokens of others are.
    tokens: of the whole batch, B T.
    """

    model: Model
    chunk_tokens: int
    tokens: int

    def __call__(self, params: Params, batch: Batch, rng: jax.Array | None, /) -> tuple[Mean, Metrics]:
        read = {name: batch[name] for name in READ if name in batch}
        hidden_BTD = self.model.hidden(params, batch["tokens"], **read, rng=rng)
        return self.of_hidden(hidden_BTD, self.model.head(params), batch)

    def of_hidden(self, hidden_BTD: jax.Array, head: Head, batch: Batch, /) -> tuple[Mean, Metrics]:
        weights_N, place_N = batch["weights"].reshape(-1), batch[PLACE].reshape(-1)
        weight = jnp.sum(weights_N)

        def gather(values: jax.Array) -> Mean:
            counted = jnp.where((weights_N > 0).reshape(-1, *[1] * (values.ndim - 1)), values, 0)
            return Mean(jnp.zeros((self.tokens, *values.shape[1:]), values.dtype).at[place_N].add(counted), weight)

        found = self.measure(hidden_BTD, head, batch)
        return Mean(jnp.zeros_like(weight), weight), {name: gather(values) for name, values in found.items()}

    @abc.abstractmethod
    def measure(self, hidden_BTD: jax.Array, head: Head, batch: Batch) -> Mapping[str, jax.Array]:
        """Arrays [B T, ...] by name."""


@dataclass(frozen=True, eq=False)
class TargetScores(Scores):
    """Measures "log_p": float32 [B T], log p of the target."""

    def measure(self, hidden_BTD: jax.Array, head: Head, batch: Batch) -> Mapping[str, jax.Array]:
        return {"log_p": target_log_probs(hidden_BTD, head, batch, self.chunk_tokens).reshape(-1)}


@dataclass(frozen=True, eq=False)
class TopScores(Scores):
    """Measures "ids": int32 [B T, K], the likeliest tokens; "log_p": float32 [B T, K + 1], log p of these and of all others together.

    rows: the first so many rows of the head are all that is told apart, and all that there is.
    """

    top: int
    temperature: float
    rows: int

    def measure(self, hidden_BTD: jax.Array, head: Head, batch: Batch) -> Mapping[str, jax.Array]:
        found = coarse.top(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            leaf.dense(head.kernel)[: self.rows],
            self.top,
            bias_V=None if head.bias is None else head.bias[: self.rows],
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
        )
        return {"ids": found.ids_NK, "log_p": found.log_p_NO}


def target_log_probs(hidden_BTD: jax.Array, head: Head, batch: Batch, chunk_tokens: int) -> jax.Array:
    """float32 [B, T]: log p of the targets that count, 0 elsewhere; NaN where one of them is not in the vocabulary."""
    weights_BT = batch["weights"]
    log_p_N = losses.log_probs(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
        leaf.dense(head.kernel),
        batch["targets"].reshape(-1),
        bias_V=head.bias,
        chunk_tokens=chunk_tokens,
    )
    return jnp.where(weights_BT > 0, log_p_N.reshape(weights_BT.shape), 0.0)
