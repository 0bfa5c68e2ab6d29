"""`types.Constrain` on a mesh: what a model is built with, to lie on it.

A model runs in one of two ways. Inside the region of a step (region.py) each device runs it on its own rows, stage and parts of rows,
and the compiler shares out what is left, the axis `tensor`. Elsewhere, as in a sample, the compiler shares out everything.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxllm.data import places
from jaxllm.parallel import gather, rules
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Context, PartAxes

# Each of their devices has rows, or parts of rows, of its own.
SPREAD = ("data", "fsdp", "seq")


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def by_hand() -> frozenset[str]:
    """The mesh axes over which the code that is traced here runs on each device by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset() if mesh.empty else frozenset(mesh.manual_axes)


def total(numbers: Any) -> Any:
    """The sum of arrays over the devices that have other rows, or parts of them, where each runs the code that is traced here by itself;
    elsewhere the arrays themselves, as they are of all rows."""
    mesh = jax.sharding.get_abstract_mesh()
    names = tuple(axis for axis in SPREAD if axis in by_hand() and mesh.shape[axis] > 1)
    return jax.lax.psum(numbers, names) if names else numbers


@dataclass(frozen=True, eq=False)
class OnMesh:
    """See `types.Constrain`. `dtype` is the compute dtype."""

    mesh: Mesh | AbstractMesh
    tables: rules.Tables
    method: str
    zigzag: bool
    dtype: Any

    def __call__(self, array: jax.Array, axes: PartAxes, /) -> jax.Array:
        if self._left() == 1:
            return array
        return jax.lax.with_sharding_constraint(array, NamedSharding(self._mesh(), self._spec(array.shape, axes)))

    def parts(self, axis: str) -> int:
        return math.prod(self.mesh.shape[mesh_axis] for mesh_axis in self.tables.parameters[axis])

    def gather(self, params: Any, axes: Any) -> Any:
        if not by_hand():
            return params

        def one(leaf_axes: Any, leaf: Any, dtype: Any = self.dtype) -> Any:
            if isinstance(leaf, Quantized):  # its scales are used as they are
                return jax.tree.map(partial(one, dtype=None), leaf_axes, leaf, is_leaf=_is_axes)
            return gather.use(leaf, leaf_axes, self.tables.parameters, self.tables.state, self.mesh.shape, dtype)

        return jax.tree.map(one, axes, params, is_leaf=lambda node: _is_axes(node) or isinstance(node, Quantized))

    def places(self, tokens: int) -> jax.Array:
        if "seq" not in by_hand() or self.mesh.shape["seq"] == 1:
            return jnp.arange(tokens)
        parts = self.mesh.shape["seq"]
        whole = jnp.asarray(places.zigzag(tokens * parts, parts) if self.zigzag else places.plain(tokens * parts))
        return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index("seq") * tokens, tokens)

    @property
    def context(self) -> Context | None:
        parts = self.mesh.shape["seq"]
        return Context(self.method, "seq", parts, self.zigzag) if "seq" in by_hand() and parts > 1 else None

    def refuse(self) -> str | None:
        parts = self.parts("length")
        return f"it needs whole rows, and the mesh cuts them into {parts} parts" if parts > 1 else None

    def share(
        self, function: Callable[..., tuple], parts: Sequence[tuple[Any, PartAxes]], out_axes: Sequence[PartAxes], /
    ) -> tuple:
        arguments = tuple(arrays for arrays, _ in parts)
        if self._left() == 1:
            return function(*arguments)
        in_specs = tuple(jax.tree.map(lambda array, axes=axes: self._spec(array.shape, axes), arrays) for arrays, axes in parts)
        out_specs = tuple(map(self._spec_of_any_shape, out_axes))
        names = set(self.mesh.axis_names) - by_hand()
        # Kernels do not say over which axes their results vary, so that cannot be checked.
        each = jax.shard_map(function, mesh=self._mesh(), in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)
        return each(*arguments)

    def _mesh(self) -> Mesh | AbstractMesh:
        return jax.sharding.get_abstract_mesh() if by_hand() else self.mesh

    def _left(self) -> int:
        """Devices that the compiler shares arrays out over, here."""
        return math.prod(size for axis, size in self.mesh.shape.items() if axis not in by_hand())

    def _spec(self, shape: tuple[int, ...], axes: PartAxes) -> PartitionSpec:
        return rules.spec(self._here(), self.mesh.shape, axes, shape, f"an activation {axes}")

    def _spec_of_any_shape(self, axes: PartAxes) -> PartitionSpec:
        return PartitionSpec(*(rules.entry(() if axis is None else self._here()[axis]) for axis in axes))

    def _here(self) -> rules.Rules:
        """The table without what is cut by hand already."""
        hand = by_hand()
        return {axis: tuple(name for name in shared if name not in hand) for axis, shared in self.tables.parameters.items()}
