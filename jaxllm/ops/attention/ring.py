"""Attention over rows that several devices share: the keys go round, the queries stay.

Ring attention: Liu et al. 2023, arXiv:2310.01889, algorithm 1. Each device holds a part of the queries and of the keys of a row.
It absorbs its own keys, then those that its neighbour sends, until all parts have come by: `online`, with the blocks of a part
where `flash` has those of the whole row. The next part is sent while this one is absorbed. The backward pass sends keys and values
round once more, and with each part the gradients that it has collected, in float32. Nothing of the parts is kept: the memory
of a device is that of its own part.

Who sees whom is decided by the *places* of tokens in their row, so a row may be laid out in any order in which places ascend on
each device (`data.places` has one that shares causal work out evenly). Blocks that no query can see are not visited.

Deviation from the paper: the softmax state is float32, and causality skips blocks.

Letters: N parts of a row as many as devices, otherwise as in `jaxllm.ops.attention`; T and S are the tokens of what the arrays
hold, whole rows or the part of a device.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxllm.ops.attention import online
from jaxllm.ops.attention.blocked import fold, unfold
from jaxllm.ops.attention.mask import HIDDEN, Mask, check
from jaxllm.ops.attention.online import Blocks, Gradients, How, Saved, State, cut, pad
from jaxllm.ops.attention.share import HEADS, KEYS, QUERIES, ROWS, TOKENS, Share, bias_axes, here, own_rng
from jaxllm.types import PartAxes


class _Rows(NamedTuple):
    """All arrays. bias_XHTS: the queries against the whole row. rows_B, heads_H: their numbers, where something is dropped."""

    q_BTHK: jax.Array
    k_BSGK: jax.Array
    v_BSGK: jax.Array
    bias_XHTS: jax.Array | None
    segments_BT: jax.Array | None
    key_segments_BS: jax.Array | None
    prefix_BS: jax.Array | None
    branches_BT: jax.Array | None
    key_branches_BS: jax.Array | None
    places_T: jax.Array
    key_places_S: jax.Array
    rng: jax.Array | None
    rows_B: jax.Array | None
    heads_H: jax.Array | None


class _Keys(NamedTuple):
    """What goes round, in blocks as of `Blocks`."""

    k_MBGSK: jax.Array
    v_MBGSK: jax.Array
    key_segments_MBS: jax.Array | None
    prefix_MBS: jax.Array | None
    key_branches_MBS: jax.Array | None
    slots_MS: jax.Array


class _Ring(NamedTuple):
    """The static arguments."""

    causal: bool
    window_tokens: int
    scale: float
    dropout_frac: float
    block_tokens: int
    axis: str
    share: Share


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    places_T: jax.Array,
    *,
    key_places_S: jax.Array | None = None,
    bias_XHTS: jax.Array | None = None,
    scale: float | None = None,
    rng: jax.Array | None = None,
    dropout_frac: float = 0.0,
    block_tokens: int = 128,
    axis: str = "seq",
    share: Share = here,
) -> jax.Array:
    """softmax(scale q k + bias) v over the keys that `mask` shows in the whole row, [B, T, H, K] in q's dtype.

    share: how to call a function on each device's part; then all arrays are whole ones. Without it they are the part of a
    device on the mesh axis `axis`, which must be manual. The former is to be preferred: forward and backward pass are shared out
    each by itself, so nobody has to differentiate the sharing.
    places_T, key_places_S: int32, the place in its row of each query and key, ascending on each device; key_places_S is
    places_T unless given.
    bias_XHTS: added to the scores; X is 1 or B, queries as they lie, keys of the whole row in the order of their places. Its
    memory is that of T x (all keys) on each device, and so is that of its gradient.
    rng: drops a `dropout_frac` of the probabilities; which ones depends on how many devices there are.
    block_tokens: the most tokens of a block; a block is at most half a part.
    For the rest see `jaxllm.ops.attention.attend`. Has a gradient for q, k, v and bias_XHTS, but no gradient of the gradient and
    no forward mode. ValueError for shapes that do not fit each other.
    """
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    drops = rng is not None and dropout_frac > 0
    how = _Ring(mask.causal, mask.window_tokens, scale, dropout_frac if drops else 0.0, block_tokens, axis, share)
    rows = _Rows(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        bias_XHTS,
        mask.segments_BT,
        mask.segments_of_keys,
        mask.prefix_BS,
        mask.branches_BT,
        mask.branches_of_keys,
        places_T,
        places_T if key_places_S is None else key_places_S,
        rng if drops else None,
        jnp.arange(q_BTHK.shape[0]) if drops else None,
        jnp.arange(q_BTHK.shape[2]) if drops else None,
    )
    return _attend(rows, how)


LOG_TOTAL: PartAxes = ("batch", "heads", "length")


def _parts(rows: _Rows) -> tuple[tuple[Any, PartAxes], ...]:
    """The arrays and how they lie."""
    bias, places = bias_axes(rows.bias_XHTS, len(rows.q_BTHK)), ("length",)
    axes = QUERIES, KEYS, KEYS, bias, *[TOKENS] * 5, places, places, (), ROWS, HEADS
    return tuple(zip(rows, axes, strict=True))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(rows: _Rows, how: _Ring) -> jax.Array:
    return _forward(rows, how)[0]


def _forward(rows: _Rows, how: _Ring) -> tuple[jax.Array, tuple]:
    out_BTHK, log_total_BHT = how.share(partial(_absorb_all, how), _parts(rows), (QUERIES, LOG_TOTAL))
    out_BTHK, log_total_BHT = checkpoint_name(out_BTHK, "attended"), checkpoint_name(log_total_BHT, "attended")
    return out_BTHK, (rows, out_BTHK, log_total_BHT)


def _backward(how: _Ring, residuals: tuple, dout_BTHK: jax.Array) -> tuple[_Rows]:
    rows, out_BTHK, log_total_BHT = residuals
    parts = (out_BTHK, QUERIES), (log_total_BHT, LOG_TOTAL), (dout_BTHK, QUERIES), *_parts(rows)
    out_axes = QUERIES, KEYS, KEYS, ("batch", "heads", "length", None)
    dq_BTHK, dk_BSGK, dv_BSGK, dbias_XHTS = how.share(partial(_differentiate_all, how), parts, out_axes)
    if rows.bias_XHTS is not None:
        # Of a bias that all rows share this is one array for each device that holds other rows.
        dbias_XHTS = dbias_XHTS if len(dbias_XHTS) == len(rows.bias_XHTS) else dbias_XHTS.sum(0, keepdims=True)
        dbias_XHTS = dbias_XHTS.astype(rows.bias_XHTS.dtype)
    return (_Rows._make((dq_BTHK, dk_BSGK, dv_BSGK, dbias_XHTS, *[None] * 10)),)


_attend.defvjp(_forward, _backward)


def _absorb_all(how: _Ring, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    """(out_BTHK, log_total_BHT) of a device's queries."""
    rows = _Rows(*arrays)
    own, part = _cut(rows, how)

    def absorb(keys: _Keys, states: State) -> State:
        """A part more."""
        blocks = _meet(own, keys)

        def row(_: None, n: Any) -> tuple[None, State]:
            block, start, stop, state = n
            return None, online.absorb(blocks, part, block, start, stop, state)

        order = jnp.arange(len(own.q_NBGRTK)), *online.reach(blocks, part), states
        return jax.lax.scan(row, None, order)[1]

    def step(carry: tuple[_Keys, State], _: None) -> tuple[tuple[_Keys, State], None]:
        keys, states = carry
        coming = _send_on(keys, how)  # does not wait for what follows, nor this for it
        return (coming, absorb(keys, states)), None

    begun = _own_keys(own), online.begin(own.q_NBGRTK)
    (keys, states), _ = jax.lax.scan(step, begun, None, length=jax.lax.axis_size(how.axis) - 1)
    out_NBGRTK, log_total_NBGRT = online.finish(absorb(keys, states))
    out_BTHK = unfold(_join(out_NBGRTK, 3, rows.q_BTHK.shape[1]), rows.q_BTHK.dtype)
    log_total_BGRT = _join(log_total_NBGRT, 3, rows.q_BTHK.shape[1])
    return out_BTHK, log_total_BGRT.reshape(len(out_BTHK), -1, log_total_BGRT.shape[-1])


