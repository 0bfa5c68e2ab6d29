"""Causal grouped-query attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Ainslie et al. 2023, arXiv:2305.13245).

Letters: B batch, T query length, S key length, H query heads, G key/value heads, R = H/G query heads a key/value head,
K head width. Query head h reads key/value head h // R.

All functions agree on: scores q k / sqrt(K) and softmax in float32, result in q.dtype. `plain` is the one to read.
Where T < S the queries are the last T of the S keys.
"""

import math

import jax
import jax.numpy as jnp

# Added to the score of a hidden key. Finite, so that a row that sees nothing is uniform and not NaN; so low that any score
# vanishes beside it in float32 and exp() gives exactly 0: hidden keys cannot change one bit of the result.
HIDDEN = -1e30


def plain(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    key_segments_BS: jax.Array | None = None,
    rng: jax.Array | None = None,
    dropout_frac: float = 0.0,
    block_tokens: int = 128,
) -> jax.Array:
    """softmax(q k / sqrt(K)) v, [B, T, H, K]: a query sees the keys of its own segment that are not after it.

    `key_segments_BS` is `segments_BT` unless given. `rng` drops attention probabilities (inverted dropout). `block_tokens`
    is for the blocked form and has no effect here.
    """
    del block_tokens
    group, query_tokens, key_tokens = _check(q_BTHK, k_BSGK), q_BTHK.shape[1], k_BSGK.shape[1]
    k_BSHK, v_BSHK = jnp.repeat(k_BSGK, group, axis=2), jnp.repeat(v_BSGK, group, axis=2)
    scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=jnp.float32) / math.sqrt(q_BTHK.shape[-1])
    visible_BTS = jnp.tril(jnp.ones((query_tokens, key_tokens), bool), k=key_tokens - query_tokens)[None]
    if segments_BT is not None:
        keys_BS = segments_BT if key_segments_BS is None else key_segments_BS
        visible_BTS &= segments_BT[:, :, None] == keys_BS[:, None, :]
    probabilities_BHTS = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores_BHTS, HIDDEN), axis=-1)
    if rng is not None and dropout_frac > 0:
        probabilities_BHTS = _drop(probabilities_BHTS, rng, dropout_frac)
    return jnp.einsum("bhts,bshk->bthk", probabilities_BHTS.astype(v_BSGK.dtype), v_BSHK).astype(q_BTHK.dtype)


def blocked(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    key_segments_BS: jax.Array | None = None,
    rng: jax.Array | None = None,
    dropout_frac: float = 0.0,
    block_tokens: int = 128,
) -> jax.Array:
    """As `plain`, faster: one batched matrix product a block of queries, which reads only the keys up to the block's end."""
    group, query_tokens = _check(q_BTHK, k_BSGK), q_BTHK.shape[1]
    offset = k_BSGK.shape[1] - query_tokens
    q_BGRTK = _fold(q_BTHK, group)
    k_BGSK, v_BGSK = k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2)
    keys_BS = segments_BT if key_segments_BS is None else key_segments_BS
    outs = []
    for start in range(0, query_tokens, block_tokens):
        stop = min(start + block_tokens, query_tokens)
        seen = stop + offset
        bias = jnp.where(jnp.arange(start, stop)[:, None] + offset >= jnp.arange(seen), 0.0, HIDDEN)
        if segments_BT is not None and keys_BS is not None:
            same_BTS = segments_BT[:, start:stop, None] == keys_BS[:, None, :seen]
            bias = jnp.where(same_BTS[:, None, None], bias, HIDDEN)
        block_rng = None if rng is None else jax.random.fold_in(rng, start)
        outs.append(_attend(q_BGRTK[:, :, :, start:stop], k_BGSK[:, :, :seen], v_BGSK[:, :, :seen], bias, block_rng, dropout_frac))
    return _unfold(jnp.concatenate(outs, axis=3), q_BTHK.dtype)


