"""Attention over a key/value cache, for decoding: it reads the slots that are filled, not those that there are.

The cache is read in blocks up to the last slot that any query sees, with the softmax made online (Milakov & Gimelshein 2018,
arXiv:1805.02867, algorithm 3). Queries go in blocks, too, so that those of a long prompt read no later ones.

Letters: B batch, T queries, S slots of a block, H query heads, G key/value heads, K head width, N blocks of queries.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.ops.attention.mask import HIDDEN
from jaxllm.ops.attention.online import cut

BLOCK_TOKENS = 256
# (first slot, how many) -> (k_BGSK, v_BGSK)
Read = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]


class _Cache(NamedTuple):
    """What all queries read, and how. As of `cached`; `block` slots at once."""

    read: Read
    slots: int
    block: int
    window_tokens: int
    scale: float


class _Queries(NamedTuple):
    """A block of queries, or with a leading axis all of them."""

    q_BHTK: jax.Array
    positions_BT: jax.Array
    bias_XHTS: jax.Array | None


def cached(
    q_BTHK: jax.Array,
    read: Read,
    slots: int,
    query_positions_BT: jax.Array,
    *,
    window_tokens: int = 0,
    bias_XHTS: jax.Array | None = None,
    scale: float | None = None,
    block_tokens: int | None = None,
) -> jax.Array:
    """Attention over a cache whose slot s holds position s, [B, T, H, K]: the query at position p sees the slots s <= p.

    `read` gives the keys and values of a range of the cache's `slots`. With `window_tokens` only those of p - s < window_tokens
    are seen. What later slots hold changes no bit, nor do the positions of other rows. A query of a negative position sees
    nothing and gives 0. bias_XHTS: added to the scores; X is 1 or B. scale: 1/sqrt(K) unless given. block_tokens: 256 on a CPU;
    elsewhere the whole cache, since a loop whose length is data makes a GPU wait for its host at every turn.
    """
    if block_tokens is None:
        block_tokens = BLOCK_TOKENS if jax.default_backend() == "cpu" else slots
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    cache = _Cache(read, slots, min(block_tokens, slots), window_tokens, scale)
    tokens = q_BTHK.shape[1]
    rows = min(block_tokens, BLOCK_TOKENS, tokens)
    blocks = _Queries(
        cut(q_BTHK.swapaxes(1, 2), 2, rows),
        cut(query_positions_BT, 1, rows),
        None if bias_XHTS is None else cut(bias_XHTS, 2, rows),
    )
    out_NBHTK = jax.lax.map(lambda queries: _attend(queries, cache), blocks)
    out_NBTHK = out_NBHTK.swapaxes(2, 3)
    return jnp.moveaxis(out_NBTHK, 0, 1).reshape(len(q_BTHK), -1, *q_BTHK.shape[2:])[:, :tokens].astype(q_BTHK.dtype)


def _attend(queries: _Queries, cache: _Cache) -> jax.Array:
    """[B, H, T, K] in float32."""
    q_BHTK, positions_BT, bias_XHTS = queries
    batch, heads, tokens, width = q_BHTK.shape

    def absorb(index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One block more in (highest score so far, sum of exp(score - highest), the same sum weighted with v)."""
        top_BHT, total_BHT, out_BHTK = state
        # The last block begins earlier than it should if the blocks do not divide the cache; what it repeats is hidden.
        start = jnp.minimum(index * cache.block, cache.slots - cache.block)
        k_BGSK, v_BGSK = cache.read(start, cache.block)
        slots_S = start + jnp.arange(cache.block)
        distance_BTS = positions_BT[:, :, None] - slots_S
        visible_BTS = (distance_BTS >= 0) & (slots_S >= index * cache.block)
        if cache.window_tokens:
            visible_BTS &= distance_BTS < cache.window_tokens
        # The query heads that share a key/value head are rows of one matrix.
        rows = (batch, k_BGSK.shape[1], -1)
        scores = jnp.einsum("bgrk,bgsk->bgrs", q_BHTK.reshape(*rows, width), k_BGSK, preferred_element_type=jnp.float32)
        scores_BHTS = scores.reshape(batch, heads, tokens, -1) * cache.scale
        if bias_XHTS is not None:
            scores_BHTS += jax.lax.dynamic_slice_in_dim(bias_XHTS, start, cache.block, axis=3)
        scores_BHTS += jnp.where(visible_BTS, 0.0, HIDDEN)[:, None]
        higher_BHT = jnp.maximum(top_BHT, scores_BHTS.max(-1))
        # Where nothing was visible yet these are sums over hidden slots, which `shrink` = 0 removes with the first visible one.
        exp_BHTS = jnp.exp(scores_BHTS - higher_BHT[..., None])
        shrink_BHT = jnp.exp(top_BHT - higher_BHT)
        weights = exp_BHTS.reshape(*rows, cache.block).astype(v_BGSK.dtype)
        out = jnp.einsum("bgrs,bgsk->bgrk", weights, v_BGSK, preferred_element_type=jnp.float32)
        out_BHTK = out_BHTK * shrink_BHT[..., None] + out.reshape(q_BHTK.shape)
        return higher_BHT, total_BHT * shrink_BHT + exp_BHTS.sum(-1), out_BHTK

    top_BHT = jnp.full(q_BHTK.shape[:-1], HIDDEN, jnp.float32)
    zero = (top_BHT, jnp.zeros_like(top_BHT), jnp.zeros(q_BHTK.shape, jnp.float32))
    _, total_BHT, out_BHTK = jax.lax.fori_loop(*_reach(positions_BT, cache), absorb, zero)
    return jnp.where((positions_BT >= 0)[:, None, :, None], out_BHTK / total_BHT[..., None], 0)


def _reach(positions_BT: jax.Array, cache: _Cache) -> tuple[jax.Array | int, jax.Array | int]:
    """(first, last + 1) of the blocks that a query of these positions may see."""
    count = -(-cache.slots // cache.block)
    if count == 1:
        return 0, 1
    first = jnp.maximum(positions_BT.min() - cache.window_tokens + 1, 0) // cache.block if cache.window_tokens else 0
    return first, jnp.clip(positions_BT.max() // cache.block + 1, 0, count)
