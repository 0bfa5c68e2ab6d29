"""The key/value cache of decoding: {"layers": keys and values, "lengths": int32 [B]}, slot s of a row holding position s.

"layers" follows the form of the layer stack: a list with one {"k", "v"} a layer, [B, G, S, K] each, or one {"k", "v"},
[B, L, G, S, K]. Batch is the first axis of every array. Slots lie next to each other within a head, as the product with the
queries reads them: with the heads inside the slots a token costs several times as much (2048 slots, CPU).

Rows differ in length. What lies behind a row's length is never read: a query sees only slots up to its own position.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.models.architecture import Architecture
from jaxllm.types import Constrain

Cache = dict[str, Any]


class Slot(NamedTuple):
    """What one layer reads and writes: its own arrays, or those of the whole stack and the layer's index in them.

    The stack is handed on whole because writing into it is done in place; cutting a layer out and putting it back would
    copy the layer's cache twice a token.
    """

    k: jax.Array
    v: jax.Array
    layer: jax.Array | None


def empty(arch: Architecture, batch_seqs: int, length_tokens: int, constrain: Constrain) -> Cache:
    """A cache for `batch_seqs` rows of up to `length_tokens` tokens in the compute dtype; ValueError if longer than the context."""
    if not 1 <= length_tokens <= arch.context_tokens:
        raise ValueError(
            f"a cache of {length_tokens} tokens.\n  Accepted: 1 to model.context_tokens = {arch.context_tokens}."
            "\n  Use fewer prompt and new tokens, or a model with a longer context."
        )
    stacked = arch.layers_as == "scan"
    shape = (batch_seqs, *((arch.layers,) if stacked else ()), arch.kv_heads, length_tokens, arch.head_dim)
    axes = ("batch", *(("layers",) if stacked else ()), "kv_heads", None, "head_dim")

    def pair() -> dict[str, jax.Array]:
        return {name: constrain(jnp.zeros(shape, arch.dtype), axes) for name in ("k", "v")}

    return {"layers": pair() if stacked else [pair() for _ in range(arch.layers)], "lengths": jnp.zeros(batch_seqs, jnp.int32)}


def write(slot: Slot, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array) -> Slot:
    """The slot with these keys and values at `positions_BT`; what lies beyond its end (right padding) is left out."""

    def one_row(row: jax.Array, new_TGK: jax.Array, positions_T: jax.Array) -> jax.Array:
        if slot.layer is None:
            return row.at[:, positions_T].set(new_TGK.swapaxes(0, 1), mode="drop", unique_indices=True)
        # Two index arrays with a slice between them: their axis, T, comes first.
        return row.at[slot.layer, :, positions_T].set(new_TGK, mode="drop", unique_indices=True)

    # By vmap, which tells the partitioner that rows do not mix.
    rows = jax.vmap(one_row)
    return slot._replace(k=rows(slot.k, k_BTGK, positions_BT), v=rows(slot.v, v_BTGK, positions_BT))


def read(slot: Slot) -> tuple[jax.Array, jax.Array]:
    """This layer's (k_BSGK, v_BSGK)."""
    k_BGSK, v_BGSK = (slot.k, slot.v) if slot.layer is None else (slot.k[:, slot.layer], slot.v[:, slot.layer])
    return k_BGSK.swapaxes(1, 2), v_BGSK.swapaxes(1, 2)
