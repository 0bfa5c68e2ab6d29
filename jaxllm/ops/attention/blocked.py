"""Attention in blocks of queries: the default.

A block makes one batched matrix product with the keys it can see, all at once: the fastest form on a CPU for up to some
thousand tokens, since a causal block reads only the keys up to its end and a windowed one not those before it either. The
blocks are unrolled, so the compile time grows with the length; for long sequences see `flash`.
"""

import jax
import jax.numpy as jnp

from jaxllm.ops.attention.backend import Backend
from jaxllm.ops.attention.mask import HIDDEN, Mask, check
from jaxllm.ops.attention.plain import drop


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
    """As `plain`, [B, T, H, K]. For arguments and errors see `jaxllm.ops.attention.attend`."""
    group = check(q_BTHK, k_BSGK, v_BSGK, mask, bias_XHTS)
    query_tokens, key_tokens = q_BTHK.shape[1], k_BSGK.shape[1]
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    q_BGRTK, k_BGSK, v_BGSK = fold(q_BTHK, group), k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2)
    outs = []
    for start in range(0, query_tokens, block_tokens):
        rows = slice(start, min(start + block_tokens, query_tokens))
        keys = slice(*mask.reach(rows, query_tokens, key_tokens))
        slots_T = jnp.arange(rows.start, rows.stop) + key_tokens - query_tokens
        visible_BTS = mask.cut(rows, keys).visible(slots_T, jnp.arange(keys.start, keys.stop))
        out_BGRTK = attend_folded(
            q_BGRTK[:, :, :, rows],
            k_BGSK[:, :, keys],
            v_BGSK[:, :, keys],
            visible_BTS,
            scale=scale,
            bias_XHTS=None if bias_XHTS is None else bias_XHTS[:, :, rows, keys],
            rng=None if rng is None else jax.random.fold_in(rng, start),
            dropout_frac=dropout_frac,
            may_be_blind=mask.may_be_blind,
        )
        outs.append(out_BGRTK)
    return unfold(jnp.concatenate(outs, axis=3), q_BTHK.dtype)


def fold(x_BTHK: jax.Array, group: int) -> jax.Array:
    """[B, G, R, T, K]: the R = `group` query heads that share a key/value head become rows of one matrix."""
    batch, tokens, heads, width = x_BTHK.shape
    return x_BTHK.reshape(batch, tokens, heads // group, group, width).transpose(0, 2, 3, 1, 4)


def unfold(x_BGRTK: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[B, T, H, K], the inverse of `fold`."""
    batch, kv_heads, group, tokens, width = x_BGRTK.shape
    return x_BGRTK.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, kv_heads * group, width).astype(dtype)


def attend_folded(
    q_BGRTK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    visible_BTS: jax.Array | None,
    *,
    scale: float,
    bias_XHTS: jax.Array | None = None,
    rng: jax.Array | None = None,
    dropout_frac: float = 0.0,
    may_be_blind: bool = False,
) -> jax.Array:
    """softmax(scale q k + bias) v over the visible keys in float32, [B, G, R, T, K]; 0 for rows that see none."""
    batch, kv_heads, group, tokens, width = q_BGRTK.shape
    rows = (batch, kv_heads, group * tokens)
    scores = jnp.einsum("bgrk,bgsk->bgrs", q_BGRTK.reshape(*rows, width), k_BGSK, preferred_element_type=jnp.float32)
    scores_BGRTS = scores.reshape(batch, kv_heads, group, tokens, -1) * scale
    if bias_XHTS is not None:
        scores_BGRTS += bias_XHTS.reshape(-1, kv_heads, group, *bias_XHTS.shape[2:])
    if visible_BTS is not None:
        scores_BGRTS += jnp.where(visible_BTS, 0.0, HIDDEN)[:, None, None]
    # The shift cancels, so it has no gradient; and dividing after the product with v divides K numbers a row instead of S.
    exp_BGRTS = jnp.exp(scores_BGRTS - jax.lax.stop_gradient(scores_BGRTS.max(-1, keepdims=True)))
    total_BGRT1 = exp_BGRTS.sum(-1, keepdims=True)
    if rng is not None and dropout_frac > 0:
        exp_BGRTS = drop(exp_BGRTS, rng, dropout_frac)
    weights = exp_BGRTS.reshape(*rows, -1).astype(v_BGSK.dtype)
    out = jnp.einsum("bgrs,bgsk->bgrk", weights, v_BGSK, preferred_element_type=jnp.float32)
    out_BGRTK = out.reshape(q_BGRTK.shape) / total_BGRT1
    if visible_BTS is not None and may_be_blind:
        out_BGRTK = jnp.where(visible_BTS.any(-1)[:, None, None, :, None], out_BGRTK, 0)
    return out_BGRTK


BACKEND = Backend(attend)
