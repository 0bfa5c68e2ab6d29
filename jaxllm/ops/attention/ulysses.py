"""Attention over rows that several devices share, by an exchange: each device gets whole rows, of fewer heads, and gives them back.

DeepSpeed-Ulysses: Jacobs et al. 2023, arXiv:2309.14509, section 3. Of q, k and v [B, T/N, H, K] an all-to-all makes
[B, T, H/N, K]; any implementation of attention for one device runs on that; another all-to-all puts its result back. The devices
have equal work however rows are masked, so rows lie in their own order.

Deviation from the paper: key/value heads that N devices do not divide are repeated until they do. That is N / gcd(G, N) times as
much of k and v to send and to hold, at worst as much as for H heads.

Letters: N devices that share a row, otherwise as in `jaxllm.ops.attention`; T and S are the tokens of what the arrays hold, whole rows
or the part of a device.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.ops.attention import blocked
from jaxllm.ops.attention.mask import Mask, check
from jaxllm.ops.attention.share import QUERIES, Share, arguments, bias_axes, here, own_rng

LENGTH, HEAD = 1, 2  # dimensions of q, k and v


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
    axis: str = "seq",
    share: Share = here,
    inner: Callable[..., jax.Array] = blocked.attend,
) -> jax.Array:
    """softmax(scale q k + bias) v over the keys that `mask` shows in the whole row, [B, T, H, K] in q's dtype.

    share: how to call a function on each device's part; then all arrays are whole ones. Without it they are the part of a
    device on the mesh axis `axis`, which must be manual.
    bias_XHTS: added to the scores; X is 1 or B, the queries of a device against all keys. inner: `attend` of an implementation.
    rng: drops a `dropout_frac` of the probabilities; which ones depends on how many devices there are. For the rest see
    `jaxllm.ops.attention.attend`. ValueError if N does not divide the query heads, or for shapes that do not fit each other.
    """
    rng = rng if dropout_frac > 0 else None
    run = partial(inner, scale=scale, dropout_frac=dropout_frac, block_tokens=block_tokens)
    parts = arguments(q_BTHK, k_BSGK, v_BSGK, mask, bias_XHTS, bias_axes(bias_XHTS, len(q_BTHK)), rng)
    return share(partial(_attend, run, axis), parts, (QUERIES,))[0]


def _attend(
    run: Callable[..., jax.Array],
    axis: str,
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    bias_XHTS: jax.Array | None,
    rng: jax.Array | None,
    rows_B: jax.Array,
    heads_H: jax.Array,
) -> tuple[jax.Array]:
    """The result of a device's queries."""
    check(q_BTHK, k_BSGK, v_BSGK, mask, None)
    exchange: Callable[..., jax.Array] = partial(jax.lax.all_to_all, axis_name=axis, tiled=True)
    devices, kv_heads = jax.lax.axis_size(axis), k_BSGK.shape[HEAD]
    _check_heads(q_BTHK.shape[HEAD], devices)
    if rng is not None:
        rng = own_rng(rng, rows_B[0], heads_H[0], jax.lax.axis_index(axis))
    repeats = devices // math.gcd(kv_heads, devices)
    k_BSGK, v_BSGK = (x if repeats == 1 else jnp.repeat(x, repeats, axis=HEAD) for x in (k_BSGK, v_BSGK))
    q_BTHK, k_BSGK, v_BSGK = (exchange(x, split_axis=HEAD, concat_axis=LENGTH) for x in (q_BTHK, k_BSGK, v_BSGK))
    if bias_XHTS is not None:
        bias_XHTS = exchange(bias_XHTS, split_axis=1, concat_axis=2)
    out_BTHK = run(q_BTHK, k_BSGK, v_BSGK, _gather(mask, axis), bias_XHTS=bias_XHTS, rng=rng)
    return (exchange(out_BTHK, split_axis=LENGTH, concat_axis=HEAD),)


def _gather(mask: Mask, axis: str) -> Mask:
    """The mask of whole rows: a few bytes a token."""

    def gather(x_BT: Any) -> jax.Array:
        return jax.lax.all_gather(x_BT, axis, axis=LENGTH, tiled=True)

    return jax.tree.map(gather, mask)


def _check_heads(heads: int, devices: int) -> None:
    if heads % devices:
        accepted = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"the exchange of heads has {heads} query heads (model.heads / parallel.tensor) for parallel.seq = {devices} devices.\n"
            f"  Accepted: parallel.seq = {accepted}.\n"
            "  Set parallel.seq to one of these, or model.heads to a multiple, or send keys round (ring), which takes any number."
        )