def cached(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, query_positions_BT: jax.Array) -> jax.Array:
    """As `plain` over a cache whose slot s holds position s, [B, T, H, K]: the query at position p sees the slots s <= p."""
    group = _check(q_BTHK, k_BSGK)
    visible_BTS = jnp.arange(k_BSGK.shape[1]) <= query_positions_BT[:, :, None]
    bias = jnp.where(visible_BTS, 0.0, HIDDEN)[:, None, None]
    out_BGRTK = _attend(_fold(q_BTHK, group), k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2), bias, None, 0.0)
    return _unfold(out_BGRTK, q_BTHK.dtype)


def _check(q_BTHK: jax.Array, k_BSGK: jax.Array) -> int:
    """Query heads a key/value head; ValueError for shapes that do not fit."""
    heads, kv_heads = q_BTHK.shape[2], k_BSGK.shape[2]
    if q_BTHK.shape[1] > k_BSGK.shape[1]:
        raise ValueError(
            f"{q_BTHK.shape[1]} queries but {k_BSGK.shape[1]} keys.\n  Accepted: at least as many keys as queries."
            "\n  Pass the keys of all queries."
        )
    if heads % kv_heads:
        raise ValueError(
            f"{kv_heads} key/value heads do not divide {heads} query heads.\n"
            f"  Accepted: {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}.\n  Change model.kv_heads."
        )
    return heads // kv_heads


def _fold(x_BTHK: jax.Array, group: int) -> jax.Array:
    """[B, G, R, T, K]: the query heads that share a key/value head become rows of one matrix."""
    batch, tokens, heads, width = x_BTHK.shape
    return x_BTHK.reshape(batch, tokens, heads // group, group, width).transpose(0, 2, 3, 1, 4)


def _unfold(x_BGRTK: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    batch, kv_heads, group, tokens, width = x_BGRTK.shape
    return x_BGRTK.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, kv_heads * group, width).astype(dtype)


def _attend(
    q_BGRTK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, bias: jax.Array, rng: jax.Array | None, dropout_frac: float
) -> jax.Array:
    """softmax(q k / sqrt(K) + bias) v in float32, [B, G, R, T, K]; bias broadcasts to [B, G, R, T, S]."""
    batch, kv_heads, group, tokens, width = q_BGRTK.shape
    rows = (batch, kv_heads, group * tokens)
    scores = jnp.einsum("bgrk,bgsk->bgrs", q_BGRTK.reshape(*rows, width), k_BGSK, preferred_element_type=jnp.float32)
    scores_BGRTS = scores.reshape(batch, kv_heads, group, tokens, -1) / math.sqrt(width) + bias
    # The shift cancels, so it has no gradient; and dividing after the product with v divides K numbers a row instead of S.
    exp_BGRTS = jnp.exp(scores_BGRTS - jax.lax.stop_gradient(scores_BGRTS.max(-1, keepdims=True)))
    total_BGRT1 = exp_BGRTS.sum(-1, keepdims=True)
    if rng is not None and dropout_frac > 0:
        exp_BGRTS = _drop(exp_BGRTS, rng, dropout_frac)
    weights = exp_BGRTS.reshape(*rows, -1).astype(v_BGSK.dtype)
    out = jnp.einsum("bgrs,bgsk->bgrk", weights, v_BGSK, preferred_element_type=jnp.float32)
    return out.reshape(q_BGRTK.shape) / total_BGRT1


def _drop(x: jax.Array, rng: jax.Array, frac: float) -> jax.Array:
    """x / (1 - frac) where kept and 0 elsewhere. x [B, heads, ...]."""
    # Drawn in three dimensions: XLA's CPU compiler takes half a minute over random bits in four or five. Batch and heads stay
    # apart, so that each device draws its own.
    kept = jax.random.bernoulli(rng, 1 - frac, (*x.shape[:2], math.prod(x.shape[2:]))).reshape(x.shape)
    return jnp.where(kept, x / (1 - frac), 0)