def _differentiate_all(how: _Ring, out_BTHK: jax.Array, log_total_BHT: jax.Array, dout_BTHK: jax.Array, *arrays: Any) -> tuple:
    """(dq_BTHK, dk_BSGK, dv_BSGK, dbias_XHTS in float32 or None) of a device's queries and keys."""
    rows = _Rows(*arrays)
    own, part = _cut(rows, how)
    group, block = own.q_NBGRTK.shape[3], own.q_NBGRTK.shape[4]
    mean_BTH = jnp.sum(dout_BTHK.astype(jnp.float32) * out_BTHK.astype(jnp.float32), axis=-1)
    saved = Saved(
        cut(fold(dout_BTHK, group), 3, block),
        # No probability of a padded query is more than 0.
        cut(log_total_BHT.reshape(len(out_BTHK), -1, group, log_total_BHT.shape[-1]), 3, block, -HIDDEN),
        cut(fold(mean_BTH[..., None], group)[..., 0], 3, block),
    )

    def add(keys: _Keys, sums: Gradients) -> Gradients:
        """What a part adds to the gradients of the queries, the bias, and the part itself."""
        found = online.differentiate(_meet(own, keys), part, saved, sums.q_NBGRTK, jnp.float32)
        dbias_XHTS = sums.bias_XHTS
        if dbias_XHTS is not None:
            dbias_XHTS = dbias_XHTS.at[..., keys.slots_MS.reshape(-1)].set(found.bias_XHTS, mode="drop")
        return Gradients(found.q_NBGRTK, sums.k_MBGSK + found.k_MBGSK, sums.v_MBGSK + found.v_MBGSK, dbias_XHTS)

    def step(carry: tuple[_Keys, Gradients], _: None) -> tuple[tuple[_Keys, Gradients], None]:
        keys, sums = carry
        coming, dk_MBGSK, dv_MBGSK = _send_on((keys, sums.k_MBGSK, sums.v_MBGSK), how)
        return (coming, add(keys, sums._replace(k_MBGSK=dk_MBGSK, v_MBGSK=dv_MBGSK))), None

    arrays = own.q_NBGRTK, own.k_MBGSK, own.v_MBGSK, own.bias_XHTS
    zero = Gradients._make(None if x is None else jnp.zeros(x.shape, jnp.float32) for x in arrays)
    # Keys are sent a step before the gradients that belong to them, so that no sending has to wait for a result.
    begun = _send_on(_own_keys(own), how), add(_own_keys(own), zero)
    (_, sums), _ = jax.lax.scan(step, begun, None, length=jax.lax.axis_size(how.axis) - 1)
    dkeys = _send_on((sums.k_MBGSK, sums.v_MBGSK), how)  # the last step, home
    dk_BSGK, dv_BSGK = (_join(d, 2, rows.k_BSGK.shape[1]).swapaxes(1, 2).astype(rows.k_BSGK.dtype) for d in dkeys)
    dq_BTHK = unfold(_join(sums.q_NBGRTK, 3, rows.q_BTHK.shape[1]), rows.q_BTHK.dtype)
    return dq_BTHK, dk_BSGK, dv_BSGK, None if sums.bias_XHTS is None else sums.bias_XHTS[:, :, : rows.q_BTHK.shape[1]]


