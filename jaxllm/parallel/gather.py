"""Parameters that several devices share, made whole for use; and gradients cut up again on the way back (ZeRO).

All of this runs on each device by itself, inside `region.py`'s shard_map, where `tensor` alone is left to the compiler. Each collective
is written in a region of its own in which `tensor` is also by hand: the compiler would make an array whole over `tensor` before it
gathers it over another axis.

ZeRO's stages (Rajbhandari et al. 2020, arXiv:1910.02054, section 5) as what is differentiated:

    1   whole parameters; their gradients are summed whole, and cut up at the end of the step
    2   whole parameters, but with respect to nothings of the size of a device's share, whose gradients arrive cut up (`Tapped`)
    3   a device's share of the parameters, gathered where a layer uses it; what comes back is summed and cut up layer by layer
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm.parallel.rules import Rules
from jaxllm.types import Axes

# Left to the compiler inside the region; all other axes of the mesh are by hand.
AUTO = "tensor"


class How(NamedTuple):
    """One array cut along `dimension` over the mesh axes `over`. auto: how it lies on what is left to the compiler, None for nothing.

    dtype: in which it is gathered; gradients are summed in float32.
    """

    dimension: int
    over: tuple[str, ...]
    auto: PartitionSpec | None
    dtype: Any


@partial(jax.tree_util.register_dataclass, data_fields=("value", "share"), meta_fields=("kind",))
@dataclasses.dataclass(frozen=True)
class Tapped:
    """A whole parameter whose gradient is taken with respect to `share`, zeros of the size of this device's share."""

    value: jax.Array
    share: jax.Array
    kind: str = "tapped"


def how(axes: Axes, rules: Rules, mesh_shape: Mapping[str, int], over: tuple[str, ...], dtype: Any = None) -> How | None:
    """How a parameter with these axes is cut over the mesh axes `over` by a table of parameters; None if it is not."""
    cut = {d: tuple(a for a in rules[axis] if a in over and mesh_shape[a] > 1) for d, axis in enumerate(axes) if axis != "layers"}
    found = [(dimension, names) for dimension, names in cut.items() if names]
    if not found:
        return None
    ((dimension, names),) = found
    shared = PartitionSpec(*(AUTO if AUTO in rules[axis] else None for axis in axes))
    return How(dimension, names, shared if mesh_shape[AUTO] > 1 else None, dtype)


def nested(function: Callable[..., jax.Array], auto: PartitionSpec | None) -> Callable[..., jax.Array]:
    """`function` of arrays that all lie so on what is left to the compiler, run on each device's own part of them."""
    if auto is None:
        return function
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(function, mesh=mesh, in_specs=auto, out_specs=auto, axis_names={AUTO}, check_vma=False)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def whole(share: jax.Array, how: How) -> jax.Array:
    """The whole array, of which each device holds a share. The gradient is summed over the devices and cut up."""

    def own(share: jax.Array) -> jax.Array:
        return jax.lax.all_gather(share, how.over, axis=how.dimension, tiled=True)

    return nested(own, how.auto)(share if how.dtype is None else share.astype(how.dtype))


def share(array: jax.Array, how: How) -> jax.Array:
    """This device's share of the sum of all devices' arrays, in float32."""

    def own(array: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(array, how.over, scatter_dimension=how.dimension, tiled=True)

    return nested(own, how.auto)(array.astype(jnp.float32))


whole.defvjp(lambda mine, how: (whole(mine, how), None), lambda how, _, gradient: (share(gradient, how),))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def tap(value: jax.Array, mine: jax.Array, how: How) -> jax.Array:
    """`value`. Its gradient goes to `mine`, summed over the devices and cut up."""
    del mine
    return value if how.dtype is None else value.astype(how.dtype)


tap.defvjp(lambda value, mine, how: (tap(value, mine, how), None), lambda how, _, gradient: (None, share(gradient, how)))


def use(leaf: Any, axes: Axes, rules: Rules, state: Rules, mesh_shape: Mapping[str, int], dtype: Any) -> Any:
    """A parameter as the model takes it, of what this device holds. rules, state: the tables of parameters and of their gradients."""
    if hasattr(leaf, "kernel"):  # one that a pipeline wraps
        return dataclasses.replace(leaf, kernel=use(leaf.kernel, axes, rules, state, mesh_shape, dtype))
    # Vectors (norm scales, biases) are used in float32.
    dtype = dtype if len(axes) > 1 else None
    if isinstance(leaf, Tapped):
        found = how(axes, state, mesh_shape, ("fsdp",), dtype)
        assert found is not None, "only what has a share is tapped"
        return tap(leaf.value, leaf.share, found)
    found = how(axes, rules, mesh_shape, ("fsdp", "pipe"), dtype)
    return leaf if found is None else whole(leaf, found)
