"""Which classes a classifier finds: of the examples of each class, the share that it puts there (recall).

Letters: N targets, C classes.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models import heads
from jaxllm.objectives.tokens import LOSS_ARRAYS
from jaxllm.types import Batch, Model, Params


class Recall(NamedTuple):
    """Examples of a class, and how many of them were put there."""

    found: int
    examples: int


def measure(model: Model, params: Params, batches: Iterable[Batch]) -> list[Recall]:
    """One a class, in their order; a target counts if it has a weight."""
    classes = model.config.classes
    totals = np.zeros((2, classes), np.int64)
    count = jax.jit(partial(_count, model, classes))
    for batch in batches:
        totals += np.asarray(count(params, batch))
    return [Recall(*pair) for pair in totals.T.tolist()]


def _count(model: Model, classes: int, params: Params, batch: Batch) -> jax.Array:
    """int32 [2, C]: targets of each class that were found, and all of them."""
    read: dict[str, Any] = {name: array for name, array in batch.items() if name not in LOSS_ARRAYS}
    logits_BTC = heads.logits(model.hidden(params, batch["tokens"], **read), model.head(params))
    targets_N, counts_N = batch["targets"].reshape(-1), batch["weights"].reshape(-1) > 0
    found_N = counts_N & (logits_BTC.argmax(-1).reshape(-1) == targets_N)
    return jnp.stack([jnp.zeros(classes, jnp.int32).at[targets_N].add(each) for each in (found_N, counts_N)])