def _check(rows: _Rows, how: _Ring) -> None:
    """ValueError for arrays of a device that do not fit each other."""
    arrays = rows.segments_BT, rows.key_segments_BS, rows.prefix_BS, rows.branches_BT, rows.key_branches_BS
    mask = Mask(how.causal, how.window_tokens, *arrays)
    check(rows.q_BTHK, rows.k_BSGK, rows.v_BSGK, mask, None)
    (batch, query_tokens, heads, _), key_tokens = rows.q_BTHK.shape, rows.k_BSGK.shape[1]
    all_keys = key_tokens * jax.lax.axis_size(how.axis)
    bias_shapes = [(x, heads, query_tokens, all_keys) for x in dict.fromkeys((1, batch))]
    expected = (
        ("places_T", rows.places_T, [(query_tokens,)]),
        ("key_places_S", rows.key_places_S, [(key_tokens,)]),
        ("bias_XHTS", rows.bias_XHTS, bias_shapes),
    )
    for name, array, shapes in expected:
        if array is not None and array.shape not in shapes:
            raise ValueError(
                f"{name} has shape {list(array.shape)} on a device; q has {list(rows.q_BTHK.shape)} and k has"
                f" {list(rows.k_BSGK.shape)}.\n  Accepted: {' or '.join(str(list(shape)) for shape in shapes)}.\n"
                "  Letters: B batch, T queries of the device, S its keys; of the bias the keys of the whole row."
            )


