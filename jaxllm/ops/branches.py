"""Numbers of the tokens of forked rows (`branches` of types.Batch) as numbers of their answers.

Letters: B rows, T tokens, S segments of a row and one more, since 0 is padding: T + 1. A row cannot have more.
"""

import jax
import jax.numpy as jnp


def totals(values_BT: jax.Array, segments_BT: jax.Array, branches_BT: jax.Array, branches: int) -> jax.Array:
    """[B, S, branches + 1]: the sum of the tokens of each branch of each segment; 0 where there are none. Branch 0 is the trunk.

    What belongs to no such branch is left out.
    """
    rows, tokens = values_BT.shape
    zeros = jnp.zeros((rows, tokens + 1, branches + 1), values_BT.dtype)
    return zeros.at[jnp.arange(rows)[:, None], segments_BT, branches_BT].add(values_BT, mode="drop")
