"""Log-probabilities of the targets of a batch, as what a pass over it measures: nothing is minimized."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxllm.ops import losses
from jaxllm.transforms import leaf
from jaxllm.types import Batch, Head, Mean, Metrics, Model, Params

# What a decoder reads of a batch with answers besides its tokens.
READ = ("segments", "positions", "branches")
# Array int32 [B, T] of a batch that is scored: which of the rows of the result a row is, the same number T times.
PLACE = "place"


@dataclass(frozen=True, eq=False)
class Scores:
    """A `types.Objective` whose metric "log_p" has the total [rows, T] in the place of a sum: log p of each target that counts, else 0.

    Micro-batches, devices and the stages of a pipeline add it up as any other metric; each has zeros where the rows of others are.
    """

    model: Model
    chunk_tokens: int
    rows: int

    def __call__(self, params: Params, batch: Batch, rng: jax.Array | None, /) -> tuple[Mean, Metrics]:
        read = {name: batch[name] for name in READ if name in batch}
        hidden_BTD = self.model.hidden(params, batch["tokens"], **read, rng=rng)
        return self.of_hidden(hidden_BTD, self.model.head(params), batch)

    def of_hidden(self, hidden_BTD: jax.Array, head: Head, batch: Batch, /) -> tuple[Mean, Metrics]:
        log_p_BT = target_log_probs(hidden_BTD, head, batch, self.chunk_tokens)
        gathered = jnp.zeros((self.rows, log_p_BT.shape[1]), jnp.float32).at[batch[PLACE][:, 0]].add(log_p_BT)
        weight = jnp.sum(batch["weights"])
        return Mean(-jnp.sum(log_p_BT), weight), {"log_p": Mean(gathered, weight)}


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
