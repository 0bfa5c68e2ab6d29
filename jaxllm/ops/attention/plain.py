"""Attention as it is written in the paper: the one to read, and what the others are compared with.

Makes [B, H, T, S] scores several times over: for short sequences.
"""

import math

import jax
import jax.numpy as jnp

from jaxllm.ops.attention.backend import Backend
from jaxllm.ops.attention.mask import HIDDEN, Mask, check


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    *,
    bias_XHTS: jax.Array | None = None,
    scale: float | None = None,
    rng: jax.Array | None = None,
    dropout_frac: float = 0.0,
    block_tokens: int = 128,
) -> jax.Array:
    """softmax(scale q k + bias) v over the visible keys, [B, T, H, K] (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    For arguments and errors see `jaxllm.ops.attention.attend`; `block_tokens` has no effect here.
    """
    del block_tokens
    group = check(q_BTHK, k_BSGK, v_BSGK, mask, bias_XHTS)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    k_BSHK, v_BSHK = jnp.repeat(k_BSGK, group, axis=2), jnp.repeat(v_BSGK, group, axis=2)
    scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=jnp.float32) * scale
    if bias_XHTS is not None:
        scores_BHTS += bias_XHTS
    visible_BTS = mask.visible_whole(q_BTHK.shape[1], k_BSGK.shape[1])
    if visible_BTS is not None:
        scores_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS, HIDDEN)
    probabilities_BHTS = jax.nn.softmax(scores_BHTS, axis=-1)
    if rng is not None and dropout_frac > 0:
        probabilities_BHTS = drop(probabilities_BHTS, rng, dropout_frac)
    out_BTHK = jnp.einsum("bhts,bshk->bthk", probabilities_BHTS.astype(v_BSGK.dtype), v_BSHK)
    if visible_BTS is not None and mask.may_be_blind:
        out_BTHK = jnp.where(visible_BTS.any(-1)[:, :, None, None], out_BTHK, 0)
    return out_BTHK.astype(q_BTHK.dtype)


def drop(x: jax.Array, rng: jax.Array, frac: float) -> jax.Array:
    """x / (1 - frac) where kept and 0 elsewhere (inverted dropout). x [B, heads, ...]."""
    # Drawn in three dimensions: XLA's CPU compiler takes half a minute over random bits in four or five. Batch and heads stay
    # apart, so that each device draws its own.
    kept = jax.random.bernoulli(rng, 1 - frac, (*x.shape[:2], math.prod(x.shape[2:]))).reshape(x.shape)
    return jnp.where(kept, x / (1 - frac), 0)


BACKEND = Backend(attend)
