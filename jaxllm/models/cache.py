"""The key/value cache of decoding: {"layers": keys and values, "lengths": int32 [B]}, slot s of a row holding position s.

"layers" follows the form of the layer stack: a list with one {"k", "v"} a layer, [B, G, S, K] each, or one {"k", "v"},
[B, L, G, S, K]. Batch is the first axis of every array. Slots lie next to each other within a head, as the product with the
queries reads them: with the heads inside the slots a token costs several times as much (2048 slots, CPU).

An encoder-decoder's cache also holds "cross_k" and "cross_v" a layer, made of the encoder's output, and "input_lengths".

With precision.cache = "int8" keys and values are codes, and beside each of these arrays is one of scales, "k_scale" [..., S, 1] and so on:
the largest number of a token's key (or value) in a head / 127.

Rows differ in length. What lies behind a row's length is never read: a query sees only slots up to its own position.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.models.architecture import Architecture
from jaxllm.types import Constrain

Cache = dict[str, Any]
SCALE = "_scale"


class Slot(NamedTuple):
    """What one layer reads and writes: its own arrays by name, or those of the whole stack and the layer's index in them.

    The stack is handed on whole because writing into it is done in place; cutting a layer out and putting it back would
    copy the layer's cache twice a token.
    """

    arrays: dict[str, jax.Array]
    layer: jax.Array | None


def empty(arch: Architecture, layers: int, batch_seqs: int, length_tokens: int, constrain: Constrain) -> Cache:
    """A cache of so many layers for `batch_seqs` rows of up to `length_tokens` tokens in the compute dtype; ValueError if longer than
    the context."""
    if not 1 <= length_tokens <= arch.context_tokens:
        raise ValueError(
            f"a cache of {length_tokens} tokens.\n  Accepted: 1 to model.context_tokens = {arch.context_tokens}."
            "\n  Use fewer prompt and new tokens, or a model with a longer context."
        )
    pairs = _zeros(arch, layers, batch_seqs, length_tokens, ("k", "v"), constrain)
    return {"layers": pairs, "lengths": jnp.zeros(batch_seqs, jnp.int32)}


def with_memory(arch: Architecture, layers: int, state: Cache, inputs_tokens: int, constrain: Constrain) -> Cache:
    """The cache with room for the keys and values of so many encoder outputs a row."""
    room = _zeros(arch, layers, state["lengths"].shape[0], inputs_tokens, ("cross_k", "cross_v"), constrain)
    if isinstance(room, dict):
        return {**state, "layers": {**state["layers"], **room}}
    return {**state, "layers": [{**old, **new} for old, new in zip(state["layers"], room, strict=True)]}


def cut(state: Cache, lengths_B: jax.Array, length_tokens: int) -> Cache:
    """The cache of the first `lengths_B` tokens of its rows, with room for `length_tokens` tokens instead of what it had."""

    def one(array: jax.Array) -> jax.Array:
        more = length_tokens - array.shape[-2]
        if more == 0:
            return array
        return array[..., :length_tokens, :] if more < 0 else jnp.pad(array, [*[(0, 0)] * (array.ndim - 2), (0, more), (0, 0)])

    return {"layers": jax.tree.map(one, state["layers"]), "lengths": lengths_B}


def _zeros(arch: Architecture, layers: int, rows: int, tokens: int, names: tuple[str, ...], constrain: Constrain) -> Any:
    stacked = arch.layers_as == "scan"
    shape = (rows, *((layers,) if stacked else ()), arch.kv_heads, tokens, arch.head_dim)
    axes = ("batch", *(("layers",) if stacked else ()), "kv_heads", None, "head_dim")

    def one() -> dict[str, jax.Array]:
        if arch.cache != "int8":
            return {name: constrain(jnp.zeros(shape, arch.dtype), axes) for name in names}
        codes = {name: constrain(jnp.zeros(shape, jnp.int8), axes) for name in names}
        return codes | {name + SCALE: constrain(jnp.zeros((*shape[:-1], 1), arch.dtype), axes) for name in names}

    return one() if stacked else [one() for _ in range(layers)]


def _stored(slot: Slot, name: str, new: jax.Array) -> dict[str, jax.Array]:
    """Keys or values [..., K] as the cache holds them, by the names of its arrays."""
    if name + SCALE not in slot.arrays:
        return {name: new}
    wide = new.astype(jnp.float32)
    scale = (jnp.abs(wide).max(-1, keepdims=True) / 127).astype(slot.arrays[name + SCALE].dtype)
    steps = wide / jnp.where(scale > 0, scale.astype(jnp.float32), 1)
    # Divided by a rounded scale, the largest may come out above 127.
    return {name: jnp.clip(jnp.round(steps), -127, 127).astype(jnp.int8), name + SCALE: scale}


def _get(slot: Slot, name: str, cut: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """cut(an array of the cache) of keys or values, in the compute dtype."""
    codes = cut(slot.arrays[name])
    if name + SCALE not in slot.arrays:
        return codes
    scale = cut(slot.arrays[name + SCALE])
    return codes.astype(scale.dtype) * scale


def write(slot: Slot, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array) -> Slot:
    """The slot with these keys and values at `positions_BT`; what lies beyond its end (right padding) is left out."""

    def one_row(row: jax.Array, new_TGK: jax.Array, positions_T: jax.Array) -> jax.Array:
        if slot.layer is None:
            return row.at[:, positions_T].set(new_TGK.swapaxes(0, 1), mode="drop", unique_indices=True)
        # Two index arrays with a slice between them: their axis, T, comes first.
        return row.at[slot.layer, :, positions_T].set(new_TGK, mode="drop", unique_indices=True)

    # By vmap, which tells the partitioner that rows do not mix.
    rows = jax.vmap(one_row)
    new = _stored(slot, "k", k_BTGK) | _stored(slot, "v", v_BTGK)
    written = {name: rows(slot.arrays[name], array, positions_BT) for name, array in new.items()}
    return slot._replace(arrays={**slot.arrays, **written})


def fill(slot: Slot, k_BSGK: jax.Array, v_BSGK: jax.Array, prefix: str) -> Slot:
    """The slot with these keys and values as all of its arrays `prefix`k and `prefix`v."""

    def one(name: str, new_BSGK: jax.Array) -> jax.Array:
        old, new_BGSK = slot.arrays[name], new_BSGK.swapaxes(1, 2)
        return new_BGSK.astype(old.dtype) if slot.layer is None else old.at[:, slot.layer].set(new_BGSK)

    new = _stored(slot, f"{prefix}k", k_BSGK) | _stored(slot, f"{prefix}v", v_BSGK)
    return slot._replace(arrays={**slot.arrays, **{name: one(name, array) for name, array in new.items()}})


def slots(slot: Slot) -> int:
    """How many positions of a row there is room for."""
    return slot.arrays["k"].shape[-2]


def read_some(slot: Slot, start: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """This layer's (k_BGSK, v_BGSK) of `count` slots from `start` on: nothing else of the cache is touched."""

    def one(array: jax.Array) -> jax.Array:
        if slot.layer is None:
            return jax.lax.dynamic_slice_in_dim(array, start, count, axis=2)
        rows, _, heads, _, width = array.shape
        return jax.lax.dynamic_slice(array, (0, slot.layer, 0, start, 0), (rows, 1, heads, count, width))[:, 0]

    return _get(slot, "k", one), _get(slot, "v", one)


def read(slot: Slot, prefix: str) -> tuple[jax.Array, jax.Array]:
    """All of this layer's (k_BSGK, v_BSGK), of the arrays whose names start with `prefix`."""

    def one(array: jax.Array) -> jax.Array:
        return (array if slot.layer is None else array[:, slot.layer]).swapaxes(1, 2)

    return _get(slot, f"{prefix}k", one), _get(slot, f"{prefix}v", one)


def last(x_BTD: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """[B, D]: x at each row's last valid token."""
    return jnp.take_along_axis(x_BTD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)[:, 0]
