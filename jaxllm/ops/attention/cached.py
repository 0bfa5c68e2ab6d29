"""Attention over a key/value cache, for decoding."""

import jax
import jax.numpy as jnp

from jaxllm.ops.attention.blocked import attend_folded, fold, unfold
from jaxllm.ops.attention.mask import Mask, check


def cached(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    query_positions_BT: jax.Array,
    *,
    window_tokens: int = 0,
    bias_XHTS: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention over a cache whose slot s holds position s, [B, T, H, K]: the query at position p sees the slots s <= p.

    With `window_tokens` only those of p - s < window_tokens. What later slots hold changes no bit. A query of a negative
    position sees nothing and gives 0. Other arguments and errors as of `jaxllm.ops.attention.attend`.
    """
    group = check(q_BTHK, k_BSGK, v_BSGK, Mask(window_tokens=window_tokens), bias_XHTS)
    distance_BTS = query_positions_BT[:, :, None] - jnp.arange(k_BSGK.shape[1])
    visible_BTS = distance_BTS >= 0
    if window_tokens:
        visible_BTS &= distance_BTS < window_tokens
    out_BGRTK = attend_folded(
        fold(q_BTHK, group),
        k_BSGK.swapaxes(1, 2),
        v_BSGK.swapaxes(1, 2),
        visible_BTS,
        scale=q_BTHK.shape[-1] ** -0.5 if scale is None else scale,
        bias_XHTS=bias_XHTS,
        may_be_blind=True,
    )
    return unfold(out_BGRTK, q_BTHK.dtype)
