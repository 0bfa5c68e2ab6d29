"""How attention over rows that several devices share is run on each of them: what `ring` and `ulysses` have in common.

A mesh axis ("seq") cuts each row in parts of consecutive indices. What each device does is a function of its own parts, in which
that axis is manual, so that it can send and receive. The other axes that cut the arrays should be manual, too: what is sent over
one axis the compiler first gathers over those that are its own (seen with all-to-all, jax 0.10.2). Only those: differentiated, a
shard_map sums over each manual axis that cuts nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.types import PartAxes

# share(function, ((a, axes of a), ...), (axes of a result, ...)) = function(a, ...), a tuple of arrays or None, where each device
# calls function on its part of the arrays: a shard_map. An array may be None.
Share = Callable[[Callable[..., tuple], Sequence[tuple[Any, PartAxes]], Sequence[PartAxes]], tuple]

QUERIES: PartAxes = ("batch", "length", "heads", "head_dim")
KEYS: PartAxes = ("batch", "length", "kv_heads_act", "head_dim")
TOKENS: PartAxes = ("batch", "length")
ROWS: PartAxes = ("batch",)
HEADS: PartAxes = ("heads",)


def here(function: Callable[..., tuple], parts: Sequence[tuple[Any, PartAxes]], out_axes: Sequence[PartAxes]) -> tuple:
    """The `Share` of a caller whose arrays are a device's parts already."""
    del out_axes
    return function(*(arrays for arrays, _ in parts))


def bias_axes(bias_XHTS: jax.Array | None, batch: int) -> PartAxes:
    """Of the queries of a device against the keys of the whole row."""
    return ("batch" if bias_XHTS is not None and len(bias_XHTS) == batch else None, "heads", "length", None)


def arguments(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: Any, bias_XHTS: jax.Array | None, bias: PartAxes, rng: Any
) -> tuple[tuple[Any, PartAxes], ...]:
    """What a device needs to attend, and how it lies: these, then the numbers of its rows and of its heads, for `own_rng`."""
    rows_B, heads_H = jnp.arange(q_BTHK.shape[0]), jnp.arange(q_BTHK.shape[2])
    axes = QUERIES, KEYS, KEYS, TOKENS, bias, (), ROWS, HEADS
    return tuple(zip((q_BTHK, k_BSGK, v_BSGK, mask, bias_XHTS, rng, rows_B, heads_H), axes, strict=True))


def own_rng(rng: jax.Array | None, *numbers: Any) -> jax.Array | None:
    """A key for what has these numbers, so that no two devices draw the same."""
    if rng is not None:
        for number in numbers:
            rng = jax.random.fold_in(rng, number)
    return rng
