"""The softmax made block by block, forward and backward: what `flash` does with a whole row and `ring` with the parts of one.

Milakov & Gimelshein 2018, arXiv:1805.02867, algorithm 3; Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4; Rabe & Staats
2021, arXiv:2112.05682. One block of scores exists at a time; of the forward pass only the result and log of each row's sum of
exponentials are kept, and the backward pass makes every block of probabilities again as exp(score - that).

Letters: N blocks of queries, M blocks of keys, T and S tokens of one block. A slot is the place of a token in its row.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.ops.attention.mask import HIDDEN, Mask
from jaxllm.ops.attention.plain import drop

NOWHERE = jnp.iinfo(jnp.int32).max  # the slot of padded keys: after everything


class Blocks(NamedTuple):
    """The arrays, cut into blocks. Padded tokens are at the end. The bias stays whole: [X, H, N T, M S].

    slots: ascending, so that the blocks that a block of queries sees follow each other. Of padded keys `NOWHERE`, of padded
    queries the last one's.
    """

    q_NBGRTK: jax.Array
    k_MBGSK: jax.Array
    v_MBGSK: jax.Array
    bias_XHTS: jax.Array | None
    segments_NBT: jax.Array | None
    key_segments_MBS: jax.Array | None
    prefix_MBS: jax.Array | None
    branches_NBT: jax.Array | None
    key_branches_MBS: jax.Array | None
    slots_NT: jax.Array
    slots_MS: jax.Array
    rng: jax.Array | None


class How(NamedTuple):
    """The static arguments. padded: whether some keys are padding."""

    causal: bool
    window_tokens: int
    scale: float
    dropout_frac: float
    padded: bool


# Of each query: highest score so far, sum of exp(score - highest), the same sum weighted with v. In float32.
State = tuple[jax.Array, jax.Array, jax.Array]


def pad(x: jax.Array, axis: int, block: int, value: float = 0) -> jax.Array:
    """x with an axis padded to a multiple of `block`."""
    return jnp.pad(x, [(0, -size % block if i == axis else 0) for i, size in enumerate(x.shape)], constant_values=value)


def cut(x: jax.Array, axis: int, block: int, value: float = 0) -> jax.Array:
    """Blocks of an axis as a leading axis, the last one padded with `value`."""
    padded = pad(x, axis, block, value)
    return jnp.moveaxis(padded.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def cut_slots(slots_T: jax.Array, block: int) -> jax.Array:
    """Slots of queries in blocks [N, T], the last slot repeated as padding."""
    return jnp.pad(slots_T, (0, -len(slots_T) % block), mode="edge").reshape(-1, block)


def reach(blocks: Blocks, how: How) -> tuple[jax.Array, jax.Array]:
    """(first, last + 1) of the blocks of keys that a block of queries may see, int32 [N] each. There may be none."""
    early_N, late_N = blocks.slots_NT.min(-1)[:, None], blocks.slots_NT.max(-1)[:, None]
    early_M, late_M = blocks.slots_MS.min(-1), jnp.where(blocks.slots_MS == NOWHERE, -1, blocks.slots_MS).max(-1)
    seen_NM = jnp.ones((len(early_N), len(early_M)), bool)
    passed_NM = ~seen_NM
    if blocks.prefix_MBS is None:
        if how.causal:
            seen_NM = early_M <= late_N
        if how.window_tokens:
            passed_NM = early_N - late_M >= how.window_tokens
    return passed_NM.sum(1, dtype=jnp.int32), seen_NM.sum(1, dtype=jnp.int32)


def begin(q_BGRTK: jax.Array) -> State:
    """What a block of queries has seen before its first key. Leading axes may be more."""
    top = jnp.full(q_BGRTK.shape[:-1], HIDDEN, jnp.float32)
    return top, jnp.zeros_like(top), jnp.zeros(q_BGRTK.shape, jnp.float32)


def finish(state: State) -> tuple[jax.Array, jax.Array]:
    """(out_BGRTK, log_total_BGRT) in float32. A row that saw nothing gives 0, and no probability is made of its log total."""
    top_BGRT, total_BGRT, out_BGRTK = state
    total_BGRT = jnp.where(total_BGRT == 0, 1, total_BGRT)
    return out_BGRTK / total_BGRT[..., None], top_BGRT + jnp.log(total_BGRT)


def absorb(blocks: Blocks, how: How, n: Any, start: Any, stop: Any, state: State) -> State:
    """The blocks of keys from `start` to `stop` more in the state of the block of queries `n`."""
    return jax.lax.fori_loop(start, stop, partial(_absorb, blocks, how, n), state)


def _absorb(blocks: Blocks, how: How, n: Any, m: Any, state: State) -> State:
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


def _score(blocks: Blocks, how: How, n: Any, m: Any) -> tuple[jax.Array, jax.Array | None]:
    """(scores_BGRTS, visible_B11TS or None) of a block of queries and a block of keys."""
    q_BGRTK, k_BGSK = blocks.q_NBGRTK[n], blocks.k_MBGSK[m]
    kv_heads, group, rows, columns = *q_BGRTK.shape[1:4], k_BGSK.shape[2]
    scores = jnp.einsum("bgrtk,bgsk->bgrts", q_BGRTK, k_BGSK, preferred_element_type=jnp.float32) * how.scale
    if blocks.bias_XHTS is not None:
        sizes = (*blocks.bias_XHTS.shape[:2], rows, columns)
        part = jax.lax.dynamic_slice(blocks.bias_XHTS, (0, 0, n * rows, m * columns), sizes)
        scores += part.reshape(-1, kv_heads, group, rows, columns)
    slots_T, slots_S = blocks.slots_NT[n], blocks.slots_MS[m]
    segments = (blocks.segments_NBT, n), (blocks.key_segments_MBS, m)
    arrays = *segments, (blocks.prefix_MBS, m), (blocks.branches_NBT, n), (blocks.key_branches_MBS, m)
    mask = Mask(how.causal, how.window_tokens, *[None if array is None else array[i] for array, i in arrays])
    visible = mask.visible(slots_T, slots_S)
    if how.padded and not how.causal:  # a causal query sees nothing that is nowhere
        inside = (slots_S < NOWHERE)[None, None]
        visible = inside if visible is None else visible & inside
    return scores, None if visible is None else visible[:, None, None]


def _drop(x_BGRTS: jax.Array, blocks: Blocks, how: How, n: Any, m: Any) -> jax.Array:
    """Dropout, the same whenever the block is made again."""
    if blocks.rng is None:
        return x_BGRTS
    return drop(x_BGRTS, jax.random.fold_in(jax.random.fold_in(blocks.rng, n), m), how.dropout_frac)


class Saved(NamedTuple):
    """What the backward pass has of each query: d out, log of the sum of exponentials (of padded queries anything that makes no
    probability infinite), and the mean of d probability, with the probabilities as weights (with dropout as well)."""

    dout_NBGRTK: jax.Array
    log_total_NBGRT: jax.Array
    mean_NBGRT: jax.Array


class Gradients(NamedTuple):
    """Of `Blocks`: dq and dbias in float32, dk and dv in the dtype that was asked for."""

    q_NBGRTK: jax.Array
    k_MBGSK: jax.Array
    v_MBGSK: jax.Array
    bias_XHTS: jax.Array | None


def differentiate(blocks: Blocks, how: How, saved: Saved, dq_NBGRTK: jax.Array, key_dtype: jax.typing.DTypeLike) -> Gradients:
    """Algorithm 4: for each block of keys, over the blocks of queries that see it. dq_NBGRTK is added to."""
    start_N, stop_N = reach(blocks, how)
    m = jnp.arange(len(blocks.k_MBGSK))
    visits_NM = (start_N[:, None] <= m) & (m < stop_N[:, None])
    first_M, visits_M = visits_NM.argmax(0), visits_NM.sum(0)

    def column(carry: tuple, m: Any) -> tuple[tuple, tuple]:
        block, start, stop = m
        k_BGSK, v_BGSK = blocks.k_MBGSK[block], blocks.v_MBGSK[block]
        zeros = jnp.zeros(k_BGSK.shape, jnp.float32), jnp.zeros(v_BGSK.shape, jnp.float32)
        step = partial(_differentiate, blocks, how, saved, block)
        *carry, dk_BGSK, dv_BGSK = jax.lax.fori_loop(start, stop, step, (*carry, *zeros))
        return tuple(carry), (dk_BGSK.astype(key_dtype), dv_BGSK.astype(key_dtype))

    bias = blocks.bias_XHTS
    begun = dq_NBGRTK, None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    (dq_NBGRTK, dbias_XHTS), (dk_MBGSK, dv_MBGSK) = jax.lax.scan(column, begun, (m, first_M, first_M + visits_M))
    return Gradients(dq_NBGRTK, dk_MBGSK, dv_MBGSK, dbias_XHTS)


def _differentiate(blocks: Blocks, how: How, saved: Saved, m: Any, n: Any, gradients: tuple) -> tuple:
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
