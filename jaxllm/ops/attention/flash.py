"""Attention with memory linear in the length: blocks of queries times blocks of keys, softmax online, backward pass recomputed.

Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4; Rabe & Staats 2021, arXiv:2112.05682. The blocks themselves are in
`online`. Loops, not unrolled: the compile time does not grow with the length. Blocks that no query can see are not visited.

Letters: N blocks of queries, M blocks of keys, T and S tokens of one block.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxllm.ops.attention import online
from jaxllm.ops.attention.backend import Backend
from jaxllm.ops.attention.blocked import fold, unfold
from jaxllm.ops.attention.mask import Mask, check
from jaxllm.ops.attention.online import Blocks, How, Saved, cut, pad


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
    how = How(
        mask.causal,
        mask.window_tokens,
        q_BTHK.shape[-1] ** -0.5 if scale is None else scale,
        0.0 if rng is None else dropout_frac,
        padded=key_tokens % columns != 0,
    )
    keys_BS, key_branches_BS = mask.segments_of_keys, mask.branches_of_keys
    blocks = Blocks(
        cut(fold(q_BTHK, group), 3, rows),
        cut(k_BSGK.swapaxes(1, 2), 2, columns),
        cut(v_BSGK.swapaxes(1, 2), 2, columns),
        None if bias_XHTS is None else pad(pad(bias_XHTS, 2, rows), 3, columns),
        None if mask.segments_BT is None else cut(mask.segments_BT, 1, rows),
        None if keys_BS is None else cut(keys_BS, 1, columns),
        None if mask.prefix_BS is None else cut(mask.prefix_BS, 1, columns),
        None if mask.branches_BT is None else cut(mask.branches_BT, 1, rows),
        None if key_branches_BS is None else cut(key_branches_BS, 1, columns),
        online.cut_slots(jnp.arange(query_tokens) + key_tokens - query_tokens, rows),
        cut(jnp.arange(key_tokens), 0, columns, online.NOWHERE),
        rng if how.dropout_frac else None,
    )
    out_BGRTK = jnp.moveaxis(_flash(blocks, how), 0, 3).reshape(*blocks.q_NBGRTK.shape[1:4], -1, q_BTHK.shape[-1])
    return unfold(out_BGRTK[:, :, :, :query_tokens], q_BTHK.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _flash(blocks: Blocks, how: How) -> jax.Array:
    return _forward(blocks, how)[0]


def _forward(blocks: Blocks, how: How) -> tuple[jax.Array, tuple]:
    """(out_NBGRTK in q's dtype, what the backward pass needs)."""

    def row(_: None, n: Any) -> tuple[None, tuple]:
        block, start, stop = n
        q_BGRTK = blocks.q_NBGRTK[block]
        out_BGRTK, log_total_BGRT = online.finish(online.absorb(blocks, how, block, start, stop, online.begin(q_BGRTK)))
        return None, (out_BGRTK.astype(q_BGRTK.dtype), log_total_BGRT)

    order = jnp.arange(len(blocks.q_NBGRTK)), *online.reach(blocks, how)
    _, (out_NBGRTK, log_total_NBGRT) = jax.lax.scan(row, None, order)
    out_NBGRTK, log_total_NBGRT = checkpoint_name(out_NBGRTK, "attended"), checkpoint_name(log_total_NBGRT, "attended")
    return out_NBGRTK, (blocks, out_NBGRTK, log_total_NBGRT)


def _backward(how: How, residuals: tuple, dout_NBGRTK: jax.Array) -> tuple[Blocks]:
    blocks, out_NBGRTK, log_total_NBGRT = residuals
    mean_NBGRT = jnp.sum(dout_NBGRTK.astype(jnp.float32) * out_NBGRTK.astype(jnp.float32), axis=-1)
    saved = Saved(dout_NBGRTK, log_total_NBGRT, mean_NBGRT)
    zero = jnp.zeros(blocks.q_NBGRTK.shape, jnp.float32)
    gradients = online.differentiate(blocks, how, saved, zero, blocks.k_MBGSK.dtype)
    arrays = blocks.q_NBGRTK, blocks.k_MBGSK, blocks.v_MBGSK, blocks.bias_XHTS
    cast = [None if d is None else d.astype(x.dtype) for d, x in zip(gradients, arrays, strict=True)]
    return (Blocks._make((*cast, *[None] * 8)),)


_flash.defvjp(_forward, _backward)


BACKEND = Backend(attend)