def _cut(rows: _Rows, how: _Ring) -> tuple[Blocks, How]:
    """A device's queries and its own keys, as blocks; of the bias only the queries are padded."""
    _check(rows, how)
    group, key_tokens = rows.q_BTHK.shape[2] // rows.k_BSGK.shape[2], rows.k_BSGK.shape[1]
    height, width = (_block_tokens(x.shape[1], how.block_tokens) for x in (rows.q_BTHK, rows.k_BSGK))
    rng = rows.rng
    if rows.rows_B is not None and rows.heads_H is not None:
        rng = own_rng(rng, rows.rows_B[0], rows.heads_H[0], rows.places_T[0])
    blocks = Blocks(
        cut(fold(rows.q_BTHK, group), 3, height),
        cut(rows.k_BSGK.swapaxes(1, 2), 2, width),
        cut(rows.v_BSGK.swapaxes(1, 2), 2, width),
        None if rows.bias_XHTS is None else pad(rows.bias_XHTS, 2, height),
        None if rows.segments_BT is None else cut(rows.segments_BT, 1, height),
        None if rows.key_segments_BS is None else cut(rows.key_segments_BS, 1, width),
        None if rows.prefix_BS is None else cut(rows.prefix_BS, 1, width),
        None if rows.branches_BT is None else cut(rows.branches_BT, 1, height),
        None if rows.key_branches_BS is None else cut(rows.key_branches_BS, 1, width),
        online.cut_slots(rows.places_T, height),
        cut(rows.key_places_S, 0, width, online.NOWHERE),
        rng,
    )
    return blocks, How(how.causal, how.window_tokens, how.scale, how.dropout_frac, padded=key_tokens % width != 0)


def _block_tokens(tokens: int, most: int) -> int:
    """Tokens of equal blocks of half a part, since in a row laid out for balance the halves do not follow each other."""
    half = -(-tokens // 2)
    return -(-half // -(-half // most))


def _own_keys(blocks: Blocks) -> _Keys:
    return _Keys(*(getattr(blocks, name) for name in _Keys._fields))


def _send_on(tree: Any, how: _Ring) -> Any:
    """What the device before this one has."""
    devices = jax.lax.axis_size(how.axis)
    return jax.lax.ppermute(tree, how.axis, [(device, (device + 1) % devices) for device in range(devices)])


def _meet(own: Blocks, keys: _Keys) -> Blocks:
    """A device's queries and a part of the keys."""
    bias_XHTS, rng, slots_MS = own.bias_XHTS, own.rng, keys.slots_MS
    if bias_XHTS is not None:
        bias_XHTS = jnp.take(bias_XHTS, slots_MS.reshape(-1), axis=3, mode="clip")
    return own._replace(**keys._asdict(), bias_XHTS=bias_XHTS, rng=own_rng(rng, slots_MS[0, 0]))


def _join(x: jax.Array, axis: int, tokens: int) -> jax.Array:
    """The inverse of `cut`, without padding."""
    joined = jnp.moveaxis(x, 0, axis)
    joined = joined.reshape(*joined.shape[:axis], -1, *joined.shape[axis + 2 :])
    return jax.lax.slice_in_dim(joined, 0, tokens, axis=axis)
