"""Optimizer state in 16 or 8 bits a number: half or a quarter of the memory, the same update rules.

Moments are stored narrow, widened to float32 for each update, and narrowed again.

    bfloat16  the upper half of a float32
    int8      codes of 8 bits in blocks along the last axis, each with its own float32 scale (Dettmers et al. 2021, arXiv:2110.02861).
              The second moment, never negative, has no sign bit.

How numbers are coded and rounded is in codes.py. An array keeps its shape and its place in the tree, so it is sharded as before. Its scales
are in a tree beside it, with a shorter last axis.

Small arrays stay in float32, as in section 2.3 and in the authors' code: they are most of the biases and norms, and none of the memory.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.optim import codes
from jaxllm.transforms import tree

SHORTEST_BLOCK = 8  # where the divisors of the last axis are smaller than this, scales would take as much as they save
SMALLEST = 4096  # numbers of an array (within a layer) from which on it is narrowed


class SmallState(NamedTuple):
    """`state`: that of the rule, some arrays narrow. `scales`: the same tree, with the scales of what is in 8 bits and None elsewhere.
    `updates`: how many were done, from which the noise of the rounding comes."""

    updates: jax.Array
    state: Any
    scales: Any


class _Moment(NamedTuple):
    """What there is to know of an array of the state that mirrors a parameter. `layer`: its place in a list of layers."""

    name: str
    layer: int
    stacked: bool
    positive: bool


def narrowed(rule: optax.GradientTransformation, kind: str, axes: Any) -> optax.GradientTransformation:
    """`rule` with its moments stored as `kind`: "bfloat16" or "int8". `axes`: of all parameters.

    Gives the same bits for both forms of the layer stack: blocks and random numbers are those of one layer.
    """
    stacked = {name for name, leaf in tree.named_leaves(axes, is_leaf=_is_axes) if leaf[:1] == ("layers",)}

    def narrow(done: jax.Array, wide: Any, params: Any) -> SmallState:
        moments = _moments(wide, params, stacked)
        paths, structure = jax.tree.flatten_with_path(wide)
        pairs = [_narrow(leaf, moments[path], kind, done) if path in moments else (leaf, None) for path, leaf in paths]
        return SmallState(done, *(jax.tree.unflatten(structure, [pair[side] for pair in pairs]) for side in (0, 1)))

    def init(params: Any) -> SmallState:
        done, wide = jnp.zeros((), jnp.int32), rule.init(params)
        small = jax.eval_shape(narrow, done, wide, params)
        # Moments begin at 0, and so do codes and scales: narrowing constants would occupy the compiler for seconds.
        state = jax.tree.map(lambda like, leaf: _zeros(like) if like.dtype != leaf.dtype else leaf, small.state, wide)
        return SmallState(done, state, jax.tree.map(_zeros, small.scales))

    def update(gradients: Any, small: SmallState, params: Any) -> tuple[Any, SmallState]:
        updates, wide = rule.update(gradients, jax.tree.map(_widen, small.state, small.scales), params)
        return updates, narrow(small.updates + 1, wide, params)

    return optax.GradientTransformation(init, update)


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def _moments(state: Any, params: Any, stacked: set[str]) -> dict[Any, _Moment]:
    """Path -> what it is, of each array of the state whose path ends with that of a parameter of its shape."""
    shapes = {path: leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    found = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        # The longest ending that is a parameter: "layers/mlp/norm/scale" is not the parameter "norm/scale".
        own = next((path[start:] for start in range(len(path)) if path[start:] in shapes), None)
        if own is None or shapes[own] != leaf.shape:
            continue
        is_stacked = tree.path_name(own) in stacked
        if leaf.size // (leaf.shape[0] if is_stacked else 1) < SMALLEST:
            continue
        layer = next((key.idx for key in own if isinstance(key, jax.tree_util.SequenceKey)), 0)
        before = tree.path_name(path[: len(path) - len(own)]).split("/")
        found[path] = _Moment(tree.path_name(path), layer, is_stacked, before[-1] == "nu")
    return found


def _narrow(wide: jax.Array, moment: _Moment, kind: str, done: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(narrow array, its scales or None)."""
    block = codes.block_of(wide.shape[-1])
    if kind == "int8" and block < SHORTEST_BLOCK:
        return wide, None

    def one(layer: jax.Array | int, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        # Other noise for each moment, update and layer, the same whether layers are a list or stacked.
        noise = codes.noise(x.shape, zlib.crc32(moment.name.encode()), done, layer)
        return (codes.to_bfloat16(x, noise), None) if kind == "bfloat16" else codes.to_codes(x, noise, block, moment.positive)

    return jax.vmap(one)(jnp.arange(len(wide)), wide) if moment.stacked else one(moment.layer, wide)


def _widen(leaf: jax.Array, scale: jax.Array | None) -> jax.Array:
    if scale is not None:
        return codes.from_codes(leaf, scale)
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf
