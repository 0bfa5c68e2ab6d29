"""Attention with memory linear in the length: blocks of queries times blocks of keys, softmax online, backward pass recomputed.

Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4; Rabe & Staats 2021, arXiv:2112.05682. One block of scores exists at a
time; of the forward pass only the result and log of each row's sum of exponentials are kept, and the backward pass makes every
block of probabilities again as exp(score - that). Loops, not unrolled: the compile time does not grow with the length. Blocks that
no query can see are not visited.

Letters: N blocks of queries, M blocks of keys, T and S tokens of one block.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxllm.ops.attention.backend import Backend
from jaxllm.ops.attention.blocked import fold, unfold
from jaxllm.ops.attention.mask import HIDDEN, Mask, check
from jaxllm.ops.attention.plain import drop


class _Blocks(NamedTuple):
    """The arrays, cut into blocks, or their gradients. Padded tokens are at the end. The bias stays whole: [X, H, N T, M S]."""

    q_NBGRTK: jax.Array
    k_MBGSK: jax.Array
    v_MBGSK: jax.Array
    bias_XHTS: jax.Array | None
    segments_NBT: jax.Array | None
    key_segments_MBS: jax.Array | None
    prefix_MBS: jax.Array | None
    rng: jax.Array | None


class _How(NamedTuple):
    """The static arguments."""

    query_tokens: int
    key_tokens: int
    causal: bool
    window_tokens: int
    scale: float
    dropout_frac: float
    reach_N: tuple[tuple[int, int], ...]  # first and last + 1 block of keys that a block of queries visits


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
    """As `plain`, [B, T, H, K]. For arguments and errors see `jaxllm.ops.attention.attend`.

    Has a gradient for q, k, v and bias_XHTS, but no gradient of the gradient and no forward mode. A bias and its gradient take
    the O(T S) memory that they have anyway.
    """
    group = check(q_BTHK, k_BSGK, v_BSGK, mask, bias_XHTS)
    query_tokens, key_tokens = q_BTHK.shape[1], k_BSGK.shape[1]
    rows, columns = min(block_tokens, query_tokens), min(block_tokens, key_tokens)
    reach = [
        mask.reach(slice(start, min(start + rows, query_tokens)), query_tokens, key_tokens)
        for start in range(0, query_tokens, rows)
    ]
    how = _How(
        query_tokens,
        key_tokens,
        mask.causal,
        mask.window_tokens,
        q_BTHK.shape[-1] ** -0.5 if scale is None else scale,
        0.0 if rng is None else dropout_frac,
        tuple((start // columns, -(-stop // columns)) for start, stop in reach),
    )
    keys_BS = mask.segments_BT if mask.key_segments_BS is None else mask.key_segments_BS
    blocks = _Blocks(
        cut(fold(q_BTHK, group), 3, rows),
        cut(k_BSGK.swapaxes(1, 2), 2, columns),
        cut(v_BSGK.swapaxes(1, 2), 2, columns),
        None if bias_XHTS is None else _pad(_pad(bias_XHTS, 2, rows), 3, columns),
        None if mask.segments_BT is None else cut(mask.segments_BT, 1, rows),
        None if keys_BS is None else cut(keys_BS, 1, columns),
        None if mask.prefix_BS is None else cut(mask.prefix_BS, 1, columns),
        rng if how.dropout_frac else None,
    )
    out_BGRTK = jnp.moveaxis(_flash(blocks, how), 0, 3).reshape(*blocks.q_NBGRTK.shape[1:4], -1, q_BTHK.shape[-1])
    return unfold(out_BGRTK[:, :, :, :query_tokens], q_BTHK.dtype)


def _pad(x: jax.Array, axis: int, block: int) -> jax.Array:
    return jnp.pad(x, [(0, -size % block if i == axis else 0) for i, size in enumerate(x.shape)])


def cut(x: jax.Array, axis: int, block: int) -> jax.Array:
    """Blocks of an axis as a leading axis, the last one padded with zeros."""
    padded = _pad(x, axis, block)
    return jnp.moveaxis(padded.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _flash(blocks: _Blocks, how: _How) -> jax.Array:
    return _forward(blocks, how)[0]


def _forward(blocks: _Blocks, how: _How) -> tuple[jax.Array, tuple]:
    """(out_NBGRTK in q's dtype, what the backward pass needs)."""

    def row(_: None, n: Any) -> tuple[None, tuple]:
        block, start, stop = n
        q_BGRTK = blocks.q_NBGRTK[block]
        top = jnp.full(q_BGRTK.shape[:-1], HIDDEN, jnp.float32)
        zero = (top, jnp.zeros_like(top), jnp.zeros(q_BGRTK.shape, jnp.float32))
        top, total, out = jax.lax.fori_loop(start, stop, partial(_absorb, blocks, how, block), zero)
        # A row that saw nothing has a total of 0: its result is 0, and no probability is made of its log total.
        total = jnp.where(total == 0, 1, total)
        return None, ((out / total[..., None]).astype(q_BGRTK.dtype), top + jnp.log(total))

    order = jnp.arange(len(how.reach_N)), *jnp.asarray(how.reach_N).T
    _, (out_NBGRTK, log_total_NBGRT) = jax.lax.scan(row, None, order)
    out_NBGRTK, log_total_NBGRT = checkpoint_name(out_NBGRTK, "attended"), checkpoint_name(log_total_NBGRT, "attended")
    return out_NBGRTK, (blocks, out_NBGRTK, log_total_NBGRT)


def _absorb(blocks: _Blocks, how: _How, n: Any, m: Any, state: tuple) -> tuple:
    """One block of keys more in (highest score so far, sum of exp(score - highest), the same sum weighted with v)."""
    top_BGRT, total_BGRT, out_BGRTK = state
    scores, visible = _score(blocks, how, n, m)
    seen = scores if visible is None else jnp.where(visible, scores, HIDDEN)
    higher_BGRT = jnp.maximum(top_BGRT, seen.max(-1))
    exp = jnp.exp(seen - higher_BGRT[..., None])
    if visible is not None:  # before its first visible key a row's highest score is HIDDEN itself
        exp = jnp.where(visible, exp, 0)
    shrink_BGRT = jnp.exp(top_BGRT - higher_BGRT)
    total_BGRT = total_BGRT * shrink_BGRT + exp.sum(-1)
    if how.dropout_frac:
        exp = _drop(exp, blocks, how, n, m)
    v_BGSK = blocks.v_MBGSK[m]
    weighted = jnp.einsum("bgrts,bgsk->bgrtk", exp.astype(v_BGSK.dtype), v_BGSK, preferred_element_type=jnp.float32)
    return higher_BGRT, total_BGRT, out_BGRTK * shrink_BGRT[..., None] + weighted


def _score(blocks: _Blocks, how: _How, n: Any, m: Any) -> tuple[jax.Array, jax.Array | None]:
    """(scores_BGRTS, visible_B11TS or None) of a block of queries and a block of keys."""
    q_BGRTK, k_BGSK = blocks.q_NBGRTK[n], blocks.k_MBGSK[m]
    kv_heads, group, rows, columns = *q_BGRTK.shape[1:4], k_BGSK.shape[2]
    scores = jnp.einsum("bgrtk,bgsk->bgrts", q_BGRTK, k_BGSK, preferred_element_type=jnp.float32) * how.scale
    if blocks.bias_XHTS is not None:
        sizes = (*blocks.bias_XHTS.shape[:2], rows, columns)
        part = jax.lax.dynamic_slice(blocks.bias_XHTS, (0, 0, n * rows, m * columns), sizes)
        scores += part.reshape(-1, kv_heads, group, rows, columns)
    slots_T = n * rows + jnp.arange(rows) + how.key_tokens - how.query_tokens
    slots_S = m * columns + jnp.arange(columns)
    arrays = (blocks.segments_NBT, n), (blocks.key_segments_MBS, m), (blocks.prefix_MBS, m)
    mask = Mask(how.causal, how.window_tokens, *[None if array is None else array[i] for array, i in arrays])
    visible = mask.visible(slots_T, slots_S)
    if how.key_tokens % columns and not how.causal:  # padded keys, which come after all that a causal query sees
        inside = (slots_S < how.key_tokens)[None, None]
        visible = inside if visible is None else visible & inside
    return scores, None if visible is None else visible[:, None, None]


def _drop(x_BGRTS: jax.Array, blocks: _Blocks, how: _How, n: Any, m: Any) -> jax.Array:
    """Dropout, the same whenever the block is made again."""
    if blocks.rng is None:
        return x_BGRTS
    return drop(x_BGRTS, jax.random.fold_in(jax.random.fold_in(blocks.rng, n), m), how.dropout_frac)


def _backward(how: _How, residuals: tuple, dout_NBGRTK: jax.Array) -> tuple[_Blocks]:
    """Algorithm 4: for each block of keys, over the blocks of queries that see it."""
    blocks, out_NBGRTK, log_total_NBGRT = residuals
    # Of each row the mean of d probability, with the probabilities as weights; with dropout as well.
    mean_NBGRT = jnp.sum(dout_NBGRTK.astype(jnp.float32) * out_NBGRTK.astype(jnp.float32), axis=-1)
    saved = dout_NBGRTK, log_total_NBGRT, mean_NBGRT
    reach_N2 = np.asarray(how.reach_N)
    visits_NM = (reach_N2[:, :1] <= np.arange(len(blocks.k_MBGSK))) & (np.arange(len(blocks.k_MBGSK)) < reach_N2[:, 1:])
    first_M = visits_NM.argmax(0)

    def column(carry: tuple, m: Any) -> tuple[tuple, tuple]:
        block, start, stop = m
        k_BGSK, v_BGSK = blocks.k_MBGSK[block], blocks.v_MBGSK[block]
        zeros = jnp.zeros(k_BGSK.shape, jnp.float32), jnp.zeros(v_BGSK.shape, jnp.float32)
        step = partial(_differentiate, blocks, how, saved, block)
        *carry, dk_BGSK, dv_BGSK = jax.lax.fori_loop(start, stop, step, (*carry, *zeros))
        return tuple(carry), (dk_BGSK.astype(k_BGSK.dtype), dv_BGSK.astype(v_BGSK.dtype))

    bias = blocks.bias_XHTS
    start = jnp.zeros(blocks.q_NBGRTK.shape, jnp.float32), None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    order = jnp.arange(len(blocks.k_MBGSK)), jnp.asarray(first_M), jnp.asarray(first_M + visits_NM.sum(0))
    (dq_NBGRTK, dbias_XHTS), (dk_MBGSK, dv_MBGSK) = jax.lax.scan(column, start, order)
    dq_NBGRTK, dbias_XHTS = jax.tree.map(lambda d, x: d.astype(x.dtype), (dq_NBGRTK, dbias_XHTS), (blocks.q_NBGRTK, bias))
    return (_Blocks(dq_NBGRTK, dk_MBGSK, dv_MBGSK, dbias_XHTS, None, None, None, None),)


def _differentiate(blocks: _Blocks, how: _How, saved: tuple, m: Any, n: Any, gradients: tuple) -> tuple:
    """The share of one block of scores in (dq_NBGRTK, dbias_XHTS, and for the block of keys dk_BGSK, dv_BGSK)."""
    dq_NBGRTK, dbias_XHTS, dk_BGSK, dv_BGSK = gradients
    dout_BGRTK, log_total_BGRT, mean_BGRT = (x[n] for x in saved)
    q_BGRTK, k_BGSK, v_BGSK = blocks.q_NBGRTK[n], blocks.k_MBGSK[m], blocks.v_MBGSK[m]
    scores, visible = _score(blocks, how, n, m)
    p = jnp.exp(scores - log_total_BGRT[..., None])
    if visible is not None:
        p = jnp.where(visible, p, 0)
    dropped = _drop(p, blocks, how, n, m) if how.dropout_frac else p
    dv_BGSK += jnp.einsum("bgrts,bgrtk->bgsk", dropped.astype(dout_BGRTK.dtype), dout_BGRTK, preferred_element_type=jnp.float32)
    dp = jnp.einsum("bgrtk,bgsk->bgrts", dout_BGRTK, v_BGSK, preferred_element_type=jnp.float32)
    if how.dropout_frac:
        dp = _drop(dp, blocks, how, n, m)
    dscores = p * (dp - mean_BGRT[..., None])
    if dbias_XHTS is not None:
        dbias = dscores.reshape(dscores.shape[0], -1, *dscores.shape[3:])
        dbias = dbias if len(dbias_XHTS) == len(dbias) else dbias.sum(0, keepdims=True)
        dbias_XHTS = jax.lax.dynamic_update_slice(dbias_XHTS, dbias, (0, 0, n * dbias.shape[2], m * dbias.shape[3]))
    dscores = (dscores * how.scale).astype(q_BGRTK.dtype)
    dk_BGSK += jnp.einsum("bgrts,bgrtk->bgsk", dscores, q_BGRTK, preferred_element_type=jnp.float32)
    dq_BGRTK = jnp.einsum("bgrts,bgsk->bgrtk", dscores, k_BGSK, preferred_element_type=jnp.float32)
    return dq_NBGRTK.at[n].add(dq_BGRTK), dbias_XHTS, dk_BGSK, dv_BGSK


_flash.defvjp(_forward, _backward)


BACKEND = Backend(attend)
